"""Trends: a margin on its way to its threshold, and looks that come again."""

from __future__ import annotations

import doctest
import itertools
import random
import re
from collections.abc import Sequence

from uncollapse.monitoring import trends
from uncollapse.monitoring.trends import TrendAlarms, window
from uncollapse.records.common import Finding
from uncollapse.records.trail import Alarm

FOUND = {"ENTROPY-FROZEN": Finding("ENTROPY-FROZEN", "entropy-collapse", "info", 0, 0, 0.5, 0.2, "It is.", "", "")}


def raised(looks: list[tuple[int, float]]) -> list[Alarm]:
    rises = TrendAlarms(0.01)
    return [alarm for step, margin in looks for alarm in rises.look(step, {"ENTROPY-FROZEN": margin}, FOUND)[0]]


def test_a_steady_rise_is_an_alarm_once_with_the_steps_that_are_left() -> None:
    (alarm,) = raised([(10 * look, -0.68 + 0.04 * look) for look in range(16)])
    assert (alarm.code, alarm.against, alarm.severity, alarm.onset) == ("ENTROPY-FROZEN", "trend", "warning", 20)
    assert alarm.step < 130
    left = round((0.68 - 0.04 * alarm.step / 10) / 0.004, -1)  # to one digit
    assert f"about {left:.0f} steps" in alarm.message


def test_a_steady_rise_among_healthy_distances_is_none() -> None:
    """Thresholds are half of the smallest healthy distance: whatever is farther than twice the threshold is healthy."""
    assert raised([(10 * look, -1.3 + 0.03 * look) for look in range(20)]) == []
    assert raised([(10 * look, -1.3 + 0.03 * look) for look in range(43)])


def test_a_rise_is_extrapolated_no_farther_than_it_was_watched() -> None:
    """By the time the threshold is within as many looks as the window has, the same rise is an alarm."""
    slow, fast = ([(10 * look, -0.68 + rise * look) for look in range(13)] for rise in (0.02, 0.04))
    assert raised(slow) == []
    assert raised(fast)
    (alarm,) = raised([(10 * look, -0.68 + 0.02 * look) for look in range(34)])
    assert 0.68 - 0.002 * alarm.step <= 0.02 * 11


def test_a_rise_at_two_looks_only_is_none() -> None:
    rises = [(10 * look, -0.68 + 0.04 * look) for look in range(30)]
    (alarm,) = raised(rises)
    first = alarm.step - 10  # as many looks as a warning must stand
    stops = [each for each in rises if each[0] <= first] + [(first + 10 * n, -0.68) for n in range(1, 10)]
    assert raised(stops) == []


def test_a_rise_that_slows_down_is_none() -> None:
    """A head in a healthy run of docs/early-warning.md (weight decay 0.1, seed 31), which turned after step 125."""
    margins = [-2.09, -2.11, -2.04, -1.92, -1.81, -1.67, -1.62, -1.46, -1.24, -0.90, -0.79, -0.62, -0.61]
    looks = [(65 + 5 * look, margin) for look, margin in enumerate(margins)]
    assert raised([*looks, (130, -0.60), (135, -0.59)]) == []
    assert raised([*looks, (130, -0.79), (135, -0.79), (140, -0.77), (145, -0.72)]) == []
    (alarm,) = raised([*looks[:-1], (125, -0.46), (130, -0.31)])
    assert alarm.step == 130


# The worst head of a run whose queries and keys are rounded away from zero (seed 13), every 25 steps from step 50.
DRIFT = [
    -3.01, -2.86, -2.71, -2.67, -2.63, -2.59, -2.55, -2.51, -2.46, -2.41, -2.36, -2.28, -2.21, -2.17, -2.12,
    -2.04, -1.95, -1.89, -1.82, -1.71, -1.59, -1.50, -1.41, -1.21, -1.01, -1.02, -1.03, -0.90, -0.76, -0.55,
    -0.33, -0.20, -0.07,
]  # fmt: skip


def drifting(noise: float, margins: Sequence[float] = DRIFT) -> list[tuple[int, float]]:
    """A look every 5 steps, with noise of this deviation."""
    draws = random.Random(0)
    pairs = itertools.pairwise(margins)
    return [
        (50 + 25 * at + 5 * n, before + (after - before) * n / 5 + draws.gauss(0, noise))
        for at, (before, after) in enumerate(pairs)
        for n in range(5)
    ]


def test_a_slow_drift_is_an_alarm_from_afar() -> None:
    """The threshold is reached about step 860. No short window sees it coming before step 800, for the noise hides it."""
    for noise in (0.0, 0.1):
        first = raised(drifting(noise))[0]
        (left,) = re.findall(r"about (\d+) steps", first.message)
        assert 550 <= first.step <= 700
        assert 800 <= first.step + int(left) <= 1200
        assert f"fallen for {8 * window(0.01, 2)} looks" in first.message
        assert first.onset == first.step - 5 * (8 * window(0.01, 2) - 1)


def test_a_drift_is_extrapolated_as_far_as_it_was_watched() -> None:
    """Straight, so that the look is known from which it is as near as the window is long; the alarm is two later."""
    watched = 8 * window(0.01, 2)
    (alarm,) = raised([(look, (look - 300) / 100) for look in range(290)])
    assert alarm.step == 300 - (watched - 1) + 2


def test_a_drift_that_slows_down_is_none() -> None:
    """As far and as fast, the other way round: what a model does that learns."""
    back = [DRIFT[0] + DRIFT[-1] - margin for margin in reversed(DRIFT)]
    far = [margin - 0.9 for margin in back]  # not so near that the short window speaks
    assert raised(drifting(0.0, far)) == []
    assert raised(drifting(0.1, far)) == []


def test_what_was_seen_from_afar_is_over_when_its_distance_has_doubled() -> None:
    rises, drift = TrendAlarms(0.01), drifting(0.0)
    steps = [step for step, margin in drift for _ in rises.look(step, {"ENTROPY-FROZEN": margin}, FOUND)[0]]
    assert len(steps) == 1  # one alarm, though it is above its distance at all looks that follow
    rises = TrendAlarms(0.01)
    before = [each for each in drift if each[0] <= steps[0]]
    for step, margin in before:
        rises.look(step, {"ENTROPY-FROZEN": margin}, FOUND)
    for ago, over in ((0.5, False), (1.0, True)):
        _, cleared = rises.look(steps[0] + round(10 * ago), {"ENTROPY-FROZEN": before[-1][1] - ago}, FOUND)
        assert cleared == (["ENTROPY-FROZEN/trend"] if over else [])


def test_an_alarm_from_afar_of_an_earlier_part_of_the_run_stands() -> None:
    drift = drifting(0.0)
    (alarm,) = raised(drift)
    again = TrendAlarms(0.01)
    for step, margin in drift:
        if step == alarm.step + 5:
            again.standing(alarm.key)
        found = FOUND if step > alarm.step else {}
        assert again.look(step, {"ENTROPY-FROZEN": margin}, found) == ([], [])


def test_the_corpus_has_no_trend() -> None:
    found = {"CORPUS-DIMENSIONS": FOUND["ENTROPY-FROZEN"]}
    rises = TrendAlarms(0.01)
    looks = [(10 * look, -0.68 + 0.03 * look) for look in range(20)]
    assert not [a for step, margin in looks for a in rises.look(step, {"CORPUS-DIMENSIONS": margin}, found)[0]]


def test_what_goes_up_and_down_is_none() -> None:
    assert raised([(10 * look, -1.0 + 0.2 * (look % 2)) for look in range(40)]) == []


def test_a_step_that_comes_again_replaces_what_was_seen_from_there() -> None:
    once = [(10 * look, -1.3 + 0.05 * look) for look in range(20)]
    twice = [each for each in once for _ in range(2)]
    back = [*once[:9], *((step, margin + 0.3) for step, margin in once[4:9]), *once[4:]]
    assert raised(twice) == raised(once)
    assert [alarm.step for alarm in raised(back)] == [alarm.step for alarm in raised(once)]


def test_the_examples_of_the_docstrings() -> None:
    done = doctest.testmod(trends)
    assert (done.attempted > 0, done.failed) == (True, 0)
