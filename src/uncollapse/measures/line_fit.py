"""The slope of a straight line through a few points, with its interval. Collapse rates and width exponents come from it.

When not to use it: for many points, or if their errors are known and depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from uncollapse.measures.student import mean_and_half, quantile_95


class LineFit(NamedTuple):
    """The slope, and the ends of its 95 % interval."""

    slope: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean (Student's t); `None` with fewer than two values.

    >>> mean_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    if len(values) < 2:
        return None
    mean, half = mean_and_half(values)
    return mean - half, mean + half


def line_fit(x: Sequence[float], y: Sequence[float], weights: Sequence[float] | None = None) -> LineFit:
    """The least-squares slope of `y` on `x` and its 95 % interval (Student's t, independent errors).

    The errors have one size, or with `weights` w a variance in proportion to 1/w. The interval needs three points, the slope two
    different `x`. What cannot be computed is `None`.

    >>> line_fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    LineFit(slope=2.0, low=2.0, high=2.0)
    """
    n = len(x)
    if n < 2:
        return LineFit(None, None, None)
    w = [1.0] * n if weights is None else weights
    mean_x, mean_y = (sum(c * v for c, v in zip(w, values, strict=True)) / sum(w) for values in (x, y))
    spread = sum(c * (a - mean_x) ** 2 for c, a in zip(w, x, strict=True))
    if spread == 0:
        return LineFit(None, None, None)
    slope = sum(c * (a - mean_x) * (b - mean_y) for c, a, b in zip(w, x, y, strict=True)) / spread
    if n < 3:
        return LineFit(slope, None, None)
    residual = sum(c * (b - mean_y - slope * (a - mean_x)) ** 2 for c, a, b in zip(w, x, y, strict=True))
    half = quantile_95(n - 2) * math.sqrt(residual / (n - 2) / spread)
    return LineFit(slope, slope - half, slope + half)
