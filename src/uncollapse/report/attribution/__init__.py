"""Show what `attribute` found: the number that is attributed and what may be said of single heads, then every component."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.attribution import AttributionRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: AttributionRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.attribution.document import document

    return document(record)


def printout(record: AttributionRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.attribution.lines import print_record

    print_record(record, console)
