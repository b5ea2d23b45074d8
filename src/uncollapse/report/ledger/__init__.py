"""A ledger, shown: every claim with its evidence and its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records.ledger import Ledger

if TYPE_CHECKING:
    from rich.console import Console


def page(record: Ledger) -> str:
    """The page, as one HTML file."""
    from uncollapse.report.ledger.document import document

    return document(record)


def printout(record: Ledger, console: Console) -> None:
    """Print it to `console`."""
    from uncollapse.report.ledger.lines import print_record

    print_record(record, console)
