"""What `identify` found, shown: the answer first, then block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.heads import IdentifiabilityRecord

if TYPE_CHECKING:
    from rich.console import Console


def page(record: IdentifiabilityRecord) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.heads.document import document

    return document(record)


def printout(record: IdentifiabilityRecord, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.heads.lines import print_record

    print_record(record, console)
