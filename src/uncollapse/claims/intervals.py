"""Means with confidence intervals, for what can only be measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from uncollapse.measures.student import quantile


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
    half = quantile(count - 1, confidence) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half)
