"""Trends: a margin on its way to its threshold, and looks that come again."""

from __future__ import annotations

import doctest

from uncollapse.monitoring import trends
from uncollapse.monitoring.trends import TrendAlarms
from uncollapse.records.common import Finding
from uncollapse.records.trail import Alarm

FOUND = {"ENTROPY-FROZEN": Finding("ENTROPY-FROZEN", "entropy-collapse", "info", 0, 0, 0.5, 0.2, "It is.", "", "")}


def raised(looks: list[tuple[int, float]]) -> list[Alarm]:
    rises = TrendAlarms(0.01)
    return [alarm for step, margin in looks for alarm in rises.look(step, {"ENTROPY-FROZEN": margin}, FOUND)[0]]


def test_a_steady_rise_is_an_alarm_once_with_the_steps_that_are_left() -> None:
    (alarm,) = raised([(10 * look, -0.68 + 0.04 * look) for look in range(16)])
    assert (alarm.code, alarm.against, alarm.severity, alarm.onset) == ("ENTROPY-FROZEN", "trend", "warning", 10)
    assert alarm.step < 130
    left = round((0.68 - 0.04 * alarm.step / 10) / 0.004, -1)  # to one digit
    assert f"about {left:.0f} steps" in alarm.message


def test_a_steady_rise_among_healthy_distances_is_none() -> None:
    """Thresholds are half of the smallest healthy distance: whatever is farther than twice the threshold is healthy."""
    assert raised([(10 * look, -1.3 + 0.03 * look) for look in range(20)]) == []
    assert raised([(10 * look, -1.3 + 0.03 * look) for look in range(43)])


def test_a_rise_is_extrapolated_no_farther_than_it_was_watched() -> None:
    """By the time the threshold is within as many looks as the window has, the same rise is an alarm."""
    slow, fast = ([(10 * look, -0.68 + rise * look) for look in range(12)] for rise in (0.02, 0.04))
    assert raised(slow) == []
    assert raised(fast)
    (alarm,) = raised([(10 * look, -0.68 + 0.02 * look) for look in range(34)])
    assert 0.68 - 0.002 * alarm.step <= 0.02 * 11


def test_a_rise_at_one_look_only_is_none() -> None:
    rises = [(10 * look, -0.68 + 0.04 * look) for look in range(30)]
    (alarm,) = raised(rises)
    first = alarm.step - 10  # the look before would have said it without patience
    stops = [each for each in rises if each[0] <= first] + [(first + 10 * n, -0.68) for n in range(1, 10)]
    assert raised(stops) == []


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
