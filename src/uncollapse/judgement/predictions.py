"""What the papers predict for a model without some of its parts, compared with what was observed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from uncollapse.judgement.rates import LOST, consensus
from uncollapse.records.ablation import AblationRun, RateRecord, VerdictRecord
from uncollapse.records.diagnosis import followed

# Dimensions are lost if the share of the attainable affine rank falls below half of its best by the first block.
RANK_LOST = 0.5
# A run that keeps less than this of its consensus distance is falling, though a decade is not lost yet.
FALLING = 0.5


_RATES = {"geometrically": "geometric", "doubly exponentially": "doubly exponential"}

# Dong et al. speak of networks without skip connections *and* MLPs. That the MLP alone prevents the collapse is a later reading.
_AFTER_DONG = "a later reading of Dong, Cordonnier, Loukas 2021, arXiv 2103.03404, who leave out skip connections and MLPs together"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681 (abstract)"


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
        found += _held("The MLP prevents the collapse", _AFTER_DONG, without_mlp, whole, collapses=True)
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
                f"at its lowest, the share of the attainable affine rank is {share:.0%} of its best by the first block",
                lost == collapses,
                None,
                block,
            )
        )
    if run.rate is not None:
        values = consensus(run.trajectory)
        as_predicted = _as_predicted(run.rate, values, collapses, how)
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


def _as_predicted(rate: RateRecord, values: Sequence[float], collapses: bool, how: str) -> bool | None:
    """Whether distances fall as predicted; `None` if the run does not decide it. A run that is falling when its blocks end, and has
    not lost a decade, decides nothing: three blocks at a factor of 1/2 cannot."""
    if rate.kind == "none":
        is_falling = values[-1] <= FALLING * values[0]
        return None if is_falling else not collapses
    if not collapses:
        return False
    if not how:
        return True
    return None if rate.kind == "open" else rate.kind == _RATES[how]


def _rank_share(run: AblationRun, whole: AblationRun) -> tuple[float, int | None] | None:
    """The lowest share of the attainable affine rank from the first block on, relative to the best by the first block, and its
    block; None where the ranks were not measured. The embedding alone would not do: repeated tokens make it poor, and what
    positions or the first attention then tell apart is no gain that a later block could lose unseen."""
    own, unchanged = _rank_shares(run), _rank_shares(whole)
    if len(own) < 2 or not unchanged:
        return None
    best = max(share for share, _ in [*own[:2], unchanged[0]])
    lowest, block = min(own[1:], key=lambda pair: pair[0])
    return lowest / best if best else 0.0, block


def _rank_shares(run: AblationRun) -> list[tuple[float, int | None]]:
    """The shares of the attainable affine rank along the stack that is followed, each with its block."""
    return [
        (s.affine_rank.mean / s.attainable_affine_rank.mean, s.block)
        for s in followed(run.trajectory)
        if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
    ]


def _in_words(found: RateRecord) -> str:
    if found.kind == "none":
        return "it does not collapse"
    if found.kind == "open":
        between = (
            f", slope {found.slope:.2g} [{found.slope_low:.2g}, {found.slope_high:.2g}]"
            if found.slope is not None and found.slope_low is not None and found.slope_high is not None
            else ""
        )
        reached = "" if found.floor_block is None else f", at the rounding floor from block {found.floor_block}"
        return f"it falls, and the figures do not say at what rate{between}{reached}"
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
    """Is the affine rank along depth the same without the norms? Were it so, they would be rank-neutral in effect. That it differs
    refutes nothing: without norms everything behind them reads another stream. The claim itself, that a norm keeps the rank of what
    it is given, is checked at each norm call of a diagnosis."""
    gaps = [
        (abs(a.affine_rank.mean - b.affine_rank.mean), a.block)
        for a, b in zip(run.trajectory, whole.trajectory, strict=True)
        if a.affine_rank is not None and b.affine_rank is not None
    ]
    gap, block = max(gaps, key=lambda pair: pair[0])
    return VerdictRecord(
        "Layer normalisation is rank-neutral, and its removal changes no rank",
        f"a test of our own, after {_CIRRINCIONE}, who speaks of single norms",
        run.without,
        "affine_rank",
        "the affine rank is the same without the norms",
        (f"it differs by at most {gap:.3g}" if gap else "it is the same in every block")
        + (" whose values stay finite" if len(gaps) < len(whole.trajectory) else ""),
        True if gap == 0 else None,
        None,
        block,
    )
