"""A sweep, shown: each measure against the checkpoints, what was found first where, and a table of all checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.sweep import SweepRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: SweepRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.sweep.document import document

    return document(record)


def printout(record: SweepRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.sweep.lines import print_record

    print_record(record, console)
