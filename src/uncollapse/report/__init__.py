"""A record, shown: as one self-contained HTML page or as lines in a terminal.

Both read records and nothing else, so a page can be drawn from a JSON file on a machine that never saw the model. Not
the place for measuring or judging: what is dangerous is decided by the findings, what is true by the claims, and both
are only repeated here.

Importing this package loads no drawing library; the first call of `page` loads what it draws with, that of `terminal`
rich.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uncollapse.records import AblationRecord, DiagnosisRecord, IdentifiabilityRecord, SymmetriesRecord

if TYPE_CHECKING:
    from rich.console import Console

    from uncollapse.claims import Ledger


def page(record: DiagnosisRecord | AblationRecord | IdentifiabilityRecord | SymmetriesRecord | Ledger) -> str:
    """The record as one HTML file: it opens from disk, fetches nothing, and is readable without JavaScript.

    Raises `InputError` where it is no record of a schema that this version draws.
    """
    if isinstance(record, DiagnosisRecord):
        from uncollapse.report.document import diagnosis_page

        return diagnosis_page(record)
    if isinstance(record, AblationRecord):
        from uncollapse.report.ablation_document import ablation_page

        return ablation_page(record)
    if isinstance(record, IdentifiabilityRecord):
        from uncollapse.report.heads_document import heads_page

        return heads_page(record)
    if isinstance(record, SymmetriesRecord):
        from uncollapse.report.symmetries_document import symmetries_page

        return symmetries_page(record)
    from uncollapse.report.ledger_document import ledger_page

    return ledger_page(record)


def terminal(
    record: DiagnosisRecord | AblationRecord | IdentifiabilityRecord | SymmetriesRecord | Ledger, console: Console
) -> None:
    """Print a diagnosis (one row a block, then its findings), an ablation (one row a run, then the predictions), the heads'
    identifiability (the answer, then one row a block), symmetries (a paragraph a phenomenon, then one row a test) or a ledger
    (a paragraph a claim, then the verdicts).
    """
    if isinstance(record, DiagnosisRecord):
        from uncollapse.report.printout import print_diagnosis

        print_diagnosis(record, console)
    elif isinstance(record, AblationRecord):
        from uncollapse.report.ablation_printout import print_ablation

        print_ablation(record, console)
    elif isinstance(record, IdentifiabilityRecord):
        from uncollapse.report.heads_printout import print_heads

        print_heads(record, console)
    elif isinstance(record, SymmetriesRecord):
        from uncollapse.report.symmetries_printout import print_symmetries

        print_symmetries(record, console)
    else:
        from uncollapse.report.ledger_printout import print_ledger

        print_ledger(record, console)
