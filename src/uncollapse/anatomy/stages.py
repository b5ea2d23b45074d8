"""Of a model whose weights are kept elsewhere: the modules that run with their weights held, and how many passes fit beside these.

A *stage* is such a module: a block, or a module outside the blocks that has weights elsewhere. All of its weights may be held at
once. What lies between two stages has none.

When not to use it: to say what a block is. Whoever asks says so, or holds each module by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.offloaded_weights import is_kept_elsewhere

# Of its stream, that a pass keeps while it stands: the model's own, those that wait to be compared, and at level full, in float64,
# what the embeddings span.
COPIES = 8
AT_LEAST = 64 * 2**20  # bytes that passes made together may take in any case


def stages(model: nn.Module, blocks: Collection[str]) -> list[nn.Module]:
    """The modules that run as a whole while their weights are held: `blocks`, by name, and outside of them whatever has weights
    elsewhere, no block in it, and no more than half of the model. Empty where none is kept elsewhere."""
    if not any(map(is_kept_elsewhere, model.modules())):
        return []
    whole = {id(model.get_submodule(name)) for name in blocks}
    found: dict[int, nn.Module] = {}
    half = _size(model) / 2

    def look(module: nn.Module) -> None:
        inner = [each for each in module.modules() if each is not module]
        is_small = not any(map(is_kept_elsewhere, inner)) or _size(module) <= half
        has_block = any(id(each) in whole for each in inner)
        if id(module) in whole or (is_kept_elsewhere(module) and is_small and not has_block):
            if any(map(is_kept_elsewhere, module.modules())):
                found[id(module)] = module
            return
        for child in module.children():
            look(child)

    look(model)
    return list(found.values())


def can_be_shared(model: nn.Module, held: Sequence[nn.Module]) -> bool:
    """Whether passes over the model may be made together: every weight that is kept elsewhere belongs to a stage. What the
    model itself holds, around its blocks, is let go by accelerate when the first pass is over. Nor may somebody watch torch's
    dispatch."""
    inside = {id(module) for stage in held for module in stage.modules()}
    own = all(id(module) in inside for module in model.modules() if is_kept_elsewhere(module))
    return bool(held) and own and torch._C._len_torch_dispatch_stack() == 0


def in_flight(batches: Sequence[Mapping[str, Any]], held: Sequence[nn.Module]) -> list[range]:
    """Which batches are passed together, by number: as many, one after the other, as keep no more than the weights of the largest
    stage take, which have to fit anyway, or `AT_LEAST`. A batch keeps `COPIES` of its stream. That is as wide as the narrow side
    of the widest weight for each whole number of the batch, and as large as what the batch itself holds besides."""
    sizes = map(_size, held)
    width = max((min(p.shape) for stage in held for p in stage.parameters() if p.ndim > 1), default=1)
    element = max((p.element_size() for stage in held for p in stage.parameters()), default=4)
    room = max(AT_LEAST, *sizes)

    def kept(batch: Mapping[str, Any]) -> int:
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        entries = max((t.numel() * (1 if t.is_floating_point() else width) for t in tensors), default=0)
        return entries * element * COPIES

    found, begin, taken = [], 0, 0
    for number, batch in enumerate(batches):
        own = kept(batch)
        if number > begin and taken + own > room:
            found.append(range(begin, number))
            begin, taken = number, 0
        taken += own
    return [*found, range(begin, len(batches))]


def _size(module: nn.Module) -> int:
    """What its weights take, in bytes."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
