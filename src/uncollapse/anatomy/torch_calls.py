"""What a torch call says of itself: its name without spelling variants, its tensors, and whether it writes into them.

The recorder (`tracing`), the handlers at a model's operations (`interception`) and the observers of `probe` all ask here, so that
they name operations and list their operands alike.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The way to a tensor inside a module's arguments or its output: keys, numbers and names of attributes, outermost first.
Path = tuple[Any, ...]
# An operation that multiplies matrices; with one operand made of parameters alone it is a learned linear map.
MATRIX_PRODUCTS = frozenset(
    [
        "linear",
        "matmul",
        "rmatmul",
        "bmm",
        "mm",
        "addmm",
        "baddbmm",
        "addbmm",
        "addmv",
        "mv",
        "einsum",
        "tensordot",
        "conv1d",
        "conv2d",
        "conv3d",
        "grouped_mm",
    ]
)
# An operation through which a value passes as it is: moved, cut, cast, or dropped out.
PASSES = frozenset(
    [
        "view",
        "reshape",
        "contiguous",
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "clone",
        "detach",
        "dropout",
        "dropout_",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "expand",
        "expand_as",
        "swapaxes",
        "movedim",
        "cat",
        "getitem",
        "view_as",
        "reshape_as",
        "narrow",
        "alias",
        "feature_dropout",
        "native_dropout",
        "nan_to_num",
        "t",
    ]
)
SCALINGS = frozenset(["mul", "rmul", "div", "truediv", "true_divide", "multiply", "neg"])
# An operation whose further tensor operands only lend their shape or type.
TEMPLATES = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])
# A learned map, written as input and weight.
LEARNED_MAPS = frozenset(["linear", "conv1d", "conv2d", "conv3d"])


def _reopened(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of a composite torch function that does not hand itself to function modes, so that they see what is inside."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# nn.MultiheadAttention calls one function that holds projections, attention and output projection together. The stubs call it a
# callable; it is a function.
_COMPOSITES: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.multi_head_attention_forward: _reopened(torch.nn.functional.multi_head_attention_forward)  # type: ignore[arg-type]
}


def opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same function with its inner calls visible to a function mode that is entered around it, if it is a composite."""
    return _COMPOSITES.get(function)


def operation_name(function: Callable[..., Any]) -> str:
    """The name of a torch call without spelling variants: `torch.add`, `x + y`, `y.__radd__`, `x += y`, `x.add_` are `add`."""
    name = getattr(function, "__name__", None) or str(function)
    name = name.rsplit("::", 1)[-1]
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name in {"iadd", "radd"}:
            return "add"
        if name[0] in "ir" and name[1:] in {"mul", "truediv", "matmul", "sub"}:
            return name[1:]
        return name
    return name.rstrip("_").lstrip("_") or name


def counted_name(name: str, operands: Iterable[Tensor]) -> str:
    """The name under which an operation is counted within a module's forward. Additions are counted apart by their number of
    axes: whether a mask is added to the scores depends on the batch, and must not shift the count of the residual ones."""
    apart = name in {"add", "sub", "mul"}
    return f"{name} of {max((t.ndim for t in operands), default=0)} axes" if apart else name


def plain_name(counted: str) -> str:
    """The name of the operation that is counted under this one."""
    return counted.partition(" of ")[0]


def writes_in_place(function: Callable[..., Any]) -> bool:
    """Whether a torch call writes into its first operand (`add_`, `+=`, `x[i] = y`)."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name in {"__setitem__"} or (name[2:3] == "i" and name[3:-2] in {"add", "mul", "sub", "truediv"})
    return name.endswith("_") and not name.endswith("__")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, mappings and objects of the Hugging Face output kind."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from tensors_in(getattr(value, item.name, None))


def tensors_at(value: Any, path: Path = (), depth: int = 4) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested containers and in the attributes of plain objects, with the path to it: keys of mappings,
    numbers in sequences, names of attributes. Modules and tensors are not looked into, nor anything below `depth`."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth and not isinstance(value, (nn.Module, type, str)):
        items: Iterable[tuple[Any, Any]]
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        elif dataclasses.is_dataclass(value):
            items = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
        else:
            items = getattr(value, "__dict__", {}).items()
        for key, item in list(items):
            yield from tensors_at(item, (*path, key), depth - 1)


def operands_of(operation: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation is given, in the order in which a `Node` lists them: as they were passed; of fused attention
    by name, since its masks and values are often passed as keywords."""
    if operation == "scaled_dot_product_attention":
        names = ("query", "key", "value", "attn_mask")
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        return [named[n] for n in names if isinstance(named.get(n), Tensor)]
    return list(tensors_in([args, dict(kwargs)]))
