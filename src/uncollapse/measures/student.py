"""Quantiles of Student's t, for the interval of a mean or a slope from a few values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

# Two-sided 95 % quantiles for 1, 2, … degrees of freedom.
_TABLE = (
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


def quantile_95(freedom: int) -> float:
    """The two-sided 95 % quantile; beyond the table its last, which is wider.

    >>> quantile_95(1), quantile_95(100)
    (12.706, 2.12)
    """
    return _TABLE[min(freedom, len(_TABLE)) - 1]


def quantile(freedom: int, confidence: float) -> float:
    """Any two-sided quantile for four degrees of freedom or more: for fewer this expansion is too rough.

    Cornish-Fisher to third order in 1/freedom, Abramowitz and Stegun 26.7.5.

    >>> round(quantile(10, 0.95), 3)
    2.228
    """
    z, nu = NormalDist().inv_cdf(0.5 + confidence / 2), freedom
    return (
        z
        + (z**3 + z) / (4 * nu)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    )


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean of two values or more, and half of its 95 % interval.

    >>> mean_and_half([1.0, 3.0])
    (2.0, 12.706)
    """
    return fmean(values), quantile_95(len(values) - 1) * stdev(values) / math.sqrt(len(values))
