"""What a rule reads of a stack: behind the norm that sees most, or scaled, or as it stands; worked out by hand."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from uncollapse.judgement.reading import Read, as_read
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import ReaderRecord, SiteRecord


def site(
    scaled: float | None, *, plain: float | None = None, readers: tuple[float | None, ...] = (), block: int | None = 0
) -> SiteRecord:
    """A site with the consensus distances after scaling, as it stands, and behind the norms "a", "b", … that read it."""
    figures: dict[str, Any] = dict.fromkeys([each.name for each in fields(SiteRecord) if each.default is MISSING])
    names = [ReaderRecord(name, measured(value)) for name, value in zip("abc", readers, strict=False)]
    known = {"consensus_after_norm": measured(scaled), "consensus_distance": measured(plain)}
    return SiteRecord(**figures | {"site": "any", "block": block, "readers": names} | known)


def measured(value: float | None) -> Statistic | None:
    return None if value is None else Statistic(value, value, value, 3)


def figures(found: list[Read]) -> list[tuple[float, float, str]]:
    return [(pytest.approx(read.distance), pytest.approx(read.share), read.by) for read in found]


def test_a_stack_that_norms_read_is_seen_by_the_norm_that_sees_most() -> None:
    sites = [
        site(0.9, readers=(0.5, 0.8, None), block=None),
        site(0.1, readers=(0.4, 0.2)),
        site(0.7, readers=(None, 0.6)),
    ]
    found = as_read(sites)
    assert figures(found) == [
        (0.8, 1.0, ", as b gives them on"),
        (0.4, 0.5, ", as a gives them on"),
        (0.6, 0.75, found[0].by),
    ]
    assert [read.site for read in found] == sites


def test_a_stack_that_no_norm_reads_at_its_embedding_is_seen_scaled() -> None:
    sites = [
        site(0.8, plain=0.5, block=None),
        site(0.4, plain=0.5, readers=(0.9,)),
        site(None, readers=(0.9,)),
        site(0.2),
    ]
    found = as_read(sites)
    assert figures(found) == [(0.8, 1.0, ""), (0.4, 0.5, ""), (0.2, 0.25, "")]
    assert [read.site for read in found] == [sites[0], sites[1], sites[3]]  # nothing is known of the third
    assert as_read([]) == []


@pytest.mark.parametrize(
    ("plain", "share"),
    [
        ((0.5, 0.4), 0.8),  # as they stand: nearer to the embedding than scaled
        ((0.5, 0.05), 0.25),  # scaled
        ((0.5, None), 0.25),
        ((None, 0.4), 0.25),
    ],
)
def test_behind_the_last_block_tokens_are_apart_if_they_are_in_either_way(
    plain: tuple[float | None, float | None], share: float
) -> None:
    first, last = (site(s, plain=p, readers=r) for s, p, r in zip((0.8, 0.2), plain, ((0.9,), ()), strict=True))
    assert figures(as_read([first, last])) == [(0.9, 1.0, ", as a gives them on"), (0.2, share, "")]


def test_where_the_embedding_has_no_figure_the_site_is_its_own_measure() -> None:
    sites = [site(None, plain=0.5, readers=(0.9,)), site(0.2)]
    assert figures(as_read(sites)) == [(0.9, 1.0, ", as a gives them on"), (0.2, 1.0, "")]
    assert figures(as_read([site(None), site(0.2)])) == [(0.2, 1.0, "")]


def test_tokens_that_enter_as_one_are_apart_by_any_distance() -> None:
    """Not infinitely: what they enter with counts as 10^-12."""
    for first, last in ((site(0.0), site(0.3)), (site(0.3, readers=(0.0,)), site(0.3, readers=(0.3,)))):
        assert as_read([first, last])[1].share == pytest.approx(3e11)
    one, other = site(0.3, plain=0.0, readers=(0.9,)), site(0.3, plain=0.5)
    assert as_read([one, other])[1].share == pytest.approx(5e11)
    found = as_read([site(0.0), site(0.0)])
    assert [read.share for read in found] == [0.0, 0.0]
