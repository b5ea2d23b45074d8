"""Heads beside their own history: what is news, and what is a head that begins to choose."""

from __future__ import annotations

from collections.abc import Sequence

from tests.helpers.records_samples import encoder, model_info
from uncollapse.monitoring.baselines import BaselineAlarms
from uncollapse.records.trail import TRAIL_SCHEMA, HeadPlace, TrailReading, TrailRecord

HEADS = [HeadPlace(0, head, None, "self") for head in range(4)]


def raised(looks: Sequence[dict[str, float]]) -> list[tuple[int, str, int | None]]:
    """The alarms, by what head 1 shows at each look; the other heads stay what they are."""
    alarms = BaselineAlarms(HEADS)
    others = {"rest_entropy": 0.7, "key_share": 0.4, "max_logit": 9.0, "query_key_norm": 5.0}
    found = []
    for number, look in enumerate(looks):
        figures = {name: [others[name], value, others[name], others[name]] for name, value in look.items()}
        found += [(a.step, a.code, a.head) for a in alarms.look(number, figures)[0]]
    return found


def test_a_head_that_chose_and_sharpens_by_half_is_an_alarm() -> None:
    before, after = {"rest_entropy": 0.6, "key_share": 0.3}, {"rest_entropy": 0.3, "key_share": 0.1}
    assert raised([*[before] * 20, *[after] * 5]) == [(21, "BASELINE-ENTROPY", 1)]


def test_a_head_that_begins_to_choose_is_none() -> None:
    """Head 3 of block 0 in a healthy run of docs/early-warning.md (weight decay 0.1, seed 2), the first that learns anything."""
    rest = (
        0.990,
        0.996,
        0.989,
        0.979,
        0.961,
        0.958,
        0.960,
        0.970,
        0.976,
        0.976,
        0.965,
        0.874,
        0.530,
        0.323,
        0.286,
        0.288,
    )
    share = (
        0.960,
        0.985,
        0.965,
        0.933,
        0.879,
        0.875,
        0.884,
        0.912,
        0.927,
        0.925,
        0.874,
        0.603,
        0.200,
        0.110,
        0.096,
        0.066,
    )
    uniform = [{"rest_entropy": 0.99, "key_share": 0.97}] * 8
    looks = [{"rest_entropy": r, "key_share": s} for r, s in zip(rest, share, strict=True)]
    assert raised([*uniform, *looks, *[looks[-1]] * 10]) == []
    assert raised(
        [{"rest_entropy": look["rest_entropy"]} for look in [*uniform, *looks]]
    )  # the ratio alone is an alarm


def test_a_head_that_is_where_it_was_before_is_none() -> None:
    """Head 3 of block 2 in a healthy run (weight decay 0.1, seed 11): sharp, blunt for a while, and sharp again."""
    sharp, blunt = {"rest_entropy": 0.36, "key_share": 0.28}, {"rest_entropy": 0.80, "key_share": 0.60}
    assert raised([*[sharp] * 5, *[blunt] * 20, *[{**sharp, "rest_entropy": 0.33}] * 5]) == []
    assert raised([*[sharp] * 5, *[blunt] * 20, *[{**sharp, "rest_entropy": 0.28}] * 5]) == [
        (26, "BASELINE-ENTROPY", 1)
    ]


def test_a_figure_that_was_infinite_once_hides_nothing_later() -> None:
    before, after = {"max_logit": 10.0}, {"max_logit": 30.0}
    looks = [{"max_logit": float("inf")}, *[before] * 20, *[after] * 5]
    assert raised(looks) == [(22, "BASELINE-LOGITS", 1)]


def test_beside_a_given_record_a_change_is_one_whatever_the_head_was_before() -> None:
    """A trail whose last reading is the baseline."""
    last = TrailReading(step=0, heads={"rest_entropy": [0.97] * 4})
    given = TrailRecord(TRAIL_SCHEMA, {}, model_info(), encoder().probe, {}, [], HEADS, [last])
    alarms = BaselineAlarms(HEADS, given)
    shares = [[0.97, sharp, 0.97, 0.97] for sharp in (0.3, 0.97, 0.97, 0.97, 0.3, 0.3)]
    looks = [{"rest_entropy": rest, "key_share": [0.95] * 4} for rest in shares]
    found = [(a.step, a.head) for number, look in enumerate(looks) for a in alarms.look(number, look)[0]]
    assert found == [(5, 1)]


def test_the_size_of_the_product_speaks_only_where_the_logits_are_not_measured() -> None:
    """They may be normalised after the product: in a healthy run with bounded logits it grew 1.6 times, and they did not."""
    norms = [*[2.3] * 20, *[3.9] * 5]
    assert raised([{"query_key_norm": norm} for norm in norms]) == [(21, "BASELINE-LOGIT-SCALE", 1)]
    assert raised([{"query_key_norm": norm, "max_logit": 9.0} for norm in norms]) == []
    grown = [{"query_key_norm": norm, "max_logit": 4 * norm} for norm in norms]
    assert raised(grown) == [(21, "BASELINE-LOGITS", 1)]
