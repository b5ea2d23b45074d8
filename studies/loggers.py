"""Run the loggers of docs/monitoring.md, and look whether the figures have arrived.

    make loggers

Needs tensorboard, wandb and trackio, which are no part of the environment. Nothing leaves the machine.
"""

from __future__ import annotations

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "monitoring.md"
FIGURE = "uncollapse/worst/max_logit"


def blocks(marked: str) -> list[str]:
    """The examples of the page whose fence has this mark."""
    return re.findall(rf"^```{marked}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def has_figure(files: Iterable[Path]) -> bool:
    """Whether one of these files names the figure."""
    return any(FIGURE.encode() in file.read_bytes() for file in files if file.is_file())


def main() -> None:
    with tempfile.TemporaryDirectory() as kept:
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": f"{kept}/trackio"}
        page: dict[str, Any] = {}
        exec(compile(blocks("python")[0], str(PAGE), "exec"), page)
        for block in blocks("python no-run"):
            exec(compile(block, str(PAGE), "exec"), page)
        folder: Path = page["folder"]
        arrived = {
            "tensorboard": has_figure((folder / "tensorboard").rglob("*tfevents*")),
            "wandb": has_figure((folder / "wandb").rglob("*.wandb")),
            "trackio": any(FIGURE in str(row) for row in rows_of_trackio(Path(kept, "trackio"))),
        }
    print(arrived)
    if not all(arrived.values()):
        raise SystemExit("studies.loggers: expected the figures in every logger.")


def rows_of_trackio(folder: Path) -> list[Any]:
    """Every row of its database."""
    found: list[Any] = []
    for file in folder.rglob("*.db"):
        with sqlite3.connect(file) as database:
            tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
            for table in tables:
                found += database.execute(f'select * from "{table}"').fetchall()
    return found


if __name__ == "__main__":
    main()
