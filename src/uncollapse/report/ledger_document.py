"""The page of a ledger: every claim with its hypotheses, evidence and counterexample, in one self-contained HTML file."""

from __future__ import annotations

from uncollapse.claims import LEDGER_SCHEMA, Ledger
from uncollapse.errors import InputError
from uncollapse.report import ledger_wording, sheet


def ledger_page(record: Ledger) -> str:
    """The page of one ledger. Raises `InputError` where it is not of the schema this version draws."""
    if not isinstance(record, Ledger) or record.schema != LEDGER_SCHEMA:
        came = getattr(record, "schema", type(record).__name__)
        raise InputError(
            f"page: expected a diagnosis record, or a ledger of the schema {LEDGER_SCHEMA}, got {came}. "
            "It may come from another command or version. Write the record again, or read the file with from_json."
        )
    return sheet.render(
        "ledger.html.j2",
        styles=["page.css", "ledger.css"],
        scripts=[sheet.source("ledger.js")],
        title=record.claims[0].id if len(record.claims) == 1 else "Claims ledger",
        record=record,
        say=ledger_wording,
        groups=ledger_wording.by_verdict(record.claims),
    )
