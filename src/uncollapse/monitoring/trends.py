"""Trend alarms: a margin that rises steadily towards its threshold, and when it will be there at this rate.

The false-alarm rate is set and not guessed. If the margins of a window were noise about a level, every order of them would be
equally likely, so the number of pairs in order (Mann and Kendall) has an exact distribution. The window is the shortest in which a
steady rise with a few pairs out of order is rarer than the rate that was asked for, shared out among all places and looks.

A steady rise alone is no alarm: training moves every figure. It must also be nearer to the threshold than any healthy run of the
validity study (`NEAR`: thresholds are half of that distance), and at the rate of the window's later half (Theil and Sen: the
median of all slopes) reach the threshold within `HORIZON` windows. The monitor asks only about places that were healthy before:
the nearly uniform attention of a fresh model comes and goes near its threshold. Of `CORPUS-DIMENSIONS` there is no trend: a
single model decides its threshold, and while a model learns how often each token occurs, all sequences come near it.

When not to use it: for what falls at once. `ThresholdAlarms` sees that; a trend needs a window of looks.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from uncollapse.monitoring.alarms import HYSTERESIS, alarm
from uncollapse.records.common import Finding
from uncollapse.records.trail import Alarm

NEAR = math.log(2.0)
HORIZON = 4
LOOKS = 1000  # the rate is that of so many looks together
SLACK = 2  # pairs out of order that a rise may have
LONGEST = 24
WITHOUT = ("CORPUS-DIMENSIONS",)


@functools.cache
def orders(looks: int) -> tuple[int, ...]:
    """How many of the looks! orders of so many different values have 0, 1, 2, … pairs out of order (Mahonian numbers).

    >>> orders(3)
    (1, 2, 2, 1)
    """
    counts = [1]
    for n in range(2, looks + 1):
        longer = [0] * (len(counts) + n - 1)
        for shift in range(n):
            for pairs, count in enumerate(counts):
                longer[pairs + shift] += count
        counts = longer
    return tuple(counts)


def chance(looks: int, out_of_order: int) -> float:
    """The probability that so many equally likely orders have at most so many pairs out of order.

    >>> chance(3, 1)
    0.5
    """
    return sum(orders(looks)[: out_of_order + 1]) / math.factorial(looks)


def window(rate: float, places: int) -> int:
    """The shortest window in which a rise with `SLACK` pairs out of order is rarer than `rate` in `LOOKS` looks at `places`."""
    wanted = rate / (LOOKS * max(places, 1))
    return next((n for n in range(6, LONGEST) if chance(n, SLACK) <= wanted), LONGEST)


def slope(points: list[tuple[int, float]]) -> float:
    """The median of all slopes between two points: what one wild point does not move."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2))


@dataclass
class TrendAlarms:
    """The margins of every place, and which of them are on their way to the threshold. `rate` is the chance of one false alarm in
    a thousand looks if nothing but noise moves the margins."""

    rate: float
    _seen: dict[str, deque[tuple[int, float]]] = field(default_factory=dict)
    _standing: set[str] = field(default_factory=set)

    def look(
        self, step: int, margins: Mapping[str, float], found: Mapping[str, Finding]
    ) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over."""
        raised, cleared = [], []
        looks = window(self.rate, len(margins))
        for key, margin in margins.items():
            seen = self._seen.setdefault(key, deque(maxlen=LONGEST))
            while seen and seen[-1][0] >= step:  # looked at twice, or back at an earlier checkpoint
                seen.pop()
            seen.append((step, margin))
            name = f"{key}/trend"
            if key.startswith(WITHOUT):
                continue
            if margin < -NEAR - HYSTERESIS and name in self._standing:
                self._standing.remove(name)
                cleared.append(name)
            if name in self._standing or key not in found or not -NEAR < margin <= 0 or len(seen) < looks:
                continue
            points = list(seen)[-looks:]
            values = [value for _, value in points]
            out_of_order = sum(a >= b for a, b in itertools.combinations(values, 2))
            if chance(looks, out_of_order) > self.rate / (LOOKS * len(margins)):
                continue
            later = slope(points[looks // 2 :])
            if later <= 0 or -margin / later > HORIZON * (points[-1][0] - points[0][0]):
                continue
            self._standing.add(name)
            steps = -margin / later
            finding = found[key]
            message = (
                f"{finding.code} is on its way: its distance has fallen for {looks} looks to {math.exp(-margin):.2g} times the "
                f"threshold. At this rate it is reached in about {_round(steps)} steps. Now: {finding.message}"
            )
            raised.append(
                alarm(replace(finding, severity="warning", message=message), step, points[0][0], "trend", name)
            )
        return raised, cleared

    def standing(self, key: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        self._standing.add(key)


def _round(steps: float) -> int:
    """To one digit, for it is a guess."""
    digits = len(str(int(steps))) - 1
    return max(1, int(round(steps, -digits)))
