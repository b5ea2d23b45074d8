"""What every part does in a probe pass: enough to tell a part that does nothing from one that does little.

At each residual addition: how large the update is beside the stream, how far it varies over tokens and sequences, and how many
directions it has. At each attention call: how far queries, keys and values vary, what each head adds, and which heads are copies.
At each MLP: which hidden units never vary. At each embedding: whether other token ids make other tokens.

Everything is the *largest* over all real tokens of all sequences, so that one token at which a part acts is enough to clear it.
Only a few numbers a part are kept.

When not to use it: to ask how much a part matters. A small update can matter, and a large one need not.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.summands import summand
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Part, Place, Residual, Stack
from uncollapse.errors import UncollapseError
from uncollapse.interventions import without
from uncollapse.probe.attention import AttentionStatistics
from uncollapse.probe.attention_calls import AttentionRows
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.observing import unasked
from uncollapse.probe.projections import projection_matrix
from uncollapse.probe.sizes import as_they_are, norms, single, within_reach
from uncollapse.records.diagnosis import EmbeddingRecord, PartRecord
from uncollapse.restoring import restoring

SKETCH = 8  # random directions in which the directions of an update are counted
WIDEST_UNITS = 8192  # weights that are no plain parameters are read with one row a hidden unit
FEWEST_TOKENS = 4
SKETCHED = 1e-2  # below this share of a second direction, a sketch in single precision says little
COARSEST = torch.finfo(torch.bfloat16).eps  # the rounding of the coarsest format that a model computes in
MASK_VALUES = 2  # integers with no more values are masks or segments, and no ids


@dataclass
class Varying:
    """How far vectors differ from the first one that was seen, and how large they are: running maxima of norms, [part]."""

    first: Tensor | None = None
    apart: Tensor | None = None
    size: Tensor | None = None
    energy: Tensor | None = None
    entries: int = 0
    tokens: int = 0

    def add(self, x: Tensor, sizes: Tensor, sound: Tensor) -> None:
        """x: [sequence, part, token, width], sizes: their norms; sound [sequence, token]: which tokens count."""
        count = int(sound.sum())
        if not count:
            return
        if self.first is None or self.apart is None or self.size is None:
            sequence, token = sound.nonzero()[0].tolist()
            self.first = x[sequence, :, token].clone()
            self.apart = self.size = self.energy = x.new_zeros(x.shape[1], dtype=torch.float64)
        if self.first.shape != (x.shape[1], x.shape[3]):
            return
        sizes = sizes.where(sound[:, None], 0)
        self.apart = torch.maximum(self.apart, _farthest(x, self.first.to(x)[:, None], sound))
        self.size = torch.maximum(self.size, sizes.amax((0, 2)))
        self.energy = sizes.square().sum((0, 2)) + (0 if self.energy is None else self.energy)
        self.entries += count * x.shape[3]
        self.tokens += count

    def start_from(self, known: Varying) -> None:
        """Count distances from the first vector that `known` saw."""
        if known.first is not None:
            self.first = known.first
            self.apart = self.size = self.energy = known.first.new_zeros(len(known.first), dtype=torch.float64)

    def typical(self) -> float | None:
        """The root mean square of an entry, over all parts."""
        return None if self.energy is None or not self.entries else float((self.energy.mean() / self.entries).sqrt())

    def share(self) -> list[float] | None:
        """The largest distance over the largest size, part by part; 0 for vectors that are zero. None if nothing was seen."""
        if self.apart is None or self.size is None or self.tokens < FEWEST_TOKENS:
            return None
        share = torch.where(self.size > 0, self.apart / self.size, 0.0)
        return share.tolist()


@dataclass
class Directions:
    """In how many directions vectors vary: the Gram matrix of their random projections, with 1 beside each vector."""

    random: Tensor | None = None
    gram: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor, sizes: Tensor, sound: Tensor) -> None:
        """x: [sequence, token, width], sizes: their norms; sound [sequence, token]: which tokens count."""
        some = sizes[sound & (sizes > 0)]
        if not len(some):
            return
        usual = some.median()
        if self.random is None:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(x.shape[-1], SKETCH, generator=generator, dtype=torch.float64)
            self.random = (drawn / math.sqrt(SKETCH)).T.contiguous().to(x.device)  # in rows: a third of the time
        gram = self._of(single(x), sizes, usual, sound)
        if x.dtype != torch.float64 and not _beyond_one(gram) > SKETCHED:
            gram = self._of(x.double(), sizes, usual, sound)
        self.gram = gram if self.gram is None else self.gram + gram
        self.tokens += int(sound.sum())

    def _of(self, x: Tensor, sizes: Tensor, usual: Tensor, sound: Tensor) -> Tensor:
        assert self.random is not None
        sketch = nn.functional.linear(x, self.random.to(x)).double()
        rows = torch.cat([usual.expand(*sizes.shape, 1), sketch], -1)
        rows = rows / torch.maximum(sizes, usual).unsqueeze(-1)  # one huge token must not hide the others
        rows = torch.where(sound.unsqueeze(-1), rows, 0).flatten(0, 1)
        return (rows.mT @ rows).cpu()

    def beyond_one(self) -> float | None:
        """sigma_3 / sigma_1 of (1, x): 0 where the vectors lie on one straight line, so that one number says all of each."""
        if self.gram is None or self.tokens < FEWEST_TOKENS:
            return None
        return _beyond_one(self.gram) if bool(self.gram.any()) else None


def _beyond_one(gram: Tensor) -> float:
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    return float((values[-3] / values[-1]).sqrt())


@dataclass
class Units:
    """The hidden units of an MLP: smallest and largest activation of each, and whether it is ever exactly 0."""

    least: Tensor | None = None
    most: Tensor | None = None
    zeros: Tensor | None = None
    unread: Tensor | None = None  # no weight of the output map reads them
    tokens: int = 0

    def add(self, hidden: Tensor) -> bool:
        """hidden: [token, unit]. False, and nothing is noted, where not all of it is finite."""
        if not len(hidden):
            return True
        low, high = hidden.amin(0).double(), hidden.amax(0).double()
        if not bool((low.isfinite() & high.isfinite()).all()):
            return False
        if self.least is None or self.most is None:
            self.least, self.most, self.zeros = low, high, torch.zeros_like(low, dtype=torch.bool)
        elif self.least.shape == low.shape:
            self.least, self.most = torch.minimum(self.least, low), torch.maximum(self.most, high)
        # Which units are ever 0 matters only as long as one of them always is.
        if (
            self.zeros is not None
            and self.zeros.shape == low.shape
            and not bool((self.least.abs() + self.most.abs()).all())
        ):
            self.zeros = self.zeros | (hidden.abs().amin(0) == 0)
        self.tokens += len(hidden)
        return True

    def has_settled(self) -> bool:
        """Whether every unit has varied by so much that no further token can make it a dead one: smallest and largest only move
        apart, and each step adds no more to their size than to their distance."""
        if self.least is None or self.most is None or self.tokens < FEWEST_TOKENS:
            return False
        size = torch.maximum(self.least.abs(), self.most.abs())
        return bool((self.most - self.least > 4 * COARSEST * size).all())

    def dead(self, epsilon: float) -> list[int] | None:
        """The units that carry nothing: constant at another value than 0, or read by no weight. A unit that is always 0 counts
        only where no other unit is ever 0: a ReLU cuts units off for a text that another text wakes."""
        if self.least is None or self.most is None or self.zeros is None or self.tokens < FEWEST_TOKENS:
            return None
        size = torch.maximum(self.least.abs(), self.most.abs())
        constant = (self.most - self.least <= 4 * epsilon * size) & (size > 0)
        silent = size == 0
        alive = self.zeros[~silent]
        gone = constant | silent if alive.numel() and not bool(alive.any()) else constant
        if self.unread is not None and self.unread.shape == gone.shape:
            gone = gone | self.unread.to(gone.device)
        return gone.nonzero().flatten().tolist()


@dataclass
class PartActivity:
    """Running figures of one part. `update_size` and `head_output` are relative to the stream, `block_change` is how much the
    whole block changes it. `copies` are pairs of heads that were equal in every batch so far (None: no batch yet)."""

    block: int
    kind: str
    stack: Literal["encoder", "decoder"] | None
    heads: int | None = None
    key_value_heads: int | None = None
    update_size: float | None = None
    update: Varying = field(default_factory=Varying)
    directions: Directions = field(default_factory=Directions)
    stream: Varying = field(default_factory=Varying)
    stream_directions: Directions = field(default_factory=Directions)
    block_change: float | None = None
    queries: Varying = field(default_factory=Varying)
    keys: Varying = field(default_factory=Varying)
    values: Varying = field(default_factory=Varying)
    logit_range: Tensor | None = None  # [head]
    head_output: Tensor | None = None  # [head]
    copies: set[tuple[int, int]] | None = None
    units: Units = field(default_factory=Units)
    epsilon: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)

    def varying(self) -> list[Varying]:
        """All that says how far vectors of this part vary."""
        return [self.update, self.stream, self.queries, self.keys, self.values]

    def start_from(self, known: PartActivity) -> None:
        """Count distances from the first vectors that `known` saw of this part."""
        for own, other in zip(self.varying(), known.varying(), strict=True):
            own.start_from(other)


@dataclass
class EmbeddingActivity:
    """Whether the tokens that enter a stack differ where their ids do: `apart` is the largest distance between two tokens at one
    position with different ids, over their size. None where no such pair was met."""

    stack: Literal["encoder", "decoder"] | None
    block: int
    apart: float | None = None
    pairs: int = 0
    epsilon: float = 0.0


class Activity:
    """Observes what the parts do in one probe pass; an `Observer`. `sublayers`: each attention part with its statistics. `attend`
    and `contributed` are told of them, by number, what they read, mix and write."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        sublayers: Sequence[tuple[Part, AttentionStatistics]],
        clouds: Clouds,
        is_own: Callable[[], bool],
    ) -> None:
        self.model, self.anatomy, self.is_own = model, anatomy, is_own
        self._tokens_of, self._clouds_of_stream = clouds.tokens_of, clouds
        self.parts: list[PartActivity] = []
        self.embeddings: list[EmbeddingActivity] = []
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        # By module and run: where hidden layers are read.
        self._entering: dict[str, dict[int, Callable[..., None]]] = {}
        self._of: dict[tuple[int, int], PartActivity] = {}
        self._runs: dict[str, int] = {}
        self._sizes: dict[int, Tensor] = {}  # by block, of the last one only: norms of the stream that entered it
        self._updates: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._batch: Mapping[str, Any] = {}
        self._looked_up: list[Tensor] = []  # what embedding tables were given in this batch
        self._removed = removed = without.is_ablated(model)
        first = {stack.blocks[0]: stack for stack in anatomy.stacks}
        for number, block in enumerate(anatomy.blocks):
            for index, part in enumerate(block.parts):
                each = PartActivity(number, part.kind, block.stack)
                self._of[number, index] = each
                self.parts.append(each)
                if not removed and part.writes is not None and part.kind == "mlp":
                    meet = functools.partial(self._measure_units, each, part)
                    self._entering.setdefault(part.writes.name, {})[part.writes.call] = meet
            if number in first:
                embedding = EmbeddingActivity(block.stack, number)
                self.embeddings.append(embedding)
                self.streams.append((block.entry, functools.partial(self._embedded, embedding, number)))
            if removed:
                continue
            self.streams.append((block.exit, functools.partial(self._leave, number)))
            for residual in block.residuals:
                self._watch(number, residual)
        self._attending: list[PartActivity] = []  # by the number of the attention sublayer
        for part, statistics in sublayers:
            index = next(i for i, p in enumerate(anatomy.blocks[statistics.block].parts) if p is part)
            each = self._of[statistics.block, index]
            each.heads, each.key_value_heads = statistics.call.heads, statistics.call.key_value_heads
            self._attending.append(each)

    def _watch(self, number: int, residual: Residual) -> None:
        alone = [leaves for node in residual.additions for leaves in node.leaves if len(leaves) == 1]
        summands = {part: alone.count(frozenset({part})) for part in residual.parts}
        for node in residual.additions:
            sides = [next(iter(leaves)) if len(leaves) == 1 else None for leaves in node.leaves]
            self.handlers[node.point] = functools.partial(self._add, number, sides, summands)

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch comes."""
        self._batch = batch
        self._looked_up.clear()
        self._runs.clear()
        self._sizes.clear()
        self._updates.clear()

    def let_go(self) -> None:
        """Drop what is bound to this object and would keep it, and the model with it, alive in a cycle."""
        self.streams.clear()
        self.handlers.clear()
        self._entering.clear()
        self._batch = {}
        self._looked_up.clear()

    # Hooks ----------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks for the passes inside. Install them inside `intercepted`: operations of theirs must not count as the model's."""
        with restoring() as changes:
            for module in self.model.modules():
                if isinstance(module, nn.Embedding):
                    changes.hook(module, "forward_pre", self._look_up, with_kwargs=True)
            for name in self._entering:
                module, enter = self.model.get_submodule(name), functools.partial(self._at_module, name)
                changes.hook(module, "forward_pre", enter, with_kwargs=True)
            yield

    def _look_up(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_own():
            given = next(tensors_in([args, kwargs]), None)
            if given is not None and given.ndim == 2:
                self._looked_up.append(given)

    def _at_module(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_own():
            return
        run = self._runs.get(name, 0)
        self._runs[name] = run + 1
        if run in self._entering[name]:
            given = next(tensors_in([args, kwargs]))
            with unasked([given, *module.parameters()]), measuring(given):
                self._entering[name][run](module, given)

    # Streams --------------------------------------------------------------------------------------------------------
    def _clouds(self, number: int, what: str, *several: Tensor) -> tuple[list[Tensor], Tensor] | None:
        """Tensors with the same tokens as [sequence, token, width], and which of these are real; None where that cannot be told."""
        clouds: list[Tensor] = []
        mask = None
        for x in several:
            found = self._tokens_of(number, x, what)
            if found is None or (clouds and found[0].shape[:2] != clouds[0].shape[:2]):
                return None
            clouds.append(found[0])
            mask = found[1]
        if mask is None:
            return clouds, torch.ones(clouds[0].shape[:2], dtype=torch.bool, device=clouds[0].device)
        return clouds, mask.to(clouds[0].device)

    def _leave(self, number: int, stream: Tensor) -> None:
        before = self._clouds_of_stream.entering(number)
        if not self.is_own() or before is None or before.shape != stream.shape:
            return
        with measuring(stream):
            found = self._clouds(number, f"block {number}", before, stream)
            if found is None:
                return
            (x, y), real = found
            size = self._sizes_entering(number)
            change = None if size is None else _largest(norms(single(y) - single(x)), size, real)
        for each in self.parts:
            if each.block == number:
                each.block_change = _greater(each.block_change, change)

    def _sizes_entering(self, number: int) -> Tensor | None:
        """The norms [sequence, token] of the stream that entered a block."""
        if number not in self._sizes:
            entered = self._clouds_of_stream.entering(number)
            found = None if entered is None else self._tokens_of(number, entered, f"block {number}")
            if found is None:
                return None
            self._sizes = {number: norms(found[0])}
        return self._sizes[number]

    def _embedded(self, embedding: EmbeddingActivity, number: int, stream: Tensor) -> None:
        """Compare the tokens at one position of two sequences, where their ids differ."""
        if not self.is_own():
            return
        stack = self.anatomy.stacks[self.anatomy.stack_of(number)]
        with measuring(stream):
            found = self._tokens_of(number, stream, "the embedding")
            if found is None:
                return
            cloud, mask = found
            ids = self._ids(stack, cloud.shape[:2])
            if ids is None:
                return
            ids = ids.to(cloud.device)
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(cloud.device)
            differ = (ids != ids.roll(1, 0)) & real & real.roll(1, 0)
            if not bool(differ.any()):
                return
            gap = norms(single(cloud) - single(cloud).roll(1, 0))
            size = norms(torch.maximum(cloud.abs(), cloud.abs().roll(1, 0)))
            embedding.apart = _greater(embedding.apart, _largest(gap, size, differ))
            embedding.pairs += int(differ.sum())
            embedding.epsilon = torch.finfo(stream.dtype).eps

    def _ids(self, stack: Stack, shape: Sequence[int]) -> Tensor | None:
        """The token ids [sequence, token] of a stack. The proof finds them by their influence, and ids without any influence are
        what is looked for here: then it is what an embedding table was given, unless that counts positions."""
        ids = self._batch.get(stack.ids or "")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            ids = ids.T if stack.ids_transposed else ids
            return ids if ids.shape == tuple(shape) else None
        for given in self._looked_up:
            if given.shape == tuple(shape) and len(given.unique()) > MASK_VALUES:
                steps = given.diff(dim=-1)
                if not bool(((steps == 0) | (steps == 1)).all()):
                    return given
        return None

    # Updates --------------------------------------------------------------------------------------------------------
    def _add(
        self,
        number: int,
        sides: list[int | None],
        summands: dict[int, int],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Look at the operands of one addition before one of them is overwritten; then let it happen."""
        if self.is_own():
            given = list(tensors_in([args, kwargs]))
            with unasked(given), measuring(given[0]):
                brought = {s: summand(function, args, kwargs, i) for i, s in enumerate(sides) if s is not None}
                for side in brought.keys() - {STREAM}:
                    self._meet(number, side, brought[side], brought.get(STREAM), summands[side])
        return function(*args, **kwargs)

    def _meet(self, number: int, side: int, update: Tensor, stream: Tensor | None, summands: int) -> None:
        each = self._of[number, side]
        each.epsilon = torch.finfo(update.dtype).eps
        seen, total = 1, update
        if (number, side) in self._updates:
            before, known = self._updates.pop((number, side))
            if known.shape != update.shape:
                return
            seen, total = before + 1, known + update
        if seen < summands:
            self._updates[number, side] = (seen, total.clone())
            return
        beside = self._clouds_of_stream.entering(number) if stream is None else stream
        if beside is None or beside.shape != total.shape:
            each.reasons["update"] = "the stream that it is added to was not met"
            return
        found = self._clouds(number, f"block {number}", beside, total)
        if found is None:
            each.reasons["update"] = "the tokens here cannot be told apart, or they are not those of the stream"
            return
        (x, u), real = found
        of_stream, of_update = norms(x), norms(u)
        sound = real & of_stream.isfinite() & of_update.isfinite()
        each.update_size = _greater(each.update_size, _largest(of_update, norms(single(x) + single(u)), sound))
        each.update.add(u.unsqueeze(1), of_update.unsqueeze(1), sound)
        each.stream.add(x.unsqueeze(1), of_stream.unsqueeze(1), sound)
        if each.kind == "mlp" and x.shape[-1] > 2:
            each.directions.add(u, of_update, sound)
            each.stream_directions.add(x, of_stream, sound)

    def _measure_units(self, each: PartActivity, part: Part, module: nn.Module, given: Tensor) -> None:
        if each.units.has_settled():
            return
        found = self._tokens_of(each.block, given, "the hidden layer")
        if found is None:
            each.reasons["dead_units"] = "the tokens of its hidden layer cannot be told apart"
            return
        cloud, mask = found
        is_first = each.units.least is None
        for some in (slice(0, 1), slice(1, None)):  # one sequence mostly says it
            rows = cloud[some].flatten(0, 1)
            if mask is not None:
                rows = rows.index_select(0, mask[some].to(rows.device).flatten().nonzero().squeeze(-1))
            if not each.units.add(rows):
                each.units.add(rows[_finite_tokens(rows)])
            if each.units.has_settled():
                break
        if is_first and (given.shape[-1] <= WIDEST_UNITS or hasattr(module, "weight")):
            with contextlib.suppress(UncollapseError):  # then it is not known which units are read, only what they do
                each.units.unread = (projection_matrix(module, given) == 0).all(-1).cpu()

    # Attention ------------------------------------------------------------------------------------------------------
    def attend(
        self, index: int, calls: Sequence[AttentionRows], query_mask: Tensor | None, key_mask: Tensor | None
    ) -> None:
        """One pass through an attention's calls, their heads one after the other."""
        each = self._attending[index]

        def joined(name: str) -> Tensor | None:
            several = [t for call in calls if (t := getattr(call, name)) is not None]
            if len(several) < len(calls) or len({(t.shape[0], *t.shape[2:]) for t in several}) != 1:
                return None
            return several[0] if len(several) == 1 else torch.cat(several, 1)

        for varying, name, mask in (
            (each.queries, "queries", query_mask),
            (each.keys, "keys", key_mask),
            (each.values, "values", key_mask),
        ):
            operand = joined(name)
            if operand is not None:
                sizes = norms(operand)
                varying.add(operand, sizes, _sound(sizes.amax(1), mask))
        logit_range, mixed = joined("logit_range"), joined("mixed")
        if logit_range is not None:
            largest = _by_head(logit_range.unsqueeze(-1), query_mask).nan_to_num(0, 0, 0).amax((-2, -1)).cpu()
            each.logit_range = largest if each.logit_range is None else torch.maximum(each.logit_range, largest)
        known = [call.rows for call in calls if call.rows is not None]
        if mixed is None or len(known) < len(calls) or each.copies == set():
            return
        patterns = [[getattr(rows, name) for rows in known] for name in ("entropy", "max_logit")]
        rows = [torch.cat(figures, 1) for figures in patterns if all(f is not None for f in figures)]
        found = self._equal_heads(mixed, rows, query_mask)
        each.copies = found if each.copies is None else each.copies & found

    @staticmethod
    def _equal_heads(mixed: Tensor, rows: Sequence[Tensor], mask: Tensor | None) -> set[tuple[int, int]]:
        """The pairs of heads with the same output and the same pattern, to rounding, at every token."""
        close = 64 * torch.finfo(torch.float32).eps
        sizes = norms(mixed) if mask is None else norms(mixed).where(mask.to(mixed.device)[:, None], 0)
        squares = sizes.square().sum(-1).T  # [head, sequence]
        energy = squares.sum(-1)
        # A first look: equal heads have equal energies in every sequence. Each pair is compared below.
        apart = (squares.sqrt()[:, None] - squares.sqrt()).abs().amax(-1)
        near = ~(apart > 1e-4 * energy.sqrt()[:, None]) & (energy > 0)[:, None]
        found = set()
        for g, h in near.triu(1).nonzero().tolist():
            first, second = _by_head(mixed[:, [g, h]], mask).double()
            if not bool((first - second).abs().max() <= close * first.abs().max()):
                continue
            same = True
            for figure in rows:
                a, b = _by_head(figure.unsqueeze(-1)[:, [g, h]], mask).double().nan_to_num(0, 0, 0)
                same &= bool(((a - b).abs() <= close * (1 + a.abs())).all())
            if same:
                found.add((g, h))
        return found

    def contributed(self, index: int, sizes: Tensor, mask: Tensor | None) -> None:
        """What each head adds to each token, its size [sequence, head, token], beside the stream that entered the block."""
        each = self._attending[index]
        size = None if self._removed else self._sizes_entering(each.block)
        if size is None or size.shape != sizes[:, 0].shape:
            return
        ratio = torch.where(sizes > 0, sizes / size[:, None], 0.0)
        sound = _sound(ratio.amax(1), mask)
        if bool(sound.any()):
            largest = ratio.where(sound[:, None], 0).amax((0, 2)).cpu()
            each.head_output = largest if each.head_output is None else torch.maximum(each.head_output, largest)


def _farthest(x: Tensor, origin: Tensor, sound: Tensor) -> Tensor:
    """The largest distance of the vectors [sequence, part, token, width] from one of each part, [part] in float64."""

    def of(x: Tensor) -> Tensor:
        return as_they_are(x - origin.to(x)).where(sound[:, None], 0).amax((0, 2)).double()

    found = of(single(x))
    return found if x.dtype == torch.float64 or within_reach(found) else of(x.double())


def _sound(sizes: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens [sequence, token] are real and finite."""
    finite = sizes.isfinite()
    return finite if mask is None else finite & mask.to(finite.device)


def _by_head(operand: Tensor, mask: Tensor | None) -> Tensor:
    """[sequence, head, token, width] as [head, real token, width]."""
    x = operand.transpose(0, 1)
    return x.flatten(1, 2) if mask is None else x[:, mask.to(x.device)]


def _largest(part: Tensor, whole: Tensor, real: Tensor) -> float | None:
    """The largest ratio over the tokens that are real and finite; a part of nothing is nothing."""
    ratio = torch.where(part > 0, part / whole, 0.0)
    # Less than any ratio where none counts: a maximum costs less than a choice.
    largest = float(ratio.where(real & part.isfinite() & whole.isfinite(), -1.0).max()) if ratio.numel() else -1.0
    return None if largest < 0 else largest


def _greater(known: float | None, new: float | None) -> float | None:
    return new if known is None else known if new is None else max(known, new)


# Records ------------------------------------------------------------------------------------------------------------


def part_records(parts: Sequence[PartActivity]) -> list[PartRecord]:
    """One record for each part, in the order of blocks and parts."""
    return [_part_record(each) for each in parts]


def _part_record(each: PartActivity) -> PartRecord:
    attends = each.kind in {"attention", "cross"}
    kind: Literal["self", "cross"] = "cross" if each.kind == "cross" else "self"
    update, stream = each.update.share(), each.stream.share()
    return PartRecord(
        block=each.block,
        sublayer="attention" if attends else "mlp",
        stack=each.stack,
        kind=kind if attends else None,
        heads=each.heads,
        key_value_heads=each.key_value_heads,
        epsilon=each.epsilon,
        tokens=each.update.tokens,
        update_size=each.update_size,
        update_variation=None if update is None else update[0],
        update_directions=each.directions.beyond_one(),
        stream_variation=None if stream is None else stream[0],
        stream_directions=each.stream_directions.beyond_one(),
        block_change=each.block_change,
        query_variation=each.queries.share(),
        key_variation=each.keys.share(),
        value_variation=each.values.share(),
        value_size=None if each.values.size is None else each.values.size.tolist(),
        typical_value=each.values.typical(),
        logit_range=None if each.logit_range is None else each.logit_range.tolist(),
        head_output=None if each.head_output is None else each.head_output.tolist(),
        copied_heads=None if each.copies is None else [list(pair) for pair in sorted(each.copies)],
        hidden_units=None if each.units.least is None else len(each.units.least),
        dead_units=each.units.dead(max(each.epsilon, torch.finfo(torch.float64).eps)),
        unavailable=dict(each.reasons),
    )


def embedding_records(embeddings: Sequence[EmbeddingActivity]) -> list[EmbeddingRecord]:
    """One record for each stack."""
    return [EmbeddingRecord(e.stack, e.block, e.apart, e.pairs, e.epsilon) for e in embeddings]


def _finite_tokens(cloud: Tensor) -> Tensor:
    """Which tokens [sequence, token] have no NaN or infinity. The sum of a row shows it at less cost, unless it overflows."""
    finite = cloud.sum(-1).isfinite()
    return finite if bool(finite.all()) else cloud.isfinite().all(-1)
