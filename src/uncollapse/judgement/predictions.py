"""What the papers predict for a model without some of its parts, compared with what was observed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uncollapse.judgement.rates import LOST, consensus
from uncollapse.records.ablation import AblationRun, RateRecord, VerdictRecord
from uncollapse.records.diagnosis import followed

# Dimensions are lost if the share of the attainable affine rank falls below half of that at the embedding.
RANK_LOST = 0.5


_RATES = {"geometrically": "geometric", "doubly exponentially": "doubly exponential"}

_DONG = "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681"


def rate_without_residual(is_causal: bool, at_consensus: Sequence[float] | None, epsilon: float) -> str:
    """How distances should fall without residual connections: `geometrically` where attention has a pattern of its own once all
    tokens are equal, `doubly exponentially` where its rows are then equal up to the rounding of logits, and empty in between, where
    the pattern is too weak to tell within a few blocks.

    `at_consensus` is ||CA||_2 of each attention there; without it only the causal mask is known. `epsilon`: that of the format.

    >>> rate_without_residual(False, [0.4, 0.5], 1e-7), rate_without_residual(False, [1e-9], 1e-7)
    ('geometrically', 'doubly exponentially')
    """
    if at_consensus is None:
        return "geometrically" if is_causal else "doubly exponentially"
    if max(at_consensus) <= math.sqrt(epsilon):
        return "doubly exponentially"
    return "geometrically" if max(at_consensus) >= LOST else ""


def verdicts(
    runs: Sequence[AblationRun], *, is_causal: bool, at_consensus: Sequence[float] | None = None, epsilon: float = 0.0
) -> list[VerdictRecord]:
    """Each prediction that these runs can test, compared with them in rank and in distance. The last three are those of
    `rate_without_residual`."""
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
        how = rate_without_residual(is_causal, at_consensus, epsilon)
        prediction = "Without residual connections the tokens collapse, with or without MLP and norms"
        found += _held(prediction, _CIRRINCIONE, without_residual, whole, collapses=True, how=how)
    without_norm = by_combination.get(frozenset({"norm"}))
    if without_norm is not None:
        found.append(_norm_neutrality(without_norm, whole))
    return found


def _held(
    prediction: str, source: str, run: AblationRun, whole: AblationRun, *, collapses: bool, how: str = ""
) -> list[VerdictRecord]:
    """One prediction in both measures. For a collapse in distance theory may also predict the rate."""
    records: list[VerdictRecord] = []
    ranks = _rank_share(run, whole)
    if ranks is not None:
        share, block = ranks
        lost = share < RANK_LOST
        records.append(
            VerdictRecord(
                prediction,
                source,
                run.without,
                "affine_rank",
                "dimensions are lost" if collapses else "no dimensions are lost",
                f"at its lowest, the share of the attainable affine rank is {share:.0%} of that at the embedding",
                lost == collapses,
                None,
                block,
            )
        )
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
                f"falls {how}".strip() if collapses else "does not fall",
                observed,
                as_predicted,
                run.rate.kind,
                run.rate.floor_block if run.rate.floor_block is not None else followed(run.trajectory)[lowest].block,
            )
        )
    return records


def _rank_share(run: AblationRun, whole: AblationRun) -> tuple[float, int | None] | None:
    """The lowest share of the attainable affine rank along depth, relative to that of the embedding, and its block; None where
    the ranks were not measured."""
    shares = [
        (s.affine_rank.mean / s.attainable_affine_rank.mean, s.block)
        for s in run.trajectory
        if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
    ]
    start = next(
        (
            s.affine_rank.mean / s.attainable_affine_rank.mean
            for s in whole.trajectory
            if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
        ),
        None,
    )
    if not shares or start is None:
        return None
    lowest, block = min(shares, key=lambda pair: pair[0])
    return lowest / start if start else 0.0, block


def _in_words(found: RateRecord) -> str:
    if found.kind == "none":
        return "it does not collapse"
    figure = (
        f", ln r grows by a factor of {found.slope:.2g} per block"
        if found.kind == "doubly exponential" and found.slope is not None
        else f", multiplied by {found.factor:.2g} per block"
        if found.factor is not None
        else ""
    )
    reached = f", at the rounding floor from block {found.floor_block}" if found.floor_block is not None else ""
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
        (f"it differs by at most {gap:.3g}" if gap else "it is the same in every block")
        + (" whose values stay finite" if len(gaps) < len(whole.trajectory) else ""),
        gap == 0,
        None,
        block,
    )
