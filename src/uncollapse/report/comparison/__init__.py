"""A comparison, shown: what got worse, what moved block by block, and which heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.comparison import ComparisonRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: ComparisonRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.comparison.document import document

    return document(record)


def printout(record: ComparisonRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.comparison.lines import print_record

    print_record(record, console)
