"""What the papers predict of a model without some of its parts, compared with what was seen."""

from __future__ import annotations

from collections.abc import Sequence

from uncollapse.judgement.rates import consensus
from uncollapse.records.ablation import AblationRun, RateRecord, VerdictRecord
from uncollapse.records.diagnosis import followed

RANK_LOST = (
    0.5  # and in rank when less than half of the dimensions that the embedding spans, relative to the attainable
)


_RATES = {"geometrically": "geometric", "doubly exponentially": "doubly exponential"}

_DONG = "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681"


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
