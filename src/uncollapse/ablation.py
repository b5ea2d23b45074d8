"""Which component keeps the tokens apart? Run a live model without each, follow the tokens along depth, and say in words
what the textbook, the paper and the model itself answer.

The model is the user's own, intervened on at its residual additions (`interventions.without`); nothing is re-implemented.
Two questions are kept apart, because they can have different answers: how many dimensions the tokens span (exact rank) and
how far apart they are (consensus distance). A collapse is followed down to the rounding floor of the model's number format and
no further: what is drawn below is rounding.

What this can not say: what a model *trained without* the component would do. Removing a part takes a trained model off its
distribution, and the wording keeps to "removed from a trained model".
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uncollapse.accumulators import Running
from uncollapse.anatomy import Layout
from uncollapse.capture import ATTENTION_MEASURES, Level, Observations, Progress, capture
from uncollapse.diagnosis import Prepared, model_info, prepare, probe, site_records, versions
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.interception import float64_kept
from uncollapse.interventions import require_blocks, require_components, require_effect
from uncollapse.interventions import without as taken_away
from uncollapse.line_fit import line_fit
from uncollapse.recorded import Recorded
from uncollapse.records import (
    ABLATION_SCHEMA,
    AblationRecord,
    AblationRun,
    RateRecord,
    SiteRecord,
    Statistic,
    VerdictRecord,
    followed,
)
from uncollapse.sublayers import norm_records, update_records
from uncollapse.tracing import tensors_in

GRID = ("norm", "residual", "mlp")
LOST = 0.1  # a run collapses in distance when less than a tenth of the embedding's consensus distance is left
RANK_LOST = (
    0.5  # and in rank when less than half of the dimensions that the embedding spans, relative to the attainable
)
DOUBLY_EXPONENTIAL = (
    1.5  # slope of ln r_{l+1} against ln r_l halfway (geometrically) between 1 and the cubic law's 3, rounded
)
FLOOR = (
    16  # rounding floor of a consensus distance, in units of the number format's epsilon: measured 2 to 5 in float64
)

_RATES = {"geometrically": "geometric", "doubly exponentially": "doubly exponential"}

_DONG = "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681"


@dataclass(frozen=True)
class Ablation(Recorded[AblationRecord]):
    """What `ablate` found. `record` is the whole of it, as data."""

    @property
    def runs(self) -> list[AblationRun]:
        """The whole model first, then each combination."""
        return self.record.runs

    @property
    def verdicts(self) -> list[VerdictRecord]:
        """Each prediction against what was observed."""
        return self.record.verdicts


def ablate(
    model: nn.Module | str | Path = "demo",
    texts: Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    without: Sequence[Sequence[str]] | None = None,
    grid: bool = False,
    blocks: Collection[int] | Literal["all", "all+outer"] | None = None,
    level: Level = "core",
    layout: Layout | None = None,
    sequences: int | None = None,
    max_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Ablation:
    """Run a model without some of its components, each combination of `without` once, and compare.

    without: combinations, such as `[("mlp",), ("residual",), ("residual", "mlp")]` (the default). grid: all eight of norm ×
    residual × MLP instead. blocks: take them away in these blocks only. The other arguments are those of `diagnose`; with
    `dtype="float64"` a collapse is followed down to 1e-15 instead of 2e-6. level `"full"` also says of the whole model what
    each sublayer adds and each norm does (`updates`, `norms`).

    Raises `InputError` for an unknown component or block, `UnsupportedModel` where the additions cannot be found and proved, or
    where a combination named in `without` takes nothing away. Of the default and the grid such combinations are left out
    (`record.probe.options["left_out"]`).
    """
    combinations = _combinations(without, grid)
    prepared = prepare(
        model,
        texts,
        tokenizer=tokenizer,
        batches=batches,
        level=level,
        layout=layout,
        sequences=sequences,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        name=name,
        progress=progress,
        head=True,
    )
    affected = require_blocks(blocks, prepared.anatomy)
    is_causal = _is_causal(prepared)
    whole: list[Tensor] = []
    runs: list[AblationRun] = []
    first: Observations | None = None
    left_out: dict[str, str] = {}
    for number, combination in enumerate(combinations):
        if progress is not None:
            progress("runs", number, len(combinations))
        try:
            if combination:
                require_effect(prepared.loaded.model, combination, blocks)
            observed, run = _run(prepared, combination, blocks, is_causal, whole)
        except UnsupportedModel as error:
            if without is not None or not combination:
                raise
            left_out[", ".join(combination)] = str(error)  # a run that nobody named: the others still say something
            continue
        first = first or observed
        runs.append(run)
    if progress is not None:
        progress("runs", len(combinations), len(combinations))
    assert first is not None
    options = {
        "without": [list(c) for c in combinations[1:]],
        "grid": grid,
        "blocks": blocks if isinstance(blocks, str) else sorted(affected),
    }
    described = probe(prepared, first, command)
    described.options.update(options)
    if left_out:
        described.options["left_out"] = left_out
    return Ablation(
        AblationRecord(
            schema=ABLATION_SCHEMA,
            versions=versions(),
            model=model_info(prepared, first),
            probe=described,
            blocks=sorted(affected),
            is_causal=is_causal,
            runs=runs,
            verdicts=verdicts(runs, is_causal=is_causal),
            norms=norm_records(first.norms),
            updates=update_records(first.updates),
        )
    )


def _combinations(without: Sequence[Sequence[str]] | None, grid: bool) -> list[tuple[str, ...]]:
    """The combinations to run, the whole model first, each once."""
    if grid and without is not None:
        raise InputError(
            "ablate: expected grid or without, got both. The grid is eight combinations already. Pass one."
        )
    if grid:
        wanted = [c for n in range(len(GRID) + 1) for c in itertools.combinations(GRID, n)]
    elif without is None:
        wanted = [("mlp",), ("residual",), ("residual", "mlp")]
    else:
        if isinstance(without, str) or any(isinstance(c, str) for c in without):
            raise InputError(
                f"ablate: expected without as a list of combinations, got {without!r}. "
                "Each combination is a tuple of components. Pass without=[('mlp',), ('residual', 'mlp')]."
            )
        wanted = [tuple(c) for c in without]
    for combination in wanted:
        if combination:
            require_components(combination)
    return list(dict.fromkeys([(), *wanted]))


def _is_causal(prepared: Prepared) -> bool:
    """Whether tokens can only be reached by earlier ones, in the stack that is followed (the decoder's, where there is one)."""
    stacks = {b.stack for b in prepared.anatomy.blocks}
    followed = "decoder" if "decoder" in stacks else None
    parts = [p for b in prepared.anatomy.blocks if b.stack == followed for p in b.parts if p.kind == "attention"]
    return bool(parts) and all(p.is_causal for p in parts)


def _run(
    prepared: Prepared,
    combination: tuple[str, ...],
    blocks: Collection[int] | Literal["all", "all+outer"] | None,
    is_causal: bool,
    whole: list[Tensor],
) -> tuple[Observations, AblationRun]:
    """One probe pass without `combination`. `whole` collects the whole model's mean output vectors, for the runs after it."""
    model = prepared.loaded.model
    outputs = _Outputs(is_causal, whole if combination else None)
    with contextlib.ExitStack() as stack:
        if combination:
            stack.enter_context(taken_away(model, *combination, blocks=blocks))
        stack.enter_context(float64_kept(model))
        observed = capture(
            model,
            prepared.batches,
            prepared.anatomy,
            level="core" if combination else prepared.level,
            seed=prepared.seed,
            on_output=outputs.add,
        )
    if not combination:
        whole.extend(outputs.vectors)
    trajectory = site_records(observed)
    unavailable = {}
    loss, shift = (Statistic.of(*r.summary()) for r in (outputs.loss, outputs.shift))
    if loss is None:
        unavailable["loss"] = "no language-model head behind a causal mask"
    if shift is None:
        unavailable["output_shift"] = (
            "this is the whole model" if not combination else "the output is no vector a token"
        )
    rate = depth_rate(trajectory, _epsilon(model))
    if rate is None:
        unavailable["rate"] = "the consensus distance is not finite"
    run = AblationRun(
        without=list(combination),
        trajectory=trajectory,
        rate=rate,
        loss=loss,
        output_shift=shift,
        attention_contraction=[_most_alive(s.values) for s in observed.attention if s.kind == "self"],
        unavailable=unavailable,
    )
    return observed, run


class _Outputs:
    """What is kept of the model's outputs: one mean vector a sequence, and running statistics of loss and shift."""

    def __init__(self, is_causal: bool, whole: list[Tensor] | None) -> None:
        self.is_causal, self.whole = is_causal, whole
        self.vectors: list[Tensor] = []
        self.has_logits = self.has_vectors = False
        self.loss, self.shift = Running.empty(), Running.empty()

    def add(self, batch: Mapping[str, Any], output: Any) -> None:
        """Called by the capture with each batch and the model's output on it."""
        mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
        logits = getattr(output, "logits", None)
        if self.is_causal and logits is not None and logits.ndim == 3 and "input_ids" in batch:
            self.has_logits = True
            self.loss = self.loss.add(_next_token_loss(logits, batch["input_ids"], mask))
        vectors = next((t for t in tensors_in(output) if t.is_floating_point() and t.ndim >= 2), None)
        if vectors is None:
            return
        self.has_vectors = True
        pooled = _pooled(vectors, mask)
        if self.whole is None:
            self.vectors.append(pooled)
        else:
            reference = self.whole[len(self.vectors)]
            self.vectors.append(pooled[:0])  # only counts batches
            if reference.shape == pooled.shape:
                self.shift = self.shift.add(1 - torch.cosine_similarity(pooled, reference, dim=-1))


def _pooled(output: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real tokens of [batch, token, width], in float64 on the CPU; [batch, width] as it is."""
    output = output.detach().double()
    if output.ndim == 3:
        if mask is not None and mask.shape == output.shape[:2]:
            real = mask.bool()[..., None]
            output = torch.where(real, output, 0).sum(1) / real.sum(1)
        else:
            output = output.mean(1)
    return output.flatten(1).cpu()


def _next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean next-token cross-entropy of each sequence, in nats."""
    losses = nn.functional.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
    if mask is None:
        return losses.mean(1)
    real = (mask[:, 1:] * mask[:, :-1]).bool()
    return torch.where(real, losses, 0).sum(1) / real.sum(1)


def _most_alive(values: Running) -> Statistic | None:
    row = ATTENTION_MEASURES.index("value_contraction")
    found = [s for h in range(values.total.shape[1]) if (s := Statistic.of(*values.summary(row, h))) is not None]
    return max(found, key=lambda s: s.mean, default=None)


def _epsilon(model: nn.Module) -> float:
    return torch.finfo(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)).eps


# Rates ----------------------------------------------------------------------------------------------------------------


def consensus(trajectory: Sequence[SiteRecord]) -> list[float]:
    """The consensus distance along the stack that is followed (the last one), massive tokens left out where there are any.

    Tokens that are all exactly zero have none (0/0); they are at consensus, so 0. NaN where the tokens are not finite.
    """
    values = []
    for site in followed(trajectory):
        zero = site.consensus is None and site.rank is not None and site.rank.max == 0
        values.append(site.consensus.mean if site.consensus is not None else 0.0 if zero else math.nan)
    return values


def depth_rate(trajectory: Sequence[SiteRecord], epsilon: float) -> RateRecord | None:
    """How the consensus distance falls with depth, from the values above the rounding floor; `None` where it is not finite."""
    values = consensus(trajectory)
    if not all(map(math.isfinite, values)):
        return None
    found = rate(values, epsilon)
    if found.floor_block is None:
        return found
    # `rate` counts along the values; records count block calls, the encoder's first.
    return replace(found, floor_block=followed(trajectory)[found.floor_block + 1].block)


def rate(values: Sequence[float], epsilon: float) -> RateRecord:
    """How a sequence of consensus distances, the embedding's first, falls; `floor_block` counts from the value after it.
    `epsilon`: of the model's number format."""
    floor = FLOOR * epsilon
    floor_block = next((i - 1 for i, v in enumerate(values) if v <= floor and i), None)
    above = values if floor_block is None else values[: floor_block + 1]
    logs = [math.log(v) for v in above if v > 0]
    steps = len(logs) - 1
    factor = math.exp((logs[-1] - logs[0]) / steps) if steps else None
    fit = line_fit(logs[:-1], logs[1:])
    slope, low, high = fit.slope, fit.low, fit.high
    kind: Literal["none", "geometric", "doubly exponential"] = "none"
    if floor_block is not None or min(values) < LOST * values[0]:
        kind = "doubly exponential" if _accelerates(logs, slope) else "geometric"
    return RateRecord(kind, factor, slope, low, high, floor, floor_block)


def _accelerates(logs: Sequence[float], slope: float | None) -> bool:
    """Whether ln r falls by more at each block: by the slope where there are points enough, else because the floor was met."""
    return slope > DOUBLY_EXPONENTIAL if slope is not None else len(logs) < 3


# Verdicts -------------------------------------------------------------------------------------------------------------


def verdicts(runs: Sequence[AblationRun], *, is_causal: bool) -> list[VerdictRecord]:
    """Each prediction that these runs can speak to, held against them in rank and in distance."""
    by_combination = {frozenset(r.without): r for r in runs}
    whole = by_combination[frozenset()]
    found: list[VerdictRecord] = []
    without_mlp = by_combination.get(frozenset({"mlp"}))
    if without_mlp is not None:
        found += _held("The MLP prevents the collapse", _DONG, without_mlp, whole, collapses=True)
        found += _held(
            "Residual connections prevent it without the MLP", _CIRRINCIONE, without_mlp, whole, collapses=False
        )
    without_residual = by_combination.get(frozenset({"residual"}))
    if without_residual is not None:
        how = "geometrically" if is_causal else "doubly exponentially"
        prediction = "Without residual connections the tokens collapse, MLP and norms or not"
        found += _held(prediction, _CIRRINCIONE, without_residual, whole, collapses=True, how=how)
    without_norm = by_combination.get(frozenset({"norm"}))
    if without_norm is not None:
        found.append(_norm_neutrality(without_norm, whole))
    return found


def _held(
    prediction: str, source: str, run: AblationRun, whole: AblationRun, *, collapses: bool, how: str = ""
) -> list[VerdictRecord]:
    """One prediction in both measures. A collapse in distance is predicted with its rate where theory gives one."""
    share, block = _rank_share(run, whole)
    lost = share < RANK_LOST
    records = [
        VerdictRecord(
            prediction,
            source,
            run.without,
            "affine_rank",
            "dimensions are lost" if collapses else "no dimensions are lost",
            f"{share:.0%} of the embedding's share of the attainable affine rank is left at its lowest",
            lost == collapses,
            None,
            block,
        )
    ]
    if run.rate is not None:
        gone = run.rate.kind != "none"
        as_predicted = gone == collapses and (not how or run.rate.kind == _RATES[how])
        values = consensus(run.trajectory)
        lowest = min(range(len(values)), key=values.__getitem__)
        observed = f"consensus distance {values[0]:.2g} → {values[lowest]:.2g}: {_in_words(run.rate)}"
        records.append(
            VerdictRecord(
                prediction,
                source,
                run.without,
                "consensus_distance",
                f"falls {how}".strip() if collapses else "stays",
                observed,
                as_predicted,
                run.rate.kind,
                run.rate.floor_block if run.rate.floor_block is not None else followed(run.trajectory)[lowest].block,
            )
        )
    return records


def _rank_share(run: AblationRun, whole: AblationRun) -> tuple[float, int | None]:
    """The lowest share of the attainable affine rank along depth, relative to that of the embedding, and its block."""
    shares = [
        (s.affine_rank.mean / s.attainable_affine_rank.mean, s.block)
        for s in run.trajectory
        if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
    ]
    start = next(
        s.affine_rank.mean / s.attainable_affine_rank.mean
        for s in whole.trajectory
        if s.affine_rank is not None and s.attainable_affine_rank is not None
    )
    lowest, block = min(shares, key=lambda pair: pair[0])
    return lowest / start if start else 0.0, block


def _in_words(found: RateRecord) -> str:
    if found.kind == "none":
        return "it does not collapse"
    figure = (
        f", ln r multiplied by {found.slope:.2g} a block"
        if found.kind == "doubly exponential" and found.slope is not None
        else f", times {found.factor:.2g} a block"
        if found.factor is not None
        else ""
    )
    reached = f", at the rounding floor from block {found.floor_block} on" if found.floor_block is not None else ""
    return f"{found.kind}{figure}{reached}"


def _norm_neutrality(run: AblationRun, whole: AblationRun) -> VerdictRecord:
    """Norms are rank-neutral: is the affine rank along depth the same without them?"""
    gaps = [
        (abs(a.affine_rank.mean - b.affine_rank.mean), a.block)
        for a, b in zip(run.trajectory, whole.trajectory, strict=True)
        if a.affine_rank is not None and b.affine_rank is not None
    ]
    gap, block = max(gaps, key=lambda pair: pair[0])
    return VerdictRecord(
        "Layer normalisation is rank-neutral",
        _CIRRINCIONE,
        run.without,
        "affine_rank",
        "the affine rank is the same without the norms",
        (f"it differs by at most {gap:.3g}" if gap else "it is the same at every block")
        + (" that stays finite" if len(gaps) < len(whole.trajectory) else ""),
        gap == 0,
        None,
        block,
    )
