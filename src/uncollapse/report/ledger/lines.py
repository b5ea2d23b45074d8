"""The ledger in a terminal: one paragraph per claim with its counterexample, then the claims of each verdict."""

from __future__ import annotations

import functools

from rich.console import Console

from uncollapse.records.ledger import ClaimResult, Ledger
from uncollapse.report.ledger import wording
from uncollapse.report.terminal import plain

STYLES = {
    "refuted as stated": "bold red",
    "undecided": "bold yellow",
    "holds": "green",
    "holds generically": "green",
    "holds under hypotheses": "green",
    "measured": "blue",
}
INDENT = 3


def print_record(record: Ledger, console: Console) -> None:
    """Print every claim, then the claims of each verdict."""
    say = functools.partial(plain.say, console)
    say("Claims ledger", "bold")
    say(wording.ledger_sentence(record))
    for claim in record.claims:
        console.print()
        _print_claim(claim, console)
    console.print()
    if len(record.claims) > 1:
        say(wording.headline(record.claims), "bold")
        for verdict, claims in wording.by_verdict(record.claims).items():
            say(f"{verdict}: {', '.join(claim.id for claim in claims)}.", STYLES[verdict], INDENT)
        console.print()
    say(wording.HOW_TO_READ)
    say("Look next: `--html ledger.html` shows all the evidence, with matrices to copy.")


def _print_claim(claim: ClaimResult, console: Console) -> None:
    say = functools.partial(plain.say, console)
    head = plain.plain(console, claim.id, "bold")
    head.append_text(plain.plain(console, f"  {wording.badge(claim.verdict)}", STYLES[claim.verdict]))
    console.print(head, highlight=False)
    if claim.title:
        say(f"{claim.title}.", "bold", INDENT)
    say(claim.statement, indent=INDENT)
    say(f"Source: {claim.source}.", "dim", INDENT)
    if claim.hypotheses:
        say(f"Hypotheses: {'; '.join(claim.hypotheses)}.", indent=INDENT)
    say(f"Evidence: {wording.evidence_line(claim)}", indent=INDENT)
    if (counterexample := claim.counterexample) is not None:
        say(f"Counterexample to “{counterexample.refutes}”: {counterexample.shows}", indent=INDENT)
        for name, rows in counterexample.matrices.items():
            say(f"{name} = {wording.entries(rows)}", "bold", 2 * INDENT)
        say(f"Smallest in this sense: {counterexample.minimal}.", indent=INDENT)
