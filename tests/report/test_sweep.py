"""A sweep, shown in a terminal and as a page: what was worst where, what was found first, what failed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.browser import Browser, hover
from tests.helpers.pages import Page, policy_allows_own_scripts_only, rows_anywhere
from tests.helpers.sweep_samples import swept
from uncollapse import report
from uncollapse.records.sweep import SweepRecord
from uncollapse.report.sweep import wording


def printed(record: SweepRecord, width: int = 100) -> str:
    text = io.StringIO()
    report.show(record, Console(file=text, width=width))
    return text.getvalue()


def specs(page: Page) -> dict[str, Any]:
    return {a["data-chart"]: json.loads(text) for a, text in page.scripts if "data-chart" in a}


def test_the_first_finding_of_each_kind_is_named_once_in_each_run() -> None:
    found = [(each.checkpoint.step, each.finding.code, each.having, each.among) for each in wording.firsts(swept())]
    assert found == [(1000, "DEPTH-CLOSE", 2, 4), (2000, "DEPTH-COLLAPSED", 1, 4)]


def test_the_printout_has_a_row_for_each_checkpoint_and_says_what_failed() -> None:
    lines = printed(swept()).splitlines()
    (row,) = (line.split() for line in lines if line.split()[:2] == ["step", "1,000"])
    assert row[2] == "0.0800"  # 0.8 / (1 + 9), in block 1
    assert row[4:] == ["13", "1", "warning"]
    said = " ".join(" ".join(lines).split())
    assert (
        "6 checkpoints, 1 of which could not be measured. The first warning: DEPTH-CLOSE at step 1,000, block 1."
        in said
    )
    assert "!! step 2,000 DEPTH-COLLAPSED (block 1; in 1 of 4 checkpoints)" in said
    assert "org/tiny@step512: crashed OSError: gone" in said
    assert max(map(len, printed(swept(), 60).splitlines())) <= 60


def test_the_page_has_a_curve_for_each_measure_with_the_worst_block_in_front() -> None:
    page = Page(report.draw(swept()))
    drawn = specs(page)
    assert list(drawn) == ["run-0-consensus-after-norm", "run-0-max-logit"]  # a single checkpoint makes no curve
    points = [row for row in rows_anywhere(drawn["run-0-consensus-after-norm"]) if "middle" in row]
    along = {row["depth"]: (row["y"], row["low"], row["middle"], row["high"]) for row in points}
    assert along[0] == (0.8, 0.7, 0.8, 0.8)
    assert along[4] == (0.8 / 17, 0.8 / 17, 0.7, 0.8)  # the embedding, at 0.9, is none of the blocks
    assert 2 not in along
    assert {
        row["depth"] for row in rows_anywhere(drawn["run-0-max-logit"]) if "middle" in row and row["y"] == 14.0
    } == {4}
    assert "block 1, where it is worst" in page.words
    assert "block 2, where it is worst" in page.words


def test_a_checkpoint_of_which_only_the_embedding_is_finite_has_no_point_on_the_curve() -> None:
    record = swept()
    run = record.runs[0]
    last = run.checkpoints[4]
    lost = replace(last.figures["consensus_after_norm"], worst=0.9, block=None, along=[0.9, None, None, None])
    diverged = replace(last, figures={**last.figures, "consensus_after_norm": lost})
    record = replace(record, runs=[replace(run, checkpoints=[*run.checkpoints[:4], diverged])])
    points = rows_anywhere(specs(Page(report.draw(record)))["run-0-consensus-after-norm"])
    assert {row["depth"] for row in points if "middle" in row} == {0, 1, 3}


def test_the_table_has_every_checkpoint_to_sort_and_says_why_a_figure_is_absent() -> None:
    page = Page(report.draw(swept()))
    cells = [page.cells[f"checkpoint-0-{index}", "consensus distance after normalisation"] for index in range(5)]
    assert [cell["v"] for cell in cells] == ["0.7", "0.4", "", "0.08", "0.0470588"]
    assert cells[3]["small"] == "block 1"
    assert "OSError: gone" in cells[2]["title"]
    findings = [page.cells[f"checkpoint-0-{index}", "findings"] for index in range(5)]
    assert [cell["text"] for cell in findings] == ["none", "none", "failed", "1 warning", "2 critical, 1 warning"]
    weights = [float(cell["v"]) for cell in findings]
    assert sorted(range(5), key=weights.__getitem__) == [0, 1, 3, 4, 2]
    assert "uncollapse compare tiny-step0-0000000000000000.json.gz tiny-step2000-0000000000000004.json.gz" in page.words
    assert "a traceback" in page.words


def test_what_comes_from_outside_stays_text_and_the_page_asks_for_nothing() -> None:
    hostile = "<script>alert(1)</script>']"
    pages = {"hostile": Page(report.draw(swept(hostile)))}
    policy_allows_own_scripts_only(pages, "hostile")
    assert hostile in pages["hostile"].words
    specs(pages["hostile"])


def test_a_sweep_of_failures_only_and_one_without_steps_are_shown_too() -> None:
    record = swept()
    failed = record.runs[0].checkpoints[2]
    only = replace(record, runs=[replace(record.runs[0], checkpoints=[failed], model=None, probe=None)])
    assert "Nothing could be judged." in printed(only)
    assert "Nothing could be judged." in report.draw(only)
    stepless = replace(record.runs[0], checkpoints=[replace(c, step=None) for c in record.runs[0].checkpoints])
    assert "tiny@step1000" in report.draw(replace(record, runs=[stepless]))


@pytest.mark.browser
def test_the_page_is_drawn_and_sorted_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "sweep.html").write_text(report.draw(swept("']<b>")), "utf-8")
    browser.open(tmp_path / "sweep.html")
    assert browser.complaints() == []
    assert browser.value("document.querySelectorAll('.failed').length") == 0
    assert browser.value("document.querySelectorAll('.chart svg').length") == 2
    assert "step\n1,000" in hover(browser, "run-0-consensus-after-norm", 0.75, 0.5)
    order = "[...document.querySelectorAll('#checkpoints-table tbody tr')].map(r => r.id).join()"
    browser.value(
        "[...document.querySelectorAll('#checkpoints-table th button')].find(b => b.innerText.startsWith('findings')).click()"
    )
    assert browser.value(order).split(",")[-1] == "checkpoint-0-2"
