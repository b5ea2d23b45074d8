"""Do a block's weights look as an initialisation makes them, or nearly so?

Nearly uniform attention is expected of a model that was just made: its queries and keys are small random vectors. So it is after
the first few steps of an optimiser. It is a fault where training led there or never led away. The weights tell the two apart,
whatever the model is called:

* Gains, biases and scales start as constants (1, 0), or as draws from the range of their own weight. Training moves them apart,
  also where the queries and keys themselves get no gradient.
* Matrices start as independent draws from one bounded or Gaussian distribution: no heavy tails, no row or column larger than
  chance, no singular value above the edge of a random matrix. Training breaks each of these.
* Query and key weights are drawn alike in every block. One block with smaller ones was not made so.

How much of this is seen decides, not whether. One step of Adam moves every weight by the learning rate, so that a trace of it
can be proved, and yet nothing was learnt. A block counts as hardly trained while its vectors, and the sizes of its rows, columns
and matrices, stay within a quarter (`MOVED`) of where they start, and at most half (`LEARNT`) of the energy of each matrix is in
directions that a random matrix does not have. And the matrices outside the blocks, which are the first to learn, must not have
passed that half: a block that shows a trace of training beside an output layer that was trained has stayed as it was. Five steps
of Adam at a learning rate of 3e-3 leave a quarter there, thirty at 1e-3 more than a half.

Whoever sets all gains to 1 and all biases to 0 afterwards (folding does) does not change the second kind of evidence.

When not to use it: to ask how far training went. It says whether it has left its start.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uncollapse.anatomy.sharded_weights import at_hand
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall
from uncollapse.measures.weight_marks import Marks, are_alike, weight_marks
from uncollapse.records.diagnosis import HARDLY_TRAINED

DEVIATIONS = 5  # chance moves a figure by so many standard deviations once in a million
UNIFORM, GAUSSIAN = 1.8, 3.0  # fourth moments over the squared variance
FEWEST_ENTRIES = 256  # of a matrix that says anything about its distribution
MOVED = 0.25  # of their size: less than this, and vectors, rows, columns and whole matrices are near where they start
LEARNT = 0.5  # of a matrix's energy, in directions that a random matrix does not have
POWER_STEPS = 24

Answer = TypeVar("Answer")
Sizes = Callable[[int], list[tuple[torch.Size, float]]]  # by block: shape and size of its query and key weights


@dataclass(frozen=True)
class Evidence:
    """`initial`: whether the weights are still near an initialisation; `reason` says what was seen, or what speaks against it."""

    initial: bool
    reason: str


@dataclass(frozen=True)
class _Trace:
    """What speaks against a tensor being as it was made: `share` of the way to where it counts as trained (from 1 on it does),
    `moved` as a share of its own size, and the words. A trace that chance can leave is none."""

    share: float
    moved: float
    words: str


@dataclass
class _Own:
    """What was seen of a block's own weights: how many vectors and matrices, and traces too small to settle it, each with whether
    it is one of a matrix."""

    vectors: int = 0
    matrices: int = 0
    traces: list[tuple[_Trace, bool]] = field(default_factory=list)


class WeightEvidence:
    """What the weights of a model's blocks say. No weight is read twice: it may be kept on disk. Where it is, it can be noted while
    a pass has it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._model, self._anatomy = model, anatomy
        self._own: dict[int, Evidence | _Own] = {}
        self._noted: dict[tuple[nn.Module, str], tuple[torch.Size, float]] = {}  # of query and key weights

    def note(self, number: int) -> None:
        """Note all that is asked of this block's weights."""
        if number not in self._own:
            self._own[number] = _of_block(self._model, self._anatomy, number, self._noted)

    def note_sizes(self, number: int) -> list[tuple[torch.Size, float]]:
        """Note shape and size of this block's query and key weights, which those of each other block are compared with."""
        found = []
        for module, name in _query_key_weights(self._model, self._anatomy.blocks[number]):
            if (module, name) not in self._noted:
                p = at_hand(module, name)
                if p.is_meta:
                    continue
                self._noted[module, name] = p.shape, _size(p)
            found.append(self._noted[module, name])
        return found

    def of(self, numbers: Iterable[int]) -> dict[int, Evidence]:
        """What the weights of each of these blocks say, by block."""
        sizes = functools.cache(self.note_sizes)  # each block is compared with all others
        outside = functools.cache(functools.partial(_learnt_outside, self._model, self._anatomy))
        for number in dict.fromkeys(numbers):
            self.note(number)
        return {
            number: found
            if isinstance(found := self._own[number], Evidence)
            else _beside_others(found, self._anatomy, number, sizes, outside)
            for number in dict.fromkeys(numbers)
        }


def _of_block(
    model: nn.Module,
    anatomy: Anatomy,
    number: int,
    noted: dict[tuple[nn.Module, str], tuple[torch.Size, float]],
) -> Evidence | _Own:
    """What the weights of one block say by themselves. The sizes of query and key weights are `noted`, as others are compared with
    them."""
    block = anatomy.blocks[number]
    own, alike = _Own(), set(_query_key_weights(model, block))
    for module in _modules(model, anatomy, block):
        named = ((name, at_hand(module, name)) for name, _ in module.named_parameters(recurse=False))
        weights = [(name, p) for name, p in named if p.numel()]
        if any(p.is_meta or not p.is_floating_point() or type(p.data) is not Tensor for _, p in weights):
            return Evidence(False, "some of its weights could not be read")
        for name, p in weights:
            if (module, name) in alike:
                noted[module, name] = p.shape, _size(p)
        for name, p in weights:
            if _is_matrix(p):
                found: Iterable[_Trace] = _drawn(module, name, p)
                own.matrices += p.numel() >= FEWEST_ENTRIES
            else:
                found = _against_start(p, [q for _, q in weights if q is not p])
                own.vectors += 1
            for trace in found:
                if trace.share >= 1:
                    return Evidence(False, f"{type(module).__name__}.{name} of this block {trace.words}")
                own.traces.append((trace, _is_matrix(p)))
    return own if own.matrices else Evidence(False, "it has too few weights to tell")


def _beside_others(
    own: _Own, anatomy: Anatomy, number: int, sizes: Sizes, outside: Callable[[], str | None]
) -> Evidence:
    """The same, beside what the other blocks and the weights outside of them say."""
    against = _against_alike([sizes(other) for other in range(len(anatomy.blocks)) if other != number], sizes(number))
    if against is not None:
        return Evidence(False, against)
    if own.traces:
        elsewhere = outside()
        if elsewhere is not None:
            return Evidence(False, f"training has passed over this block, while {elsewhere}")
        in_vectors = max((t.moved for t, is_matrix in own.traces if not is_matrix), default=0.0)
        in_matrices = max((t.moved for t, is_matrix in own.traces if is_matrix), default=0.0)
        return Evidence(
            True,
            f"{HARDLY_TRAINED}: gains and biases have moved by at most {in_vectors:.2g} of their scale, and at most "
            f"{in_matrices:.2g} of a weight matrix is more than a random draw",
        )
    still = f"{own.vectors} gains and biases are where they start, " if own.vectors else ""
    return Evidence(
        True, f"{still}{own.matrices} weight matrices are independent random draws, queries and keys as in every block"
    )


def _learnt_outside(model: nn.Module, anatomy: Anatomy) -> str | None:
    """A matrix outside the blocks whose energy is mostly in directions that a random one does not have. A table whose rows all have
    one size was not drawn but computed, as sinusoids are, and says nothing."""
    inside = tuple(f"{block.module.name}." for block in anatomy.blocks)
    for path, _ in model.named_parameters():
        if path.startswith(inside):
            continue
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        p = at_hand(module, name)
        if not _is_matrix(p) or p.is_meta or not p.is_floating_point():
            continue
        if type(p.data) is not Tensor or p.numel() < FEWEST_ENTRIES or not bool(p.isfinite().all()):
            continue
        share = _once(module, name, p, _learnt)
        if share > LEARNT:
            return f"{share:.2g} of the energy of {path} is in directions that training gave it"
    return None


def _learnt(p: Tensor) -> float:
    """The share of a matrix's energy that is in directions training gave it; 0 for one that was not drawn."""
    w = _in_scale(p.flatten(1))
    size, energy = _size(w), _row_energies(w)
    if size == 0 or float(energy.std()) < 0.1 * size**2 / math.sqrt(w.shape[1]):
        return 0.0
    return _beyond_random(w, size)


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


def _against_start(p: Tensor, beside: list[Tensor]) -> Iterator[_Trace]:
    """What speaks against a vector being as it was made: all entries equal, or drawn as the weight beside it is. How far it has
    moved is told beside its own mean, the vectors beside it, or what the weight beside it puts out for inputs of unit variance,
    whichever is largest."""
    p = p.double().flatten()
    if bool((p == p[0]).all()):
        return
    size = float(p.square().mean().sqrt())
    if not math.isfinite(size):
        yield _Trace(1.0, 1.0, "is not finite")
        return
    scales = [abs(float(p.mean()))]
    for each in beside:
        w = each.double()
        scale = float(w.square().mean().sqrt())
        if not _is_matrix(each):
            scales.append(scale)
            continue
        scales.append(scale * math.sqrt(w.numel() / len(p)))
        close = abs(size / scale - 1) <= DEVIATIONS * 0.45 / math.sqrt(len(p)) if scale else False
        if close and float(p.abs().max()) <= math.sqrt(3) * scale * (1 + DEVIATIONS * 0.45 / math.sqrt(w.numel())):
            return
    moved = float(p.std(correction=0)) / max(*scales, 1e-300)
    yield _Trace(moved / MOVED, moved, f"was moved from where such a vector starts, by {moved:.2g} of its scale")


_remembered: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], tuple[torch.Size, Marks, Any]]] = (
    weakref.WeakKeyDictionary()
)  # by module, name of the weight and question


def _drawn(module: nn.Module, name: str, p: Tensor) -> list[_Trace]:
    """`_against_drawn` up to the first that settles it."""
    return _once(module, name, p, _traces)


def _once(module: nn.Module, name: str, p: Tensor, question: Callable[[Tensor], Answer]) -> Answer:
    """What a weight says, once for each state of it."""
    if p.element_size() < 2:  # in eight bits nothing can be marked
        return question(p)
    known, marks = _remembered.setdefault(module, {}), weight_marks(p.flatten(1))
    key = name, question.__name__
    last = known.get(key)
    if last is None or last[0] != p.shape or not are_alike(last[1], marks):
        last = known[key] = p.shape, marks, question(p)
    answer: Answer = last[2]
    return answer


def _traces(p: Tensor) -> list[_Trace]:
    return _until_settled(_against_drawn(p))


def _until_settled(traces: Iterator[_Trace]) -> list[_Trace]:
    found = []
    for trace in traces:
        found.append(trace)
        if trace.share >= 1:
            break
    return found


def _against_drawn(p: Tensor) -> Iterator[_Trace]:
    """What speaks against independent draws from one distribution no wider than a Gaussian, the cheapest first."""
    if p.numel() < FEWEST_ENTRIES or bool((p == p.flatten()[0]).all()):
        return
    w = _in_scale(p.flatten(0, -2) if p.ndim > 2 and p.shape[0] < p.shape[-1] else p.flatten(1))
    count, size = w.numel(), _size(w)
    if not math.isfinite(size):
        yield _Trace(1.0, 1.0, "is not finite")
        return
    mean = abs(float(w.mean())) / size
    if mean > DEVIATIONS / math.sqrt(count):
        yield _Trace(mean / MOVED, mean, "has a mean")
    tail = _mean_power(w, 4) / size**4
    slack = DEVIATIONS * math.sqrt(24 / count)
    beyond = max(UNIFORM - slack - tail, tail - GAUSSIAN - slack)
    if beyond > 0:
        yield _Trace(beyond / MOVED, beyond, f"is not one random draw (fourth moment {tail:.3g}, a Gaussian has 3)")
    for each, name in ((w, "rows"), (w.T, "columns")):
        energy = _row_energies(each) / size**2
        if len(energy) <= 2:
            continue
        chance = (tail - 1) / each.shape[1]
        excess = float(energy.var()) - chance * (1 + DEVIATIONS * math.sqrt(2 / (len(energy) - 1)))
        if excess > 0:
            spread = math.sqrt(excess)
            yield _Trace(spread / MOVED, spread, f"has {name} of more different sizes than chance gives")
    structure = _beyond_random(w, size)
    if structure > 0:
        yield _Trace(structure / LEARNT, structure, "has directions larger than a random matrix has")


def _in_scale(w: Tensor) -> Tensor:
    """A matrix over its largest entry, in single precision if it is not in double. Powers of small weights would underflow."""
    w = _computable(w)
    low, high = (float(end) for end in w.aminmax())
    return w / (max(-low, high) or 1.0)


def _computable(w: Tensor) -> Tensor:
    """In single precision, or double where it was stored so: chance leaves these figures three digits."""
    return w if w.dtype == torch.float64 else w.float()


def _size(weight: Tensor) -> float:
    """The root mean square of its entries."""
    return math.sqrt(_mean_power(_computable(weight), 2))


def _mean_power(w: Tensor, order: int) -> float:
    """The mean of |entry|^order: rows in the format at hand, and their sum in double precision. In single precision ten million
    fourth powers add up to a hundredth too little."""
    rows = torch.linalg.vector_norm(w.flatten(1) if w.ndim > 1 else w[None], order, dim=-1)
    return float(rows.double().pow(order).sum()) / w.numel()


def _row_energies(w: Tensor) -> Tensor:
    """The mean square of each row."""
    return torch.linalg.vector_norm(w, dim=-1).double().square() / w.shape[-1]


def _beyond_random(w: Tensor, size: float) -> float:
    """The share of the energy in singular values above the edge of a random matrix of this size: sqrt(m) + sqrt(n) entries, with
    three widths of the Tracy-Widom law to spare. All singular values are looked for only where the largest is above it."""
    edge = size * (math.sqrt(w.shape[0]) + math.sqrt(w.shape[1])) * (1 + 3 * min(w.shape) ** (-2 / 3))
    if _largest_singular_value(w) <= edge:
        return 0.0
    short = w if w.shape[0] <= w.shape[1] else w.T
    energies = torch.linalg.eigvalsh((short @ short.T).double()).clamp(min=0)
    return float(energies[energies > edge**2].sum() / energies.sum())


def _largest_singular_value(w: Tensor) -> float:
    """From below, by power iteration."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(w.shape[1], generator=generator, dtype=torch.float64).to(w)
    for _ in range(POWER_STEPS):
        v = w.T @ (w @ v)
        v = v / v.norm().clamp(min=1e-30)
    return float((w @ v).norm())


def _against_alike(others: list[list[tuple[torch.Size, float]]], mine: list[tuple[torch.Size, float]]) -> str | None:
    """Whether the query and key weights of a block are of another size than the same ones of most other blocks, by more than
    chance and a short training give."""
    others = [theirs for theirs in others if [shape for shape, _ in theirs] == [shape for shape, _ in mine]]
    for place, (shape, size) in enumerate(mine):
        slack = MOVED + DEVIATIONS * math.sqrt((GAUSSIAN - 1) / (2 * shape.numel()))
        differ = sum(abs(size - theirs[place][1]) > slack * max(size, theirs[place][1]) for theirs in others)
        if 2 * differ > len(others):
            return "its query and key weights are of another size than those of other blocks"
    return None


def _query_key_weights(model: nn.Module, block: Block) -> list[tuple[nn.Module, str]]:
    calls = [c for part in block.parts for call in part.attention for c in (call.queries, call.keys)]
    names = dict.fromkeys(c.name for c in calls if isinstance(c, ModuleCall))
    modules = [model.get_submodule(name) for name in names]
    return [(m, name) for m in modules for name, p in m.named_parameters(recurse=False) if _is_matrix(p)]
