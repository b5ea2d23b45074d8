"""Trend alarms: a margin that rises steadily towards its threshold, and when it will be there at this rate.

The false-alarm rate is set and not guessed. If the margins of a window were noise about a level, every order of them would be
equally likely, so the number of pairs in order (Mann and Kendall) has an exact distribution. The window is the shortest in which a
steady rise with a few pairs out of order is rarer than the rate that was asked for, shared out among all places and looks.

A steady rise alone is no alarm: training moves every figure. It must also be nearer to the threshold than any healthy run of the
validity study (`NEAR`: thresholds are half of that distance), and at the rate of the window's later half (Theil and Sen: the
median of all slopes) reach the threshold within `HORIZON` windows: a rise is extrapolated no farther than it was watched, for a
model that learns slows down. All this must hold for `patience` looks. The monitor asks only about places that were healthy before:
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from uncollapse.monitoring.alarms import HYSTERESIS, alarm
from uncollapse.records.common import Finding
from uncollapse.records.trail import Alarm

NEAR = math.log(2.0)
HORIZON = 1
LOOKS = 1000  # the rate is that of so many looks together
SLACK = 2  # pairs out of order that a rise may have
LONGEST = 24
WITHOUT = ("CORPUS-DIMENSIONS",)  # rules that have no trend


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


def slope(points: Sequence[tuple[int, float]]) -> float:
    """The median of all slopes between two points: what one wild point does not move."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2))


@dataclass
class TrendAlarms:
    """The margins of every place, and which of them are on their way to the threshold. `rate` is the chance of one false alarm in
    a thousand looks if nothing but noise moves the margins."""

    rate: float
    patience: int = 2
    _seen: dict[str, deque[tuple[int, float]]] = field(default_factory=dict)
    _standing: set[str] = field(default_factory=set)

    def look(
        self, step: int, margins: Mapping[str, float], found: Mapping[str, Finding]
    ) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over."""
        raised, cleared = [], []
        looks = window(self.rate, len(margins))
        for key, margin in margins.items():
            seen = self._seen.setdefault(key, deque(maxlen=LONGEST + self.patience - 1))
            while seen and seen[-1][0] >= step:  # looked at twice, or back at an earlier checkpoint
                seen.pop()
            seen.append((step, margin))
            name = f"{key}/trend"
            if key.startswith(WITHOUT):
                continue
            if margin < -NEAR - HYSTERESIS and name in self._standing:
                self._standing.remove(name)
                cleared.append(name)
            if name in self._standing or key not in found:
                continue
            points, wanted = list(seen), self.rate / (LOOKS * len(margins))
            steps = _left(points[-looks:], looks, wanted)
            earlier = (points[-looks - ago : -ago] for ago in range(1, self.patience))
            if steps is None or any(_left(each, looks, wanted) is None for each in earlier):
                continue
            self._standing.add(name)
            finding = found[key]
            message = (
                f"{finding.code} is on its way: its distance has fallen for {looks} looks to {math.exp(-margin):.2g} times the "
                f"threshold. At this rate it is reached in about {_round(steps)} steps. Now: {finding.message}"
            )
            raised.append(
                alarm(replace(finding, severity="warning", message=message), step, points[-looks][0], "trend", name)
            )
        return raised, cleared

    def standing(self, key: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        self._standing.add(key)


def _left(points: Sequence[tuple[int, float]], looks: int, wanted: float) -> float | None:
    """In how many steps the threshold is reached; None where these looks are not a steady rise that will be there within their own
    length, or where so steady a one is not as rare as wanted."""
    values = [value for _, value in points]
    if len(points) < looks or not -NEAR < values[-1] <= 0:
        return None
    if chance(looks, sum(a >= b for a, b in itertools.combinations(values, 2))) > wanted:
        return None
    later = slope(points[looks // 2 :])
    steps = -values[-1] / later if later > 0 else math.inf
    return steps if steps <= HORIZON * (points[-1][0] - points[0][0]) else None


def _round(steps: float) -> int:
    """To one digit, for it is a guess."""
    digits = len(str(int(steps))) - 1
    return max(1, int(round(steps, -digits)))
