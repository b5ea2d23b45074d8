"""A record, shown: as one self-contained HTML page or as lines in a terminal.

Both read records and nothing else, so a page can be drawn from a JSON file on a machine that never saw the model. Not
the place for measuring or judging: what is dangerous is decided by the findings, what is true by the claims, and both
are only repeated here. The schema that a record names says which of the two kinds it is.

Importing this package loads no drawing library; the first call of `page` loads what it draws with, that of `terminal`
rich.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from rich.console import Console

    from uncollapse.claims import Ledger
    from uncollapse.records import DiagnosisRecord


def page(record: DiagnosisRecord | Ledger) -> str:
    """The record as one HTML file: it opens from disk, fetches nothing, and is readable without JavaScript."""
    if _is_ledger(record):
        from uncollapse.report.ledger_document import ledger_page

        return ledger_page(record)
    from uncollapse.report.document import diagnosis_page

    return diagnosis_page(record)


def terminal(record: DiagnosisRecord | Ledger, console: Console) -> None:
    """Print a diagnosis (one row a block, then its findings) or a ledger (a paragraph a claim, then the verdicts)."""
    if _is_ledger(record):
        from uncollapse.report.ledger_printout import print_ledger

        print_ledger(record, console)
    else:
        from uncollapse.report.printout import print_diagnosis

        print_diagnosis(record, console)


def _is_ledger(record: DiagnosisRecord | Ledger) -> TypeGuard[Ledger]:
    """By the schema it names and not by its class: to draw a diagnosis, the claims need not be loaded."""
    return str(getattr(record, "schema", "")).startswith("uncollapse/ledger/")
