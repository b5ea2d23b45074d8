"""A record, shown: as one self-contained HTML page or as lines in a terminal.

Each command has a package with two functions, `page(record)` and `printout(record, console)`. All of them read records
and nothing else, so that a page can be drawn from a JSON file on a machine that never saw the model. What several
commands share lies in `page/` (a template lies beside the code that fills it), in `terminal/` and in `wording`.

Not the place for measuring or judging: the findings decide what is dangerous, the claims decide what is true, and both
are only repeated here.

Importing this package loads no drawing library. The first call of `draw` loads what it draws with, that of `show` rich.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from uncollapse.errors import InputError
from uncollapse.records.ablation import ABLATION_SCHEMA, AblationRecord
from uncollapse.records.diagnosis import DIAGNOSIS_SCHEMA, DiagnosisRecord
from uncollapse.records.heads import HEADS_SCHEMA, IdentifiabilityRecord
from uncollapse.records.ledger import LEDGER_SCHEMA, Ledger
from uncollapse.records.symmetries import SYMMETRIES_SCHEMA, SymmetriesRecord
from uncollapse.report import ablation, diagnosis, heads, ledger, symmetries

if TYPE_CHECKING:
    from rich.console import Console

AnyRecord = DiagnosisRecord | AblationRecord | IdentifiabilityRecord | SymmetriesRecord | Ledger


def draw(record: AnyRecord) -> str:
    """The record as one HTML file: it opens from disk, fetches nothing, and is readable without JavaScript.

    Raises `InputError` where it is no record of a schema that this version draws.
    """
    return _shown("draw", record).page()


def show(record: AnyRecord, console: Console) -> None:
    """Print a diagnosis (one row a block, then its findings), an ablation (one row a run, then the predictions), the heads'
    identifiability (the answer, then one row a block), symmetries (a paragraph a phenomenon, then one row a test) or a ledger
    (a paragraph a claim, then the verdicts).

    Raises `InputError` where it is no record of a schema that this version prints.
    """
    _shown("show", record).printout(console)


class _Shown(NamedTuple):
    schema: str
    page: Callable[[], str]
    printout: Callable[[Console], None]


def _shown(function: str, record: AnyRecord) -> _Shown:
    """The two functions of the record's command, with the record filled in."""
    match record:
        case DiagnosisRecord():
            shown = _Shown(DIAGNOSIS_SCHEMA, partial(diagnosis.page, record), partial(diagnosis.printout, record))
        case AblationRecord():
            shown = _Shown(ABLATION_SCHEMA, partial(ablation.page, record), partial(ablation.printout, record))
        case IdentifiabilityRecord():
            shown = _Shown(HEADS_SCHEMA, partial(heads.page, record), partial(heads.printout, record))
        case SymmetriesRecord():
            shown = _Shown(SYMMETRIES_SCHEMA, partial(symmetries.page, record), partial(symmetries.printout, record))
        case Ledger():
            shown = _Shown(LEDGER_SCHEMA, partial(ledger.page, record), partial(ledger.printout, record))
        case _:
            raise InputError(
                f"{function}: expected the record of a command, got {type(record).__name__}. "
                "A result of `diagnose` or `ablate` holds its record in `.record`. Pass that, or read a file with from_json."
            )
    if record.schema != shown.schema:
        raise InputError(
            f"{function}: expected a record of the schema {shown.schema}, got {record.schema}. "
            "It may come from another version. Run the command again, or read the file with from_json."
        )
    return shown
