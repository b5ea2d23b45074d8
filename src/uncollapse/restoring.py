"""Change something for a while and put it back, whatever happens in between: the one mechanism for all of the package.

    with restoring() as changes:
        changes.set(config, "use_cache", False)
        changes.hook(module, "forward", function)
        ...

The undo is noted *before* the change is made, and every undo may run twice or before its change. So an exception may come between
any two lines, Ctrl-C too, also while something is being put back: what was interrupted is done again. Contexts may be left in any
order. One that `gathers` puts back whatever was opened inside it, should that one's own way out be cut short.

When not to use it: for what shall stay. Position gates are installed, not borrowed; only a failed installation is put back.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Undo = Callable[[], object]
_ABSENT = object()


class Changes:
    """What was changed, and how each change is undone, the latest first."""

    def __init__(self) -> None:
        self._undos: list[Undo] = []

    def undo(self, undo: Undo) -> None:
        """Note how a change that is about to be made is undone. `undo` must bear being called twice, and without the change."""
        self._undos.append(undo)

    def set(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute that `owner` has."""
        self.undo(functools.partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def place(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> None:
        """Put `value` under `name`, whether or not something stands there: in a module's own `vars`, in the environment. Several
        may be put there and taken out in any order."""
        token = object()
        self.undo(functools.partial(_take_out, mapping, name, token))
        _put_in(mapping, name, token, value)

    def switch(self, read: Callable[[], T], write: Callable[[T], object], value: T) -> None:
        """Change a setting that is read and written by functions."""
        self.undo(functools.partial(write, read()))
        write(value)

    def hook(
        self, module: nn.Module, kind: Literal["forward", "forward_pre"], function: Callable[..., Any], **options: bool
    ) -> None:
        """Register a hook. It is found again by its function: the handle would be lost to an exception on its way here."""
        hook = _Hook(function)
        mark_own(hook)
        self.undo(functools.partial(_take_off, module, kind, hook))
        getattr(module, f"register_{kind}_hook")(hook, **options)

    def wrap(self, module: nn.Module, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put `wrapping(forward)` in place of a module's `forward`. Several may be put around one and taken off in any order."""
        token = object()
        self.undo(functools.partial(_unwrap, module, token))
        _wrap(module, token, wrapping)

    def enter(self, context: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context made by `contextlib.contextmanager`. Closing its generator leaves it, and can be noted before it runs."""
        assert isinstance(context, contextlib._GeneratorContextManager)
        self.undo(context.gen.close)
        return context.__enter__()

    def default_device(self, device: str) -> None:
        """New tensors of this thread are made on `device`. A `with torch.device(...)` would stay, were its way out interrupted."""
        modes = _get_current_function_mode_stack()
        self.undo(functools.partial(_put_function_modes, modes, torch.utils._device.CURRENT_DEVICE))
        torch.device(device).__enter__()

    def put_back(self) -> None:
        """Undo everything, also when one undo fails or is interrupted; what came in between is raised at the end."""
        raised: BaseException | None = None
        while self._undos:
            for _ in range(2):
                try:
                    self._undos[-1]()
                    break
                except BaseException as error:  # whatever it is: the others still have to be undone
                    raised = error
            self._undos.pop()
        if raised is not None:
            raise raised

    def forget(self) -> None:
        """Let every change stay."""
        self._undos.clear()

    def _forget_one(self, undo: Undo) -> None:
        if undo in self._undos:
            self._undos.remove(undo)


class _Gathering(threading.local):
    """What this thread is inside of that puts back all that is opened inside."""

    def __init__(self) -> None:
        self.changes: list[Changes] = []


_gathering = _Gathering()


@contextlib.contextmanager
def restoring(*, gathers: bool = False) -> Iterator[Changes]:
    """Within the block changes are made; on leaving it they are undone. With `gathers`, those of contexts opened inside too."""
    changes = Changes()
    around = _gathering.changes[-1] if _gathering.changes else None
    undo = changes.put_back
    try:
        try:
            if around is not None:
                around.undo(undo)
            if gathers:
                _gathering.changes.append(changes)
            yield changes
        finally:
            _close(changes, around, undo)
    finally:
        _close(changes, around, undo)  # again, where the first time was interrupted


def _close(changes: Changes, around: Changes | None, undo: Undo) -> None:
    try:
        changes.put_back()
    finally:
        if changes in _gathering.changes:
            del _gathering.changes[_gathering.changes.index(changes) :]
        if around is not None:
            around._forget_one(undo)


def outermost() -> Changes:
    """The changes around all others that this thread is inside of, of those that gather."""
    return _gathering.changes[0]


turn = threading.RLock()
"""Held by the thread whose turn it is to change a model or the process: one at a time."""


def leaves_no_trace(function: Callable[P, R]) -> Callable[P, R]:
    """Whatever `function` changes by `restoring` is undone when it ends, and so are torch's settings for the calling thread. One
    thread at a time is inside: another waits for its turn."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with turn, restoring(gathers=True) as changes:
            changes.undo(functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()))
            changes.undo(functools.partial(_cut_function_modes, torch._C._len_torch_function_stack()))
            try:
                return function(*args, **kwargs)
            finally:
                # While this call runs: cut off by Ctrl-C, the way out of `restoring` waits for garbage collection, and another
                # call may run by then.
                _close(changes, None, changes.put_back)

    return guarded


def _cut_function_modes(length: int) -> None:
    while torch._C._len_torch_function_stack() > length:
        torch._C._pop_torch_function_stack()


def take_off_function_modes(own: Collection[int]) -> None:
    """Take the modes with these numbers (`id`) off this thread's stack, wherever they stand."""
    modes = _get_current_function_mode_stack()
    if not any(id(mode) in own for mode in modes):
        return
    _cut_function_modes(0)
    for mode in modes:
        if id(mode) not in own:
            torch._C._push_on_torch_function_stack(mode)


def _put_function_modes(modes: list[Any], device: torch.device | None) -> None:
    """The modes, and the device that one of them stands for, where it was set."""
    _cut_function_modes(0)
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    torch.utils._device.CURRENT_DEVICE = device


class _Hook:
    """A hook that does nothing once it is off. A pass of another thread may have listed it before, and call it afterwards, even
    with other arguments: whether it takes keywords stood in a table that it is no longer in."""

    __slots__ = ("__weakref__", "function", "is_up")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.is_up = function, True

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.is_up else None


def _take_off(module: nn.Module, kind: Literal["forward", "forward_pre"], hook: _Hook) -> None:
    hook.is_up = False
    _remove(module, module._forward_hooks if kind == "forward" else module._forward_pre_hooks, hook)


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in passes of other threads."""
    thread = threading.get_ident()

    @functools.wraps(hook)
    def here(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == thread else None

    return here


def remove_hook(module: nn.Module, function: Callable[..., Any]) -> None:
    """Take a hook off a module, wherever it stands among its forward hooks."""
    for table in (module._forward_pre_hooks, module._forward_hooks):
        _remove(module, table, function)


def _remove(module: nn.Module, table: MutableMapping[int, Any], function: Callable[..., Any]) -> None:
    for key in [key for key, hook in list(table.items()) if hook is function]:
        take_off(module, key)


def take_off(module: nn.Module, key: int) -> None:
    """Take the hook of this number off a module."""
    for marks in _marks(module):
        marks.pop(key, None)
    module._forward_pre_hooks.pop(key, None)
    module._forward_hooks.pop(key, None)


def _marks(module: nn.Module) -> tuple[dict[int, bool], ...]:
    return (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )


@dataclass
class _Placed:
    """What stood in a mapping under a name, and what was put there since, the latest last. It keeps the mapping, so that no other
    one gets its number."""

    mapping: MutableMapping[str, Any]
    before: Any
    since: list[tuple[object, Any]] = field(default_factory=list)


_placed: dict[tuple[int, str], _Placed] = {}


def _put_in(mapping: MutableMapping[str, Any], name: str, token: object, value: Any) -> None:
    found = _placed.setdefault((id(mapping), name), _Placed(mapping, mapping.get(name, _ABSENT)))
    found.since.append((token, value))
    mapping[name] = value


def _take_out(mapping: MutableMapping[str, Any], name: str, token: object) -> None:
    found = _placed.get((id(mapping), name))
    if found is None:
        return
    found.since[:] = [each for each in found.since if each[0] is not token]
    if found.since:
        mapping[name] = found.since[-1][1]
        return
    if found.before is _ABSENT:
        mapping.pop(name, None)
    else:
        mapping[name] = found.before
    _placed.pop((id(mapping), name), None)


@dataclass
class _Wrapped:
    """A module's `forward` as it was found (`own`: that in its `vars`), and what is around it, the innermost first."""

    own: Any
    forward: Callable[..., Any]
    around: list[tuple[object, Callable[[Callable[..., Any]], Callable[..., Any]]]] = field(default_factory=list)


_wrapped: weakref.WeakKeyDictionary[nn.Module, _Wrapped] = weakref.WeakKeyDictionary()


def _wrap(module: nn.Module, token: object, wrapping: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if module not in _wrapped:
        _wrapped[module] = _Wrapped(vars(module).get("forward", _ABSENT), module.forward)
    _wrapped[module].around.append((token, wrapping))
    _put_around(module)


def _unwrap(module: nn.Module, token: object) -> None:
    found = _wrapped.get(module)
    if found is not None:
        found.around[:] = [each for each in found.around if each[0] is not token]
        _put_around(module)


def _put_around(module: nn.Module) -> None:
    found = _wrapped[module]
    forward = found.forward
    for _, wrapping in found.around:
        forward = wrapping(forward)
        mark_own(forward)
    if found.around:
        vars(module)["forward"] = forward
        return
    if found.own is _ABSENT:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = found.own
    del _wrapped[module]


# What is put up for a while ---------------------------------------------------------------------------------------------

_own: weakref.WeakSet[Any] = weakref.WeakSet()


def mark_own(function: Any) -> None:
    """Note that this hook or `forward` is put up by this package, for the time being."""
    _own.add(function)


def is_own(function: Any) -> bool:
    """Whether this hook or `forward` was put up by this package."""
    try:
        return function in _own
    except TypeError:  # not everything that can be called can be looked up
        return False


def found_state(state: dict[str, Any]) -> dict[str, Any]:
    """The `vars` of a module as they are without what is put up for a while: hooks, what is around `forward`, and how a copy is
    made."""
    found = {name: value for name, value in state.items() if name not in {"__reduce_ex__", "__deepcopy__"}}
    gone: set[int] = set()
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        gone |= {key for key, hook in state[name].items() if is_own(hook)}
    for name, value in state.items():
        if name.startswith(("_forward_pre_hooks", "_forward_hooks")):
            found[name] = type(value)((key, each) for key, each in value.items() if key not in gone)
    if is_own(found.get("forward")):
        inner = next(
            kept.own for module, kept in list(_wrapped.items()) if vars(module).get("forward") is found["forward"]
        )
        if inner is _ABSENT:
            del found["forward"]
        else:
            found["forward"] = inner
    return found


def reduced_as_found(reference: weakref.ref[nn.Module], protocol: SupportsIndex) -> Any:
    """What `copy` and `pickle` ask of a module, without what is put up for a while. It stands in the module's `vars` as its
    `__reduce_ex__`."""
    module = reference()
    assert module is not None
    reduced: Any = type(module).__reduce_ex__(module, protocol)
    made, given, state, *rest = reduced
    return made, given, found_state(state) if isinstance(state, dict) else state, *rest


# Settings of the whole process ------------------------------------------------------------------------------------------


class SharedSetting:
    """A setting of the whole process that several contexts want at once: changed by the first, put back by the last, in whatever
    order and whatever thread they leave."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> None:
        self._read, self._write, self._value = read, write, value
        self._before: Any = None
        self._holders: set[object] = set()
        self._lock = threading.RLock()

    def hold(self, changes: Changes) -> None:
        """Have the setting changed until `changes` are undone."""
        holder = object()
        with self._lock:
            if not self._holders:
                self._before = self._read()
            changes.undo(functools.partial(self._release, holder))
            self._holders.add(holder)
            self._write(self._value)

    def _release(self, holder: object) -> None:
        with self._lock:
            self._holders.discard(holder)
            if not self._holders:
                self._write(self._before)


def _stance() -> tuple[str, bool, Any]:
    now = torch._dynamo.eval_frame._stance
    return now.stance, now.skip_guard_eval_unsafe, now.backend


def _set_stance(stance: tuple[str, bool, Any]) -> None:
    name, unsafe, backend = stance
    torch.compiler.set_stance(name, skip_guard_eval_unsafe=unsafe, force_backend=backend)


run_eagerly = SharedSetting(_stance, _set_stance, ("force_eager", False, None))
"""No compiled code runs: hooks added after a model's first compiled call would never fire."""

run_layers_openly = SharedSetting(
    torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False
)
"""torch's own `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` do not fuse themselves into one kernel, which nobody can
look inside."""
