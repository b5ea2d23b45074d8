"""Run a piece of a model in double precision, whatever its weights and its arguments are kept in.

Where rounding and influence look alike, the same question in a finer format has a clear answer: rounding shrinks by nine digits,
and what a token brings to another stays. Every torch operation within `in_double_precision` gets its floating tensors as float64,
and makes float64 where it asked for another format. Parameters and buffers are not touched: they are converted for each operation.
Those that accelerate brings from elsewhere are brought as they are.

When not to use it: for figures. The model's own pass is the one that is measured; this is another function, if a near one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.offloaded_weights import brought_within
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.torch_calls import opened, operation_name, tensors_in, writes_in_place

_FORMATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_CASTS = frozenset({"half", "bfloat16", "float"})


@contextlib.contextmanager
def in_double_precision(module: nn.Module) -> Iterator[None]:
    """Within the block torch operations compute in float64. `module` is what is run there.

    Raises `UnreadableError` where one would write into a tensor of another format: what it writes would be lost."""
    doubled = _Doubled()
    with brought_within(module, doubled.at_rest), doubled:
        yield


class _Doubled(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._is_at_rest = False

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Within the block operations compute as they do without."""
        before, self._is_at_rest = self._is_at_rest, True
        try:
            yield
        finally:
            self._is_at_rest = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_at_rest:
            return func(*args, **kwargs)
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        if any(t.dtype in _FORMATS for t in tensors_in(args[:1] if writes_in_place(func) else kwargs.get("out"))):
            raise UnreadableError("a tensor of the model's own is written to, which double precision would not see")
        if operation_name(func) in _CASTS:
            return args[0].double()
        return func(*_doubled(args), **_doubled(kwargs))


def _doubled(value: Any) -> Any:
    """The same with every floating tensor, and every name of a floating format, in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _FORMATS else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FORMATS else value
    if isinstance(value, (list, tuple)):
        same = [_doubled(each) for each in value]
        return type(value)(*same) if hasattr(value, "_fields") else type(value)(same)
    if isinstance(value, dict):
        return {key: _doubled(each) for key, each in value.items()}
    return value
