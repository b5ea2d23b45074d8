"""The slope of a straight line through a few points, with its interval. Collapse rates and width exponents come from it.

When not to use it: for many points, or if their errors are known. All points have the same weight here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond the table its last, which is wider.
_STUDENT = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
)


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
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = _STUDENT[min(n - 1, len(_STUDENT)) - 1] * deviation / math.sqrt(n)
    return mean - half, mean + half


def line_fit(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """The least-squares slope of `y` on `x` and its 95 % interval (Student's t, independent errors of one size).

    The interval needs three points, the slope two different `x`. What cannot be computed is `None`.

    >>> line_fit([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    LineFit(slope=2.0, low=2.0, high=2.0)
    """
    n = len(x)
    if n < 2:
        return LineFit(None, None, None)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        return LineFit(None, None, None)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    if n < 3:
        return LineFit(slope, None, None)
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    quantile = _STUDENT[min(n - 2, len(_STUDENT)) - 1]
    half = quantile * math.sqrt(residual / (n - 2) / spread)
    return LineFit(slope, slope - half, slope + half)
