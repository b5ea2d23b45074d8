"""How fast the consensus distance falls with depth, and whether it falls faster and faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from uncollapse.measures.line_fit import line_fit
from uncollapse.records.ablation import RateRecord
from uncollapse.records.diagnosis import SiteRecord, followed

LOST = 0.1  # a run collapses in distance when less than a tenth of the embedding's consensus distance is left


DOUBLY_EXPONENTIAL = (
    1.5  # slope of ln r_{l+1} against ln r_l halfway (geometrically) between 1 and the cubic law's 3, rounded
)
FLOOR = (
    16  # rounding floor of a consensus distance, in units of the number format's epsilon: measured 2 to 5 in float64
)


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
