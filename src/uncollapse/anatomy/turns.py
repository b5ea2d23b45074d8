"""Whose turn it is: what holds for a model while one thread probes it and others run it.

* *Probes* come one after the other, in the whole process: a second one waits for the first. Settings of the process (random
  numbers, compiled code, torch's fused layers, log levels) are touched by the one whose turn it is.
* *A pass of another thread that is under way* when a probe begins: the probe is refused.
* *A pass that begins during a probe* gives the outputs it always gives. What a probe puts into the model acts in the probe's
  thread. Where the model itself must be another one for a while (training mode, weights that are transformed, code that is
  hidden from a probe), the pass waits until that is over. Should the probe's thread be waiting for that of the pass, in a
  callback of the user's, the pass is refused.

When not to use it: for optimiser steps. Whoever writes into the weights during a probe changes what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from uncollapse.errors import InputError
from uncollapse.restoring import outermost, restoring
from uncollapse.wrappers import bound, rebound, takes

_serving: dict[int, int] = {}  # by thread: the one for which it makes a pass


def own_thread() -> int:
    """The thread that the present pass belongs to: this one, or the one that this one `serves`."""
    thread = threading.get_ident()
    return _serving.get(thread, thread)


@contextlib.contextmanager
def serving(thread: int) -> Iterator[None]:
    """Within the block the passes of this thread count as those of another one, which waits for them."""
    with restoring() as changes:
        changes.undo(functools.partial(_serving.pop, threading.get_ident(), None))
        _serving[threading.get_ident()] = thread
        yield


_POLL = 0.05  # seconds between two looks at whether the probe's thread is stuck
_STUCK = 20  # looks in a row that find it waiting in the same place


class _Watch:
    """Stands at every module of a model that is being probed, and tells passes of other threads from the probe's own."""

    def __init__(self, model: nn.Module) -> None:
        self.thread = threading.get_ident()
        # Not the copies that `DataParallel` runs for the probe.
        self.modules = {id(module) for module in model.modules()}
        self.caching: set[int] = set()  # modules whose calls keep a cache unless told otherwise, but for the probe
        self._depth = threading.local()
        self._passes = 0
        self._closed = 0
        self._is_waiting = False
        self._changed = threading.Condition()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module begins to run."""
        if own_thread() == self.thread or id(module) not in self.modules:
            return None
        depth = getattr(self._depth, "now", 0)
        if depth == 0:
            self._begin()
        self._depth.now = depth + 1
        if depth == 0 and id(module) in self.caching and bound(module, args, kwargs).get("use_cache") is None:
            return rebound(module, args, kwargs, {"use_cache": True})
        return None

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A module has run, or raised."""
        if own_thread() == self.thread or id(module) not in self.modules:
            return
        depth = getattr(self._depth, "now", 0)
        if depth == 1:
            with self._changed:
                self._passes -= 1
                self._changed.notify_all()
        self._depth.now = max(depth - 1, 0)

    def _begin(self) -> None:
        stuck, place = 0, None
        with self._changed:
            while self._closed:
                self._changed.wait(_POLL)
                frame = sys._current_frames().get(self.thread)
                here = None if frame is None or self._is_waiting else _waiting_place(frame)
                stuck = stuck + 1 if here is not None and here == place else 0
                place = here
                if stuck >= _STUCK:
                    raise InputError(
                        "probe: expected a probe that does not wait for a pass of another thread, got one that does. The model is "
                        "in another state while it is probed, and the pass waits for the probe. Run the model after the probe."
                    )
            self._passes += 1

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """No pass of another thread is under way, and none begins."""
        with restoring() as changes:
            entry: list[None] = []
            changes.undo(lambda: self._open(entry))
            with self._changed:
                entry.append(None)
                self._closed += 1
                self._is_waiting = True
                self._changed.wait_for(lambda: self._passes == 0)
                self._is_waiting = False
            yield

    def _open(self, entry: list[None]) -> None:
        with self._changed:
            self._is_waiting = False
            while entry:
                self._closed = max(self._closed - 1, 0)
                entry.pop()
            self._changed.notify_all()


_watches: list[tuple[nn.Module, _Watch]] = []  # of the thread whose turn it is; the outermost first


def _waiting_place(frame: types.FrameType) -> tuple[int, int] | None:
    """Where a thread waits for another one, if it does; `threading` is where all of them wait."""
    return (id(frame), frame.f_lasti) if frame.f_code.co_filename == threading.__file__ else None


def watch(model: nn.Module, caching: Callable[[nn.Module], bool]) -> None:
    """Tell passes of other threads from those of this one, until the outermost probe is over. `caching` tells whose calls keep a
    cache by themselves.

    Raises `InputError` where another thread is running the model.
    """
    if any(known is model for known, _ in _watches):
        return
    refuse_running("probe", model)
    changes, found = outermost(), _Watch(model)
    found.caching = {id(m) for m in model.modules() if caching(m) and takes(m, "use_cache")}
    entry = (model, found)
    changes.undo(lambda: _watches.remove(entry) if entry in _watches else None)
    _watches.append(entry)
    for module in model.modules():
        changes.hook(module, "forward_pre", found.enter, with_kwargs=True, prepend=True)
        changes.hook(module, "forward", found.leave, always_call=True)
    refuse_running("probe", model)  # one that began meanwhile


@contextlib.contextmanager
def closed_to_others() -> Iterator[None]:
    """Within the block no other thread runs a model that is being probed: it is another model meanwhile."""
    with restoring() as changes:
        for _, found in list(_watches):
            changes.enter(found.closed())
        yield


def refuse_running(function: str, model: nn.Module) -> None:
    """Raise `InputError` where another thread is in a method of `model` or of one of its modules."""
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()}
    if not frames:
        return
    modules = {id(module): module for module in model.modules()}
    for thread, frame in frames.items():
        at: types.FrameType | None = frame
        while at is not None:
            if _is_method(at, modules):
                name = next((t.name for t in threading.enumerate() if t.ident == thread), str(thread))
                raise InputError(
                    f"{function}: expected a model that no other thread is running, got a call of {type(model).__name__} in thread "
                    f"{name!r}. What it returns would not be the model's own any more. Wait for it, or pass a copy of the model."
                )
            at = at.f_back


def _is_method(frame: types.FrameType, modules: dict[int, nn.Module]) -> bool:
    """Whether a frame runs a method of one of the modules: its first argument is one, and its code stands in that one's class."""
    code = frame.f_code
    if not code.co_argcount:
        return False
    module = modules.get(id(frame.f_locals.get(code.co_varnames[0])))
    if module is None:
        return False
    found = inspect.getattr_static(type(module), code.co_name, None)
    while found is not None:
        if getattr(found, "__code__", None) is code:
            return True
        found = getattr(found, "__wrapped__", None)
    return False
