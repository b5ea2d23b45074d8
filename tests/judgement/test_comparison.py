"""What a change between two records is called, on figures made by hand. tests/analyses/test_comparison.py compares models."""

import math
from dataclasses import MISSING, fields, replace
from statistics import NormalDist
from typing import Any

import pytest

from uncollapse.judgement.comparison import (
    HEAD_COURSES,
    SITE_COURSES,
    finding,
    has_moved,
    head_changes,
    noise,
    site_changes,
    smallest,
    standard_error,
    worse,
)
from uncollapse.records.common import Statistic
from uncollapse.records.comparison import Change
from uncollapse.records.diagnosis import AttentionRecord, SiteRecord

HALF_PERCENT = NormalDist().inv_cdf(0.995)  # 1 % in both tails


def change(measure: str = "max_logit", before: float = 2.0, after: float = 4.0, noise: float | None = 0.0) -> Change:
    return Change(measure, "block.1", 1, 3, None, "self", before, after, noise, moved=True)


def test_two_sequences_tell_the_noise() -> None:
    """The range of n figures drawn evenly from [0, 1], whose deviation is sqrt(1/12), is (n - 1)/(n + 1) on average."""
    error = standard_error(Statistic(0.0, -1.0, 1.0, 2))
    assert error == pytest.approx(2 * 3 / math.sqrt(12) / math.sqrt(2))
    assert standard_error(Statistic(0.0, 0.0, 0.0, 1)) is None


def test_the_noise_of_a_difference_adds_in_squares() -> None:
    one, other = Statistic(0.0, -1.0, 1.0, 9), Statistic(0.0, -2.0, 2.0, 9)
    error = standard_error(one)
    assert error is not None
    assert noise(one, other, same_probe=False) == pytest.approx(error * math.sqrt(5))
    assert noise(one, other, same_probe=True) == 0
    assert noise(one, replace(other, n=1), same_probe=False) is None
    assert noise(replace(one, n=1), other, same_probe=False) is None


@pytest.mark.parametrize(
    ("before", "after", "error", "moved"),
    [
        (1.0, 1.0, 0.0, False),
        (100.0, 95.0, 0.0, False),  # a twentieth of the larger one is not more than that
        (100.0, 94.9, 0.0, True),
        (94.9, 100.0, 0.0, True),
        (-100.0, -94.9, 0.0, True),
        (100.0, 100.0 + 9.99 * HALF_PERCENT, 10.0, False),
        (100.0, 100.0 + 10.01 * HALF_PERCENT, 10.0, True),
        (100.0, 100.0 - 10.01 * HALF_PERCENT, 10.0, True),
        (1.0, 9.0, None, False),
    ],
)
def test_a_change_moves_beyond_the_noise_and_a_twentieth(
    before: float, after: float, error: float | None, moved: bool
) -> None:
    assert has_moved(before, after, error) is moved


def test_the_smallest_change_that_would_be_found() -> None:
    changes = [
        change(before=100.0, noise=4.0),
        change(before=-100.0, noise=10.0),
        change(before=100.0, noise=20.0),
        change(before=0.0, noise=1.0),  # no relative change of nothing
        change(before=5.0, noise=None),
        change("rest_entropy", before=1.0, noise=0.001),
    ]
    assert smallest(changes) == pytest.approx({"max_logit": HALF_PERCENT * 0.1, "rest_entropy": 0.05})
    assert smallest([change(noise=None)]) == {}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (change(before=2.0, after=3.0), True),  # by just one half
        (change(before=2.0, after=2.99), False),
        (change(before=2.0, after=1.0), False),  # for the better
        (change(before=1.0, after=1.6), True),
        (change(before=0.99, after=1.6), False),  # such logits choose nothing
        (change(before=-2.0, after=4.0), False),
        (replace(change(), moved=False), False),
        (change("rest_entropy", before=3.0, after=2.0), True),
        (change("rest_entropy", before=0.5, after=0.3), True),  # only of logits are small ones left out
        (change("rest_entropy", before=2.0, after=3.0), False),
        (change("normalized_entropy", before=3.0, after=1.0), False),  # no course of its own
        (replace(change("effective_rank", before=3.0, after=2.0), head=None), True),
        (change("effective_rank", before=3.0, after=2.0), False),  # a measure of a site, not of a head
    ],
)
def test_what_is_worse_by_half_is_a_finding(changed: Change, found: bool) -> None:
    findings = list(worse([changed]))
    assert len(findings) == found
    for each in findings:
        assert each.value == pytest.approx(changed.after / changed.before)
        assert each.threshold == pytest.approx(1.5 if changed.after > changed.before else 2 / 3)
        assert (each.block, each.head) == (1, changed.head)
        where = "Block 1" if changed.head is None else "Head 3 of block 1"
        assert each.message.startswith(f"{where} has changed.")


@pytest.mark.parametrize("measure", [*HEAD_COURSES, *SITE_COURSES])
def test_each_course_is_worse_by_half_in_its_own_direction(measure: str) -> None:
    """Logits grow, everything else falls."""
    head = 3 if measure in HEAD_COURSES else None
    grows = measure in {"max_logit", "query_key_norm"}
    for factor, is_worse in ((1.49, False), (1.51, True)):
        for after, course in ((2 * factor, grows), (2 / factor, not grows)):
            findings = list(worse([replace(change(measure, before=2.0, after=after), head=head)]))
            assert len(findings) == (is_worse and course)


def test_a_finding_goes_on_to_the_next_change() -> None:
    better, unknown = change(before=4.0, after=2.0), change("normalized_entropy")
    small, still = change(before=0.5, after=4.0), replace(change(), moved=False)
    assert len(list(worse([better, unknown, small, still, change(), change()]))) == 2


def test_the_embedding_is_called_that() -> None:
    said = finding(HEAD_COURSES["max_logit"], 2.0, 1.0, "it was before", block=None)
    assert said.message.startswith("The embedding has changed.")
    assert said.threshold == pytest.approx(2 / 3)
    assert "0.5 times what it was before (2 became 1)" in said.message


def test_heads_are_compared_where_both_have_the_figure() -> None:
    def record(head: int, value: float | None) -> AttentionRecord:
        logit = None if value is None else Statistic(value, value, value, 4)
        return AttentionRecord(2, head, None, "self", None, None, None, logit)

    before = [record(0, 1.0), record(1, None), record(2, 3.0), record(3, 5.0)]
    after = [record(0, 2.0), record(1, 2.0), record(2, None)]
    found = head_changes(before, after, same_probe=True)
    assert [(c.measure, c.site, c.head, c.before, c.after, c.moved) for c in found] == [
        ("max_logit", "block.2", 0, 1.0, 2.0, True)
    ]


def site(name: str, value: float | None, stack: Any = None, measure: str = "consensus_distance") -> SiteRecord:
    figures: dict[str, Any] = dict.fromkeys([field.name for field in fields(SiteRecord) if field.default is MISSING])
    known = None if value is None else Statistic(value, value - 0.5, value + 0.5, 4)
    return SiteRecord(**{**figures, "site": name, "stack": stack, measure: known})


def test_sites_are_compared_by_name_and_stack_in_the_figures_that_both_have() -> None:
    before = [
        site("block.0", 1.0, "encoder"),
        site("block.0", 2.0, "decoder"),
        site("block.1", 3.0),
        site("block.2", 4.0),
    ]
    after = [
        site("block.0", 5.0, "decoder"),
        site("block.0", 1.0, "encoder"),
        site("block.1", None),
        site("block.9", 1.0),
    ]
    found = site_changes(before, after, same_probe=True)
    assert [(c.site, c.stack, c.before, c.after, c.noise, c.moved) for c in found] == [
        ("block.0", "encoder", 1.0, 1.0, 0.0, False),
        ("block.0", "decoder", 2.0, 5.0, 0.0, True),
    ]
    (other,) = site_changes(before[:1], after[1:2], same_probe=False)
    assert other.noise == noise(before[0].consensus_distance, after[1].consensus_distance, same_probe=False)  # type: ignore[arg-type]
    assert (other.head, other.kind) == (None, None)


@pytest.mark.parametrize(
    "measure", ["consensus_after_norm", "consensus_distance", "effective_rank", "affine_rank", "stream_carried"]
)
def test_each_measure_of_a_site_is_compared(measure: str) -> None:
    (found,) = site_changes([site("a", 1.0, measure=measure)], [site("a", 2.0, measure=measure)], same_probe=True)
    assert (found.measure, found.after) == (measure, 2.0)


@pytest.mark.parametrize(
    "measure", ["max_logit", "rest_entropy", "normalized_entropy", "key_share", "value_contraction"]
)
def test_each_measure_of_a_head_is_compared_with_that_of_its_kind(measure: str) -> None:
    def record(kind: Any, block: int, value: float) -> AttentionRecord:
        empty = AttentionRecord(block, 0, None, kind, None, None, None, None)
        return replace(empty, **{measure: Statistic(value, value, value, 4)})

    before = [record("self", 1, 1.0), record("cross", 1, 2.0), record("self", 2, 3.0)]
    after = [record("cross", 1, 7.0), record("self", 1, 5.0), record("self", 3, 9.0)]
    found = head_changes(before, after, same_probe=True)
    assert [(c.kind, c.block, c.measure, c.before, c.after) for c in found] == [
        ("self", 1, measure, 1.0, 5.0),
        ("cross", 1, measure, 2.0, 7.0),
    ]
