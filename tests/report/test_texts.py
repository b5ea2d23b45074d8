"""Texts of pages and printouts as a reader meets them: code set as code, options whole, one figure in one form."""

from __future__ import annotations

import doctest
import io
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tests.helpers import heads_samples, records_samples
from tests.helpers.pages import Page
from uncollapse.measures.heads import attribution_verdict
from uncollapse.records.common import Finding
from uncollapse.report import draw, show, wording
from uncollapse.report.diagnosis.wording import attention_sentences, depth_sentences
from uncollapse.report.page import sheet

RECORDS: dict[str, Callable[[], Any]] = {
    "translation": records_samples.translation,
    "symmetries": records_samples.symmetries,
    "lengths": records_samples.lengths,
    "ablation": records_samples.ablation,
    "heads": heads_samples.mixed,
}
REMEDY = "Run `uncollapse ablate demo --grid` to see why; the noise gain is 7.11e+04, off by 1.2e-05."


def told() -> Any:
    record = records_samples.encoder()
    return replace(record, findings=[replace(records_samples.SHARP_HEAD, remedy=REMEDY)])


def words_between(page: str) -> str:
    """What a reader sees of a page, without what stands in code."""
    page = re.sub(r"(?s)<(script|style|pre|code|title)\b.*?</\1>", "", page)
    return re.sub(r"<[^>]*>", " ", page)


@pytest.mark.parametrize("record", [*RECORDS.values(), told])
def test_a_page_has_no_backtick_no_bare_option_and_no_two_digit_exponent(record: Callable[[], Any]) -> None:
    page = draw(record())
    words = words_between(page)
    assert "`" not in words
    assert not re.search(r"--[a-z]", words)
    assert not re.search(r"\de(\+\d|-0)", words)
    assert not [a for _, attributes in Page(page).elements for a in attributes.values() if "`" in a]


def test_a_command_in_a_remedy_is_code_and_its_figures_are_those_of_the_tables() -> None:
    page = draw(told())
    assert "Run <code>uncollapse ablate demo --grid</code> to see why; the noise gain is 71,100, off by 1.2e-5." in page


def test_code_that_came_from_outside_is_still_escaped() -> None:
    record = replace(told(), findings=[replace(records_samples.SHARP_HEAD, remedy="`<b>--x</b>` --y<i>")])
    page = draw(record)
    assert "<code>&lt;b&gt;--x&lt;/b&gt;</code>" in page
    assert '<code class="option">--y</code>&lt;i&gt;' in page
    Page(page)


def test_a_model_named_with_backticks_keeps_them_where_it_is_named() -> None:
    page = draw(replace(records_samples.encoder("a--b"), findings=[]))
    assert "<h1>a--b</h1>" in page
    assert "<title>a--b · uncollapse</title>" in page


def test_figures_in_a_printout_have_the_digits_of_the_tables() -> None:
    console = Console(file=io.StringIO(), width=200)
    show(told(), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the noise gain is 71,100, off by 1.2e-5." in printed


def test_a_verdict_says_its_gain_as_the_table_does() -> None:
    gain = 71097.3
    assert attribution_verdict(0, gain) == f"attributable with care (noise gain {wording.number(gain)})"


def test_what_is_alike_everywhere_is_not_said_from_one_to_the_other() -> None:
    record = records_samples.encoder()
    flat = [replace(head, normalized_entropy=records_samples.statistic(0.9999)) for head in record.attention]
    assert attention_sentences(replace(record, attention=flat)) == [
        "Normalized entropy is 1.00 in every head (healthy: 4.2e-5 … 0.97)."
    ]
    sites = [replace(site, consensus_distance=records_samples.statistic(0.5)) for site in record.trajectory]
    (said, _) = depth_sentences(replace(record, trajectory=sites))
    assert said.startswith("The consensus distance is 0.500 at the embedding and at block 5 (healthy: ")


def test_a_rank_that_is_lowest_at_the_embedding_does_not_fall() -> None:
    """Repeated tokens are one point there."""
    record = records_samples.encoder()
    first = record.trajectory[0]
    assert first.affine_rank is not None
    low = replace(first, affine_rank=replace(first.affine_rank, mean=0.75 * first.affine_rank.mean))
    (_, said) = depth_sentences(replace(record, trajectory=[low, *record.trajectory[1:]]))
    assert said == "The affine rank is lowest at the embedding: 75 % of the attainable."


def test_many_places_of_one_rule_are_one_short_line() -> None:
    findings = [replace(records_samples.SHARP_HEAD, block=block, head=head) for block in range(13) for head in range(4)]
    console = Console(file=io.StringIO(), width=100)
    show(replace(records_samples.encoder(), findings=findings), console)
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "The same at 49 more places: block 0 (head 3); blocks 1–12 (heads 0–3)." in printed
    assert printed.count("The same at") == 1


def test_places_of_stacks_and_kinds_are_told_apart() -> None:
    def at(block: int | None, head: int | None, **where: Any) -> Finding:
        return replace(records_samples.SHARP_HEAD, block=block, head=head, **where)

    found = [
        at(4, 0, stack="decoder", kind="cross"),
        at(5, 0, stack="decoder", kind="cross"),
        at(1, 2, stack="encoder"),
    ]
    assert wording.finding_places(found) == "decoder blocks 4–5 (head 0) (cross); encoder block 1 (head 2)"
    assert wording.finding_places([at(None, None)]) == "the whole model"


@pytest.mark.parametrize("module", [wording, sheet])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0
