"""Results in Jupyter: a real kernel shows every kind of result, and a real browser draws what it was given."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

import uncollapse as uc
from tests.helpers import heads_samples, records_samples
from tests.helpers.browser import Browser
from uncollapse.analyses.ledger import Verification
from uncollapse.analyses.result import Recorded

KINDS = {
    "Diagnosis": "uc.Diagnosis(samples.encoder())",
    "Ablation": "uc.Ablation(samples.ablation())",
    "Identifiability": "uc.Identifiability(heads_samples.mixed())",
    "Symmetries": "uc.Symmetries(samples.symmetries())",
    "Comparison": "uc.Comparison(samples.compared())",
    "Verification": 'uc.verify(["rmsnorm-rank"], trials=2)',
}
LARGE = "uc.Diagnosis(samples.large())"  # 80 blocks of 64 heads
IMPORTS = "import uncollapse as uc\nfrom tests.helpers import heads_samples, records_samples as samples"
ROOT = Path(__file__).resolve().parents[2]


def executed(*cells: str) -> Any:
    """A notebook of these cells, executed by a kernel."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    notebook = new_notebook(cells=[new_code_cell(cell) for cell in (IMPORTS, *cells)])
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    return notebook


@pytest.mark.browser
def test_a_notebook_shows_every_kind_of_result(browser: Browser, tmp_path: Path) -> None:
    notebook = executed(*KINDS.values())
    shown = [cell.outputs[0].data for cell in notebook.cells[1:]]
    page = tmp_path / "notebook.html"
    frames = "".join(data["text/html"] for data in shown)
    page.write_text(f"<!doctype html><html data-drawn='true'><body>{frames}</body></html>", encoding="utf-8")
    for data, kind in zip(shown, KINDS, strict=True):
        assert data["text/plain"].startswith(f"{kind}(")
        assert len(data["text/plain"]) < 200
    browser.open(page, height=6000)  # so that every frame is in sight: one out of sight is not drawn yet
    drawn = "[...document.querySelectorAll('iframe')].map(f => f.contentDocument)"
    browser.wait_until(f"{drawn}.every(d => d && d.readyState === 'complete' && d.querySelector('h1'))", 60)
    browser.wait_until(f"{drawn}.slice(0, -1).every(d => d.documentElement.dataset.drawn === 'true')", 60)
    assert browser.value(f"{drawn}.map(d => d.querySelectorAll('.failed').length)") == [0] * len(KINDS)
    assert all(
        charts > 0 for charts in browser.value(f"{drawn}.map(d => d.querySelectorAll('.chart svg').length)")[:-1]
    )
    assert [text for text in browser.complaints() if "Content Security" in text] == []


@pytest.mark.browser
def test_a_page_of_80_blocks_does_not_hang_a_notebook(browser: Browser, tmp_path: Path) -> None:
    start = time.process_time()
    shown = uc.Diagnosis(records_samples.large())._repr_html_()
    assert time.process_time() - start < 20  # about 4 on an idle core
    assert len(shown) < 20e6
    page = tmp_path / "large.html"
    page.write_text(f"<!doctype html><html data-drawn='true'><body>{shown}</body></html>", encoding="utf-8")
    browser.open(page)
    inside = "document.querySelector('iframe').contentDocument"
    browser.wait_until(f"{inside} && {inside}.documentElement.dataset.drawn === 'true'", 60)
    assert browser.value(f"{inside}.querySelectorAll('.chart svg').length") >= 6


@pytest.mark.browser
def test_show_in_a_notebook_is_one_text_of_plain_lines() -> None:
    """rich would make an output of its own of every line, with a gap between any two rows of the table."""
    (outputs,) = [cell.outputs for cell in executed(f"{KINDS['Diagnosis']}.show()").cells[1:]]
    assert [output.output_type for output in outputs] == ["stream"]
    lines = outputs[0].text.splitlines()
    assert lines[0] == "all-MiniLM-L6-v2"
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in outputs[0].text


RESULTS: list[Recorded] = [
    uc.Diagnosis(records_samples.large()),
    uc.Ablation(records_samples.ablation()),
    uc.Identifiability(heads_samples.mixed()),
    uc.Symmetries(records_samples.symmetries()),
    uc.Comparison(records_samples.compared()),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_result_says_in_one_line_what_it_is(result: Recorded) -> None:
    """A notebook keeps this line beside the page; that of a large model's record was 12 megabytes long."""
    words = repr(result)
    assert re.fullmatch(rf"{type(result).__name__}\(.+; show\(\) prints it, to_html\(path\) writes its page\)", words)
    assert len(words) < 200
    assert "\n" not in words


def test_a_ledger_is_a_result_too() -> None:
    found = uc.verify(["rmsnorm-rank"], trials=2)
    assert isinstance(found, Verification)
    assert repr(found).startswith("Verification(1 claim; ")
    assert found._repr_html_().startswith("<iframe srcdoc=")
