"""What every sublayer adds to the stream and what every norm does to it, as running statistics during a probe pass.

Updates are observed at their residual addition, just before the model adds them, and norms when their module is called.
Nothing is changed, and only running sums are kept beyond a batch. For each update: how large it is relative to the stream, how
much of it lies outside the span of the sequence's own embeddings (compared with the updates of other sequences), how much of
it cannot be explained by an affine map of the MLP's input, and how many directions the hidden layer of the MLP uses. For each
norm: the affine rank before and after, and the three brackets of the change (`normalization.rank_change`). Its gamma, beta and
eps are found by what it does, not by their names.

When not to use it: inside `uncollapse.without`. A removed addition cannot be observed, so everything is unavailable.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, in_turn
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.summands import summand
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Block, ModuleCall, Norm, NormPiece, Part, Place, Residual
from uncollapse.interventions import without
from uncollapse.measures import geometry
from uncollapse.measures.affine_fit import HELD_OUT_EVERY, AffineFit
from uncollapse.measures.normalization import Ranks
from uncollapse.measures.running import Running
from uncollapse.probe.norm_law import Images, NormLaw, norm_law
from uncollapse.probe.observing import unasked
from uncollapse.probe.sizes import norms
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import NormRecord, UpdateRecord
from uncollapse.restoring import restoring

Stack = Literal["encoder", "decoder"] | None
TokensOf = Callable[[int, Tensor, str], tuple[Tensor, Tensor | None] | None]  # block, values, what: cloud, real tokens

UPDATE_MEASURES = ["relative_norm", "out_of_span_energy", "null_out_of_span_energy", "hidden_effective_rank"]
NORM_MEASURES = ["affine_rank_before", "affine_rank_after", "one in X", "scales in image", "kernel"]
NULL_SEQUENCES = 4  # how many other sequences of the batch are compared with the span of a sequence
LITTLE = 1e-3  # below this share outside of a span, what is inside is not taken from the whole
MUCH = 0.2  # above this share, it may be in single precision
WIDEST_FIT = 1024  # beyond, the moments of the affine fit would no longer be small

_UNDEFINED = "not finite or undefined on this text"
_REMOVED = "not measured while a component is removed"
_SEVERAL = "its stream is several side by side: what a sublayer adds to each lies in the span of none of them alone"
_NO_TOKENS = "the tokens here cannot be told apart, or they are not those of the stream"


@dataclass
class UpdateStatistics:
    """Running statistics of what one part adds: `values` as in `UPDATE_MEASURES`; `fit`, of an MLP whose input is met, with
    the number of sequences that `scored` it. `reasons` says of a measure why it is missing."""

    block: int
    sublayer: Literal["attention", "mlp"]
    stack: Stack
    kind: Literal["self", "cross"] | None
    values: Running = field(default_factory=lambda: Running.empty(len(UPDATE_MEASURES)))
    fit: AffineFit | None = None
    scored: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class NormStatistics:
    """Running statistics of one norm call: `values` as in `NORM_MEASURES`, the last three being the brackets."""

    block: int
    norm: str
    values: Running = field(default_factory=lambda: Running.empty(len(NORM_MEASURES)))
    reasons: dict[str, str] = field(default_factory=dict)


class _Cloud(NamedTuple):
    """The tokens of a batch: `x` [sequence, token, width], which are real, and which sequences are finite there."""

    x: Tensor
    real: Tensor
    finite: Tensor

    def clean(self) -> Tensor:
        """Zero in padded rows and in sequences that are not finite."""
        sound = self.real & self.finite.unsqueeze(-1)
        return self.x if bool(sound.all()) else torch.where(sound.unsqueeze(-1), self.x, 0)

    def double(self) -> Tensor:
        """`clean` in float64."""
        return self.clean().double()

    def missing(self) -> Tensor:
        return torch.full_like(self.finite, math.nan, dtype=torch.float64)


class _Span(NamedTuple):
    """The span of each sequence's embeddings: `basis` as of `geometry.row_space`; sequences without one are not `known`."""

    basis: Tensor
    known: Tensor


@dataclass
class _Batch:
    """What is under way in the present batch: spans by stack; by part what its MLP reads and its hidden layer's rank, and
    the sizes of the update; by residual addition the size of its stream."""

    spans: dict[int, _Span] = field(default_factory=dict)
    inputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    partial: dict[tuple[int, int], tuple[int, Tensor]] = field(default_factory=dict)
    sizes: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    streams: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Sublayers:
    """Observes the updates and norms of one probe pass; an `Observer`. `tokens_of` is the probe's way to tell tokens, `is_own`
    whether a hook was reached by the probe's own pass."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, tokens_of: TokensOf, is_own: Callable[[], bool]) -> None:
        self.model, self.is_own = model, is_own
        self._tokens_of = tokens_of
        self._stack_of = {n: i for i, stack in enumerate(anatomy.stacks) for n in stack.blocks}
        self.updates: list[UpdateStatistics] = []
        self.norms: list[NormStatistics] = []
        self.handlers: dict[Point, Handler] = {}
        self.streams: list[tuple[Place, Action]] = []
        self._entering: dict[str, dict[int, list[Callable[..., None]]]] = {}
        self._leaving: dict[str, dict[int, list[Callable[..., None]]]] = {}
        self._reading: dict[Point, list[Callable[..., None]]] = {}  # where norms that are no modules begin
        self._giving: dict[Point, list[Callable[..., None]]] = {}  # and where they end
        self._laws: dict[str | ModuleCall | NormPiece, NormLaw | None] = {}
        self._runs: dict[str, int] = {}
        self._batch = _Batch()
        self.before = 0  # sequences of the corpus before this batch: every so-manyth of all is held out
        removed = without.is_ablated(model)  # a removed addition would shift the count of the others
        first = {stack.blocks[0] for stack in anatomy.stacks}
        for number, block in enumerate(anatomy.blocks):
            if number in first and not removed and (block.axes is None or block.axes.streams is None):
                self.streams.append((block.entry, functools.partial(self._measure_span, number)))
            found = [self._update_statistics(number, block, part, removed) for part in block.parts]
            self.updates += found
            if not removed:
                self._watch_parts(number, block, found)
            for norm in block.norms:
                if norm.role != "inner":
                    self._watch_norm(number, norm, removed)
        for point in dict.fromkeys([*self._reading, *self._giving]):
            norms = self._at_pieces(point)
            self.handlers[point] = in_turn(self.handlers[point], norms) if point in self.handlers else norms

    # What is watched ----------------------------------------------------------------------------------------------
    def _on_entry(self, place: ModuleCall, action: Callable[..., None]) -> None:
        self._entering.setdefault(place.name, {}).setdefault(place.call, []).append(action)

    def _update_statistics(self, number: int, block: Block, part: Part, removed: bool) -> UpdateStatistics:
        attends = part.kind in {"attention", "cross"}
        kind: Literal["self", "cross"] = "cross" if part.kind == "cross" else "self"
        statistics = UpdateStatistics(number, "attention" if attends else "mlp", block.stack, kind if attends else None)
        reasons = statistics.reasons
        if attends:
            reasons["nonlinear_innovation"] = "0 by construction: given its patterns, attention is affine in its input"
            reasons["hidden_effective_rank"] = "attention has no hidden layer"
        elif part.kind == "mixer":
            reasons["nonlinear_innovation"] = (
                "it moves information between tokens, so no map of single tokens is fitted"
            )
        elif part.reads is None:
            reasons["nonlinear_innovation"] = "the input of this MLP is not read by a module of its own"
        else:
            statistics.fit = AffineFit()
        if not attends and part.writes is None:
            reasons["hidden_effective_rank"] = "the output of this MLP is not written by a module of its own"
        if block.axes is not None and block.axes.streams is not None:
            reasons |= dict.fromkeys(["out_of_span_energy", "null_out_of_span_energy"], _SEVERAL)
        if removed:
            statistics.reasons = dict.fromkeys([*UPDATE_MEASURES, "nonlinear_innovation"], _REMOVED) | reasons
        return statistics

    def _watch_parts(self, number: int, block: Block, found: list[UpdateStatistics]) -> None:
        for index, (part, statistics) in enumerate(zip(block.parts, found, strict=True)):
            key = (number, index)
            if part.reads is not None and statistics.fit is not None:
                self._on_entry(part.reads, functools.partial(self._keep_inputs, key))
            if part.writes is not None and statistics.sublayer == "mlp":
                self._on_entry(part.writes, functools.partial(self._measure_hidden, key))
        for place, residual in enumerate(block.residuals):
            alone = [leaves for node in residual.additions for leaves in node.leaves if len(leaves) == 1]
            summands = {part: alone.count(frozenset({part})) for part in residual.parts}
            for node in residual.additions:
                sides = [next(iter(leaves)) if len(leaves) == 1 else None for leaves in node.leaves]
                self.handlers[node.point] = functools.partial(
                    self._add, number, (place, residual), sides, summands, found
                )

    def _watch_norm(self, number: int, norm: Norm, removed: bool) -> None:
        statistics = NormStatistics(number, str(norm))
        self.norms.append(statistics)
        if removed:
            statistics.reasons = dict.fromkeys(["affine_rank_before", "affine_rank_after", "brackets"], _REMOVED)
            return
        action = functools.partial(self._measure_norm, statistics, number, norm)
        if norm.piece is not None:
            self._watch_piece(norm.piece, action)
        else:
            self._leaving.setdefault(norm.module.name, {}).setdefault(norm.module.call, []).append(action)

    def _watch_piece(self, piece: NormPiece, action: Callable[..., None]) -> None:
        """Meet the input and the output of a norm that is no module."""
        given: list[Tensor] = []
        alone = piece.reads == piece.gives and piece.member is None

        def reading(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[:] = [list(tensors_in([args, kwargs]))[piece.operand].clone()]  # the norm may overwrite it

        def giving(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if given:
                run = functools.partial(_rerun, function, args, kwargs, piece.operand) if alone else None
                with measuring(given[0]):
                    action(run, given.pop(), piece.result(output))

        self._reading.setdefault(piece.reads, []).append(reading)
        self._giving.setdefault(piece.gives, []).append(giving)

    def _at_pieces(self, point: Point) -> Handler:
        """A handler for every norm that begins or ends at an operation: several may share one."""

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.is_own():
                for read in self._reading.get(point, ()):
                    read(args, kwargs)
            output = function(*args, **kwargs)
            if self.is_own():
                for give in self._giving.get(point, ()):
                    give(function, args, kwargs, output)
            return output

        return handler

    # The pass -----------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks for the passes inside. Install them inside `intercepted`: operations of theirs must not count as the model's."""
        with restoring() as changes:
            for name in {*self._entering, *self._leaving}:
                module = self.model.get_submodule(name)
                enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
                changes.hook(module, "forward_pre", enter, with_kwargs=True)
                changes.hook(module, "forward", leave, prepend=True, with_kwargs=True)
            yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._runs.clear()
        self._batch = _Batch()

    def read_with(self, first: Sublayers) -> None:
        """Tell the law of no norm anew that another observer of the same blocks has told."""
        self._laws = first._laws

    def let_go(self) -> None:
        self.streams.clear()
        for bound in (self.handlers, self._entering, self._leaving):
            bound.clear()

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_own():
            run = self._runs.get(name, 0)
            self._runs[name] = run + 1
            given = list(tensors_in([args, kwargs]))
            with unasked(given), measuring(given[0]):
                for action in self._entering.get(name, {}).get(run, ()):
                    action(args, kwargs)

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_own():
            given, got = next(tensors_in([args, kwargs])), next(tensors_in(output))
            with measuring(given):
                for action in self._leaving.get(name, {}).get(self._runs[name] - 1, ()):
                    action(module, given, got)

    def _tokens(self, number: int, x: Tensor, what: str) -> _Cloud | None:
        """The tokens of the block's stack; None where they cannot be told."""
        found = self._tokens_of(number, x, what)
        if found is None:
            return None
        cloud, mask = found
        real = torch.ones(cloud.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.to(x.device)
        return _Cloud(cloud, real, _finite(cloud, real))

    # Updates ------------------------------------------------------------------------------------------------------
    def _measure_span(self, number: int, stream: Tensor) -> None:
        if not self.is_own():
            return
        with measuring(stream):
            cloud = self._tokens(number, stream, "the embedding")
            if cloud is not None:
                basis = geometry.row_space(cloud.double(), cloud.real, precision=stream.dtype)
                directions = basis.square().sum((-2, -1)).round()
                known = cloud.finite & (directions < cloud.x.shape[-1])
                self._batch.spans[self._stack_of[number]] = _Span(basis, known)

    def _keep_inputs(self, key: tuple[int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(tensors_in([args, kwargs]))
        is_wide = given.shape[-1] > WIDEST_FIT  # and only asked for its width
        self._batch.inputs[key] = given if is_wide else given.clone()  # the model may write into it before the addition

    def _measure_hidden(self, key: tuple[int, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(tensors_in([args, kwargs]))
        cloud = self._tokens(key[0], given, "the hidden layer")
        if cloud is not None:
            measured = geometry.cloud_measures(cloud.x, cloud.real)
            self._batch.hidden[key] = measured.effective_rank

    def _add(
        self,
        number: int,
        residual: tuple[int, Residual],
        sides: list[int | None],
        summands: dict[int, int],
        found: list[UpdateStatistics],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Look at the operands of one addition, before an addition in place overwrites one of them; then let it happen."""
        if self.is_own():
            given = list(tensors_in([args, kwargs]))
            with unasked(given), measuring(given[0]):
                for operand, side in enumerate(sides):
                    if side is not None:
                        brought = summand(function, args, kwargs, operand)
                        self._meet((number, residual[0]), side, brought, summands, found)
                self._relate(number, residual, found)
        return function(*args, **kwargs)

    def _meet(
        self,
        place: tuple[int, int],
        side: int,
        operand: Tensor,
        summands: dict[int, int],
        found: list[UpdateStatistics],
    ) -> None:
        """One operand of a residual addition that is the stream alone or one part alone."""
        cloud = self._tokens(place[0], operand, f"block {place[0]}")
        if side == STREAM:
            if cloud is not None:
                self._batch.streams.setdefault(place, _size(cloud))
        elif cloud is not None:
            self._sum_up((place[0], side), cloud, summands[side], found[side])
        else:
            measures = [*UPDATE_MEASURES, "nonlinear_innovation"]
            found[side].reasons = dict.fromkeys(measures, _NO_TOKENS) | found[side].reasons

    def _sum_up(self, key: tuple[int, int], cloud: _Cloud, summands: int, statistics: UpdateStatistics) -> None:
        """Measure the update, once all its summands are there: most have one."""
        if summands > 1:
            seen, total = self._batch.partial.get(key, (0, torch.zeros_like(cloud.x)))
            total = total + cloud.x
            self._batch.partial[key] = (seen + 1, total)
            if seen + 1 < summands:
                return
            cloud = _Cloud(total, cloud.real, _finite(total, cloud.real))
        self._batch.sizes[key] = _size(cloud)
        columns = dict.fromkeys(UPDATE_MEASURES, cloud.missing())
        columns |= self._out_of_span(statistics, self._batch.spans.get(self._stack_of[key[0]]), cloud)
        columns["hidden_effective_rank"] = self._batch.hidden.pop(key, cloud.missing())
        statistics.values = statistics.values.add(torch.stack([columns[name].cpu() for name in UPDATE_MEASURES], -1))
        inputs = self._batch.inputs.pop(key, None)
        if statistics.fit is not None and inputs is not None:
            self._fit(key[0], statistics, inputs, cloud)

    def _out_of_span(self, statistics: UpdateStatistics, span: _Span | None, cloud: _Cloud) -> dict[str, Tensor]:
        names = ("out_of_span_energy", "null_out_of_span_energy")
        if statistics.reasons.get(names[0]) == _SEVERAL:
            return {}
        if span is None or span.basis.shape[-1] != cloud.x.shape[-1]:
            statistics.reasons |= dict.fromkeys(names, "the embeddings of this stack were not observed in this width")
            return {}
        if not span.known.any():
            statistics.reasons |= dict.fromkeys(names, "the embeddings span the whole width, or are not finite")
            return {}
        x, basis, known = cloud.clean(), span.basis.to(cloud.x.device), span.known.to(cloud.x.device)
        total = norms(x).square().sum(-1)
        energy = 1 - _inside(x.double(), basis) / total
        few = (energy < LITTLE) & (total > 0) & known
        if bool(few.any()):  # the difference has lost its digits there
            energy[few] = geometry.out_of_span_energy(x[few].double(), basis=basis[few])
        found = {names[0]: energy.where(known & (total > 0), math.nan)}
        others = min(NULL_SEQUENCES, len(x) - 1)
        if others < 1:
            statistics.reasons[names[1]] = "each batch has only one sequence, and the null value needs others"
            return found
        shifts = range(1, others + 1)
        # A large share keeps its digits in single precision, which is twice as fast.
        coarse = torch.promote_types(x.dtype, torch.float32)
        around = torch.stack([total.roll(-shift, 0) for shift in shifts]).sum(0)
        null = energy.new_zeros(())
        for dtype in dict.fromkeys((coarse, torch.float64)):
            moved, spans = x.to(dtype), basis.to(dtype)
            inside = torch.stack([_inside(moved.roll(-shift, 0), spans) for shift in shifts]).sum(0)
            null = (1 - inside / around).clamp(min=0)
            if bool((null > MUCH)[known].all()):
                break
        found[names[1]] = null.where(known & (around > 0), math.nan)
        return found

    def _fit(self, block: int, statistics: UpdateStatistics, inputs: Tensor, update: _Cloud) -> None:
        fit = statistics.fit
        assert fit is not None
        if inputs.shape[-1] > WIDEST_FIT or update.x.shape[-1] > WIDEST_FIT:
            statistics.reasons["nonlinear_innovation"] = f"wider than {WIDEST_FIT:,}: its moments would not stay small"
            return
        cloud = self._tokens(block, inputs, "the MLP")
        if cloud is None or cloud.x.shape[:2] != update.x.shape[:2]:
            statistics.reasons["nonlinear_innovation"] = _NO_TOKENS
            return
        sound = cloud.finite & update.finite
        number = torch.arange(self.before, self.before + len(cloud.x), device=sound.device)
        scores = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        statistics.scored += int((sound & scores).sum())
        for held_out in (False, True):
            rows = update.real & (sound & (scores == held_out)).unsqueeze(-1)
            fit.add(cloud.x[rows], update.x[rows], held_out=held_out)

    def _relate(self, number: int, residual: tuple[int, Residual], found: list[UpdateStatistics]) -> None:
        """The size of each update over that of its stream, as soon as both were met."""
        stream = self._batch.streams.get((number, residual[0]))
        if stream is None:
            return
        for part in residual[1].parts:
            size = self._batch.sizes.pop((number, part), None)
            if size is not None:
                ratio = (size / stream.to(size.device)).where(stream.to(size.device) > 0, math.nan).cpu()
                row = torch.full((len(ratio), len(UPDATE_MEASURES)), math.nan, dtype=torch.float64)
                row[:, UPDATE_MEASURES.index("relative_norm")] = ratio
                found[part].values = found[part].values.add(row)

    # Norms --------------------------------------------------------------------------------------------------------
    def _measure_norm(
        self,
        statistics: NormStatistics,
        block: int,
        norm: Norm,
        run: nn.Module | Callable[[Tensor], Tensor] | None,
        given: Tensor,
        output: Tensor,
    ) -> None:
        """`run` is what can be run on other tokens: a module, one operation, or nothing where the norm is written out."""
        where = norm.where if norm.piece is not None else norm.module.name
        if where not in self._laws:  # the norm is run as the model runs it
            self._laws[where] = (
                None if run is None else norm_law(run, norm.kind, given.shape, given.dtype, given.device)
            )
        with unasked([given, output]):
            self._add_ranks(statistics, block, f"the norm {norm}", given, output, self._laws[where], run is not None)

    def _add_ranks(
        self,
        statistics: NormStatistics,
        block: int,
        what: str,
        given: Tensor,
        output: Tensor,
        law: NormLaw | None,
        runs: bool,
    ) -> None:
        before, after = self._tokens(block, given, what), self._tokens(block, output, what)
        if before is None or after is None:
            statistics.reasons = dict.fromkeys(["affine_rank_before", "affine_rank_after", "brackets"], _NO_TOKENS)
            return
        precision = max(given.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        ranks = geometry.cloud_ranks(before.x, before.real, precision=precision)
        ranks_after, brackets = before.missing(), torch.full((len(before.x), 3), math.nan, dtype=torch.float64)
        if not runs:
            statistics.reasons["brackets"] = (
                "it is written out over several operations, so it is not known what it does to other tokens"
            )
        elif law is None:
            statistics.reasons["brackets"] = "it cannot be run on other tokens by itself, or takes more than the stream"
        else:
            sound = before.real & (before.finite & after.finite).unsqueeze(-1)
            images = law.images(before.x, after.x, sound, precision)
            if images.holds:
                ranks_after = images.given_affine
                brackets = _brackets(law, images, before.x, sound, ranks, precision, statistics)
            else:
                statistics.reasons["brackets"] = (
                    "its output is not gamma (x - mean) / deviation + beta, with or without the mean"
                )
        rest = ranks_after.isnan().nonzero().flatten()
        if len(rest):
            _, found = geometry.cloud_ranks(after.x[rest], after.real[rest], precision=precision)
            ranks_after = ranks_after.index_put((rest,), found)
        both = torch.stack([ranks[1].cpu(), ranks_after.cpu()], -1)
        statistics.values = statistics.values.add(torch.cat([both, brackets], -1))


def _brackets(
    law: NormLaw,
    images: Images,
    x: Tensor,
    sound: Tensor,
    ranks: tuple[Tensor, Tensor],
    precision: torch.dtype,
    statistics: NormStatistics,
) -> Tensor:
    """The brackets of each sequence [sequence, 3], NaN where there are none."""
    rank, affine_rank = ranks
    found = torch.stack([rank - affine_rank, images.rank - images.affine_rank, rank - images.rank], -1)
    fit = (found >= 0).all(-1) & (found[:, :2] <= 1).all(-1)
    found = torch.where((images.full & fit).unsqueeze(-1), found, math.nan).cpu()
    for i in (sound.any(-1) & ~images.full).nonzero().flatten().tolist():
        one = law.brackets(x[i][sound[i]], Ranks(int(rank[i]), int(affine_rank[i])), precision)
        if one is not None:
            found[i] = torch.tensor(one, dtype=torch.float64)
    if bool((found.isnan().all(-1) & sound.any(-1).cpu()).any()):
        statistics.reasons["brackets"] = "a few tokens are so much larger that they hide the rank of the others"
    return found


def _rerun(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], operand: int, value: Tensor
) -> Tensor:
    """One operation again, with another tensor in the place of its tensor number `operand`."""
    met = itertools.count()

    def exchanged(item: Any) -> Any:
        if isinstance(item, Tensor):
            return value if next(met) == operand else item
        if type(item) in (list, tuple):
            return type(item)(exchanged(i) for i in item)
        return item

    exchanged_args = [
        exchanged(a) for a in args
    ]  # before the keywords: tensors are counted in the order they are written
    result: Tensor = function(*exchanged_args, **{k: exchanged(v) for k, v in kwargs.items()})
    return result


def _finite(x: Tensor, real: Tensor) -> Tensor:
    """Which sequences are finite in all real tokens."""
    sound = x.sum(-1).isfinite() | ~real  # no value but a finite one leaves the sum finite
    if not bool(sound.all()):  # the sum may have overflowed by itself
        sound = x.isfinite().all(-1) | ~real
    return sound.all(-1)


def _size(cloud: _Cloud) -> Tensor:
    """||X||_F [sequence] over real tokens, NaN where they are not finite."""
    return norms(cloud.clean()).square().sum(-1).sqrt().where(cloud.finite, math.nan)


def _inside(x: Tensor, basis: Tensor) -> Tensor:
    """The energy of x [sequence, token, width] in the span of orthonormal rows [sequence, direction, width], in float64."""
    return torch.linalg.vector_norm(x @ basis.mT, dim=(-2, -1), dtype=torch.float64).square()


# Records ------------------------------------------------------------------------------------------------------------


def update_records(found: list[UpdateStatistics]) -> list[UpdateRecord]:
    """One record for each update, in the order of blocks and parts."""
    return [_update_record(statistics) for statistics in found]


def _update_record(statistics: UpdateStatistics) -> UpdateRecord:
    values = {name: Statistic.of(*statistics.values.summary(i)) for i, name in enumerate(UPDATE_MEASURES)}
    values["nonlinear_innovation"], fit = None, statistics.fit
    reasons = dict(statistics.reasons)
    if fit is not None and "nonlinear_innovation" not in reasons:
        missing = fit.missing()
        if missing is None:
            share = fit.share()
            values["nonlinear_innovation"] = Statistic.of(share, share, share, statistics.scored)
        else:
            reasons["nonlinear_innovation"] = missing
    return UpdateRecord(
        block=statistics.block,
        sublayer=statistics.sublayer,
        stack=statistics.stack,
        kind=statistics.kind,
        unavailable={name: reasons.get(name, _UNDEFINED) for name, value in values.items() if value is None},
        **values,
    )


def norm_records(found: list[NormStatistics]) -> list[NormRecord]:
    """One record for each norm call inside a block, in the order of blocks."""
    return [_norm_record(statistics) for statistics in found]


def _norm_record(statistics: NormStatistics) -> NormRecord:
    before, after, *three = (Statistic.of(*statistics.values.summary(i)) for i in range(len(NORM_MEASURES)))
    brackets = None if any(b is None for b in three) else three
    values: dict[str, Any] = {"affine_rank_before": before, "affine_rank_after": after, "brackets": brackets}
    return NormRecord(
        block=statistics.block,
        norm=statistics.norm,
        unavailable={k: statistics.reasons.get(k, _UNDEFINED) for k, value in values.items() if value is None},
        **values,
    )
