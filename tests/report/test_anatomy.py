"""Terminal and page say first what was not measured, and "No warning" only of what was looked at."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from tests.helpers import records_samples as samples
from tests.helpers.pages import Page, well_formed_and_accessible
from uncollapse.records.anatomy import (
    AnatomyRecord,
    AttentionCallRecord,
    BlockAnatomy,
    ForbiddenPairs,
    MaskRecord,
    NormPlace,
    NotMeasured,
    PartRecord,
    StackAnatomy,
    StreamAxesRecord,
)
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.report import draw, show
from uncollapse.report.anatomy import kinds_of_blocks, not_measured_sentences

REASON = "its weights are no distribution over the keys: rows sum to {} … 1.53"
ENTROPIES = ("entropy", "normalized_entropy", "key_share", "value_contraction", "rest_entropy", "max_logit")


def block(number: int, *, measured: bool = True) -> BlockAnatomy:
    call = AttentionCallRecord(
        product=f"matmul #1 of layers.{number}.attention",
        weights=0,
        softmax=f"softmax #0 of layers.{number}.attention" if measured else None,
        axes=["sequence", "head", "query", "key"],
        heads=12,
        key_value_heads=4,
        head_width=32,
        before=1,
        after=0,
        output_projection=f"layers.{number}.out",
        forbids=[ForbiddenPairs(f"masked_fill #0 of layers.{number}.attention", None, ["sequence", None, None, "key"])],
    )
    attention = PartRecord(
        "attention",
        f"layers.{number}.attention",
        causal=True,
        attention=[call],
        deviation=3e-7 if measured else None,
        row_sums=[0.25, 0.5] if measured else None,
    )
    mlp = PartRecord("mlp", f"layers.{number}.mlp", reads=f"layers.{number}.up", writes=f"layers.{number}.down")
    norm = NormPlace(f"layers.{number}.norm", "rms", "before", 0, "it also adds a position")
    return BlockAnatomy(
        number, None, f"layers.{number}", "pre", StreamAxesRecord(1, [0], 2), "", [attention, mlp], [norm]
    )


def anatomy(blind: int) -> AnatomyRecord:
    """Six blocks; the attention of the first `blind` could not be measured."""
    return AnatomyRecord(
        [block(number, measured=number >= blind) for number in range(6)],
        [StackAnatomy(None, list(range(6)), [MaskRecord("padding", 0, "token", False)], "ids")],
        [NotMeasured(number, "attention", REASON.format(f"0.{number + 1}")) for number in range(blind)],
    )


def blinded(blind: int) -> DiagnosisRecord:
    quiet = samples.quiet()
    attention = [
        replace(head, **dict.fromkeys(ENTROPIES), unavailable=dict.fromkeys(ENTROPIES, "none"))
        if head.block < blind
        else head
        for head in quiet.attention
    ]
    return replace(quiet, attention=attention, anatomy=anatomy(blind))


def printed(record: Any) -> str:
    file = io.StringIO()
    show(record, Console(file=file, width=100))
    return " ".join(file.getvalue().split())


def words(record: Any) -> str:
    return " ".join(Page(draw(record)).words.split())


both = pytest.mark.parametrize("told", [printed, words])
Told = Callable[[Any], str]


@both
def test_what_was_not_measured_stands_before_every_figure(told: Told) -> None:
    text = told(blinded(6))
    said = f"No attention was measured in 6 of 6 blocks: {REASON.format('0.1')} (block 0; alike in blocks 1–5)."
    assert text.index(said) < text.index("consen")
    assert "No warning about depth (7 sites) and output projections (6 blocks); attention was not measured." in text


@both
def test_half_of_the_attention_is_not_all_of_it(told: Told) -> None:
    text = told(blinded(2))
    assert "No attention was measured in 2 of 6 blocks" in text
    assert (
        "No warning about depth (7 sites), attention (48 heads) and output projections (6 blocks); "
        "attention in 24 of 72 heads was not measured." in text
    )
    whole = told(blinded(0))
    assert "not measured." not in whole.split("No warning")[1].split("Look next")[0].split("Findings")[0][:200]
    assert "attention (72 heads)" in whole


@both
def test_a_warning_does_not_hide_what_was_not_measured(told: Told) -> None:
    text = told(replace(blinded(6), findings=[samples.FALLING]))
    assert "1 critical finding. Attention was not measured." in text
    assert "No warning" not in text


def test_a_model_without_attention_is_not_cleared_of_it() -> None:
    record = replace(samples.quiet(), attention=[], heads=[])
    assert "No warning about depth (7 sites); attention was not measured." in printed(record)
    nothing = replace(record, trajectory=[replace(s, **_no_figures(s)) for s in record.trajectory])
    assert "Nothing could be judged: depth and attention were not measured." in printed(nothing)
    assert "No warning" not in words(nothing)


def _no_figures(site: Any) -> dict[str, None]:
    return {
        name: None
        for name, value in vars(site).items()
        if name not in ("site", "block", "stack", "unavailable", "not_finite", "streams") and value is not None
    }


def test_several_figures_with_one_reason_share_a_line() -> None:
    reason = "its weights are not the softmax of one set of logits"
    missing = [NotMeasured(4, f"attention: {name}", reason) for name in ("entropy_floor", "max_logit")]
    lines = not_measured_sentences(replace(anatomy(0), not_measured=missing))
    assert lines == [f"Of the attention, no entropy floor and largest logit was measured in 1 of 6 blocks: {reason}."]
    assert not_measured_sentences(replace(anatomy(0), not_measured=missing), "projection") == []


def test_each_kind_of_block_has_one_line() -> None:
    first, second, padding = kinds_of_blocks(anatomy(2))
    assert first == (
        "Blocks 0–1: attention (12 heads, values mixed by matmul, causal, no softmax, pairs forbidden by masked_fill, "
        "1 sink column) + MLP; pre norm; stream token × sequence × width."
    )
    assert second.startswith("Blocks 2–5: attention (12 heads, values mixed by matmul, causal, pairs")
    assert padding == "Padding is hidden by padding."
    assert first in printed(blinded(2))


def test_the_first_panel_is_what_was_taken_for_what() -> None:
    page = Page(draw(blinded(2)))
    well_formed_and_accessible({"blinded": page}, "blinded")
    assert page.text.index('id="anatomy"') < page.text.index('id="findings"') < page.text.index('id="depth"')
    assert "<details" not in page.text[page.text.index('id="anatomy"') : page.text.index('id="findings"')]
    assert page.words.count("No attention was measured in 2 of 6 blocks") == 2, "at the top, and in the panel"
    rows = {row: {title: cell for (r, title), cell in page.cells.items() if r == row} for row in page_rows(page)}
    assert [(rows[row]["block"]["text"], rows[row]["sublayer"]["text"]) for row in rows] == [
        ("0–1", "attention"),
        ("0–5", "MLP"),
        ("2–5", "attention"),
    ]
    assert rows["taken-2"]["mixes the values"]["text"] == "matmul #1 of layers.*.attention"
    assert rows["taken-2"]["weights"]["text"] == "sequence × head × query × key"
    assert rows["taken-2"]["heads"]["text"] == "12, 4"
    assert rows["taken-2"]["row sums"]["text"] == "0.250 … 0.500"
    assert rows["taken-2"]["norms of the block"]["text"] == "layers.*.norm (before, cannot be removed)"
    assert rows["taken-0"]["row sums"]["title"] == REASON.format("0.1")


def page_rows(page: Page) -> list[str]:
    return [key for key in page.ids() if key.startswith("taken-")]


def test_a_block_that_differs_has_a_row_of_its_own() -> None:
    record = blinded(0)
    assert record.anatomy is not None
    blocks = list(record.anatomy.blocks)
    part = blocks[3].parts[0]
    other = replace(part, attention=[replace(part.attention[0], heads=11)], deviation=2e-6)
    blocks[3] = replace(blocks[3], parts=[other, *blocks[3].parts[1:]])
    page = Page(draw(replace(record, anatomy=replace(record.anatomy, blocks=blocks))))
    cells = [(page.cells[row, "block"]["text"], page.cells[row, "heads"]["text"]) for row in page_rows(page)]
    assert cells == [("0–2, 4–5", "12, 4"), ("0–5", ""), ("3", "11, 4")]
    alone = page.cells["taken-2", "mixes the values"]["text"]
    assert alone == "matmul #1 of layers.3.attention", "one block keeps its number"
    assert float(page.cells["taken-2", "deviation"]["v"]) == 2e-6


def test_a_whole_reading_and_an_old_record_say_so() -> None:
    whole = "No part that was found in the 6 blocks was left out."
    assert whole in words(blinded(0))
    assert whole not in words(blinded(1))
    bare = words(replace(blinded(0), attention=[]))
    assert whole not in bare
    assert "Attention was not measured." in bare
    old = words(replace(blinded(0), anatomy=None))
    assert "The record does not say what was taken for what: an older version wrote it." in old
    assert "was left out" not in old
