"""One probe pass over a corpus, reduced to running statistics where the numbers appear.

Token clouds are measured at the block boundaries and let go; attention is measured inside the model's own attention call:
a fused call from its queries and keys, a softmax the model ran itself from its weights. Nothing of size tokens × tokens
a head is kept, nor anything that grows with the corpus. The model runs the very operations it would have run, so its
outputs are bit-identical; hooks and wrapped forwards are gone afterwards, also after an exception or Ctrl-C.

Only the passes that the probe itself starts are observed. If another thread runs the model meanwhile, or another model that
shares its modules does, their outputs are right and enter no figure; but they see the model in evaluation mode and without
its key-value cache, as the probe does. Do not train in one thread while probing in another.

When not to use this: to look at activations. Nothing is stored; a hook of your own does that better.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.expected_runs import runs_checked
from uncollapse.anatomy.interception import Handler, Point, device_of, in_turn
from uncollapse.anatomy.output_maps import product_map
from uncollapse.anatomy.probing import full_precision, probing
from uncollapse.anatomy.proof import blocks_alone, piece_of
from uncollapse.anatomy.stacks import Padding, paddings
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.tracing import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Block, Part, Place
from uncollapse.errors import InputError, UncollapseError
from uncollapse.measures import geometry, heads
from uncollapse.measures.running import Running
from uncollapse.probe.attention import (
    ATTENTION_MEASURES,
    AttentionStatistics,
    pattern_spectra,
    spread,
)
from uncollapse.probe.attention_calls import AttentionRows, CallObserver, in_sequence
from uncollapse.probe.projections import (
    bears_out,
    holds,
    projected_cloud,
    projection_matrix,
    side_by_side,
)
from uncollapse.probe.sites import MASSIVE_MEASURES, PLAIN_MEASURES, SiteStatistics, distinct_tokens
from uncollapse.probe.sublayers import NormStatistics, Sublayers, UpdateStatistics
from uncollapse.restoring import restoring

Progress = Callable[[str, int, int], None]
Level = Literal["core", "full"]
Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]  # function, operands, result


@dataclass
class Observations:
    """What one probe pass saw: a site for each stack's embedding and each of its blocks, stack after stack, and an entry for
    each attention call; at level `full` also one for each update and for each norm call inside a block. `sequences`, `tokens`
    (real ones) and `max_tokens` are those of the first stack's stream."""

    sites: list[SiteStatistics]
    attention: list[AttentionStatistics]
    updates: list[UpdateStatistics] = field(default_factory=list)
    norms: list[NormStatistics] = field(default_factory=list)
    sequences: int = 0
    tokens: int = 0
    max_tokens: int = 0


def capture(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    anatomy: Anatomy,
    *,
    level: Level = "core",
    seed: int = 0,
    progress: Progress | None = None,
    on_output: Callable[[Mapping[str, Any], Any], None] | None = None,
    spectra: bool | None = None,
) -> Observations:
    """Run `model` once over `batches` (each a dict of tensors, moved to the model's device) and observe. `on_output` is given
    each batch and the model's output on it. `spectra`: whether to decompose the attention matrices, by default at level `full`.

    Raises `InputError` where a padded batch meets a model whose token axis does not match the mask, `ChangedPath` where the
    model takes another path on a batch than the one that was proved.
    """
    probe = _Probe(model, anatomy, level, level == "full" if spectra is None else spectra)
    device = device_of(model)
    with contextlib.closing(probe), probing(model, seed), probe.installed(), runs_checked(model, anatomy) as check:
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("probe", number, len(batches))
            on_device = {k: v.to(device).contiguous() if isinstance(v, Tensor) else v for k, v in batch.items()}
            probe.begin(on_device)
            with check(on_device):
                output = model(**on_device)
            probe.count()
            if on_output is not None:
                on_output(on_device, output)
        if progress is not None:
            progress("probe", len(batches), len(batches))
    return probe.observations


@dataclass
class _WholeMap:
    """An attention without an output projection of its own, and the bias of the map from its mixed values to what it writes."""

    statistics: AttentionStatistics
    block: int
    part: Part
    bias: Tensor | None = None


class _Probe:
    """The state of one pass: which batch is running, which call of a shared module, and the statistics so far."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, level: Level, spectra: bool) -> None:
        self.model, self.anatomy, self.level, self.spectra = model, anatomy, level, spectra
        self.observations = Observations([], [])
        self.batch_size = 0  # sequences in the stream of the block that is running
        self.paddings: list[Padding] = []  # by stack
        self.shapes: dict[int, tuple[int, int]] = {}  # by stack: sequences and tokens of its clouds in this batch
        self.entered_shapes: dict[int, tuple[int, int]] = {}  # by block: sequences and tokens of what entered it
        self.given = (0, 0)  # sequences and tokens of the batch as it was given
        self.real: dict[int, int] = {}  # by stack: real tokens in this batch
        self.runs: dict[str, int] = {}
        self.heads_output: Tensor | None = None  # of the attention call whose output projection is still to come
        self.matrices: dict[str, Tensor] = {}
        self.whole_maps: list[_WholeMap] = []
        self.have_whole_maps = False
        self.distinct: list[Tensor | None] = []  # by stack: different token ids of each sequence
        # Of a sharded model the whole weights exist only while a block runs, and their memory is freed under whoever kept a view.
        self.lasting = {id(p) for p in model.parameters()}
        self.entered: dict[str, Tensor] = {}  # by site: the cloud that entered the block that is running
        # What reads the stream takes each token's mean away, if it is a layer norm.
        readers = [n for b in anatomy.blocks for n in b.norms if n.role in {"before", "post"}]
        self.is_centred = any(norm.kind == "layer" for norm in readers)
        self.thread: int | None = None  # the thread of the probe's own pass, while one runs
        self.sublayers: Sublayers | None = None
        if level == "full":
            self.sublayers = Sublayers(model, anatomy, self._tokens_of, self._is_own)
            self.observations.updates, self.observations.norms = self.sublayers.updates, self.sublayers.norms

    def close(self) -> None:
        """Be no part of a cycle any more: that would keep the model in memory until Python looks for such."""
        if self.sublayers is not None:
            self.sublayers.let_go()
        self.sublayers = None

    # Installation -------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Any:
        # Calls may share their way: one softmax, and a product for each head.
        observers: dict[Point, list[Observer]] = {}
        projections: dict[str, dict[int, AttentionStatistics]] = {}
        streams: list[tuple[Place, Action]] = []
        sites = self._sites()
        for number, block in enumerate(self.anatomy.blocks):
            embedding, site = sites[number]
            if embedding is not None:
                streams.append((block.entry, functools.partial(self._meet_site, embedding, number)))
            streams.append((block.entry, functools.partial(self._keep_entered, site, number)))
            streams.append((block.exit, functools.partial(self._meet_site, site, number)))
            for part in block.parts:
                if part.kind in {"attention", "cross"}:
                    self._attend(number, block, part, observers, projections)
        handlers = {p: self._observing(several) for p, several in observers.items()}
        if self.sublayers is not None:
            streams += self.sublayers.streams
            for point, handler in self.sublayers.handlers.items():
                handlers[point] = in_turn(handler, handlers[point]) if point in handlers else handler
        with restoring() as changes:
            changes.hook(self.model, "forward", self._end, always_call=True)
            # Before the hooks: what they compute must not count as operations of the module that calls theirs.
            changes.enter(met(self.model, streams, handlers=handlers))
            if self.sublayers is not None:
                changes.enter(self.sublayers.installed())
            for name, calls in projections.items():
                enter = self._projecting(name, calls)
                changes.hook(self.model.get_submodule(name), "forward_pre", enter, with_kwargs=True)
            yield

    def _sites(self) -> dict[int, tuple[SiteStatistics | None, SiteStatistics]]:
        """By block: the embedding's site where it begins a stack, and its own."""
        found: dict[int, tuple[SiteStatistics | None, SiteStatistics]] = {}
        named: dict[str, int] = {}
        for stack in self.anatomy.stacks:
            name = "embedding" if stack.name != "decoder" else "decoder.embedding"
            named[name] = named.get(name, 0) + 1
            embedding = SiteStatistics(name if named[name] == 1 else f"{name}.{named[name]}", None, stack.name)
            sites = [SiteStatistics(f"block.{number}", number, stack.name) for number in stack.blocks]
            self.observations.sites += [embedding, *sites]
            found |= {n: (embedding if i == 0 else None, sites[i]) for i, n in enumerate(stack.blocks)}
        return found

    def _end(self, *_: Any) -> None:
        if self._is_own():
            self.thread = None

    def _is_own(self) -> bool:
        """Whether a hook was reached by the probe's own pass: not by another thread, nor by a model that shares a module."""
        return self.thread == threading.get_ident()

    def _observing(self, observers: Sequence[Observer]) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            if self._is_own():
                seen = next(tensors_in([output, args, kwargs]))
                with full_precision(seen):
                    for observe in observers:
                        observe(function, args, kwargs, output)
            return output

        return handler

    def _keep_entered(self, site: SiteStatistics, number: int, stream: Tensor) -> None:
        if not self._is_own():
            return
        cloud = self._cloud(stream, self.anatomy.blocks[number], self.anatomy.stack_of(number))
        if cloud is not None:
            self.batch_size = len(cloud)
            self.entered_shapes[number] = (cloud.shape[0], cloud.shape[1])
            self.entered[site.site] = cloud.clone()  # a copy: a block may add to its stream in place

    def _meet_site(self, site: SiteStatistics, number: int, stream: Tensor) -> None:
        if self._is_own():
            with full_precision(stream):
                self._measure_site(site, stream, self.anatomy.blocks[number], self.anatomy.stack_of(number))

    def _projecting(self, name: str, calls: Mapping[int, AttentionStatistics]) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._is_own():
                return
            run = self.runs.get(name, 0)
            self.runs[name] = run + 1
            if run in calls:
                given = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
                with full_precision(given):
                    self._project(calls[run], name, module, given)

        return enter

    def _project(self, statistics: AttentionStatistics, name: str, module: nn.Module, given: Tensor) -> None:
        """Meet the output projection: its matrix, once a module, and the energy of what it reads."""
        if name not in self.matrices:
            try:
                matrix = projection_matrix(module, given)
                lasts = all(id(p) in self.lasting for p in module.parameters())
                self.matrices[name] = matrix if lasts else matrix.clone()
            except UncollapseError as error:
                statistics.reasons |= {"matrix": str(error), "energy_share": str(error)}
                return
        statistics.matrix = side_by_side(self.matrices[name], statistics.features, 0)
        self._measure_energy(statistics, statistics.matrix, given)

    def _attend(
        self,
        number: int,
        block: Block,
        part: Part,
        observers: dict[Point, list[Observer]],
        projections: dict[str, dict[int, AttentionStatistics]],
    ) -> None:
        first = part.attention[0]
        beside = part.attention[:1] if first.shares_queries else part.attention  # the others are the same heads again
        call = replace(
            first, heads=sum(c.heads for c in beside), key_value_heads=sum(c.key_value_heads for c in beside)
        )
        statistics = AttentionStatistics(
            number,
            "cross" if part.kind == "cross" else "self",
            block.stack,
            call,
            Running.empty(len(ATTENTION_MEASURES), call.heads),
            Running.empty(call.heads),
            sinks=any(c.before or c.after or c.drops_columns for c in part.attention),
            features=part.features,
        )
        self.observations.attention.append(statistics)
        if isinstance(call.projection, Point):
            projecting = functools.partial(self._projection_call, statistics)
            observers.setdefault(call.projection, []).append(projecting)
        elif call.projection is not None:
            projections.setdefault(call.projection.name, {})[call.projection.call] = statistics
        elif part.written is not None and not part.no_output_map:
            self.whole_maps.append(_WholeMap(statistics, number, part))
        if part.no_output_map or (call.projection is None and part.written is None):
            reason = part.no_output_map or "no output projection follows this attention"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}
        problem = next((c.unreadable for c in part.attention if c.unreadable is not None), None)
        if problem is not None:
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, problem)
            return
        met: dict[int, AttentionRows] = {}

        def deliver(index: int, found: AttentionRows) -> None:
            met[index] = found
            if len(met) == len(part.attention):
                several = [met[i] for i in range(len(met))]
                met.clear()
                answered = sum(rows.rows.entropy.shape[-1] for rows in several)
                if first.shares_queries and answered != self.entered_shapes.get(number, (0, answered))[1]:
                    refuse("its queries are shared out among another number of calls than on the example")
                    return
                self._measure_attention(statistics, [in_sequence(several)] if first.shares_queries else several)

        def refuse(reason: str) -> None:
            self.heads_output = None
            met.clear()
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason)

        def own_queries(queries: int, sequences: int) -> Tensor | None:
            """The mask of a call's queries; of one that answers for some of them, of those behind the ones that were met."""
            total = self.entered_shapes.get(number, (0, queries))[1]
            mask = self._query_mask(statistics, total, sequences)
            start = sum(rows.rows.entropy.shape[-1] for rows in met.values())
            return None if mask is None else mask[:, start : start + queries]

        for index, each in enumerate(part.attention):
            observer = CallObserver(
                each,
                sequences=lambda: self.batch_size,
                tokens=lambda: self.entered_shapes.get(number, (0, None))[1],
                query_mask=own_queries if first.shares_queries else functools.partial(self._query_mask, statistics),
                susceptibility=self.level == "full",
                spectra=self.spectra,
                deliver=functools.partial(deliver, index),
                refuse=refuse,
            )
            for point, observe in observer.observers().items():
                observers.setdefault(point, []).append(observe)
        if self.whole_maps and self.whole_maps[-1].statistics is statistics and part.written is not None:
            observers.setdefault(part.written, []).append(functools.partial(self._written, self.whole_maps[-1]))

    # Batches ------------------------------------------------------------------------------------------------------
    def begin(self, batch: Mapping[str, Any]) -> None:
        """Note the batch's masks and ids before the model runs on it."""
        self.runs.clear()
        self.entered.clear()
        self.shapes.clear()
        self.entered_shapes.clear()
        self.real.clear()
        self.batch_size = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
        ids = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim == 2), None)
        self.given = (self.batch_size, 0) if ids is None else (ids.shape[0], ids.shape[1])
        self.paddings = paddings(self.model, batch, self.anatomy, blocks_alone)
        self.distinct = [
            distinct_tokens(stack, batch, padding.mask)
            for stack, padding in zip(self.anatomy.stacks, self.paddings, strict=True)
        ]
        if self.sublayers is not None:
            self.sublayers.begin()
        if self.whole_maps and not self.have_whole_maps:
            self._find_whole_maps(batch)
        self.thread = threading.get_ident()

    def count(self) -> None:
        """Count the sequences and tokens of the batch that was run."""
        # Where the stream's own axes could not be told, the batch is counted as it was given.
        sequences, tokens = self.shapes.get(0, self.given)
        self.observations.sequences += sequences
        self.observations.tokens += self.real.get(0, sequences * tokens)
        self.observations.max_tokens = max(self.observations.max_tokens, tokens)

    def _mask(self, stack: int, tokens: int, what: str) -> Tensor | None:
        """The token mask of a stack, by its number, for a cloud of `tokens` rows; `None` when every row is real."""
        mask = self.paddings[stack].mask
        if mask is None or mask.shape[-1] == tokens:
            return mask
        raise InputError(
            f"capture: expected {mask.shape[-1]} tokens at {what}, as in the mask of its stack, got {tokens}. "
            "This model changes the number of tokens, so padding cannot be told apart inside it. "
            "Pass batches without padding (batch_size=1 for texts)."
        )

    # Sites --------------------------------------------------------------------------------------------------------
    def _measure_site(self, site: SiteStatistics, stream: Tensor, block: Block, stack: int) -> None:
        cloud = self._cloud(stream, block, stack)
        if cloud is None:
            site.width = stream.shape[-1]
            site.reason = self.paddings[stack].reason or block.axes_reason
            return
        site.width = cloud.shape[-1]
        mask = self._cloud_mask(stack, cloud, site.site)
        if site.block is None:
            self.shapes[stack] = (cloud.shape[0], cloud.shape[1])
            self.real[stack] = cloud.shape[0] * cloud.shape[1] if mask is None else int(mask.sum())
        measured = geometry.cloud_measures(cloud, mask)
        finite = cloud.isfinite().all(-1)
        if mask is not None:
            finite |= ~mask
        site.not_finite += int((~finite.all(-1)).sum())
        gap = measured.rank_gap.masked_fill(measured.rank_gap.isinf(), math.nan)
        plain = [gap if name == "rank_gap" else getattr(measured, name) for name in PLAIN_MEASURES]
        site.plain = site.plain.add(torch.stack([p.double() for p in plain], -1))
        massive = [getattr(measured.without_massive, name).double() for name in MASSIVE_MEASURES]
        site.massive = site.massive.add(torch.stack(massive, -1))
        apart = geometry.consensus_after_norm(cloud, mask, centred=self.is_centred)
        before, carried = self.entered.pop(site.site, None), torch.full_like(apart, math.nan)
        if before is not None and before.shape == cloud.shape:
            carried = geometry.stream_carried(before, cloud, mask, is_normalized=block.placement == "post")
        distinct = self.distinct[stack] if site.block is None else None
        if distinct is None or len(distinct) != len(apart):
            distinct = torch.full_like(apart, math.nan)
        site.stream = site.stream.add(torch.stack([apart, carried, distinct.to(apart)], -1))

    def _cloud(self, stream: Tensor, block: Block, stack: int) -> Tensor | None:
        """The stream as [sequence, token, width], whatever axes the model uses; rows that belong to no sequence are zero. None
        where its tokens cannot be told."""
        if block.axes is None or self.paddings[stack].reason or stream.ndim != block.axes.ndim:
            return None
        cloud = block.axes.cloud(stream)
        parts = self.paddings[stack].segments
        if block.axes.sequence is not None or parts is None:
            return cloud
        return nn.utils.rnn.pad_sequence([cloud[0][rows.to(cloud.device)] for rows in parts], batch_first=True)

    def _cloud_mask(self, stack: int, cloud: Tensor, what: str) -> Tensor | None:
        """Which rows of a cloud are real tokens; `None` when all are."""
        parts = self.paddings[stack].segments
        if parts is None:
            return self._mask(stack, cloud.shape[1], what)
        lengths = torch.tensor([len(rows) for rows in parts], device=cloud.device)
        mask = torch.arange(cloud.shape[1], device=cloud.device) < lengths[:, None]
        return None if bool(mask.all()) else mask

    def _tokens_of(self, number: int, x: Tensor, what: str) -> tuple[Tensor, Tensor | None] | None:
        """What a block with this number computes for its tokens, as [sequence, token, width], and which are real; None where the
        tokens cannot be told, or are not those of its stream."""
        block, stack = self.anatomy.blocks[number], self.anatomy.stack_of(number)
        axes, shape = block.axes, self.entered_shapes.get(number)
        if axes is None:
            return None
        if x.ndim == axes.ndim:
            cloud = self._cloud(x, block, stack)
            shape = shape or (
                None if cloud is None else (cloud.shape[0], cloud.shape[1])
            )  # the stream itself, on entry
        elif x.ndim == 2 and shape is not None and axes.sequence == 0 and len(x) == math.prod(shape):
            cloud = x.reshape(*shape, -1)  # rows of all sequences, one after another
        else:
            cloud = None
        if cloud is not None and shape is not None and block.chooses_tokens and cloud.shape[1] < shape[1]:
            shape = shape[0], cloud.shape[1]  # the chosen ones; a mask does not say which of them are padding
        if cloud is None or tuple(cloud.shape[:2]) != shape:
            return None
        try:
            return cloud, self._cloud_mask(stack, cloud, what)
        except InputError:  # another number of tokens than the mask has
            return None

    # Attention ----------------------------------------------------------------------------------------------------
    def _query_mask(self, statistics: AttentionStatistics, queries: int, sequences: int) -> Tensor | None:
        mask = self._mask(
            self.anatomy.stack_of(statistics.block), queries, f"the attention of block {statistics.block}"
        )
        return mask if mask is None or mask.shape[0] == sequences else None

    def _key_mask(self, statistics: AttentionStatistics, keys: int, sequences: int) -> Tensor | None:
        stack = self.anatomy.stack_of(statistics.block)
        known = self.paddings[stack].mask
        if statistics.kind == "self" and known is not None and known.shape[-1] < keys:
            # A cache that the model fills itself (virtual tokens of prefix tuning) comes before the text; its keys are real.
            known = torch.cat([known.new_ones(len(known), keys - known.shape[-1]), known], -1)
            return known if known.shape[0] == sequences else None
        if statistics.kind == "cross":
            encoder = next((i for i, s in enumerate(self.anatomy.stacks) if s.name == "encoder"), None)
            if encoder is None or self.shapes.get(encoder, (0, keys))[1] != keys:
                return None
            stack = encoder
        mask = self._mask(stack, keys, f"the keys of block {statistics.block}")
        return mask if mask is None or mask.shape[0] == sequences else None

    def _measure_attention(self, statistics: AttentionStatistics, found: Sequence[AttentionRows]) -> None:
        """Add one pass through a sublayer's attention calls, their heads one after the other."""
        statistics.route = found[0].rows.route
        columns: dict[str, list[Tensor]] = {name: [] for name in ATTENTION_MEASURES}
        for number, each in enumerate(found):
            forbids = statistics.forbids.setdefault(number, [])
            forbids += [one for one in each.forbids if one not in forbids]
            rows = each.rows
            sequences, count = rows.entropy.shape[:2]
            undefined = torch.full((sequences, count), math.nan, dtype=torch.float64)
            own = dict.fromkeys(ATTENTION_MEASURES, undefined)
            for name in (
                "entropy",
                "normalized_entropy",
                "entropy_floor",
                "rest_entropy",
                "key_share",
                "susceptibility",
            ):
                figure = getattr(rows, name)
                if figure is not None:
                    own[name] = figure.double().nanmean(-1)
            if rows.max_logit is not None:
                own["max_logit"] = rows.max_logit.double().nan_to_num(nan=-math.inf).amax(-1)
            query_mask = self._query_mask(statistics, rows.entropy.shape[-1], sequences)
            if each.values is not None and each.mixed is not None:
                key_mask = self._key_mask(statistics, each.values.shape[-2], sequences)
                before, after = spread(each.values, key_mask), spread(each.mixed, query_mask)
                own["value_contraction"] = after / before.repeat_interleave(count // before.shape[1], 1)
                if each.weights is not None:
                    own |= pattern_spectra(each.weights, query_mask, key_mask)
            statistics.reasons |= each.reasons
            statistics.deviation = max(statistics.deviation, each.deviation)
            statistics.row_sums = (
                min(statistics.row_sums[0], each.row_sums[0]),
                max(statistics.row_sums[1], each.row_sums[1]),
            )
            for name in ATTENTION_MEASURES:
                columns[name].append(own[name].to("cpu", torch.float64))
        mixed = [each.mixed for each in found if each.mixed is not None]
        same = len(mixed) == len(found) and len({m.shape[2:] for m in mixed}) == 1
        self.heads_output = torch.cat(mixed, 1) if same else None
        statistics.values = statistics.values.add(
            torch.stack([torch.cat(columns[n], 1) for n in ATTENTION_MEASURES], 1)
        )

    def _projection_call(
        self,
        statistics: AttentionStatistics,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """An output projection written in the attention's own code: its weight is an operand."""
        found = product_map(function, args, kwargs)
        if found is not None and len(found.matrix) == statistics.call.heads * statistics.call.head_width:
            lasts = any(id(t) in self.lasting for t in tensors_in([args, kwargs]))
            matrix = found.matrix if lasts else found.matrix.clone()
            statistics.matrix = side_by_side(matrix, statistics.features, 0)
            self._measure_energy(statistics, statistics.matrix, found.given)
        else:
            reason = "the output projection is no linear map of the concatenated heads"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}

    def _find_whole_maps(self, batch: Mapping[str, Any]) -> None:
        """The maps from mixed values to what is written, from the weights as they are, on a few tokens of this batch."""
        self.have_whole_maps = True
        with torch.random.fork_rng(devices=[]):
            piece = piece_of(self.model, batch)
            alone = blocks_alone(self.model, piece, self.anatomy, {each.block for each in self.whole_maps})
            for each in self.whole_maps:
                block = alone[each.block]
                try:
                    number = next(i for i, part in enumerate(block.block.parts) if part is each.part)
                    with full_precision(block.stream):
                        each.statistics.matrix, each.bias = block.output_map(number)
                except UncollapseError as error:
                    each.statistics.reasons |= {"matrix": str(error), "energy_share": str(error)}

    def _written(
        self, each: _WholeMap, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """What the heads of an attention write together: the energy of each, where the map that was found gives this again."""
        mixed, self.heads_output = self.heads_output, None
        statistics, matrix = each.statistics, each.statistics.matrix
        if "energy_share" in statistics.reasons or matrix is None or each.bias is None:
            return
        found = self._tokens_of(each.block, next(tensors_in(output)), "what its heads write")
        if mixed is None or found is None or mixed.shape[0::2] != found[0].shape[:2]:
            statistics.reasons["energy_share"] = (
                "the mixed values could not be laid beside the tokens that they are written to"
            )
            return
        cloud, mask = mixed.transpose(1, 2).flatten(2), found[1]
        if not bears_out(cloud, matrix, each.bias, found[0], mask):
            reason = "on this batch its heads do not write what the map found on the example says"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}
            statistics.matrix = None
            return
        self._add_energy(statistics, matrix, cloud, mask)

    def _measure_energy(self, statistics: AttentionStatistics, matrix: Tensor, mixed: Tensor) -> None:
        """The energy of each head's centred contribution. `mixed` is what the projection reads."""
        call = statistics.call
        heads_output, self.heads_output = self.heads_output, None
        if "energy_share" in statistics.reasons:
            return
        if mixed.shape[-1] != call.heads * call.head_width:
            statistics.reasons["energy_share"] = "the output projection's input is not the concatenated heads"
            return
        mixed = side_by_side(mixed, statistics.features, -1)
        cloud = projected_cloud(mixed, heads_output, self.batch_size)
        if cloud is None:
            laid = self._tokens_of(statistics.block, mixed, "what its output projection reads")
            cloud = None if laid is None else laid[0]
        is_first = not statistics.tokens.count
        if is_first and heads_output is not None and not holds(mixed, heads_output):
            statistics.reasons["gauge_dimension"] = "something acts between the attention and its output projection"
        if cloud is None:
            statistics.reasons["energy_share"] = "the tokens of the output projection's input cannot be told apart"
            return
        stack = self.anatomy.stack_of(statistics.block)
        mask = self._mask(stack, cloud.shape[1], f"the output projection of block {statistics.block}")
        if mask is not None and mask.shape[0] != cloud.shape[0]:
            mask = None
        self._add_energy(statistics, matrix, cloud, mask)

    def _add_energy(self, statistics: AttentionStatistics, matrix: Tensor, cloud: Tensor, mask: Tensor | None) -> None:
        lengths = torch.full(cloud.shape[:1], cloud.shape[1]) if mask is None else mask.sum(-1)
        statistics.tokens = statistics.tokens.add(lengths)
        energy = heads.contribution_energy(cloud, matrix, statistics.call.heads, mask)
        statistics.energy = statistics.energy.add((energy / energy.sum(-1, keepdim=True)).double())
