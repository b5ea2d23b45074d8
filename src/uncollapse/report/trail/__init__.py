"""A monitored run, shown: its curves over the steps, maps of blocks and heads over the steps, and its alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.trail import TrailRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: TrailRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.trail.document import document

    return document(record)


def printout(record: TrailRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.trail.lines import print_record

    print_record(record, console)
