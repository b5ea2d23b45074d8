"""docs/tutorial.ipynb, executed: `python -m studies.tutorial`.

The printed lines of every cell are kept. The pages are not: each is more than a megabyte, and appears when the notebook is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PLACE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"
SECONDS = 600  # for a cell


def executed(place: Path = PLACE) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run, pages too."""
    notebook = nbformat.read(place, as_version=4)
    NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(place.parent)}},
    ).execute()
    return notebook


def without_pages(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is kept: no pages, no progress, no times, and no name of the machine's kernel."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in kept:
            output.get("data", {}).pop("text/html", None)
        cell.outputs = kept
    notebook.metadata = {"language_info": {"name": "python"}, "kernelspec": notebook.metadata.kernelspec}
    return notebook


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    nbformat.write(without_pages(executed()), PLACE)
    print(f"wrote {PLACE.name}")


if __name__ == "__main__":
    main()
