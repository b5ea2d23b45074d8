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
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse import geometry, heads, mixing
from uncollapse.accumulators import Running
from uncollapse.anatomy import Anatomy, AttentionCall, Block, Part, Place
from uncollapse.errors import InputError, UncollapseError
from uncollapse.interception import Handler, Point, full_precision, in_turn, probing
from uncollapse.sources import token_mask
from uncollapse.streams import Action, met
from uncollapse.sublayers import NormStatistics, Sublayers, UpdateStatistics
from uncollapse.tracing import operation_name, tensors_in

Progress = Callable[[str, int, int], None]
Level = Literal["core", "full"]
Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]  # function, operands, result

PLAIN_MEASURES = [
    "rank",
    "affine_rank",
    "attainable_rank",
    "attainable_affine_rank",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
    "rank_gap",
]
MASSIVE_MEASURES = [
    "tokens_left_out",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
]
STREAM_MEASURES = ["consensus_after_norm", "stream_carried", "distinct_tokens"]
SCALE = 256.0
ATTENTION_MEASURES = [
    "entropy",
    "normalized_entropy",
    "entropy_floor",
    "max_logit",
    "rest_entropy",
    "key_share",
    "value_contraction",
    "susceptibility",
    "contraction",
    "spectral_gap",
    "second_singular_value",
]


@dataclass
class SiteStatistics:
    """Running statistics of the token cloud at one site. `not_finite` counts sequences with NaN or infinity in a real token."""

    site: str
    block: int | None
    stack: Literal["encoder", "decoder"] | None
    plain: Running = field(default_factory=lambda: Running.empty(len(PLAIN_MEASURES)))
    massive: Running = field(default_factory=lambda: Running.empty(len(MASSIVE_MEASURES)))
    stream: Running = field(default_factory=lambda: Running.empty(len(STREAM_MEASURES)))
    not_finite: int = 0
    width: int = 0


@dataclass
class AttentionStatistics:
    """Running statistics of one attention call: `values` is [measure, head], `energy` [head] the share of the centred
    output energy. `reasons` says of a measure why it is missing. `matrix` is W_O as [mixed, width], as met in the pass: effective,
    with adapters in it and quantised weights expanded; `reasons["matrix"]` says why it is missing. `tokens` are the real ones
    that the projection reads; `sinks` says that the softmax also ran over columns that belong to no key."""

    block: int
    kind: Literal["self", "cross"]
    stack: Literal["encoder", "decoder"] | None
    call: AttentionCall
    values: Running
    energy: Running
    route: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    matrix: Tensor | None = None
    tokens: Running = field(default_factory=Running.empty)
    sinks: bool = False


@dataclass
class Observations:
    """What one probe pass saw: a site for each stack's embedding and each block, an entry for each attention call; at level
    `full` also one for each update and for each norm call inside a block."""

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

    Raises `InputError` where a padded batch meets a model whose token axis does not match the mask.
    """
    probe = _Probe(model, anatomy, level, level == "full" if spectra is None else spectra)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    with probing(model, seed), probe.installed():
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("probe", number, len(batches))
            on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            probe.begin(on_device)
            output = model(**on_device)
            if on_output is not None:
                on_output(on_device, output)
        if progress is not None:
            progress("probe", len(batches), len(batches))
    return probe.observations


class _Probe:
    """The state of one pass: which batch is running, which call of a shared module, and the statistics so far."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, level: Level, spectra: bool) -> None:
        self.model, self.anatomy, self.level, self.spectra = model, anatomy, level, spectra
        self.observations = Observations([], [])
        self.batch_size = 0
        self.masks: dict[str, Tensor | None] = {}
        self.runs: dict[str, int] = {}
        self.heads_output: Tensor | None = None  # of the attention call whose output projection is still to come
        self.matrices: dict[str, Tensor] = {}
        self.distinct: dict[str, Tensor | None] = {}  # by stack: different token ids of each sequence
        self.entered: dict[str, Tensor] = {}  # by site: the cloud that entered the block that is running
        # What reads the stream takes each token's mean away, if it is a layer norm.
        self.is_centred = any(norm.kind == "layer" for block in anatomy.blocks for norm in block.norms)
        self.thread: int | None = None  # the thread of the probe's own pass, while one runs
        self.sublayers: Sublayers | None = None
        if level == "full":
            self.sublayers = Sublayers(model, anatomy, self._cloud, self._mask, self._is_own)
            self.observations.updates, self.observations.norms = self.sublayers.updates, self.sublayers.norms

    # Installation -------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Any:
        observers: dict[Point, Observer] = {}
        projections: dict[str, dict[int, AttentionStatistics]] = {}
        streams: list[tuple[Place, Action]] = []
        begun: set[str | None] = set()
        for number, block in enumerate(self.anatomy.blocks):
            if block.stack not in begun:
                begun.add(block.stack)
                name = "embedding" if block.stack != "decoder" else "decoder.embedding"
                embedding = self._site(SiteStatistics(name, None, block.stack))
                streams.append((block.entry, functools.partial(self._meet_site, embedding, block)))
            site = self._site(SiteStatistics(f"block.{number}", number, block.stack))
            streams.append((block.entry, functools.partial(self._keep_entered, site, block)))
            streams.append((block.exit, functools.partial(self._meet_site, site, block)))
            for part in block.parts:
                if part.kind in {"attention", "cross"}:
                    self._attend(number, block, part, observers, projections)
        handlers = {p: self._observing(o) for p, o in observers.items()}
        if self.sublayers is not None:
            streams += self.sublayers.streams
            for point, handler in self.sublayers.handlers.items():
                handlers[point] = in_turn(handler, handlers[point]) if point in handlers else handler
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
            # Before the hooks: what they compute must not count as operations of the module that calls theirs.
            stack.enter_context(met(self.model, streams, handlers=handlers))
            if self.sublayers is not None:
                stack.enter_context(self.sublayers.installed())
            for name, calls in projections.items():
                enter = self._projecting(name, calls)
                stack.callback(self.model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    def _site(self, site: SiteStatistics) -> SiteStatistics:
        self.observations.sites.append(site)
        return site

    def _end(self, *_: Any) -> None:
        if self._is_own():
            self.thread = None

    def _is_own(self) -> bool:
        """Whether a hook was reached by the probe's own pass: not by another thread, nor by a model that shares a module."""
        return self.thread == threading.get_ident()

    def _observing(self, observe: Observer) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            if self._is_own():
                with full_precision(output):
                    observe(function, args, kwargs, output)
            return output

        return handler

    def _keep_entered(self, site: SiteStatistics, block: Block, stream: Tensor) -> None:
        if self._is_own():  # a copy: a block may add to its stream in place
            self.entered[site.site] = self._cloud(stream, block.token_axis).clone()

    def _meet_site(self, site: SiteStatistics, block: Block, stream: Tensor) -> None:
        if self._is_own():
            with full_precision(stream):
                self._measure_site(site, stream, block)

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
                self.matrices[name] = projection_matrix(module, given)
            except UncollapseError as error:
                statistics.reasons |= {"matrix": str(error), "energy_share": str(error)}
                return
        statistics.matrix = self.matrices[name]
        self._measure_energy(statistics, statistics.matrix, given)

    def _attend(
        self,
        number: int,
        block: Block,
        part: Part,
        observers: dict[Point, Observer],
        projections: dict[str, dict[int, AttentionStatistics]],
    ) -> None:
        call = part.attention[0]
        statistics = AttentionStatistics(
            number,
            "cross" if part.kind == "cross" else "self",
            block.stack,
            call,
            Running.empty(len(ATTENTION_MEASURES), call.heads),
            Running.empty(call.heads),
        )
        self.observations.attention.append(statistics)
        if isinstance(call.projection, Point):
            observers[call.projection] = functools.partial(self._projection_call, statistics)
        elif call.projection is not None:
            projections.setdefault(call.projection.name, {})[call.projection.call] = statistics
        else:
            statistics.reasons["energy_share"] = "no output projection follows this attention"
        if len(part.attention) > 1:
            reason = f"{len(part.attention)} attention calls in one sublayer are not measured yet"
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason) | {"energy_share": reason}
            return
        if call.score == call.product:
            observers[call.score] = functools.partial(self._fused_call, statistics)
        else:
            pending: list[tuple[Tensor, Tensor]] = []
            observers[call.score] = functools.partial(self._softmax_call, pending)
            observers[call.product] = functools.partial(self._product_call, statistics, pending)

    # Batches ------------------------------------------------------------------------------------------------------
    def begin(self, batch: Mapping[str, Any]) -> None:
        """Note the batch's size and masks before the model runs on it."""
        self.runs.clear()
        self.entered.clear()
        self.thread = threading.get_ident()
        self.batch_size = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
        encoder = token_mask(batch)
        decoder = token_mask(batch, "decoder_attention_mask") if "decoder_input_ids" in batch else encoder
        self.masks = {"encoder": encoder, "decoder": decoder, "": encoder}
        own = _distinct_tokens(batch, "input_ids", encoder)
        self.distinct = {"encoder": own, "decoder": own, "": own}
        if "decoder_input_ids" in batch:
            self.distinct["decoder"] = _distinct_tokens(batch, "decoder_input_ids", decoder)
        lengths = encoder.sum(-1) if encoder is not None else None
        if lengths is None:
            first = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim >= 2), None)
            known = first is not None and first.ndim == 2 and not first.is_floating_point()
            lengths = torch.full((self.batch_size,), first.shape[1] if known and first is not None else 0)
        if self.sublayers is not None:
            self.sublayers.begin(self.batch_size)
        self.observations.sequences += self.batch_size
        self.observations.tokens += int(lengths.sum())
        self.observations.max_tokens = max(self.observations.max_tokens, int(lengths.max()))

    def _mask(self, stack: str | None, tokens: int, what: str) -> Tensor | None:
        """The token mask of a stack for a cloud of `tokens` rows; `None` when every row is real."""
        mask = self.masks[stack or ""]
        if mask is None or (mask.shape[-1] == tokens and bool(mask.all())):
            return None
        if mask.shape[-1] == tokens:
            return mask
        if bool(mask.all()):
            return None
        raise InputError(
            f"capture: expected {mask.shape[-1]} tokens at {what}, as in the attention mask, got {tokens}. "
            "This model changes the number of tokens, so padding cannot be told apart inside it. "
            "Pass batches without padding (batch_size=1 for texts)."
        )

    # Sites --------------------------------------------------------------------------------------------------------
    def _measure_site(self, site: SiteStatistics, stream: Tensor, block: Block) -> None:
        cloud = self._cloud(stream, block.token_axis)
        site.width = cloud.shape[-1]
        mask = self._mask(site.stack, cloud.shape[1], site.site)
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
        distinct = self.distinct[site.stack or ""] if site.block is None else None
        if distinct is None or len(distinct) != len(apart):
            distinct = torch.full_like(apart, math.nan)
        site.stream = site.stream.add(torch.stack([apart, carried, distinct.to(apart)], -1))

    def _cloud(self, stream: Tensor, token_axis: int | None) -> Tensor:
        """The stream as [batch, token, width], whatever axes the model uses."""
        if token_axis is None:
            return stream.reshape(self.batch_size, -1, stream.shape[-1])
        if token_axis == 0:
            return stream.transpose(0, 1)
        return stream.flatten(1, -2)  # a grid of patches, or tokens already

    # Attention ----------------------------------------------------------------------------------------------------
    def _fused_call(
        self,
        statistics: AttentionStatistics,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (_four_axes(given[n], self.batch_size) for n in names[:3])
        allowed, bias = _mask_or_bias(given.get("attn_mask"))
        rows = mixing.row_statistics(
            q,
            k,
            allowed=allowed,
            bias=bias,
            query_mask=self._query_mask(statistics, q.shape[-2], q.shape[0]),
            causal=bool(given.get("is_causal", False)),
            scale=given.get("scale"),
            susceptibility=self.level == "full",
        )
        weights = None
        if self.spectra:
            weights = mixing.attention_weights(
                q, k, allowed=allowed, bias=bias, causal=bool(given.get("is_causal", False)), scale=given.get("scale")
            )
        self._measure_attention(statistics, rows, v, _four_axes(output, self.batch_size), weights)

    def _softmax_call(
        self,
        pending: list[tuple[Tensor, Tensor]],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        pending[:] = [(output, args[0] if args else kwargs["input"])]

    def _product_call(
        self,
        statistics: AttentionStatistics,
        pending: list[tuple[Tensor, Tensor]],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        weights, logits = (_four_axes(t, self.batch_size) for t in pending.pop())
        operands = list(tensors_in([args, kwargs]))
        value = _four_axes(operands[statistics.call.value_operand], self.batch_size)
        keys = value.shape[-2]
        if weights.ndim != 4 or keys > weights.shape[-1]:
            reason = "the attention weights do not have the axes batch, head, query, key"
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason)
            return
        statistics.sinks |= keys < weights.shape[-1]
        weights, logits = weights[..., :keys], logits[..., :keys]  # columns beyond the keys are attention sinks
        query_mask = self._query_mask(statistics, weights.shape[-2], weights.shape[0])
        rows = mixing.row_statistics_from_weights(
            weights, logits, query_mask=query_mask, susceptibility=self.level == "full"
        )
        full = weights / weights.sum(-1, keepdim=True) if self.spectra else None
        self._measure_attention(statistics, rows, value, _four_axes(output, self.batch_size), full)

    def _query_mask(self, statistics: AttentionStatistics, queries: int, sequences: int) -> Tensor | None:
        mask = self._mask(statistics.stack, queries, f"the attention of block {statistics.block}")
        return mask if mask is None or mask.shape[0] == sequences else None

    def _key_mask(self, statistics: AttentionStatistics, keys: int, sequences: int) -> Tensor | None:
        stack = "encoder" if statistics.kind == "cross" else statistics.stack
        mask = self._mask(stack, keys, f"the keys of block {statistics.block}")
        return mask if mask is None or mask.shape[0] == sequences else None

    def _measure_attention(
        self,
        statistics: AttentionStatistics,
        rows: mixing.RowStatistics,
        value: Tensor,
        mixed: Tensor,
        weights: Tensor | None,
    ) -> None:
        statistics.route = rows.route
        sequences, count = rows.entropy.shape[:2]
        undefined = torch.full((sequences, count), math.nan, dtype=torch.float64)
        columns = dict.fromkeys(ATTENTION_MEASURES, undefined)
        for name in ("entropy", "normalized_entropy", "entropy_floor", "rest_entropy", "key_share", "susceptibility"):
            found = getattr(rows, name)
            if found is not None:
                columns[name] = found.double().nanmean(-1)
        if rows.max_logit is not None:
            columns["max_logit"] = rows.max_logit.double().nan_to_num(nan=-math.inf).amax(-1)
        query_mask = self._query_mask(statistics, rows.entropy.shape[-1], sequences)
        key_mask = self._key_mask(statistics, value.shape[-2], sequences)
        if mixed.ndim == 4 and mixed.shape[:2] == (sequences, count) and value.shape[0] == sequences:
            before, after = _spread(value, key_mask), _spread(mixed, query_mask)
            columns["value_contraction"] = after / before.repeat_interleave(count // before.shape[1], 1)
        else:
            statistics.reasons["value_contraction"] = "the mixed values do not have the axes batch, head, token, width"
        self.heads_output = mixed if mixed.ndim == 4 else None
        if weights is not None:
            for name, found in _spectra(weights, query_mask, key_mask).items():
                columns[name] = found
        statistics.values = statistics.values.add(
            torch.stack([columns[n].to("cpu", torch.float64) for n in ATTENTION_MEASURES], 1)
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
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        mixed = statistics.call.heads * statistics.call.head_width
        if operation_name(function) == "linear" and operands[1].shape[-1] == mixed:
            statistics.matrix = operands[1].detach().T
            self._measure_energy(statistics, statistics.matrix, operands[0])
        else:
            reason = "the output projection is no linear map of the concatenated heads"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}

    def _measure_energy(self, statistics: AttentionStatistics, matrix: Tensor, mixed: Tensor) -> None:
        """The energy of each head's centred contribution. `mixed` is what the projection reads."""
        call = statistics.call
        heads_output, self.heads_output = self.heads_output, None
        if "energy_share" in statistics.reasons:
            return
        if mixed.shape[-1] != call.heads * call.head_width:
            statistics.reasons["energy_share"] = "the output projection's input is not the concatenated heads"
            return
        cloud = projected_cloud(mixed, heads_output, self.batch_size)
        is_first = not statistics.tokens.count
        if is_first and heads_output is not None and not _holds(mixed, heads_output):
            statistics.reasons["gauge_dimension"] = "something acts between the attention and its output projection"
        if cloud is None:
            statistics.reasons["energy_share"] = "the tokens of the output projection's input cannot be told apart"
            return
        mask = self._mask(statistics.stack, cloud.shape[1], f"the output projection of block {statistics.block}")
        if mask is not None and mask.shape[0] != cloud.shape[0]:
            mask = None
        lengths = torch.full(cloud.shape[:1], cloud.shape[1]) if mask is None else mask.sum(-1)
        statistics.tokens = statistics.tokens.add(lengths)
        energy = heads.contribution_energy(cloud, matrix, call.heads, mask)
        statistics.energy = statistics.energy.add((energy / energy.sum(-1, keepdim=True)).double())


def projected_cloud(mixed: Tensor, heads_output: Tensor | None, batch_size: int) -> Tensor | None:
    """What the output projection reads as [sequence, token, mixed]. Batch-first as it stands; otherwise the order of its rows
    is taken from the attention's own output [sequence, head, token, head width], which must be found in it."""
    if mixed.ndim == 3 and mixed.shape[0] == batch_size != mixed.shape[1]:
        return mixed
    if heads_output is not None:
        known = heads_output.transpose(1, 2).flatten(2)  # [sequence, token, mixed]
        if mixed.numel() == known.numel():
            sequences, tokens = known.shape[:2]
            if torch.equal(mixed.reshape(known.shape), known):
                return mixed.reshape(known.shape)
            first = mixed.reshape(tokens, sequences, -1).transpose(0, 1)
            if torch.equal(first, known):
                return first
    return mixed if mixed.ndim == 3 and mixed.shape[0] == batch_size else None


def _holds(mixed: Tensor, heads_output: Tensor) -> bool:
    """Whether what the projection reads is the attention's own output, whatever the order of its axes. NaN says nothing."""
    if mixed.numel() != heads_output.numel():
        return False
    found = (heads_output.permute(order) for order in ((0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 2, 3)))
    equal = any(torch.equal(mixed.flatten(), each.flatten().to(mixed.dtype)) for each in found)
    return equal or not bool(mixed.isfinite().all())


def _distinct_tokens(batch: Mapping[str, Any], name: str, mask: Tensor | None) -> Tensor | None:
    """How many different ids each sequence has, padding left out; None where the model is given none (images, sound)."""
    named = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()}
    ids = named.get(name, next((v for k, v in named.items() if "mask" not in k and v.dtype != torch.bool), None))
    if ids is None:
        return None
    real = mask if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    return torch.tensor([len(row[kept].unique()) for row, kept in zip(ids, real, strict=True)])


def _four_axes(tensor: Tensor, batch: int) -> Tensor:
    """[batch, head, token, ·] from that, from [batch·head, token, ·] or from [batch, token, ·] with one head."""
    if tensor.ndim == 3 and tensor.shape[0] % batch == 0:
        return tensor.reshape(batch, tensor.shape[0] // batch, *tensor.shape[1:])
    return tensor


def _mask_or_bias(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A fused call's mask as (allowed pairs, additive bias): an additive mask of zeros and forbidden pairs is no bias."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    allowed = mask > torch.finfo(mask.dtype).min / 2
    if bool(((mask == 0) | ~allowed).all()):
        return allowed, None
    return None, mask


def _spread(x: Tensor, mask: Tensor | None) -> Tensor:
    """||C X||_F over real tokens for x [batch, head, token, width], as [batch, head] in float64."""
    x = x.float() if x.dtype != torch.float64 else x
    if mask is None:
        return (x - x.mean(-2, keepdim=True)).square().sum((-2, -1)).sqrt().double()
    real = mask[:, None, :, None]
    x = torch.where(real, x, 0.0)
    mean = x.sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
    return torch.where(real, x - mean, 0.0).square().sum((-2, -1)).sqrt().double()


def _spectra(weights: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> dict[str, Tensor]:
    """Contraction and leading singular values [batch, head] of weights [batch, head, query, key], sequence by sequence."""
    found: dict[str, list[Tensor]] = {"contraction": [], "spectral_gap": [], "second_singular_value": []}
    for i in range(weights.shape[0]):
        one = weights[i]
        if query_mask is not None:
            one = one[:, query_mask[i]]
        if key_mask is not None:
            one = one[:, :, key_mask[i]]
        first, second = mixing.leading_singular_values(one).unbind(-1)
        found["contraction"].append(mixing.contraction(one))
        found["spectral_gap"].append(1 - second / first)
        found["second_singular_value"].append(second)
    return {name: torch.stack(values) for name, values in found.items()}


def projection_matrix(module: nn.Module, given: Tensor) -> Tensor:
    """W_O of `projection_map`, which raises what it does."""
    return projection_map(module, given)[0]


def projection_map(module: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    """W_O as [mixed, width], rows the concatenated heads, and the bias [width], zeros where there is none: of a plain linear
    map its parameters, else what the module makes of the unit vectors (adapters, quantised and offloaded weights: whatever it
    is, it should be affine). `given` is what it reads.

    Raises `UncollapseError` where the module is not affine or cannot be run by itself.
    """
    weight = getattr(module, "weight", None)
    own_forward = "forward" in vars(module)  # put on the instance by accelerate and others
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    if plain and isinstance(weight, Tensor) and weight.is_floating_point() and not (own_forward or weight.is_meta):
        matrix = weight.detach().T if type(module) is nn.Linear else weight.detach()
        bias = getattr(module, "bias", None)
        return matrix, matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach()
    mixed = given.shape[-1]
    kept = [t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    dtype = (
        given.dtype if given.dtype in kept or not kept else kept[0]
    )  # under autocast the input is not in the weights'
    unit = torch.eye(mixed, device=given.device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    check = torch.randn(1, mixed, generator=generator).to(unit)
    # Large unit vectors, a power of two: f(s e) - f(0) then loses no digits of the weights to the bias.
    rows = torch.cat([SCALE * unit, torch.zeros_like(check), check])
    try:
        with torch.no_grad():  # `forward`: no hook on this module, ours nor the user's, should meet the unit vectors
            image = module.forward(rows.reshape(*(1,) * (given.ndim - 2), *rows.shape)).reshape(len(rows), -1)
    except Exception as error:
        raise UncollapseError("the output projection cannot be run by itself") from error
    zero = image[mixed]
    matrix, got = (image[:mixed] - zero) / SCALE, image[mixed + 1] - zero
    expected = check[0].to(matrix.dtype) @ matrix
    # Activations may be quantised (below 1 %), and beside a large bias half precision rounds; a nonlinearity is off by more.
    allowed = 0.1 * expected.abs().max() + 4 * torch.finfo(image.dtype).eps * zero.abs().max()
    if bool(image.isfinite().all()) and not bool((got - expected).abs().max() <= allowed):
        raise UncollapseError("the output projection is no affine map")
    return matrix, zero
