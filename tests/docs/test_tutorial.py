"""docs/tutorial.ipynb runs, top to bottom, and what it printed when it was written is what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

PLACE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.ipynb"


def texts(notebook: Any) -> list[str]:
    """What every cell printed or returned, on one line, with its figures left out: another machine's last digits are others."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    said = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return [" ".join(re.sub(r"[-\d.,e]*\d", "#", "".join(words)).split()) for words in said]


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows() -> None:
    from studies.tutorial import executed, without_pages

    notebook = executed()
    pages = [o for cell in notebook.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
    assert len(pages) == 3
    assert texts(without_pages(notebook)) == texts(json.loads(PLACE.read_text("utf-8")))


def test_the_tutorial_is_kept_executed_and_without_its_pages() -> None:
    code = [cell for cell in json.loads(PLACE.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or "text/html" in o.get("data", {})]
    told = sum("".join(o.get("text", "")).count("healthy models") for o in outputs)
    assert told == 4  # of a diagnosis, of its corpus' directions and of its pooled vectors, of an ablation
    assert PLACE.stat().st_size < 100_000
