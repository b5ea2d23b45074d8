"""Weights of which each process of a group holds a part: FSDP2 (`fully_shard`), tensor parallel (`parallelize_module`).

FSDP2 gathers the weights of a block when the block runs and lets them go behind it; a probe has nothing to add. Tensor parallel
computes with the parts: no process sees all heads, nor any weight as a whole. While a probe runs, each module therefore gathers its
own weights when it is called and lets them go when it is done, and the exchange of activations rests: every process computes the
whole model, a module at a time. That this is the same function is tried on the user's own tokens (`require_faithful`).

When not to use it: for weights that are laid out anew, as by FSDP1 and ZeRO-3. Those are refused by name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.offloaded_weights import kept_weight
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.restoring import restoring

# Whose hooks exchange activations between the parts of a tensor-parallel model.
_EXCHANGING = ("torch.distributed.tensor", "transformers.integrations.tensor_parallel")
SAME = 1e-2  # relative: the sums over parts are rounded in another order, in half precision too


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameter, so that all processes must run the model together."""
    return any(is_part(p) for p in model.parameters())


def is_part(tensor: Tensor) -> bool:
    """Whether this is the part that a process holds of a tensor (a `DTensor`)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes if this is a part of it. All of them must ask."""
    part: Any = tensor
    gathered: Tensor = part.full_tensor() if is_part(tensor) else tensor
    return gathered


def at_hand(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter as a whole, wherever it is kept: gathered from all processes, or read from where accelerate keeps
    it between runs. It stays on `meta` where nobody knows."""
    parameter = module._parameters[name]
    assert parameter is not None
    tensor = parameter.detach()
    if not tensor.is_meta:
        return whole(tensor)
    kept = kept_weight(module, name)
    return tensor if kept is None else kept


def head_shards(projection: nn.Module) -> tuple[int, int]:
    """Into how many parts a tensor-parallel output projection cuts what it reads, and which of them this process has: (1, 0) where
    it reads all of it."""
    weight: Any = projection._parameters.get("weight")
    if weight is None or not is_part(weight):
        return 1, 0
    mixed = 0 if type(projection).__name__.endswith("Conv1D") else 1
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard(mixed):
            return weight.device_mesh.size(axis), weight.device_mesh.get_local_rank(axis)
    return 1, 0


def require_gatherable(caller: str, model: nn.Module) -> None:
    """Refuse weights that are shared out in a way in which no module's own can be gathered."""
    kinds = {cls.__name__ for m in model.modules() for cls in type(m).__mro__ if cls.__module__.startswith("torch.")}
    found = None
    if "FullyShardedDataParallel" in kinds:
        found = "one in FullyShardedDataParallel (FSDP1), which lays the weights of a module end to end"
    elif any(hasattr(p, "ds_id") for p in model.parameters()):
        found = "one that DeepSpeed (ZeRO) has partitioned, which takes the weights out of their modules"
    if found is not None:
        raise UnsupportedModel(
            f"{caller}: expected a model whose weights stand in its modules, got {found}. No weight could be read there. Shard it "
            "with torch.distributed.fsdp.fully_shard instead, or save a checkpoint and diagnose that."
        )


@contextlib.contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Within the block each module of a tensor-parallel model that has parts of weights runs with its whole ones. Such blocks may
    be left in any order."""
    holder = object()
    with restoring() as changes:
        for module in model.modules():
            if any(p is not None and is_part(p) for p in module._parameters.values()):
                gathering = _Gathering(module)
                changes.undo(gathering.let_go)
                changes.hook(module, "forward_pre", gathering.gather)
                changes.hook(module, "forward", gathering.let_go, always_call=True)
            for table in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(table.items()):
                    if isinstance(hook, _Resting) or _exchanges(hook):
                        resting = hook if isinstance(hook, _Resting) else _Resting(hook)
                        changes.undo(functools.partial(resting.let_go, holder, table, key))
                        resting.holders.add(holder)
                        table[key] = resting
        yield


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Within the block a module that is run by itself, past its hooks, has its whole weights. Without gradients."""
    with torch.no_grad(), restoring() as changes:
        for each in module.modules():
            if any(p is not None and is_part(p) for p in each._parameters.values()):
                gathering = _Gathering(each)
                changes.undo(gathering.let_go)
                gathering.gather()
        yield


def _exchanges(hook: Any) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(function, "__module__", "")).startswith(_EXCHANGING)


class _Resting:
    """Stands where a hook was that exchanges activations, until the last of its holders lets it go. A copy is the hook itself."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.holders = hook, set[object]()

    def __call__(self, *_: Any) -> None:
        """Nothing is exchanged."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.hook,)

    def let_go(self, holder: object, table: dict[int, Any], key: int) -> None:
        self.holders.discard(holder)
        if not self.holders and table.get(key) is self:
            table[key] = self.hook


def _itself(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


class _Gathering:
    """One module's weights: its parts outside of its runs, whole ones inside."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parts: dict[str, nn.Parameter] = {}

    def gather(self, *_: Any) -> None:
        for name, p in self.module._parameters.items():
            if p is not None and is_part(p):  # FSDP2's are whole by now
                if torch.is_grad_enabled() and p.requires_grad:
                    raise InputError(
                        "gather: expected a pass without gradients, got one that would give a tensor-parallel model none. Single "
                        "heads are away from such a model only where nothing is trained. Put torch.no_grad() around it."
                    )
                self._parts[name] = p
                self.module._parameters[name] = nn.Parameter(whole(p).detach(), requires_grad=False)

    def let_go(self, *_: Any) -> None:
        while self._parts:
            name, p = next(iter(self._parts.items()))
            self.module._parameters[name] = p
            self._parts.pop(name, None)


def require_faithful(caller: str, model: nn.Module, batch: Mapping[str, Any], output: Any) -> None:
    """Refuse a sharded model whose own `output` on a batch is not what it gives here with whole weights, to rounding."""
    with torch.no_grad(), restoring() as changes:
        for module in model.modules():
            if module.training:
                changes.set(module, "training", False)
        own = [whole(t) for t in tensors_in(model(**batch)) if t.is_floating_point()]
    here = [t for t in tensors_in(output) if t.is_floating_point()]
    if not all(_agree(a, b) for a, b in zip(own, here, strict=False)) or not own or not here:
        raise UnsupportedModel(
            f"{caller}: expected {type(model).__name__} to give the outputs with whole weights that it gives with the parts of "
            f"{len(own)} tensors, got others. Its code may count on the part of a process. Save a checkpoint and diagnose that."
        )


def _agree(part: Tensor, total: Tensor) -> bool:
    """Whether two outputs are the same, or the one a piece of the other along its last axis."""
    pieces = [total] if part.shape == total.shape else list(total.split(part.shape[-1], -1))
    size = total.abs().max()
    return any(piece.shape == part.shape and bool((piece - part).abs().max() <= SAME * size) for piece in pieces)
