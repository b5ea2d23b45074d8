"""The pictures of what people see: the page in a browser, and the printouts of a terminal. `python -m studies.screens`.

Every picture comes from a run on the packaged model, now, shown as the command line shows it. The pictures of results come from
their own studies; `make pictures` makes all of them.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tests.helpers.browser import Browser

import uncollapse as uc
from uncollapse import report

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PAGE = "page.png"
# The printouts: a command, and the rows of it that fit a picture.
TERMINALS = {
    "terminal-diagnose.svg": ("uncollapse diagnose demo", 42),
    "terminal-ablate.svg": ("uncollapse ablate demo --without residual", 36),
}
WIDTH, COLUMNS = 1280, 100


def page(folder: Path) -> None:
    """The page of `uncollapse diagnose demo` down to the map of the heads, as a browser on a desk shows it."""
    chromium = shutil.which("chromium")
    assert chromium is not None, "the page is looked at in Debian's chromium: apt-get install chromium"
    with tempfile.TemporaryDirectory() as place:
        written = Path(place) / "page.html"
        uc.diagnose("demo").to_html(written)
        with Browser(chromium) as browser:
            browser.open(written, width=WIDTH)
            end = browser.value("scrollY + document.querySelector('#attention figure').getBoundingClientRect().bottom")
            browser.picture(folder / PAGE, height=round(end) + 24)


def terminal(command: str, rows: int) -> str:
    """What the command prints on a terminal of 100 columns, as a picture in SVG that fetches nothing."""
    console = Console(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ {command}", "bold"))
    report.show(_run(command).record, console)
    lines = console.export_text(styles=True, clear=True).splitlines()
    shown = Console(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=True, color_system="truecolor")
    for line in lines[:rows]:
        shown.print(Text.from_ansi(line), highlight=False, no_wrap=True)
    svg = shown.export_svg(title=command, unique_id="uncollapse")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    assert "url(http" not in svg, "a picture that fetches something"
    return svg


def _run(command: str) -> uc.Diagnosis | uc.Ablation:
    _, verb, model, *options = command.split()
    if verb == "diagnose":
        return uc.diagnose(model)
    return uc.ablate(model, without=[tuple(options[1].split(","))])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    page(IMAGES)
    for name, (command, rows) in TERMINALS.items():
        (IMAGES / name).write_text(terminal(command, rows), encoding="utf-8")
    print(f"wrote {', '.join([PAGE, *TERMINALS])}")


if __name__ == "__main__":
    main()
