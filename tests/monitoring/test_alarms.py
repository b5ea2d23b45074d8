"""When a reading becomes an alarm: places that were healthy, and places that never were."""

from __future__ import annotations

import math

import uncollapse as uc
from tests.helpers.own_models import OwnGPT
from tests.monitoring.test_bit_identical import probe
from uncollapse.judgement.findings import CONSENSUS
from uncollapse.monitoring.alarms import MOST, ThresholdAlarms
from uncollapse.records.common import Finding
from uncollapse.records.trail import Alarm, TrailReading

STREAM = Finding("DEPTH-CONSENSUS", "rank-collapse-depth", "warning", 3, None, 0.1, CONSENSUS, "They converge.", "", "")
UNIFORM = Finding("WIDTH-UNIFORM", "rank-collapse-width", "warning", 0, 0, 0.1, 0.1, "It is.", "", "")

# A healthy run of docs/early-warning.md (post-norm, 4 blocks, warm-up, seed 0): the smallest share of the embedding's distance.
FRESH = (
    0.326,
    0.326,
    0.323,
    0.304,
    0.272,
    0.219,
    0.17,
    0.144,
    0.125,
    0.106,
    0.093,
    0.093,
    0.107,
    0.142,
    0.214,
    0.368,
    0.415,
)


def raised(shares: tuple[float, ...]) -> list[Alarm]:
    alarms = ThresholdAlarms()
    looks = enumerate(math.log(CONSENSUS / share) for share in shares)
    return [a for n, margin in looks for a in alarms.look(5 * n, {STREAM.code: margin}, {STREAM.code: STREAM})[0]]


def test_a_fresh_stream_whose_tokens_come_together_and_part_again_is_no_alarm() -> None:
    assert min(FRESH) < CONSENSUS
    assert raised(FRESH) == []


def test_a_stream_that_was_healthy_and_falls_is_one_alarm() -> None:
    (alarm,) = raised((*FRESH, *[0.5] * 5, *[CONSENSUS * 0.9] * 4))
    assert alarm.step == 5 * (len(FRESH) + 6)  # the second look over the threshold
    (alarm,) = raised((0.9, *[CONSENSUS * 0.9] * 4))
    assert alarm.step == 10


def test_a_part_that_never_lived_is_no_alarm_however_long_it_is_dead() -> None:
    key = "DEAD-MLP/block.1/mlp"
    dead = {key: Finding("DEAD-MLP", "dead-component", "warning", 1, None, 0.0, 1e-7, "It adds nothing.", "", "")}
    for first, count in (({key: MOST}, 0), ({}, 1)):
        alarms = ThresholdAlarms()
        alarms.look(0, first, dead, {1})
        raised = [a for step in range(1, 60) for a in alarms.look(step, {key: MOST}, dead, {1})[0]]
        assert [a.step for a in raised] == [2] * count
    alarms = ThresholdAlarms()  # another block was seen, this one was not
    alarms.look(0, {}, dead, {0, None})
    assert not [a for step in range(1, 60) for a in alarms.look(step, {key: MOST}, dead, {0, 1})[0]]


def test_a_trend_is_news_only_of_a_place_that_was_healthy() -> None:
    key = "WIDTH-UNIFORM/block.0/self"
    rise = [-0.6 + 0.05 * look for look in range(12)]
    for before, count in (([-1.5] * 6, 1), ([], 0)):
        monitor = uc.Monitor(OwnGPT(), [{"idx": probe()[0]["input_ids"]}])
        for look, margin in enumerate([*before, *rise]):
            reading = TrailReading(step=5 * look, margins={key: margin})
            monitor._judge(reading, {key: UNIFORM})
            count -= len(reading.alarms)
        assert count == 0
