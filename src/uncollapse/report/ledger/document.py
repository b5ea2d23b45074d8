"""The page of a ledger: every claim with its hypotheses, evidence and counterexample, in one self-contained HTML file."""

from __future__ import annotations

from uncollapse.records.ledger import Ledger
from uncollapse.report.ledger import wording
from uncollapse.report.page import sheet


def document(record: Ledger) -> str:
    """The page of one ledger."""
    return sheet.render(
        "ledger/page.html.j2",
        styles=["page/page.css", "ledger/page.css"],
        scripts=[sheet.source("ledger/page.js")],
        title=wording.title(record.claims[0]) if len(record.claims) == 1 else "Claims ledger",
        record=record,
        say=wording,
        sections=wording.theory(record.claims),
        groups=wording.by_verdict(record.claims),
    )
