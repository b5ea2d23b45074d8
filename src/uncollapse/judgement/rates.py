"""How fast the consensus distance falls with depth, and whether it falls faster and faster."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from uncollapse.measures.line_fit import LineFit, line_fit, mean_interval
from uncollapse.records.ablation import Kind, RateRecord
from uncollapse.records.diagnosis import SiteRecord, followed

LOST = 0.1  # a run collapses in distance if less than a tenth of the consensus distance at the embedding is left


CUBIC = 3.0  # the slope of ln r_{l+1} against ln r_l under the cubic law; a geometric fall has 1
# Half way, as a factor, from a geometric fall to the cubic law, rounded down. Below it an interval that leaves out 1 says that the
# factor drifts, not that the law is another one: 1.08 [1.04, 1.12] over twelve blocks is a geometric fall.
ACCELERATING = 1.5
# A step that reaches the floor fell at least that far. If that is so many times the step before, the fall grows.
GROWING = 2.0
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
    steps = [after - before for before, after in itertools.pairwise(logs)]
    factor = math.exp((logs[-1] - logs[0]) / len(steps)) if steps else None
    between = mean_interval(steps)
    low, high = (None, None) if between is None else (math.exp(between[0]), math.exp(between[1]))
    fit = line_fit(logs[:-1], logs[1:])
    kind: Kind = "none"
    if floor_block is not None or min(values) < LOST * values[0]:
        last = None if floor_block is None or not logs else math.log(floor) - logs[-1]
        kind = _kind(steps, last, fit, high)
    return RateRecord(kind, factor, fit.slope, fit.low, fit.high, floor, floor_block, low, high)


def _kind(steps: Sequence[float], last: float | None, fit: LineFit, factor_high: float | None) -> Kind:
    """What the figures support of a fall. `steps` are the changes of ln r above the floor, and `last` what the step onto the floor
    lost at least. Doubly exponential: the slope's interval lies above 1. Geometric: it does not reach the cubic law, and the
    interval of the factor says that every block takes its share. Open: neither, as where a fall stops half way."""
    if fit.low is not None and fit.low > 1 and fit.slope is not None and fit.slope > ACCELERATING:
        return "doubly exponential"
    if last is not None and steps and last < GROWING * min(0.0, steps[-1]) and (fit.low is None or fit.low > 1):
        return "doubly exponential"
    if factor_high is not None and factor_high < 1 and (fit.high is None or fit.high < CUBIC):
        return "geometric"
    return "open"
