"""docs/tutorial.ipynb runs, top to bottom, and what it printed when it was written is what it prints."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest
from studies.tutorial import PLACE, executed, without_pages


def texts(notebook: Any) -> list[str]:
    """What every cell printed or returned, with its figures left out: another machine's last digits are others."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            words = output.get("text") or output.get("data", {}).get("text/plain", "")
            found.append(re.sub(r"[-\d.,e]*\d", "#", words))
    return found


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows() -> None:
    notebook = executed()
    pages = [o for cell in notebook.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
    assert len(pages) == 3
    stored = nbformat.read(PLACE, as_version=4)
    # The words of a printout wrap at other places where a figure is longer.
    assert [" ".join(text.split()) for text in texts(without_pages(notebook))] == [
        " ".join(text.split()) for text in texts(stored)
    ]


def test_the_tutorial_is_kept_executed_and_without_its_pages() -> None:
    stored = nbformat.read(PLACE, as_version=4)
    nbformat.validate(stored)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    assert all(cell.execution_count for cell in code)
    assert not [
        o for cell in code for o in cell.outputs if o.output_type == "error" or "text/html" in o.get("data", {})
    ]
    assert PLACE.stat().st_size < 100_000
