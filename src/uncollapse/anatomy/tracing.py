"""Record one forward pass as a dataflow graph: which operation made which value from which, and inside which module.

A `TorchFunctionMode` sees every torch call the model's own code makes, whatever the model is called and however it is
written; module hooks supply the call stack. Values are numbered in static single assignment form: an in-place
operation makes a new value of every tensor on that storage, an operation that returns its own input makes none.

When not to use this: on long inputs. Every tensor of the pass is kept alive so that identities stay unique; eight
tokens tell as much about the wiring as eight thousand.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# An operation that multiplies matrices; with one operand made of parameters alone it is a learned linear map.
_MATRIX_PRODUCTS = frozenset(
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
_PASSES = frozenset(
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
_SCALINGS = frozenset(["mul", "rmul", "div", "truediv", "true_divide", "multiply", "neg"])
# An operation whose further tensor operands only lend their shape or type.
_TEMPLATES = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])
# A learned map, written as input and weight.
_LEARNED_MAPS = frozenset(["linear", "conv1d", "conv2d", "conv3d"])


def _reopened(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of a composite torch function that does not hand itself to function modes, so that they see what is inside."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# nn.MultiheadAttention calls one function that holds projections, attention and output projection together.
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
    return f"add of {max((t.ndim for t in operands), default=0)} axes" if name == "add" else name


def writes_in_place(function: Callable[..., Any]) -> bool:
    """Whether a torch call writes into its first operand (`add_`, `+=`, `x[i] = y`)."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name in {"__setitem__"} or (name[2:3] == "i" and name[3:-2] in {"add", "mul", "sub", "truediv"})
    return name.endswith("_") and not name.endswith("__")


@dataclass(frozen=True)
class Node:
    """One value. `operation` made it from `inputs` in the module call `call`; parameters, constants and the batch have
    no inputs. `ordinal` counts what is `counted` as the same operation within the module's own forward (its children's do
    not count)."""

    index: int
    operation: str
    inputs: tuple[int, ...]
    call: int
    ordinal: int
    shape: tuple[int, ...]
    is_data: bool
    is_parameter: bool
    is_floating: bool
    counted: str
    scalars: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass
class Call:
    """One run of one module: the `ordinal`-th of that module in the pass. Nodes `first` ≤ i < `last` ran inside."""

    index: int
    name: str
    ordinal: int
    parent: int
    first: int
    last: int = -1
    inputs: dict[int | str, int] = field(default_factory=dict)
    outputs: dict[int | None, int] = field(default_factory=dict)
    children: list[int] = field(default_factory=list)


@dataclass
class Trace:
    """The graph of one pass. `ancestors[i]` and `learned_ancestors[i]` are bit sets over node numbers: everything value i
    depends on, and what it depends on through at least one matrix product with a weight."""

    nodes: list[Node]
    calls: list[Call]
    ancestors: list[int]
    learned_ancestors: list[int]
    consumers: list[list[int]]
    output: Any

    def is_matrix_product(self, index: int) -> bool:
        return self.nodes[index].operation in _MATRIX_PRODUCTS

    def is_learned_product(self, index: int) -> bool:
        """A matrix product of data with a weight."""
        node = self.nodes[index]
        return (
            node.operation in _MATRIX_PRODUCTS
            and node.is_data
            and sum(self.nodes[i].is_data for i in node.inputs) == 1
            and any(self.nodes[i].is_parameter for i in node.inputs)
        )

    def is_data_product(self, index: int) -> bool:
        """A matrix product of data with data."""
        node = self.nodes[index]
        return node.operation in _MATRIX_PRODUCTS and sum(self.nodes[i].is_data for i in node.inputs) >= 2

    def passes_through(self, index: int) -> int | None:
        """The value that node `index` merely moves, casts or scales, or `None` where it does more."""
        node = self.nodes[index]
        data = [i for i in node.inputs if self.nodes[i].is_data]
        if len(data) != 1:
            return None
        if node.operation in _PASSES or node.operation in _SCALINGS or node.operation == "add":
            return data[0]
        return None

    def depends(self, index: int, on: int) -> bool:
        return bool(self.ancestors[index] >> on & 1)

    def learned(self, index: int, on: int) -> bool:
        """Whether value `index` depends on value `on` through a learned matrix product."""
        return bool(self.learned_ancestors[index] >> on & 1)

    def call_path(self, call: int) -> list[int]:
        """The call and those around it, innermost first."""
        path = []
        while call >= 0:
            path.append(call)
            call = self.calls[call].parent
        return path


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


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, batch: Iterable[Tensor]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.ancestors: list[int] = []
        self.learned_ancestors: list[int] = []
        self.consumers: list[list[int]] = []
        self.calls: list[Call] = [Call(0, "", 0, -1, 0)]
        self.stack = [0]
        self._value_of: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._on_storage: dict[int, list[int]] = {}
        self._ordinals: dict[tuple[int, str], int] = {}
        self._module_calls: dict[str, int] = {}
        self._parameters = {id(p) for p in (*model.parameters(), *model.buffers())}
        for tensor in batch:
            self._new(tensor, "batch", (), is_data=True)

    # Values -------------------------------------------------------------------------------------------------------
    def _new(
        self,
        tensor: Tensor,
        operation: str,
        inputs: tuple[int, ...],
        *,
        is_data: bool = False,
        is_parameter: bool = False,
        ordinal: int = 0,
        counted: str = "",
        scalars: tuple[float, ...] = (),
    ) -> int:
        index = len(self.nodes)
        node = Node(
            index,
            operation,
            inputs,
            self.stack[-1],
            ordinal,
            tuple(tensor.shape),
            is_data,
            is_parameter,
            tensor.is_floating_point(),
            counted or operation,
            scalars,
        )
        ancestors = learned = 0
        for i in inputs:
            ancestors |= self.ancestors[i] | 1 << i
            learned |= self.learned_ancestors[i]
            self.consumers[i].append(index)
        if operation in _MATRIX_PRODUCTS:
            data = [i for i in inputs if self.nodes[i].is_data]
            if len(data) == 1 and any(self.nodes[i].is_parameter for i in inputs):
                learned |= self.ancestors[data[0]] | 1 << data[0]
        self.nodes.append(node)
        self.ancestors.append(ancestors)
        self.learned_ancestors.append(learned)
        self.consumers.append([])
        self._remember(tensor, index)
        return index

    def _remember(self, tensor: Tensor, index: int) -> None:
        if id(tensor) not in self._value_of:
            self._alive.append(tensor)
            storage = _storage(tensor)
            if storage:
                self._on_storage.setdefault(storage, []).append(id(tensor))
        self._value_of[id(tensor)] = index

    def value(self, tensor: Tensor) -> int:
        known = self._value_of.get(id(tensor))
        if known is not None:
            return known
        parameter = id(tensor) in self._parameters or isinstance(tensor, nn.Parameter)
        return self._new(tensor, "parameter" if parameter else "constant", (), is_parameter=parameter)

    # Operations ---------------------------------------------------------------------------------------------------
    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        output = func(*args, **kwargs)
        name = operation_name(func)
        in_place = writes_in_place(func) or kwargs.get("out") is not None
        written = [kwargs["out"]] if kwargs.get("out") is not None else [args[0]] if in_place and args else []
        results = list(tensors_in(output))
        if not results and not in_place:
            return output
        operands = list(tensors_in([args, kwargs]))[: 1 if name in _TEMPLATES else None]
        inputs = tuple(self.value(t) for t in operands)
        is_data = any(self.nodes[i].is_data for i in inputs)
        is_parameter = not is_data and any(self.nodes[i].is_parameter for i in inputs)
        scalars = tuple(float(a) for a in args if isinstance(a, (int, float)) and not isinstance(a, bool))
        counted = counted_name(name, operands)
        ordinal = self._next_ordinal(counted)
        for tensor in tensors_in(written):
            index = self._new(
                tensor,
                name,
                inputs,
                is_data=is_data,
                is_parameter=is_parameter,
                ordinal=ordinal,
                counted=counted,
                scalars=scalars,
            )
            for other in self._on_storage.get(_storage(tensor), ()):
                self._value_of[other] = index
        if not in_place:
            ids = {id(t) for t in operands}
            for tensor in results:
                if id(tensor) not in ids:
                    self._new(
                        tensor,
                        name,
                        inputs,
                        is_data=is_data,
                        is_parameter=is_parameter,
                        ordinal=ordinal,
                        counted=counted,
                        scalars=scalars,
                    )
        return output

    def _next_ordinal(self, name: str) -> int:
        key = (self.stack[-1], name)
        ordinal = self._ordinals.get(key, 0)
        self._ordinals[key] = ordinal + 1
        return ordinal

    # Modules ------------------------------------------------------------------------------------------------------
    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ordinal = self._module_calls.get(name, 0)
        self._module_calls[name] = ordinal + 1
        call = Call(len(self.calls), name, ordinal, self.stack[-1], len(self.nodes))
        call.inputs |= {i: self.value(item) for i, item in enumerate(args) if isinstance(item, Tensor)}
        call.inputs |= {name: self.value(item) for name, item in kwargs.items() if isinstance(item, Tensor)}
        call.first = len(self.nodes)
        self.calls[self.stack[-1]].children.append(call.index)
        self.calls.append(call)
        self.stack.append(call.index)

    def leave(self, output: Any) -> None:
        call = self.calls[self.stack.pop()]
        call.last = len(self.nodes)
        items: Iterable[tuple[int | None, Any]]
        if isinstance(output, Tensor):
            items = [(None, output)]
        elif isinstance(output, Mapping):
            items = list(enumerate(output.values()))
        elif isinstance(output, (list, tuple)):
            items = list(enumerate(output))
        else:
            items = []
        for key, item in items:
            if isinstance(item, Tensor):
                call.outputs[key] = self.value(item)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage of its own
        return 0


def trace(model: nn.Module, batch: Mapping[str, Any]) -> Trace:
    """The dataflow graph of `model(**batch)`, run once without gradients. The model's output is in `Trace.output`.

    Hooks are gone again afterwards, also after an exception. Errors of the model itself pass through.
    """
    recorder = _Recorder(model, tensors_in(batch))
    thread = threading.get_ident()  # hooks fire for every thread that runs the model; only this one is recorded
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name == "":
                continue

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if threading.get_ident() == thread:
                    recorder.enter(name, args, kwargs)

            def leave(_: nn.Module, _args: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    recorder.leave(output)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        with torch.no_grad(), recorder:
            output = model(**batch)
    recorder.calls[0].last = len(recorder.nodes)
    nodes, learned = _with_own_tokens(recorder.nodes, recorder.ancestors)
    return Trace(nodes, recorder.calls, recorder.ancestors, learned, recorder.consumers, output)


def _with_own_tokens(nodes: list[Node], ancestors: list[int]) -> tuple[list[Node], list[int]]:
    """Count tokens that do not come from the batch as data too: learned queries, start tokens that a model makes itself.

    They are told by what becomes of them: the input of a learned map, never its weight.
    """
    own: set[int] = set()
    seen: set[int] = set()
    frontier = [n.inputs[0] for n in nodes if n.operation in _LEARNED_MAPS and nodes[n.inputs[1]].is_parameter]
    while frontier:
        node = nodes[frontier.pop()]
        if node.index in seen or node.is_data or len(node.shape) < 2 or not node.is_floating:
            continue
        seen.add(node.index)
        if node.operation in {"embedding", "parameter"}:
            own.add(node.index)
        else:
            frontier.extend(node.inputs[:1] if node.operation in _MATRIX_PRODUCTS else node.inputs)
    found: list[Node] = []
    learned: list[int] = []
    for node in nodes:
        is_data = node.is_data or node.index in own or any(found[i].is_data for i in node.inputs)
        found.append(replace(node, is_data=is_data, is_parameter=node.is_parameter and not is_data))
        through = 0
        for i in node.inputs:
            through |= learned[i]
        data = [i for i in node.inputs if found[i].is_data]
        if node.operation in _MATRIX_PRODUCTS and len(data) == 1 and any(found[i].is_parameter for i in node.inputs):
            through |= ancestors[data[0]] | 1 << data[0]
        learned.append(through)
    return found, learned
