"""Trend alarms: a margin that rises steadily towards its threshold, and when it will be there at this rate.

The false-alarm rate is set and not guessed. If the margins of a window were noise about a level, every order of them would be
equally likely, so the number of pairs in order (Mann and Kendall) has an exact distribution. The window is the shortest in which a
steady rise with a few pairs out of order is rarer than the rate that was asked for, shared out among all places and looks.

A steady rise alone is no alarm: training moves every figure. Three things tell a collapse from a model that learns:

* It is near: nearer to the threshold than any healthy run of the validity study (`NEAR`: thresholds are half of that distance).
* At the rate of the window's later half (Theil and Sen: the median of all slopes) it reaches the threshold within `HORIZON`
  windows: a rise is extrapolated no farther than it was watched.
* It has not slowed down, as a model that learns does: the last third of the window rises no slower than the whole.

A slow fault drifts for hundreds of looks, and is near only at its end. So each place is watched through a second window, `LONG`
times as long. A point of it is the median of `LONG` looks, which leaves little of the noise. From there a rise counts from any
distance, if the other two conditions hold: it is extrapolated no farther than it was watched, and that is farther. No spurt of
learning lasts as long without slowing down.

All this must hold for `LATER` looks more than `patience`, for a trend is a guess. The monitor asks only about places that were
healthy before: the nearly uniform attention of a fresh model comes and goes near its threshold. Of `CORPUS-DIMENSIONS` there is no
trend: a single model decides its threshold, and while a model learns how often each token occurs, all sequences come near it.

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
LONG = 8  # times the looks of the short window has the long one
LENGTHS = (1, LONG)
LATER = 1  # looks more than a warning must stand
SLOWED = 0.9  # of the whole window's slope; a straight rise has all of it, but for rounding
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


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of all slopes between two points: what one wild point does not move."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2))


@dataclass
class TrendAlarms:
    """The margins of every place, and which of them are on their way to the threshold. `rate` is the chance of one false alarm in
    a thousand looks if nothing but noise moves the margins."""

    rate: float
    patience: int = 2
    _seen: dict[str, deque[tuple[int, float]]] = field(default_factory=dict)
    _standing: dict[str, float] = field(default_factory=dict)  # the margin below which an alarm is over

    def look(
        self, step: int, margins: Mapping[str, float], found: Mapping[str, Finding]
    ) -> tuple[list[Alarm], list[str]]:
        """The alarms that this look raises, and the keys of those that are over."""
        raised, cleared = [], []
        tests = len(LENGTHS) * len(margins)
        looks = window(self.rate, tests)
        for key, margin in margins.items():
            seen = self._seen.setdefault(key, deque(maxlen=LONG * LONGEST + self._stands - 1))
            while seen and seen[-1][0] >= step:  # looked at twice, or back at an earlier checkpoint
                seen.pop()
            seen.append((step, margin))
            name = f"{key}/trend"
            if key.startswith(WITHOUT):
                continue
            if margin < self._standing.get(name, -math.inf):
                del self._standing[name]
                cleared.append(name)
            if name in self._standing or key not in found:
                continue
            rise = next((r for each in LENGTHS if (r := self._rise(list(seen), looks, each, tests)) is not None), None)
            if rise is None:
                continue
            self._standing[name] = rise.over
            finding = found[key]
            message = (
                f"{finding.code} is on its way: its distance has fallen for {rise.looks} looks to {math.exp(-margin):.2g} times "
                f"the threshold. At this rate it is reached in about {_round(rise.left)} steps. Now: {finding.message}"
            )
            raised.append(alarm(replace(finding, severity="warning", message=message), step, rise.onset, "trend", name))
        return raised, cleared

    def _rise(self, seen: Sequence[tuple[int, float]], looks: int, length: int, tests: int) -> _Rise | None:
        """The rise that has stood for long enough in a window of `length` times as many looks; None where there is none."""
        if len(seen) < looks * length + self._stands - 1:
            return None
        ends = (seen[: len(seen) - ago][-looks * length :] for ago in reversed(range(self._stands)))
        rise = None
        for points in ends:
            rise = _rise(points, length, self.rate / (LOOKS * tests))
            if rise is None:
                return None
        return rise

    @property
    def _stands(self) -> int:
        """For how many looks a rise must stand."""
        return self.patience + LATER

    def standing(self, key: str) -> None:
        """Take an alarm of an earlier part of the run as raised."""
        seen = self._seen.get(key.removesuffix("/trend"))
        last = seen[-1][1] if seen else 0.0
        self._standing[key] = _over(last)


@dataclass(frozen=True)
class _Rise:
    """A steady rise: over how many looks, since which step, how many steps are left, and below which margin it is over."""

    looks: int
    onset: int
    left: float
    over: float


def _rise(seen: Sequence[tuple[int, float]], length: int, wanted: float) -> _Rise | None:
    """None where these looks, in medians of `length`, are not a steady rise that has not slowed down and will be at the threshold
    within as many steps again, or where so steady a one is not as rare as wanted."""
    points = [_middle(seen[at : at + length]) for at in range(0, len(seen), length)]
    values = [value for _, value in points]
    nearest = -NEAR if length == 1 else -math.inf
    if not nearest < values[-1] <= 0:
        return None
    if chance(len(points), sum(a >= b for a, b in itertools.combinations(values, 2))) > wanted:
        return None
    later = slope(points[len(points) // 2 :])
    if later <= 0 or slope(points[-max(len(points) // 3, 2) :]) < SLOWED * slope(points):
        return None
    left = -values[-1] / later - (seen[-1][0] - points[-1][0])
    if left > HORIZON * (seen[-1][0] - seen[0][0]):
        return None
    return _Rise(len(seen), seen[0][0], max(left, 0.0), _over(values[-1]))


def _over(margin: float) -> float:
    """Below which margin an alarm that was raised at this one is over: where it is no longer near, or, if it never was, where its
    distance has doubled."""
    return -NEAR - HYSTERESIS if margin > -NEAR else margin - NEAR


def _middle(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The medians of steps and values."""
    return statistics.median(step for step, _ in points), statistics.median(value for _, value in points)


def _round(steps: float) -> int:
    """To one digit, for it is a guess."""
    digits = len(str(int(steps))) - 1
    return max(1, int(round(steps, -digits)))
