"""Meet a residual stream wherever a model keeps it, look at it there, or put another one in its place.

A stream enters a block as an argument, inside a tuple, a dictionary or an object of the user's own, or, where a model adds
up in its own loop, as the result of an operation. A `Place` says which; this module is the one that goes there.

When not to use it: to stand at an operation for its operands. That is `interception`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, counted, in_turn, intercepted
from uncollapse.anatomy.torch_calls import Path, tensors_at
from uncollapse.anatomy.vocabulary import ModuleCall, Place
from uncollapse.errors import UncollapseError
from uncollapse.restoring import restoring

Action = Callable[[Tensor], Tensor | None]


def tensor_at(value: Any, path: Path) -> Tensor:
    """The tensor at the end of a path. Raises `UncollapseError` where there is none."""
    for step in path:
        try:
            value = value[step] if isinstance(value, (Mapping, list, tuple)) else getattr(value, step)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise _no_tensor(path, f"a {type(value).__name__} without {step!r}") from error
    if not isinstance(value, Tensor):
        raise _no_tensor(path, f"a {type(value).__name__}")
    return value


def _no_tensor(path: Path, came: str) -> UncollapseError:
    way = "".join(f"[{step!r}]" for step in path)
    return UncollapseError(
        f"streams: expected a tensor at {way or 'the output'}, got {came}. The model handed its state on in another form than "
        "when it was traced. Diagnose it on inputs of one kind."
    )


def with_tensor(value: Any, path: Path, tensor: Tensor) -> Any:
    """`value` with another tensor at the end of the path. What can be written to is written to, so that a state that the model
    holds in several places stays one; tuples are made anew."""
    if not path:
        return tensor
    step, *rest = path
    held = value[step] if isinstance(value, (Mapping, list, tuple)) else getattr(value, step)
    changed = with_tensor(held, tuple(rest), tensor)
    if isinstance(value, tuple):
        items = [changed if i == step else item for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, (list, dict)):
        value[step] = changed
    elif getattr(getattr(value, "__dataclass_params__", None), "frozen", False):
        return dataclasses.replace(value, **{step: changed})
    else:
        setattr(value, step, changed)
    return value


def cloned(value: Any, depth: int = 4) -> Any:
    """A copy with copies of its tensors, through containers and plain objects: what a block writes to does not come back."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if depth and type(value) in (list, tuple):
        return type(value)(cloned(v, depth - 1) for v in value)
    if depth and isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cloned(v, depth - 1) for v in value))
    if depth and type(value) is dict:
        return {k: cloned(v, depth - 1) for k, v in value.items()}
    if depth and _is_state(value, depth):
        twin = copy.copy(value)
        for name, item in vars(value).items():
            object.__setattr__(twin, name, cloned(item, depth - 1))
        return twin
    return value


def _is_state(value: Any, depth: int) -> bool:
    """Whether an object of the user's own holds tensors, no deeper than a stream is looked for."""
    if isinstance(value, (nn.Module, type, str)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return any(True for _ in tensors_at(value, (), depth))


@contextlib.contextmanager
def met(
    model: nn.Module,
    actions: Iterable[tuple[Place, Action]],
    *,
    handlers: Mapping[Point, Handler] | None = None,
    within: nn.Module | None = None,
    strict: bool = True,
) -> Iterator[None]:
    """Within the block, and in the thread that entered it, each action is given the stream at its place in every pass, and may
    return another one. `handlers` act at operations besides; at one and the same operation the action sees what the handler
    makes of it."""
    at_points: dict[Point, list[Handler]] = {}
    at_modules: dict[str, list[tuple[Place, Action]]] = {}
    for place, given in actions:
        action = _opening(place, given)
        if isinstance(place.at, ModuleCall):
            at_modules.setdefault(place.at.name, []).append((place, action))
        else:
            at_points.setdefault(place.at, []).append(_acting(place.path, action))
    for point, handler in (handlers or {}).items():
        at_points.setdefault(point, []).append(handler)
    with restoring() as changes:
        together = {point: in_turn(*several) for point, several in at_points.items()}
        changes.enter(intercepted(model, together, within=within, strict=strict))
        changes.enter(_at_modules(model, at_modules, within))
        yield


def _opening(place: Place, action: Action) -> Action:
    """An action on streams that the model has folded into one axis with the sequences: it is given them with an axis of their
    own, and what it returns is folded again."""
    fold = place.fold
    if fold is None:
        return action

    def acting(tensor: Tensor) -> Tensor | None:
        changed = action(fold.opened(tensor))
        return None if changed is None else fold.closed(changed)

    return acting


def _acting(path: Path, action: Action) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        changed = action(tensor_at(result, path))
        return result if changed is None else with_tensor(result, path, changed)

    return handler


@contextlib.contextmanager
def _at_modules(
    model: nn.Module, actions: Mapping[str, list[tuple[Place, Action]]], within: nn.Module | None
) -> Iterator[None]:
    thread = threading.get_ident()
    with restoring() as changes:
        changes.undo(functions_as_found())
        runs = changes.enter(counted(model, actions, within))
        for name, wanted in actions.items():

            def enter(
                _: nn.Module, args: Any, kwargs: Any, name: str = name, wanted: list[tuple[Place, Action]] = wanted
            ) -> Any:
                if threading.get_ident() != thread:
                    return None
                run, given, is_changed = runs.begin(name), (args, kwargs), False
                for place, action in _of_run(wanted, run, {"in"}):
                    changed = undisturbed(action, _argument(*given, place.path))
                    if changed is not None:
                        given, is_changed = _with_argument(*given, place.path, changed), True
                return given if is_changed else None

            def leave(
                _: nn.Module,
                args: Any,
                kwargs: Any,
                output: Any,
                name: str = name,
                wanted: list[tuple[Place, Action]] = wanted,
            ) -> Any:
                if threading.get_ident() != thread:
                    return None
                is_changed = False
                for place, action in _of_run(wanted, runs.counts.get(name, 0) - 1, {"out", "written"}):
                    if place.side == "out":
                        changed = undisturbed(action, tensor_at(output, place.path))
                        if changed is not None:
                            output, is_changed = with_tensor(output, place.path, changed), True
                    else:
                        changed = undisturbed(action, _argument(args, kwargs, place.path))
                        if changed is not None:
                            _with_argument(args, kwargs, place.path, changed)
                return output if is_changed else None

            module = model.get_submodule(name)
            changes.hook(module, "forward_pre", enter, with_kwargs=True)
            changes.hook(module, "forward", leave, with_kwargs=True)
        yield


def functions_as_found() -> Callable[[], object]:
    """Lets function modes act again as they do now: Ctrl-C may come on the way out of `DisableTorchFunction`."""
    # By name: they are unknown to the stubs.
    read, write = (getattr(torch._C, f"_{verb}_torch_function_state") for verb in ("get", "set"))
    return functools.partial(write, read())


def _of_run(actions: list[tuple[Place, Action]], run: int, sides: set[str]) -> Iterator[tuple[Place, Action]]:
    for place, action in actions:
        if isinstance(place.at, ModuleCall) and place.at.call == run and place.side in sides:
            yield place, action


def undisturbed(action: Action, tensor: Tensor) -> Tensor | None:
    """The action's own operations must not count as those of the module in whose code the stream is met."""
    with torch._C.DisableTorchFunction():
        return action(tensor)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Tensor:
    return tensor_at(args if isinstance(path[0], int) else kwargs, path)


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(path[0], int):
        return with_tensor(args, path, tensor), kwargs
    return args, with_tensor(dict(kwargs), path, tensor)
