"""Weights that accelerate keeps elsewhere between the runs of their modules: in memory, or in the files of a checkpoint.

Between two runs such a parameter stands on `meta`. When its module runs, it is read, and then let go. `kept_weight` reads one for
somebody who wants the numbers and not the run. Within `held_weights` a module that runs many times reads its weights once; within
`replaced_weights` it is given others, and within `put_in_place` others are put in the place of what is not read at all.

When not to use `held_weights`: around a whole model, which would then be held as a whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.turns import closed_to_others
from uncollapse.restoring import restoring


def kept_weight(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, read from where accelerate keeps it; None where it keeps none of that name."""
    for hook in _offloading(module):
        with contextlib.suppress(KeyError):
            return torch.as_tensor(hook.weights_map[name])
    return None


def is_kept_elsewhere(module: nn.Module) -> bool:
    """Whether accelerate keeps some of a module's own weights elsewhere between its runs."""
    for hook in _offloading(module):
        deep = bool(hook.place_submodules)
        tensors = [*module.parameters(deep), *(module.buffers(deep) if hook.offload_buffers else ())]
        if tensors:
            return True
    return False


@contextlib.contextmanager
def held_weights(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of `module`, and of the modules in it, are read when they are first wanted, and kept."""
    with restoring() as changes:
        for each in module.modules():
            for hook in _offloading(each):
                changes.set(
                    hook, "weights_map", _Given(hook.weights_map, functools.cache(hook.weights_map.__getitem__))
                )
        yield


@contextlib.contextmanager
def replaced_weights(module: nn.Module, other: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block `module`, and the modules in it, are given for each of their weights what `other` makes of it when it is
    first read; the weight itself where that is None."""

    def given(kept: Mapping[str, Any], names: Collection[str]) -> Callable[[str], Any]:
        others: dict[str, Tensor | None] = {}

        def read(name: str) -> Any:
            weight = kept[name]
            if name in names and name not in others:
                others[name] = other(torch.as_tensor(weight))
            put = others.get(name)
            return weight if put is None else put

        return read

    offloading = [(each, hook) for each in module.modules() for hook in _offloading(each)]
    with restoring() as changes:
        if offloading:
            changes.enter(closed_to_others())
        for each, hook in offloading:
            names = {name for name, _ in each.named_parameters()}
            changes.set(hook, "weights_map", _Given(hook.weights_map, given(hook.weights_map, names)))
        yield


def kept_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of `module`, and of the modules in it, that are kept elsewhere, as they stand on `meta`."""
    for each in module.modules():
        for hook in _offloading(each):
            yield from each.parameters(recurse=bool(hook.place_submodules))


@contextlib.contextmanager
def put_in_place(module: nn.Module, other: Callable[[str, nn.Parameter], Tensor]) -> Iterator[None]:
    """Within the block `module`, and the modules in it, are given for each of their parameters what `other` makes of its name and
    of the parameter as it stands on `meta`, and no parameter is read. What is kept beside parameters is."""

    def given(kept: Mapping[str, Any], where: str, own: Mapping[str, nn.Parameter]) -> Callable[[str], Any]:
        return lambda name: other(f"{where}.{name}", own[name]) if name in own else kept[name]

    offloading = [(where, each, hook) for where, each in module.named_modules() for hook in _offloading(each)]
    with restoring() as changes:
        if offloading:
            changes.enter(closed_to_others())
        for where, each, hook in offloading:
            own = dict(each.named_parameters(recurse=bool(hook.place_submodules), remove_duplicate=False))
            changes.set(hook, "tied_params_names", set())  # accelerate would note where a tied weight lies in memory
            changes.set(hook, "weights_map", _Given(hook.weights_map, given(hook.weights_map, where, own)))
        yield


@contextlib.contextmanager
def brought_within(
    module: nn.Module, around: Callable[[], contextlib.AbstractContextManager[object]]
) -> Iterator[None]:
    """Within the block what accelerate does before and behind a run of `module`, or of a module in it, is done within `around`:
    bringing weights and putting them away is no part of what the model computes."""

    def wrapped(does: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(does)
        def apart(*args: Any, **kwargs: Any) -> Any:
            with around():
                return does(*args, **kwargs)

        return apart

    hooks = {id(hook): hook for each in module.modules() if (hook := getattr(each, "_hf_hook", None)) is not None}
    with restoring() as changes:
        if hooks:
            changes.enter(closed_to_others())
        for hook in hooks.values():
            for name in ("pre_forward", "post_forward"):
                changes.place(vars(hook), name, wrapped(getattr(hook, name)))
        yield


def give_back_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can be asked for it: glibc keeps pieces of up to 32 MB,
    and with them a block's weights."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    with contextlib.suppress(OSError, TypeError, AttributeError):
        return ctypes.CDLL(None).malloc_trim
    return None


def _offloading(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring a module its weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None]


class _Given(Mapping[str, Any]):
    """Kept weights by name, as `read` gives them."""

    def __init__(self, kept: Mapping[str, Any], read: Callable[[str], Any]) -> None:
        self._kept, self._read = kept, read

    def __getitem__(self, name: str) -> Any:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
