"""Do a block's weights look as an initialisation makes them?

Nearly uniform attention is expected of a model that was just made: its queries and keys are small random vectors. It is a fault
where training led there or never led away. The weights tell the two apart, whatever the model is called:

* Gains, biases and scales start as constants (1, 0), or as draws from the range of their own weight. One step of any optimiser
  moves them apart, also where the queries and keys themselves get no gradient.
* Matrices start as independent draws from one bounded or Gaussian distribution: no heavy tails, no row or column larger than
  chance, no singular value above the edge of a random matrix. Training breaks each of these.
* Query and key weights are drawn alike in every block. One block with smaller ones was not made so.

Whoever sets all gains to 1 and all biases to 0 afterwards (folding does) does not change the second kind of evidence.

When not to use it: to ask how far training went. It says whether anything was trained at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uncollapse.anatomy.sharded_weights import at_hand
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall

DEVIATIONS = 5  # chance moves a figure by so many standard deviations once in a million
UNIFORM, GAUSSIAN = 1.8, 3.0  # fourth moments over the squared variance
FEWEST_ENTRIES = 256  # of a matrix that says anything about its distribution
POWER_STEPS = 24

Sizes = Callable[[int], list[tuple[torch.Size, float]]]  # by block: shape and size of its query and key weights


@dataclass(frozen=True)
class Evidence:
    """`initial`: whether nothing speaks against an initialisation; `reason` says what was seen, or what speaks against it."""

    initial: bool
    reason: str


def evidence(model: nn.Module, anatomy: Anatomy, numbers: Iterable[int]) -> dict[int, Evidence]:
    """What the weights of each of these blocks say, by block."""

    @functools.cache  # each block is compared with all others
    def sizes(number: int) -> list[tuple[torch.Size, float]]:
        return [(w.shape, _size(w)) for w in _query_key_weights(model, anatomy.blocks[number])]

    return {number: _of_block(model, anatomy, number, sizes) for number in dict.fromkeys(numbers)}


def _of_block(model: nn.Module, anatomy: Anatomy, number: int, sizes: Sizes) -> Evidence:
    block = anatomy.blocks[number]
    vectors = matrices = 0
    for module in _modules(model, anatomy, block):
        own = [(name, at_hand(module, name)) for name, _ in module.named_parameters(recurse=False)]
        if any(p.is_meta or not p.is_floating_point() or type(p.data) is not Tensor for _, p in own):
            return Evidence(False, "some of its weights could not be read")
        large = [p for _, p in own if _is_matrix(p)]
        for name, p in own:
            if _is_matrix(p):
                against = _against_drawn(p)
                matrices += p.numel() >= FEWEST_ENTRIES
            else:
                against = _against_start(p, large)
                vectors += 1
            if against is not None:
                return Evidence(False, f"{type(module).__name__}.{name} of this block {against}")
    if not matrices:
        return Evidence(False, "it has too few weights to tell")
    against = _against_alike([sizes(other) for other in range(len(anatomy.blocks)) if other != number], sizes(number))
    if against is not None:
        return Evidence(False, against)
    still = f"{vectors} gains and biases are where they start, " if vectors else ""
    return Evidence(
        True, f"{still}{matrices} weight matrices are independent random draws, queries and keys as in every block"
    )


def _modules(model: nn.Module, anatomy: Anatomy, block: Block) -> Iterator[nn.Module]:
    """The modules that hold the block's weights: all inside it; where blocks share a module, those that its parts name."""
    if sum(other.module.name == block.module.name for other in anatomy.blocks) == 1:
        yield from model.get_submodule(block.module.name).modules()
        return
    calls = [norm.module for norm in block.norms if norm.piece is None]
    for part in block.parts:
        calls += [c for c in (part.reads, part.writes) if c is not None]
        for call in part.attention:
            found = (call.queries, call.keys, call.values, call.projection)
            calls += [c for c in found if isinstance(c, ModuleCall)]
    for name in dict.fromkeys(call.name for call in calls):
        yield from model.get_submodule(name).modules()


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and p.numel() > max(p.shape)


def _against_start(p: Tensor, beside: list[Tensor]) -> str | None:
    """What speaks against a vector being as it was made: all entries equal, or drawn as the weight beside it is."""
    p = p.double().flatten()
    if bool((p == p[0]).all()):
        return None
    size = float(p.square().mean().sqrt())
    for weight in beside:
        w = weight.double()
        scale = float(w.square().mean().sqrt())
        close = abs(size / scale - 1) <= DEVIATIONS * 0.45 / math.sqrt(len(p)) if scale else False
        if close and float(p.abs().max()) <= math.sqrt(3) * scale * (1 + DEVIATIONS * 0.45 / math.sqrt(w.numel())):
            return None
    return "was moved from where such a vector starts"


def _against_drawn(p: Tensor) -> str | None:
    """What speaks against independent draws from one distribution no wider than a Gaussian."""
    if p.numel() < FEWEST_ENTRIES or bool((p == p.flatten()[0]).all()):
        return None
    w = p.double().flatten(0, -2) if p.ndim > 2 and p.shape[0] < p.shape[-1] else p.double().flatten(1)
    count, size = w.numel(), float(w.square().mean().sqrt())
    if not math.isfinite(size):
        return "is not finite"
    if abs(float(w.mean())) > DEVIATIONS * size / math.sqrt(count):
        return "has a mean"
    tail = float((w / size).pow(4).mean())
    slack = DEVIATIONS * math.sqrt(24 / count)
    if not UNIFORM - slack <= tail <= GAUSSIAN + slack:
        return f"is not one random draw (fourth moment {tail:.3g}, a Gaussian has 3)"
    for each, name in ((w, "rows"), (w.T, "columns")):
        energy = (each / size).square().sum(-1)
        expected = each.shape[1] * (tail - 1)
        if len(energy) > 2 and float(energy.var()) > expected * (1 + DEVIATIONS * math.sqrt(2 / (len(energy) - 1))):
            return f"has {name} of more different sizes than chance gives"
    least = min(w.shape)
    edge = size * (math.sqrt(w.shape[0]) + math.sqrt(w.shape[1])) * (1 + 3 * least ** (-2 / 3))
    if _largest_singular_value(w) > edge:
        return "has a direction larger than a random matrix has"
    return None


def _largest_singular_value(w: Tensor) -> float:
    """From below, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(w.shape[1], generator=generator, dtype=torch.float64).to(w.device)
    for _ in range(POWER_STEPS):
        v = w.T @ (w @ v)
        v = v / v.norm().clamp(min=1e-300)
    return float((w @ v).norm())


def _against_alike(others: list[list[tuple[torch.Size, float]]], mine: list[tuple[torch.Size, float]]) -> str | None:
    """Whether the query and key weights of a block are of another size than the same ones of most other blocks."""
    others = [theirs for theirs in others if [shape for shape, _ in theirs] == [shape for shape, _ in mine]]
    for place, (shape, size) in enumerate(mine):
        chance = DEVIATIONS * math.sqrt((GAUSSIAN - 1) / (2 * shape.numel()))
        differ = sum(abs(size - theirs[place][1]) > chance * max(size, theirs[place][1]) for theirs in others)
        if 2 * differ > len(others):
            return "its query and key weights are of another size than those of other blocks"
    return None


def _size(weight: Tensor) -> float:
    """The root mean square of its entries."""
    return float(weight.double().square().mean().sqrt())


def _query_key_weights(model: nn.Module, block: Block) -> list[Tensor]:
    calls = [c for part in block.parts for call in part.attention for c in (call.queries, call.keys)]
    names = dict.fromkeys(c.name for c in calls if isinstance(c, ModuleCall))
    modules = [model.get_submodule(name) for name in names]
    read = (at_hand(m, name) for m in modules for name, p in m.named_parameters(recurse=False) if _is_matrix(p))
    return [p for p in read if not p.is_meta]
