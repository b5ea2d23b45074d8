"""Means with confidence intervals, for what can only be measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval."""

    mean: float
    half: float

    def below(self, value: float) -> bool | None:
        """True where the whole interval lies below the value, False where it lies above, None where it contains it."""
        if self.mean + self.half < value:
            return True
        return False if self.mean - self.half > value else None

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float], confidence: float = 0.9999) -> Interval:
    """Student's interval of the mean, for five values or more: for fewer the expansion of the quantile is too rough."""
    count = len(values)
    z, nu = NormalDist().inv_cdf(0.5 + confidence / 2), count - 1
    # Cornish-Fisher expansion of Student's quantile, to third order in 1/nu (Abramowitz and Stegun 26.7.5).
    quantile = (
        z
        + (z**3 + z) / (4 * nu)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    )
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(count))
