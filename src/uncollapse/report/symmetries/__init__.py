"""Symmetries, shown: four phenomena at a glance, then the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.symmetries import SymmetriesRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: SymmetriesRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.symmetries.document import document

    return document(record)


def printout(record: SymmetriesRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.symmetries.lines import print_record

    print_record(record, console)
