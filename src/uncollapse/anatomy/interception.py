"""Stand at one operation inside a live model and act there: the mechanism under the proof, `without` and the capture.

A `Point` names an operation without naming an architecture: the `ordinal`-th `operation` ("add of 3 axes", "softmax",
"scaled_dot_product_attention", ...) in the `call`-th run of the module `owner`, counted in the module's *own* forward;
what its children do does not count. A handler gets the torch function and its operands and returns the result.

Each owner's `forward` is wrapped for the duration and put back (accelerate and others replace `forward` on the instance:
that one is wrapped and restored). A module's own code sees the handlers, nothing else in the process does. Handlers act in
the thread that put them up, those of a removal in whatever thread runs the model; each thread counts the runs of its own passes.
Under `torch.compile` the wrapped forward runs eagerly; gradient checkpointing would run it twice and is refused by
those who change values.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from uncollapse.anatomy.torch_calls import counted_name, opened, operation_name, plain_name, tensors_in
from uncollapse.errors import UncollapseError
from uncollapse.restoring import Changes, restoring, run_eagerly, take_off_function_modes


class ChangedPath(UncollapseError):  # noqa: N818 - what is found, as in the other errors
    """A model went another way than the one that was proved: it has to be proved anew, on the `batch` it was running on."""

    batch: Mapping[str, Any] | None = None
    number: int | None = None  # of that batch, among those of the pass


Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Paths = Mapping[tuple[str, int], Mapping[str, int]]  # by module and run: how often its own code did each operation


@dataclass(frozen=True)
class Point:
    """The `ordinal`-th `operation` in the `call`-th run of the module named `owner`; `call=None` is every run.

    A point of a loop recurs: with `every`, at every so many further operations of this name in that run; with `each_run`, in every
    so many further runs of the module."""

    owner: str
    call: int | None
    operation: str
    ordinal: int
    every: int = 0
    each_run: int = 0

    @property
    def recurs(self) -> bool:
        """Whether it stands in each turn of a loop."""
        return bool(self.every or self.each_run)

    def is_in_run(self, run: int) -> bool:
        """Whether it stands in this run of its owner."""
        if self.call is None or self.call == run:
            return True
        return bool(self.each_run) and run > self.call and (run - self.call) % self.each_run == 0

    def __str__(self) -> str:
        run = "" if not self.call else f", run {self.call}"
        return f"{self.operation} #{self.ordinal} of {self.owner or 'the model itself'}{run}"


class _Handling(threading.local):
    """Whose handler's own code this thread is in; None: in nobody's. Contexts nest (a diagnosis of a model without a part): what
    one handler computes for itself must not count as the model's own operations in another context."""

    within: object = None

    @contextlib.contextmanager
    def set(self, within: object) -> Iterator[None]:
        before, self.within = self.within, within
        try:
            yield
        finally:
            self.within = before


_handling = _Handling()


def aside() -> contextlib.AbstractContextManager[None]:
    """Within the block nothing that this thread computes counts as an operation of a model, or meets a handler."""
    return _handling.set(aside)


def _as_the_models_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation that a handler was called for: where the handler runs it, it is the model's again."""

    @functools.wraps(function)
    def own(*args: Any, **kwargs: Any) -> Any:
        with _handling.set(None):
            return function(*args, **kwargs)

    return own


class _Owner(TorchFunctionMode):
    """The handlers of one module while its own forward runs."""

    def __init__(self, handlers: Mapping[Point, Handler], hits: set[tuple[str, int]]) -> None:
        super().__init__()
        every_run_first = sorted(handlers, key=lambda point: point.call is not None)
        self.handlers = {(point.operation, point.ordinal): handlers[point] for point in every_run_first}
        self.recurring: dict[str, list[tuple[Point, Handler]]] = {}
        for point, handler in handlers.items():
            if point.every:
                self.recurring.setdefault(point.operation, []).append((point, handler))
        self.operations = {point.operation for point in handlers}
        self.names = {plain_name(operation) for operation in self.operations}
        self.hits = hits
        self.depth = 0
        self.counts: dict[str, int] = {}
        self.around: _Owner | None = None  # that of whoever stood at this module before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth or _handling.within is not None:
            return func(*args, **kwargs)
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        name = operation_name(func)
        if name not in self.names:
            return func(*args, **kwargs)
        operands = list(tensors_in([args, kwargs]))
        name = counted_name(name, operands)
        if name not in self.operations or not operands:
            return func(*args, **kwargs)
        handler = self._next(name)
        if handler is None:
            return func(*args, **kwargs)
        own = _as_the_models_own(func)
        if self.around is None or handler not in _putting_another:
            with _handling.set(self):
                return handler(own, args, kwargs)

        @functools.wraps(func)
        def changed(*given: Any, **named: Any) -> Any:
            with _handling.set(self):
                return handler(own, given, named)

        return self.around.seeing(name, changed, args, kwargs)

    def _next(self, name: str) -> Handler | None:
        """Count one more operation of this name; its handler."""
        ordinal = self.counts.get(name, 0)
        self.counts[name] = ordinal + 1
        handler = self.handlers.get((name, ordinal))
        if handler is not None:
            self.hits.add((name, ordinal))
            return handler
        for point, again in self.recurring.get(name, ()):
            if ordinal > point.ordinal and (ordinal - point.ordinal) % point.every == 0:
                return again
        return None

    def seeing(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation in whose place another handler puts `function`, as those see it who stood here before."""
        handler = self._next(name) if not self.depth and name in self.operations else None
        self.depth += 1  # what the handlers themselves do is none of the module's operations
        try:
            if handler is not None:
                with _handling.set(self):
                    return handler(function, args, kwargs)
            return (
                function(*args, **kwargs) if self.around is None else self.around.seeing(name, function, args, kwargs)
            )
        finally:
            self.depth -= 1


_putting_another: weakref.WeakSet[Handler] = weakref.WeakSet()


def putting_another(handler: Handler) -> Handler:
    """Mark a handler that puts another value in the place of an operation's result: whoever stood at the same operation before
    sees that value, and not the operation's own."""
    _putting_another.add(handler)
    return handler


def is_putting_another(handler: Handler) -> bool:
    """Whether a handler is marked so."""
    return handler in _putting_another


def device_of(model: nn.Module) -> torch.device:
    """Where to put the inputs of `model`: the device of its first parameter or buffer that is not on `meta`, else the CPU.

    Offloaded parameters stand on `meta` between passes, where nothing can be computed; accelerate moves a batch from the CPU to
    wherever the model runs.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


class Runs(threading.local):
    """How often each module has run in the pass that the present thread is in."""

    def __init__(self) -> None:
        self.depth = 0  # calls of surrounding modules that this thread is in
        self.counts: dict[str, int] = {}
        self.modes: dict[str, list[_Owner]] = {}

    def begin(self, name: str) -> int:
        """Count a run of the module with this name; its number in the pass, from 0."""
        run = self.counts.get(name, 0)
        self.counts[name] = run + 1
        return run


_in_force: list[Runs] = []  # those of all contexts that are open


@contextlib.contextmanager
def depths_as_found() -> Iterator[None]:
    """Around a run of a module that may be ended by what is no `Exception`: such an end skips the hooks on the way out, by which
    every context in force counts."""
    found = [(runs, runs.depth) for runs in list(_in_force)]
    try:
        yield
    finally:
        for runs, depth in found:
            runs.depth = depth


def _no_longer_in_force(runs: Runs) -> None:
    with contextlib.suppress(ValueError):
        _in_force.remove(runs)


@contextlib.contextmanager
def counted(model: nn.Module, owners: Iterable[str], within: nn.Module | None = None) -> Iterator[Runs]:
    """Count runs of the `owners` from the start of each pass. A pass is a call of `model`, or of any module around an owner that is
    called from outside the model: `generate` runs an encoder by itself, `get_text_features` a tower. Of a module of the model
    that is run by itself, `within`, it is a call of that one; no other is counted then."""
    runs = Runs()
    if within is None:
        around = {name[:end] for name in owners for end in [*(i for i, c in enumerate(name) if c == "."), len(name)]}
        modules = {id(m): m for m in (model, *(model.get_submodule(name) for name in sorted(around)))}
    else:
        modules = {id(within): within}

    def enter(module: nn.Module, *_: Any) -> None:
        # Ctrl-C skips the hooks on the way out: the model itself starts afresh.
        if runs.depth == 0 or module is (within or model):
            runs.depth = 0
            runs.counts.clear()
        runs.depth += 1

    def leave(*_: Any) -> None:
        runs.depth -= 1

    with restoring() as changes:
        for module in modules.values():
            changes.hook(module, "forward_pre", enter)
            changes.hook(module, "forward", leave, always_call=True)
        changes.undo(functools.partial(_no_longer_in_force, runs))
        _in_force.append(runs)
        yield runs


@contextlib.contextmanager
def intercepted(
    model: nn.Module,
    handlers: Mapping[Point, Handler],
    *,
    within: nn.Module | None = None,
    strict: bool = True,
    everywhere: bool = False,
    paths: Paths | None = None,
) -> Iterator[None]:
    """Within the block the handlers act in every pass of `model`, or of its module `within`, run by itself; see `counted`. They
    act in the thread that entered the block; `everywhere`: in whatever thread runs the model.

    With `strict`, a run of an owner that misses one of its points raises `UncollapseError`: nothing is measured or
    changed at a wrong place without a word. With `paths`, so does a run of an owner that is not among them, or whose own code
    does an operation that is acted on more or less often than there: a loop that goes on, or stops, would have other points.
    """
    by_owner: dict[str, dict[Point, Handler]] = {}
    for point, handler in handlers.items():
        by_owner.setdefault(point.owner, {})[point] = handler
    thread = None if everywhere else threading.get_ident()
    with restoring() as changes:
        own: dict[int, _Owner] = {}  # those that stand, by identity: not all modes can be looked up otherwise
        changes.undo(_as_found(own))
        # A compiled model would not notice what is put up here, or compile it: both were seen to go wrong.
        run_eagerly.hold(changes)
        runs = changes.enter(counted(model, by_owner, within))
        for owner, standing in by_owner.items():
            _wrap(changes, model.get_submodule(owner), owner, standing, runs, strict, thread, paths, own)
        yield


class _Standing(threading.local):
    """The handlers in force in the runs of modules that the present thread is in, by module, the latest last."""

    def __init__(self) -> None:
        self.modes: dict[int, list[_Owner]] = {}


_standing = _Standing()


def _as_found(own: Mapping[int, _Owner]) -> Callable[[], None]:
    """Puts back what this thread notes about its `own` modes while they run: Ctrl-C may come where their way out does so. The modes
    of others are left alone. A context that Ctrl-C cut off on its way out is closed by garbage collection, maybe in the midst of
    another call."""
    thread, within = threading.get_ident(), _handling.within

    def put_back() -> None:
        if threading.get_ident() != thread:
            return
        take_off_function_modes(own)
        if id(_handling.within) in own:
            _handling.within = within
        for key, modes in list(_standing.modes.items()):
            modes[:] = [mode for mode in modes if id(mode) not in own]
            if not modes:
                _standing.modes.pop(key, None)

    return put_back


def _wrap(
    changes: Changes,
    module: nn.Module,
    name: str,
    standing: Mapping[Point, Handler],
    runs: Runs,
    strict: bool,
    thread: int | None,
    paths: Paths | None,
    own: dict[int, _Owner],
) -> None:
    def down(*_: Any) -> None:
        for mode in runs.modes.get(name, [])[-1:]:
            mode.depth += 1

    def up(*_: Any) -> None:
        for mode in runs.modes.get(name, [])[-1:]:
            mode.depth -= 1

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if thread not in (None, threading.get_ident()) or _handling.within is not None:
                return original(*args, **kwargs)
            run = runs.begin(name)
            if paths is not None and (name, run) not in paths:
                raise ChangedPath(
                    f"intercept: expected {max(r for n, r in paths if n == name) + 1} runs of {name or 'the model'} in a pass, "
                    "got one more. What it does there was never looked at. Run the model on inputs of one kind."
                )
            wanted = {point: handler for point, handler in standing.items() if point.is_in_run(run)}
            if not wanted:
                return original(*args, **kwargs)
            hits: set[tuple[str, int]] = set()
            mode = _Owner(wanted, hits)
            own[id(mode)] = mode
            modes = runs.modes.setdefault(name, [])
            modes.append(mode)
            before = _standing.modes.setdefault(id(module), [])
            mode.around = before[-1] if before else None
            before.append(mode)
            try:
                with mode:
                    output = original(*args, **kwargs)
            finally:
                modes.pop()
                before.pop()
                if not before:
                    _standing.modes.pop(id(module), None)
            own.pop(id(mode), None)  # only here: Ctrl-C may have come while it was to be taken off
            missed = {(point.operation, point.ordinal) for point in wanted} - hits
            if missed and strict:
                operation, ordinal = sorted(missed)[0]
                raise ChangedPath(
                    f"intercept: expected {Point(name, run, operation, ordinal)}, got a run without it. "
                    "The model took another path than when it was traced. Diagnose it on inputs of one kind."
                )
            for operation, count in ({} if paths is None else paths[name, run]).items():
                if operation in mode.operations and mode.counts.get(operation, 0) != count:
                    raise ChangedPath(
                        f"intercept: expected {count} times {operation} in {name or 'the model itself'}, got "
                        f"{mode.counts.get(operation, 0)}. The model took another path than when it was traced, and which of them "
                        "is which is not known. Run it on inputs of one kind."
                    )
            return output

        return forward

    for child in module.modules():
        if child is not module:
            changes.hook(child, "forward_pre", down)
            changes.hook(child, "forward", up, always_call=True)
    changes.wrap(module, around)


def function_modes() -> list[TorchFunctionMode]:
    """The function modes in force at this place, the outermost first, but for those of handlers."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, _Owner)]


def in_turn(*handlers: Handler) -> Handler:
    """One handler made of several for the same point: the first sees what the others make of the operation."""
    first, *others = handlers
    if not others:
        return first
    behind = in_turn(*others)

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        @functools.wraps(function)
        def inner(*given: Any, **named: Any) -> Any:
            return behind(function, given, named)

        return first(inner, args, kwargs)

    return putting_another(handler) if any(each in _putting_another for each in handlers) else handler
