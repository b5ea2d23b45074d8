"""A record, shown: as one self-contained HTML page or as a table in a terminal.

Both read records and nothing else, so a page can be drawn from a JSON file on a machine that never saw the model. Not
the place for measuring or judging: what is dangerous is decided by the findings, and only repeated here.

Importing this package loads no drawing library; the first call of `page` loads altair, the first of `terminal` rich.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from uncollapse.records import DiagnosisRecord


def page(record: DiagnosisRecord) -> str:
    """The diagnosis as one HTML file: it opens from disk, fetches nothing, and is readable without JavaScript."""
    from uncollapse.report.document import diagnosis_page

    return diagnosis_page(record)


def terminal(record: DiagnosisRecord, console: Console) -> None:
    """Print the diagnosis: one row a block, then a line a finding, then where to look next."""
    from uncollapse.report.printout import print_diagnosis

    print_diagnosis(record, console)
