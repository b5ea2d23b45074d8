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

from uncollapse.anatomy.expected_runs import runs_checked
from uncollapse.anatomy.interception import Handler, Point, device_of, intercepted
from uncollapse.anatomy.probing import full_precision, probing
from uncollapse.anatomy.proof import block_output
from uncollapse.anatomy.tracing import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Block, Part
from uncollapse.errors import InputError, UncollapseError
from uncollapse.measures import geometry, heads, mixing
from uncollapse.measures.running import Running
from uncollapse.probe.attention import (
    ATTENTION_MEASURES,
    AttentionStatistics,
    four_axes,
    mask_or_bias,
    pattern_spectra,
    spread,
)
from uncollapse.probe.projections import holds, projected_cloud, projection_matrix
from uncollapse.probe.sites import MASSIVE_MEASURES, PLAIN_MEASURES, SiteStatistics, distinct_tokens
from uncollapse.probe.sublayers import NormStatistics, Sublayers, UpdateStatistics
from uncollapse.sources import token_mask

Progress = Callable[[str, int, int], None]
Level = Literal["core", "full"]
Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]  # function, operands, result


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

    Raises `InputError` where a padded batch meets a model whose token axis does not match the mask, `ChangedPath` where the
    model takes another path on a batch than the one that was proved.
    """
    probe = _Probe(model, anatomy, level, level == "full" if spectra is None else spectra)
    device = device_of(model)
    with contextlib.closing(probe), probing(model, seed), probe.installed(), runs_checked(model, anatomy) as check:
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("probe", number, len(batches))
            on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            probe.begin(on_device)
            with check(on_device):
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
        # Of a sharded model the whole weights exist only while a block runs, and their memory is freed under whoever kept a view.
        self.lasting = {id(p) for p in model.parameters()}
        self.distinct: dict[str, Tensor | None] = {}  # by stack: different token ids of each sequence
        self.entered: dict[str, Tensor] = {}  # by site: the cloud that entered the block that is running
        # What reads the stream takes each token's mean away, if it is a layer norm.
        self.is_centred = any(norm.kind == "layer" for block in anatomy.blocks for norm in block.norms)
        self.thread: int | None = None  # the thread of the probe's own pass, while one runs
        self.sublayers: Sublayers | None = None
        if level == "full":
            self.sublayers = Sublayers(model, anatomy, self._cloud, self._mask, self._is_own)
            self.observations.updates, self.observations.norms = self.sublayers.updates, self.sublayers.norms

    def close(self) -> None:
        """Be no part of a cycle any more: that would keep the model in memory until Python looks for such."""
        if self.sublayers is not None:
            self.sublayers.let_go()
        self.sublayers = None

    # Installation -------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def installed(self) -> Any:
        observers: dict[Point, Observer] = {}
        block_hooks: dict[str, dict[int, list[tuple[bool, SiteStatistics, Block]]]] = {}
        projections: dict[str, dict[int, AttentionStatistics]] = {}
        begun: set[str | None] = set()
        for number, block in enumerate(self.anatomy.blocks):
            by_call = block_hooks.setdefault(block.module.name, {}).setdefault(block.module.call, [])
            if block.stack not in begun:
                begun.add(block.stack)
                site = "embedding" if block.stack != "decoder" else "decoder.embedding"
                by_call.append((True, self._site(SiteStatistics(site, None, block.stack)), block))
            by_call.append((False, self._site(SiteStatistics(f"block.{number}", number, block.stack)), block))
            for part in block.parts:
                if part.kind in {"attention", "cross"}:
                    self._attend(number, block, part, observers, projections)
        handlers = {p: self._observing(o) for p, o in observers.items()}
        if self.sublayers is not None:
            handlers |= self.sublayers.handlers
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
            # Before the hooks: what they compute must not count as operations of the module that calls theirs.
            stack.enter_context(intercepted(self.model, handlers))
            if self.sublayers is not None:
                stack.enter_context(self.sublayers.installed())
            for name in {*block_hooks, *projections}:
                module = self.model.get_submodule(name)
                enter, leave = self._hooks(name, block_hooks.get(name, {}), projections.get(name, {}))
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
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

    def _hooks(
        self,
        name: str,
        sites: Mapping[int, list[tuple[bool, SiteStatistics, Block]]],
        attentions: Mapping[int, AttentionStatistics],
    ) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._is_own():
                return
            run = self.runs.get(name, 0)
            self.runs[name] = run + 1
            for at_entry, site, block in sites.get(run, ()):
                key = block.stream_input
                given = args[key] if isinstance(key, int) else kwargs[key]
                if at_entry:
                    with full_precision(given):
                        self._measure_site(site, given, block)
                else:
                    # A copy: a block may add to its stream in place.
                    self.entered[site.site] = self._cloud(given, block.token_axis).clone()
            if run in attentions:
                given = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
                with full_precision(given):
                    self._project(attentions[run], name, module, given)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            if not self._is_own():
                return
            run = self.runs[name] - 1
            for at_entry, site, block in sites.get(run, ()):
                if not at_entry:
                    stream = block_output(output, block.stream_output)
                    with full_precision(stream):
                        self._measure_site(site, stream, block)

        return enter, leave

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
        own = distinct_tokens(batch, "input_ids", encoder)
        self.distinct = {"encoder": own, "decoder": own, "": own}
        if "decoder_input_ids" in batch:
            self.distinct["decoder"] = distinct_tokens(batch, "decoder_input_ids", decoder)
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
        q, k, v = (four_axes(given[n], self.batch_size) for n in names[:3])
        allowed, bias = mask_or_bias(given.get("attn_mask"))
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
        self._measure_attention(statistics, rows, v, four_axes(output, self.batch_size), weights)

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
        weights, logits = (four_axes(t, self.batch_size) for t in pending.pop())
        operands = list(tensors_in([args, kwargs]))
        value = four_axes(operands[statistics.call.value_operand], self.batch_size)
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
        self._measure_attention(statistics, rows, value, four_axes(output, self.batch_size), full)

    def _query_mask(self, statistics: AttentionStatistics, queries: int, sequences: int) -> Tensor | None:
        mask = self._mask(statistics.stack, queries, f"the attention of block {statistics.block}")
        return mask if mask is None or mask.shape[0] == sequences else None

    def _key_mask(self, statistics: AttentionStatistics, keys: int, sequences: int) -> Tensor | None:
        stack = "encoder" if statistics.kind == "cross" else statistics.stack
        known = self.masks[stack or ""]
        if statistics.kind == "self" and known is not None and known.shape[-1] < keys:
            # A cache that the model fills itself (virtual tokens of prefix tuning) comes before the text; its keys are real.
            known = torch.cat([known.new_ones(len(known), keys - known.shape[-1]), known], -1)
            return known if known.shape[0] == sequences else None
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
            before, after = spread(value, key_mask), spread(mixed, query_mask)
            columns["value_contraction"] = after / before.repeat_interleave(count // before.shape[1], 1)
        else:
            statistics.reasons["value_contraction"] = "the mixed values do not have the axes batch, head, token, width"
        self.heads_output = mixed if mixed.ndim == 4 else None
        if weights is not None:
            for name, found in pattern_spectra(weights, query_mask, key_mask).items():
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
            weight = operands[1].detach()
            statistics.matrix = (weight if id(operands[1]) in self.lasting else weight.clone()).T
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
        if is_first and heads_output is not None and not holds(mixed, heads_output):
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
