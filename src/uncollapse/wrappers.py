"""Models around models: what PEFT, `DataParallel`, DDP, FSDP, `torch.compile` and accelerate put around the user's.

A wrapper hands on what it is called with. The arguments that a model takes are therefore those of the innermost `forward` that
a call reaches: `position_ids` may be passed to a wrapper that does not name them.

When not to use it: to get hold of a model to run. A wrapper can add to the call (virtual tokens, autocast, another device), so
what the user runs is what is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def module_of(model: Any) -> Any:
    """The module behind an object that is none but stands for one, as nnsight's does; else what is given."""
    held = None if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).get("_module")
    return held if isinstance(held, nn.Module) else model


def seen_through(model: nn.Module) -> nn.Module:
    """The model inside all wrappers: the one whose configuration and arguments are meant. It is `model` itself where nothing
    is around it."""
    *_, inner = _inwards(model)
    return inner


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that the user wrote: `fully_shard` puts one of its own in its place, which inherits from it."""
    kind = type(model)
    return kind.__bases__[1] if kind.__bases__[0].__name__ == "FSDPModule" and len(kind.__bases__) == 2 else kind


def takes(model: nn.Module, name: str) -> bool:
    """Whether an argument of this name, passed by keyword, arrives at a `forward` that names it."""
    for module in _inwards(model):
        parameters = _parameters(module)
        if name in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def bound(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model` by name: those passed by position as the first `forward` inwards names them."""
    return {**dict(zip(_positional(model), args, strict=False)), **kwargs}


def rebound(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `model` with those in `changed` instead, at the positions where they were passed."""
    places = {name: i for i, name in enumerate(_positional(model)[: len(args)])}
    given = list(args)
    for name, value in changed.items():
        if name in places:
            given[places[name]] = value
    return tuple(given), {**kwargs, **{k: v for k, v in changed.items() if k not in places}}


def _inwards(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, then what it wraps, and so on inwards."""
    seen: set[int] = set()
    module: nn.Module | None = model
    while module is not None and id(module) not in seen:
        seen.add(id(module))
        yield module
        module = _wrapped(module)


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a module merely wraps: the only child of one whose `forward` names no argument of its own, or PEFT's base model, which
    stands beside a prompt encoder where virtual tokens are tuned."""
    base = getattr(type(module), "get_base_model", None)
    if callable(base):
        inner = module.get_base_model()  # type: ignore[operator]
        return inner if isinstance(inner, nn.Module) else None
    children = list(module.children())
    passes = {p.kind for p in _parameters(module).values()} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    compiled = "_orig_mod" in module._modules  # its `forward` bears the signature of what it compiles
    return children[0] if len(children) == 1 and (passes or compiled) else None


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward written in C++
        return {}


def _positional(model: nn.Module) -> tuple[str, ...]:
    for module in _inwards(model):
        parameters = _parameters(module).values()
        named = tuple(p.name for p in parameters if p.kind in _POSITIONAL)
        if named or not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return named
    return ()
