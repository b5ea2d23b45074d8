"""The page of a comparison: the maps of both models side by side on one scale, and the difference."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import records_samples as samples
from tests.helpers.pages import Page, policy_allows_own_scripts_only, well_formed_and_accessible
from uncollapse.records.comparison import ComparisonRecord
from uncollapse.report import draw

MEASURES = ("normalized_entropy", "max_logit", "rest_entropy", "value_contraction")


@pytest.fixture(scope="module", params=["encoder", "translation"])
def drawn(request: pytest.FixtureRequest) -> tuple[ComparisonRecord, Page]:
    record = samples.compared(getattr(samples, request.param)())
    return record, Page(draw(record))


def cells(page: Page, key: str) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["block"], row["head"]): row for row in page.rows_of(key, "block", "head")}


def test_the_page_is_whole(drawn: tuple[ComparisonRecord, Page]) -> None:
    well_formed_and_accessible({"page": drawn[1]}, "page")
    policy_allows_own_scripts_only({"page": drawn[1]}, "page")


def test_both_models_stand_side_by_side_with_the_difference(drawn: tuple[ComparisonRecord, Page]) -> None:
    record, page = drawn
    compared = 0
    for change in record.heads:
        if change.measure not in MEASURES:
            continue
        key = "-".join(filter(None, ["map", change.measure.replace("_", "-"), change.stack, change.kind]))
        place = (change.block, change.head)
        before, after, difference = (cells(page, f"{key}-{part}")[place] for part in ("before", "after", "change"))
        assert before["value"] == change.before
        assert after["value"] == change.after
        if change.measure in ("normalized_entropy", "rest_entropy"):
            assert difference["value"] == pytest.approx(change.after - change.before)
        else:
            assert difference["value"] == pytest.approx(math.log2(change.after / change.before))
        row = record.heads.index(change)
        assert before["row"] == after["row"] == difference["row"] == f"heads-table-{row}"
        compared += 1
    assert compared == sum(change.measure in MEASURES for change in record.heads) > 100


def test_the_two_maps_have_one_scale_and_zero_is_the_middle_of_the_difference(
    drawn: tuple[ComparisonRecord, Page],
) -> None:
    _, page = drawn
    keys = [key.removesuffix("-before") for key in page.charts() if key.endswith("-before")]
    assert len(keys) >= 4
    for key in keys:
        before, after, change = (scale(page.spec(f"{key}-{part}")) for part in ("before", "after", "change"))
        assert before == after
        values = [row["value"] for part in ("before", "after") for row in cells(page, f"{key}-{part}").values()]
        assert before[0] <= min(values)
        assert max(values) <= before[1]
        assert change[1] == 0
        assert change[0] == -change[2]


def scale(spec: dict[str, Any]) -> list[float]:
    (found,) = [
        layer["encoding"]["color"]["scale"]["domain"] for layer in spec["layer"] if "color" in layer["encoding"]
    ]
    return list(found)


def test_a_figure_that_is_not_positive_has_no_doublings() -> None:
    record = samples.compared()
    changes = [c for c in record.heads if c.measure == "max_logit"]
    zero = [replace(c, before=0.0) if c is changes[0] else c for c in record.heads]
    page = Page(draw(replace(record, heads=zero)))
    found = cells(page, "map-max-logit-self-change")
    assert found[changes[0].block or 0, changes[0].head or 0]["value"] is None
    assert sum(row["value"] is None for row in found.values()) == 1
    assert "not comparable" in page.words


def test_a_logit_that_became_zero_is_the_one_that_moved_most() -> None:
    record = samples.compared()
    changes = [c for c in record.heads if c.measure == "max_logit"]
    gone = replace(changes[5], before=8.21, after=0.0, moved=True)
    heads = [gone if c is changes[5] else c for c in record.heads]
    tile = draw(replace(record, heads=heads)).split("<dt>logits moved most</dt>")[1].split("</dd>")[0]
    assert "<b>8.21 → 0</b>" in tile
    assert f"block {gone.block}, head {gone.head}" in tile


def test_more_than_two_are_drawn_together() -> None:
    record = samples.compared_three()
    page = Page(draw(record))
    well_formed_and_accessible({"page": page}, "page")
    lines = {row["line"] for row in page.rows_of("depth-consensus-after-norm", "line")}
    assert lines == {"first", "second", "third"}
    for number, pair in ((0, record.pairs[0]), (1, record.pairs[1])):
        ending = f"-of-{number + 2}" if number else ""
        drawn = cells(page, f"map-max-logit-self-change{ending}")
        for row, change in enumerate(pair.heads):
            if change.measure == "max_logit":
                cell = drawn[change.block or 0, change.head or 0]
                assert cell["value"] == pytest.approx(math.log2(change.after / change.before))
                assert cell["row"] == f"heads-table{ending}-{row}"
    assert "map-max-logit-self-after" not in page.charts()  # the maps would be too many
    assert "Something got worse in 1 of 2, compared with first." in page.words


def test_maps_in_a_row_have_one_scale_of_differences() -> None:
    record = samples.compared_three()
    last = record.further[0]
    grown = [replace(c, after=32 * c.before) if c.measure == "max_logit" else c for c in last.heads]
    page = Page(draw(replace(record, further=[replace(last, heads=grown)])))
    one, other = (scale(page.spec(f"map-max-logit-self-change{end}")) for end in ("", "-of-3"))
    assert one == other == [-5, 0, 5]


def test_a_block_that_one_of_them_lacks_is_left_out_of_its_line_alone() -> None:
    record = samples.compared_three()
    last = record.further[0]
    measure, gone = "consensus_after_norm", record.models[0].blocks // 2
    kept = [c for c in last.sites if (c.measure, c.block) != (measure, gone)]
    page = Page(draw(replace(record, further=[replace(last, sites=kept)])))
    drawn = {(row["line"], row["depth"]): row["y"] for row in page.rows_of("depth-consensus-after-norm", "line")}
    blocks = [change.block for change in record.sites if change.measure == measure]
    assert ("third", blocks.index(gone)) not in drawn
    for change in (c for c in kept if c.measure == measure):
        assert drawn["third", blocks.index(change.block)] == change.after
    # also where the pair that lacks it is the one that is longest otherwise, and where all but one lack it
    fewer = [c for c in record.sites if (c.measure, c.block) != (measure, gone)]
    page = Page(draw(replace(record, sites=fewer)))
    drawn = {(row["line"], row["depth"]): row["y"] for row in page.rows_of("depth-consensus-after-norm", "line")}
    assert ("second", blocks.index(gone)) not in drawn
    assert {depth for line, depth in drawn if line == "first"} == set(range(len(blocks)))


def test_findings_of_one_rule_share_a_card_in_each_pair() -> None:
    record = samples.compared_three()
    (one, *_) = (f for pair in record.pairs for f in pair.findings)
    many = [replace(one, head=head, message=f"Head {head} has changed.") for head in range(6)]
    last = replace(record.further[0], findings=many)
    page = Page(draw(replace(record, findings=many[:1], further=[last])))
    well_formed_and_accessible({"page": page}, "page")
    cards = re.findall(r'<article class="finding \w+" id="(.*?)">(.*?)</article>', page.text, re.S)
    assert [key for key, _ in cards] == ["finding-0", "finding-1-0"]
    assert "6 places" in cards[1][1]
    assert cards[1][1].count(html.escape(one.remedy)) == 1
    assert all(finding.message in cards[1][1] for finding in many)


def test_a_pair_whose_heads_were_not_compared_has_no_table_of_them() -> None:
    record = samples.compared_three()
    page = Page(draw(replace(record, further=[replace(record.further[0], heads=[])])))
    assert "heads-table" in page.ids()
    assert "heads-table-of-3" not in page.ids()
    assert "sites-table-of-3" in page.ids()
