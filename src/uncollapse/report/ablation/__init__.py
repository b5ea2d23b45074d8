"""An ablation, shown: every run's curve, and the predictions beside what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.ablation import AblationRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: AblationRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.ablation.document import document

    return document(record)


def printout(record: AblationRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.ablation.lines import print_record

    print_record(record, console)
