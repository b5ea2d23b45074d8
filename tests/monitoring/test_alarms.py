"""When a reading becomes an alarm: places that were healthy, and places that never were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

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


WIDTH_KEY = "WIDTH-UNIFORM/block.1/self"


def of_attention(margins: list[float | None]) -> list[int]:
    """The looks at which alarms are raised, by the margin of WIDTH-UNIFORM at each; None where it was not judged."""
    alarms, found = ThresholdAlarms(), {WIDTH_KEY: UNIFORM}
    looks = [({} if margin is None else {WIDTH_KEY: margin}) for margin in margins]
    return [a.step for look, margins in enumerate(looks) for a in alarms.look(look, margins, found)[0]]


def test_attention_that_comes_from_uniform_and_falls_back_while_it_learns_is_no_alarm() -> None:
    """As in healthy runs of docs/early-warning.md: over the threshold for up to 34 looks, and better again."""
    learnt, back = [-1.5] * 26, [0.1, 0.9, 1.9, 1.5, 1.0, 0.6, 0.3]
    assert of_attention([6.9, *learnt, *back, *learnt]) == []
    assert of_attention([None, *learnt, *back, *learnt]) == []  # as initialised, so not judged at first
    assert of_attention([6.9, *learnt, *(1.9 - 0.03 * look for look in range(60))]) == []  # it gets better all the time
    assert of_attention([-0.9, *learnt, *back]) == [len(learnt) + 2]  # it never was uniform


def test_attention_that_comes_from_uniform_and_returns_for_good_is_an_alarm() -> None:
    assert of_attention([6.9, *[-1.5] * 40, 0.1, 0.1]) == [42]  # healthy for long enough
    assert of_attention([6.9, *[-1.5] * 10, 1.0, 3.6]) == [12]  # as uniform as no healthy run becomes again
    assert of_attention([6.9, *[-1.5] * 10, *[1.0] * 90]) == []  # a young model, selective for some looks
    assert of_attention([6.9, *[-1.5] * 4, *[0.5] * 45]) == []  # it never was anything else


def test_attention_that_began_uniform_and_whose_mixtures_are_alike_before_it_chooses_is_no_alarm() -> None:
    """Block 3 in a healthy run of docs/early-warning.md (weight decay 0.1, seed 24), whose heads chose at step 120."""
    uniform = (
        6.91,
        None,
        None,
        None,
        None,
        1.26,
        1.72,
        -1.54,
        -0.83,
        -1.64,
        -1.55,
        -0.17,
        -0.28,
        -0.57,
        -0.44,
        -0.54,
        -0.50,
        -0.39,
    )
    alike = (
        -1.34,
        None,
        None,
        None,
        None,
        -1.54,
        -1.25,
        -2.46,
        -2.15,
        -2.51,
        -2.52,
        -1.76,
        -0.53,
        -0.35,
        -0.02,
        -0.19,
        0.35,
        0.24,
    )
    assert of_mixtures(uniform, alike) == []
    assert of_mixtures((-1.0, *uniform[1:]), alike) == [17]  # it never was uniform
    learnt = [-1.5] * 40
    assert of_mixtures((*uniform, *learnt, -1.0, -1.0), (*alike, *learnt, 0.35, 0.24)) == [len(uniform) + 41]


def of_mixtures(uniform: Sequence[float | None], alike: Sequence[float | None]) -> list[int]:
    """The looks at which there are alarms about alike mixtures, by the margins of both rules on width at each."""
    key, alarms = "WIDTH-RANK-ONE/block.1/self", ThresholdAlarms()
    found = {key: replace(UNIFORM, code="WIDTH-RANK-ONE")}
    looks = [
        {name: margin for name, margin in ((WIDTH_KEY, one), (key, other)) if margin is not None}
        for one, other in zip(uniform, alike, strict=True)
    ]
    return [a.step for look, margins in enumerate(looks) for a in alarms.look(look, margins, found)[0]]


def test_a_warning_must_stand_in_a_row() -> None:
    """A head that is frozen at every other look (weight decay 0.1, seed 29) has not frozen yet."""
    key = "ENTROPY-FROZEN/block.0/self"
    found = {key: Finding("ENTROPY-FROZEN", "entropy-collapse", "warning", 0, 0, 0.5, 0.4, "It is.", "", "")}
    learnt, flickers = [-1.5] * 6, [0.01, -0.22, 0.03, -0.12, -0.19, -0.24, -0.10, 0.20, 0.02, -0.07]
    for margins, steps in (([*learnt, *flickers[:7]], []), ([*learnt, *flickers], [len(learnt) + 8])):
        alarms = ThresholdAlarms()
        looks = enumerate({key: margin} for margin in margins)
        assert [a.step for look, each in looks for a in alarms.look(look, each, found)[0]] == steps


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


def test_the_patience_of_a_monitor_is_that_of_its_trends() -> None:
    key = "ENTROPY-FROZEN/block.0/self"
    found = {key: Finding("ENTROPY-FROZEN", "entropy-collapse", "warning", 0, 0, 0.5, 0.4, "It is.", "", "")}
    steps = []
    for patience in (2, 4):
        monitor = uc.Monitor(OwnGPT(), [{"idx": probe()[0]["input_ids"]}], patience=patience)
        readings = [TrailReading(step=look, margins={key: -1.5 + 0.05 * look}) for look in range(30)]
        for reading in readings:
            monitor._judge(reading, found)
        steps += [alarm.step for reading in readings for alarm in reading.alarms if alarm.against == "trend"]
    assert len(steps) == 2
    assert steps[1] == steps[0] + 2


def test_a_monitor_names_the_block_from_which_on_the_stream_is_lost() -> None:
    monitor = uc.Monitor(OwnGPT(), [{"idx": probe()[0]["input_ids"]}])
    monitor.look(0)
    assert monitor.record is not None
    blocks = [site.block for site in monitor.record.sites]
    found, last = {STREAM.code: STREAM}, max(block for block in blocks if block is not None)
    for look in range(1, 12):
        falls = look > 9
        carried = [None if block is None else 0.4 if falls and block == last else 1.0 for block in blocks]
        margins = {STREAM.code: 0.3 if falls else -1.9}
        reading = TrailReading(step=look, margins=margins, sites={"stream_carried": carried})
        monitor._judge(reading, found)
    assert [(alarm.code, alarm.block) for alarm in reading.alarms] == [(STREAM.code, last)]
