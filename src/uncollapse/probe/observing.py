"""The one shape of everything that watches a probe pass, and whose pass it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, in_turn
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Place

Look = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]  # function, operands, result


class Observer(Protocol):
    """Watches one kind of thing: `handlers` stand at operations, `streams` at places of the residual stream, `installed()` holds
    module hooks, `begin` comes before each batch, and `let_go` afterwards drops what is bound to the observer: it would keep it,
    and the model with it, alive in a cycle."""

    handlers: dict[Point, Handler]
    streams: list[tuple[Place, Action]]

    def installed(self) -> contextlib.AbstractContextManager[None]: ...

    def begin(self, batch: Mapping[str, Any]) -> None: ...

    def let_go(self) -> None: ...


class OwnPass:
    """Whether a hook was reached by the probe's own pass: not by another thread, nor by a model that shares a module."""

    def __init__(self) -> None:
        self._thread: int | None = None

    def begin(self) -> None:
        self._thread = threading.get_ident()

    def end(self, *_: Any) -> None:
        """A forward hook: the pass is over."""
        if self.is_own():
            self._thread = None

    def is_own(self) -> bool:
        return self._thread == threading.get_ident()


def looking(looks: Sequence[Look], is_own: Callable[[], bool]) -> Handler:
    """A handler that lets the operation happen and then looks, in the probe's own pass."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if is_own():
            given = list(tensors_in([output, args, kwargs]))
            with unasked(given), measuring(given[0]):
                for look in looks:
                    look(function, args, kwargs, output)
        return output

    return handler


def unasked(given: Iterable[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Within the block no operation is shown to those who stand at the model's: what is computed about `given` is none of those.
    Tensors of another class may compute in being asked themselves."""
    if all(type(tensor) in (Tensor, nn.Parameter) for tensor in given):
        return torch._C.DisableTorchFunction()
    return contextlib.nullcontext()


def all_handlers(observers: Sequence[Observer]) -> dict[Point, Handler]:
    """The handlers of all of them. At an operation where several stand, the earlier one looks first."""
    at: dict[Point, list[Handler]] = {}
    for observer in observers:
        for point, handler in observer.handlers.items():
            at.setdefault(point, []).insert(0, handler)
    return {point: in_turn(*several) for point, several in at.items()}
