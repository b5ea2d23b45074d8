"""A diagnosis, shown: every site, every head, and the findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.diagnosis import DiagnosisRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: DiagnosisRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.diagnosis.document import document

    return document(record)


def printout(record: DiagnosisRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.diagnosis.lines import print_record

    print_record(record, console)
