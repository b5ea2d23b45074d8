"""How fast the consensus distance falls with depth, and whether it falls faster and faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from uncollapse.measures.line_fit import line_fit
from uncollapse.records.ablation import RateRecord
from uncollapse.records.diagnosis import SiteRecord, followed

LOST = 0.1  # a run collapses in distance if less than a tenth of the consensus distance at the embedding is left


# Slope of ln r_{l+1} against ln r_l above which a fall counts as doubly exponential. The geometric mean of 1 (a geometric fall)
# and 3 (the cubic law) is 1.7, rounded down.
DOUBLY_EXPONENTIAL = 1.5
# Rounding floor of a consensus distance, in units of the number format's epsilon. In float64 it was measured as 2 to 5.
FLOOR = 16


def consensus(trajectory: Sequence[SiteRecord]) -> list[float]:
    """The consensus distance along the stack that is followed (the last one), without massive tokens where there are any.

    If all tokens are exactly zero it is 0/0; they agree, so it counts as 0. NaN where the tokens are not finite.
    """
    values = []
    for site in followed(trajectory):
        zero = site.consensus is None and site.rank is not None and site.rank.max == 0
        values.append(site.consensus.mean if site.consensus is not None else 0.0 if zero else math.nan)
    return values


def depth_rate(trajectory: Sequence[SiteRecord], epsilon: float) -> RateRecord | None:
    """How the consensus distance falls with depth, from the values above the rounding floor. `None` if one is not finite."""
    values = consensus(trajectory)
    if not all(map(math.isfinite, values)):
        return None
    found = rate(values, epsilon)
    if found.floor_block is None:
        return found
    # `rate` counts along the values; records count block calls, the encoder's first.
    return replace(found, floor_block=followed(trajectory)[found.floor_block + 1].block)


def rate(values: Sequence[float], epsilon: float) -> RateRecord:
    """How a sequence of consensus distances falls. The first is that of the embedding; `floor_block` counts from the second.
    `epsilon`: that of the model's number format."""
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
    """Whether ln r falls by more at each block. The slope decides if there are enough points; otherwise too few blocks above
    the floor do."""
    return slope > DOUBLY_EXPONENTIAL if slope is not None else len(logs) < 3
