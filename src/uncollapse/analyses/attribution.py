"""Which part of a model does it? The effects of heads, MLPs, embedding and biases on one number of its output, each beside what
may be said of a single head.

Three effects answer three questions. The *direct* effect is what a component does on the stream's own way to the output. The
*total* effect is what is lost when it is taken away and later layers answer. The *first-order* effect stands for the total one,
by gradients. Where later layers make up for a missing head (self-repair), its total effect is smaller than its direct one.

An effect of a head is a statement about a part of a sum. Whoever records the heads before the output projection knows the part.
Whoever sees the sum has to take it apart, and an error in it grows by the layer's noise gain. Both are said of every head.

What this cannot say: what would be lost if the component had never been there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from uncollapse.analyses.anatomy_recording import anatomy_record
from uncollapse.analyses.preparation import Prepared, ProbeOptions, prepare, with_true_positions
from uncollapse.analyses.recording import model_info, probe_record, versions
from uncollapse.analyses.result import Recorded
from uncollapse.anatomy.block_alone import blocks_alone
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import float64_kept, probing
from uncollapse.anatomy.sharded_weights import is_sharded
from uncollapse.anatomy.stacks import paddings
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.interventions.single_heads import HeadsAs
from uncollapse.judgement.identifiability import heads_records, weights_reader
from uncollapse.probe.attention import attention_places
from uncollapse.probe.effects import Effect, Effects, Key, effects_of
from uncollapse.probe.metrics import LogitDifference, NextTokenLoss
from uncollapse.probe.passes import Observations
from uncollapse.probe.total_effects import add_total_effects
from uncollapse.records.attribution import (
    ATTRIBUTION_SCHEMA,
    AttributionRecord,
    EffectRecord,
    Estimate,
    MetricRecord,
)
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.restoring import leaves_no_trace
from uncollapse.sources import tokenize
from uncollapse.wrappers import module_of

AnyMetric = Callable[[Any], Tensor] | LogitDifference | NextTokenLoss
FIGURES = ("direct", "exact", "first_order", "total")
AFFINE = "the metric: it is affine in what the components add"
LINEARISED = "the metric's linearisation at this point: it is not affine in what the components add"
UNTOLD = (
    "the metric's linearisation at this point: half precision hides whether it is affine in what the components add"
)


@dataclass(frozen=True, repr=False)
class Attribution(Recorded[AttributionRecord]):
    """What `attribute` found. `record` has all of it, as data."""

    @property
    def direct(self) -> list[EffectRecord]:
        """One entry for each component, with `kind`, `block`, `head` and `value`. The values add up to the metric where it is
        affine in what the components add (`record.metric.is_affine`)."""
        return self.record.effects

    @property
    def heads(self) -> list[EffectRecord]:
        """The entries of heads."""
        return [effect for effect in self.record.effects if effect.kind == "head"]


@leaves_no_trace
def attribute(
    model: nn.Module | str | Path,
    batch: Mapping[str, Any] | str | Iterable[Mapping[str, Any]] | Iterable[str],
    metric: AnyMetric,
    *,
    ablated_as: HeadsAs | None = "zero",
    exact: bool = False,
    noise: float = 0.01,
    **probe: Unpack[ProbeOptions],
) -> Attribution:
    """What each part of a model does to a number of its output.

    batch: one dictionary of tensors or a list of them, passed to the model as they are; or prompts, with a tokenizer. metric:
    called with the model's output, it gives one number for each sequence (or one number): `uc.logit_difference(" Mary", " John")`,
    `uc.next_token_loss()`, or any function. ablated_as: what stands in the place of a component for its total effect, `"zero"`,
    `"mean"` (over the batch) or `"resample"` (another sequence's); None leaves total effects out. They take one pass for each head
    and MLP. exact: also measure exact direct effects, one more pass for each. noise: the error that an observer behind the output
    projection has, as a share of what the layer writes.

    `attribution.direct` is a list of entries with `kind`, `block`, `head`, `value`. With several sequences every figure has the
    half width of its 95 % interval over them.

    Options shared with `diagnose`, as far as they apply (`help(uncollapse.analyses.preparation.ProbeOptions)`): tokenizer,
    max_tokens, seed, layout, name, device, dtype, device_map, max_memory, trust_remote_code, max_parameters, command, alone,
    progress.

    Raises `InputError` for input that cannot be used, `TypeError` for an unknown option, and `UnsupportedModel` where the anatomy
    cannot be proved or the model cannot be differentiated.
    """
    _require(metric, ablated_as, noise)
    given: list[Any] = [batch] if isinstance(batch, str | Mapping) else list(batch)
    prompts = given if given and all(isinstance(each, str) for each in given) else None
    if probe.get("batches") is not None:
        raise InputError("attribute: expected the batch as second argument, got batches, too. Leave batches out.")
    _require_unsharded(module_of(model))
    prepared = _prepared(model, prompts, given, probe)
    prepared.require_same("options", (ablated_as, exact))
    if ablated_as == "resample" and any(_sequences(each) < 2 for each in prepared.batches):
        raise InputError(
            "attribute: expected at least 2 sequences in a batch to take values from, got 1. ablated_as='resample' puts those of "
            "another one in the place of a component. Pass more of them, or ablated_as='mean'."
        )
    with float64_kept(prepared.loaded.model):
        observed = prepared.captured(
            watch={"attention", "projections"},
            digest=weights_reader(prepared.loaded.model),
            progress=prepared.progress,
        )
        found = prepared.of_each_batch(lambda number: _effects(prepared, number, metric, ablated_as, exact))
    options: dict[str, Any] = {"ablated_as": ablated_as, "exact": exact, "noise": noise}
    if prompts is not None:
        options["prompts"] = prompts
    if isinstance(metric, LogitDifference):
        options |= {"target": list(metric.target), "against": list(metric.against), "position": metric.position}
    return Attribution(
        prepared.judged(lambda: _judged(prepared, observed, found, metric, ablated_as, noise, options)),
        prepared.is_first,
    )


def _judged(
    prepared: Prepared,
    observed: Observations,
    found: Sequence[Effects],
    metric: AnyMetric,
    ablated_as: HeadsAs | None,
    noise: float,
    options: Mapping[str, Any],
) -> AttributionRecord:
    heads = heads_records(observed.attention, prepared.loaded.model)
    own = dict(zip(attention_places(prepared.anatomy), heads, strict=True))
    described = probe_record(prepared, observed)
    described.options.update(options)
    return AttributionRecord(
        schema=ATTRIBUTION_SCHEMA,
        versions=versions(),
        model=model_info(prepared, observed),
        probe=described,
        metric=_metric_record(metric, found),
        effects=_effect_records(found, own, noise, ablated_as),
        noise=noise,
        ablated_as=ablated_as,
        heads=heads,
        anatomy=anatomy_record(prepared.anatomy, observed),
    )


def _require_unsharded(model: object) -> None:
    if isinstance(model, nn.Module) and is_sharded(model):
        raise UnsupportedModel(
            "attribute: expected a model that every process holds as a whole, got one whose weights are shared out (FSDP2 or "
            "tensor parallel). Gradients would have to go through weights that are gathered for a block and let go. Save a "
            "checkpoint and attribute that."
        )


def _require(metric: AnyMetric, ablated_as: HeadsAs | None, noise: float) -> None:
    if not callable(metric) and not isinstance(metric, LogitDifference | NextTokenLoss):
        raise InputError(
            f"attribute: expected a metric that can be called with the model's output, got {type(metric).__name__}. "
            "Pass uc.logit_difference(target, against), uc.next_token_loss(), or a function."
        )
    if ablated_as not in (None, "zero", "mean", "resample"):
        raise InputError(
            f"attribute: expected ablated_as among zero, mean, resample or None, got {ablated_as!r}. Check the spelling."
        )
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 < noise < 1:
        raise InputError(
            f"attribute: expected noise as a share between 0 and 1, got {noise!r}. It is relative to what a layer writes. "
            "Pass 0.01."
        )


def _prepared(
    model: nn.Module | str | Path, prompts: list[str] | None, given: list[Any], probe: ProbeOptions
) -> Prepared:
    if prompts is None:
        return prepare(attribute, model, None, {**probe, "batches": given}, head=True)
    # Loaded before it is known how its tokenizer cuts: one text makes it ready, the prompts keep their order.
    prepared = prepare(attribute, model, prompts, {**probe, "batch_size": len(prompts)}, head=True)
    max_tokens = probe.get("max_tokens", 128)
    _require_whole(prompts, prepared.loaded.tokenizer, max_tokens)
    batches = tokenize(
        prompts,
        prepared.loaded.tokenizer,
        max_tokens=max_tokens,
        batch_size=len(prompts),
        keeps_order=True,
    )
    prepared.batches = with_true_positions(prepared.loaded.model, batches)
    prepared.source = "prompts"
    return prepared


def _require_whole(prompts: Sequence[str], tokenizer: Any, max_tokens: int) -> None:
    """A prompt that is cut ends at another token, and the answer would be about that one."""
    for number, prompt in enumerate(prompts, 1):
        if len(tokenizer(prompt, truncation=True, max_length=max_tokens + 1)["input_ids"]) > max_tokens:
            raise InputError(
                f"attribute: expected prompts of up to {max_tokens} tokens, got more in prompt {number} of {len(prompts)} "
                f"({prompt[:30]!r}…). Cut there, it would ask about another token. Set max_tokens (--max-tokens) higher."
            )


def _effects(prepared: Prepared, number: int, metric: AnyMetric, ablated_as: HeadsAs | None, exact: bool) -> Effects:
    model, batch, batches = prepared.loaded.model, prepared.batches[number], len(prepared.batches)
    made = _made(prepared, batch, metric)

    def progress(what: str, done: int, total: int) -> None:
        if prepared.progress is not None:
            prepared.progress(what, number * total + done, batches * total)

    found = effects_of(model, batch, made, prepared.anatomy, layout=prepared.layout, exact=exact, progress=progress)
    if ablated_as is not None:
        add_total_effects(
            model, batch, made, prepared.anatomy, found.effects, ablated_as, seed=prepared.seed, progress=progress
        )
    return found


def _made(prepared: Prepared, batch: Mapping[str, Any], metric: AnyMetric) -> Callable[[Any], Tensor]:
    """The metric as a function of the output of this batch."""
    if not isinstance(metric, LogitDifference | NextTokenLoss):
        return metric
    model = prepared.loaded.model
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with probing(model):
        padding = paddings(model, given, prepared.anatomy, blocks_alone)[-1]
    if padding.reason:
        raise InputError(
            f"attribute: expected a batch whose real tokens can be told, got {padding.reason}. The last token of a sequence is not "
            "known then. Pass a batch without padding, or a metric of your own."
        )
    if isinstance(metric, NextTokenLoss):
        return metric.of(given, padding.mask)
    return metric.of(_sequences(batch), padding.mask, prepared.loaded.tokenizer)


def _sequences(batch: Mapping[str, Any]) -> int:
    return next(t.shape[0] for t in tensors_in(dict(batch)) if t.ndim)


# From tensors to records ----------------------------------------------------------------------------------------------


def _estimate(values: Iterable[Tensor | None]) -> Estimate | None:
    """The estimate over the sequences of all batches; None where one of them has no figure."""
    found = list(values)
    if any(each is None for each in found):
        return None
    return Estimate.of(torch.cat([each.double().cpu() for each in found if each is not None]).tolist())


def _required(values: Iterable[Tensor]) -> Estimate:
    found = _estimate(values)
    if found is None:
        raise UnsupportedModel(
            "attribute: expected effects that are finite, got NaN or infinity. The model's activations may overflow in its number "
            "format. Load it in float32."
        )
    return found


def _metric_record(metric: AnyMetric, found: Sequence[Effects]) -> MetricRecord:
    told = [each.is_affine for each in found]
    is_affine = all(told)
    return MetricRecord(
        name=getattr(metric, "name", "") or getattr(metric, "__name__", "") or type(metric).__name__,
        value=_required(each.metric for each in found),
        sum=_required(each.metric - each.remainder for each in found),
        remainder=_required(each.remainder for each in found),
        is_affine=is_affine,
        sum_of=AFFINE if is_affine else UNTOLD if None in told else LINEARISED,
        left=sorted({name for each in found for name in each.left}),
    )


def _effect_records(
    found: Sequence[Effects], heads: Mapping[Key, HeadsRecord], noise: float, ablated_as: HeadsAs | None
) -> list[EffectRecord]:
    """One record for each component. heads: by block and part."""
    by_place: dict[tuple[Any, ...], dict[int, Effect]] = {}
    for batch, each in enumerate(found):
        counts: dict[tuple[Any, ...], int] = {}
        for effect in each.effects:
            place = (effect.kind, effect.block, effect.head, effect.stack, effect.attention, effect.part)
            counts[place] = counts.get(place, 0) + 1
            by_place.setdefault((*place, counts[place]), {})[batch] = effect
    records = []
    for own in by_place.values():
        like = next(iter(own.values()))
        # A bias that is not met on a batch adds nothing there.
        effects = [
            own.get(
                batch,
                Effect(like.kind, like.block, stack=like.stack, part=like.part, direct=torch.zeros_like(each.metric)),
            )
            for batch, each in enumerate(found)
        ]
        records.append(_effect_record(effects, heads, noise, ablated_as))
    return records


def _effect_record(
    effects: Sequence[Effect],
    heads: Mapping[Key, HeadsRecord],
    noise: float,
    ablated_as: HeadsAs | None,
) -> EffectRecord:
    first = effects[0]
    figures = {name: _estimate(getattr(effect, name) for effect in effects) for name in FIGURES}
    unavailable = {k: reason for effect in effects for k, reason in effect.reasons.items()}
    for name, value in figures.items():
        if value is not None:
            unavailable.pop(name, None)
        elif name == "exact":
            unavailable.setdefault(name, "measured with exact=True (--exact)")
        elif name == "total" and ablated_as is None:
            unavailable[name] = "measured with ablated_as (--ablated-as)"
        else:
            unavailable.setdefault(name, "not finite")
    said: dict[str, Any] = {}
    if first.kind == "head" and first.head is not None and first.block is not None and first.part is not None:
        said = _of_a_head(first.head, heads.get((first.block, first.part)), effects, noise, unavailable)
    return EffectRecord(
        first.kind,
        first.block,
        first.head,
        first.stack,
        first.attention,
        figures["direct"],
        figures["exact"],
        figures["first_order"],
        figures["total"],
        **said,
        unavailable=unavailable,
    )


def _of_a_head(
    head: int,
    record: HeadsRecord | None,
    effects: Sequence[Effect],
    noise: float,
    unavailable: dict[str, str],
) -> dict[str, Any]:
    """What the layer's output projection says of the effect of one head."""
    behind = ("noise_gain", "behind", "behind_random")
    if record is None or record.head_noise_gain is None:
        reason = "what its output projection says was not measured"
        unavailable |= dict.fromkeys(
            behind, reason if record is None else record.unavailable.get("head_noise_gain", reason)
        )
        return {}
    reach = _estimate(effect.reach for effect in effects)
    gain, random = record.head_noise_gain[head], record.random_head_noise_gain
    size = 0.0 if reach is None else noise * reach.mean
    if gain is None:
        unavailable |= dict.fromkeys(behind[:2], "infinite: other heads can write part of what this head writes")
    if not random:
        unavailable["behind_random"] = record.unavailable.get("random_head_noise_gain", "not known")
    overlap = (record.write_space_overlap or [[]] * record.heads)[head]
    return {
        "noise_gain": gain,
        "behind": None if gain is None else gain * size,
        "behind_random": random[len(random) // 2] * size if random and math.isfinite(random[-1]) else None,
        # The mean squared sine of the angles between the two spaces is 1 less the overlap.
        "indistinguishable_from": [h for h, share in enumerate(overlap) if h != head and share >= 1 - noise**2],
    }
