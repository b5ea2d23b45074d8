"""How a ledger of claims is put into words: shared by its page and its terminal form, so that both say the same.

Verdicts are repeated, never drawn here: they were read off the evidence where it was gathered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from uncollapse.records.ledger import ClaimResult, Evidence, Ledger, Verdict
from uncollapse.report import wording

# What each verdict says, in the order in which a reader wants them: what is wrong or open first.
MEANINGS: dict[Verdict, str] = {
    "refuted as stated": "false as its source words it; a counterexample or failing cases say where",
    "undecided": "the checks could not settle it, and nothing is claimed",
    "holds": "proved without further hypotheses, and no case contradicts it",
    "holds generically": "true for almost every choice of weights; exceptions exist, and one is shown",
    "holds under hypotheses": "true where the listed hypotheses hold, and not promised elsewhere",
    "measured": "a measurement in floating point, given with its interval; no theorem",
}
HOW_TO_READ = (
    "A verdict is read off the evidence by one rule: a failed check of the statement refutes it; one that stays open, or "
    "a boundary that could not be shown, leaves it undecided; otherwise it holds, with the hypotheses listed. Random "
    "cases only guard against a wrong proof; the proofs themselves are in docs/theory.md."
)
_RATIONAL = re.compile(r"(-?\d+)(?:/(\d+))?")


def by_verdict(claims: Sequence[ClaimResult]) -> dict[Verdict, list[ClaimResult]]:
    """The claims of each verdict that occurs."""
    found = {verdict: [claim for claim in claims if claim.verdict == verdict] for verdict in MEANINGS}
    return {verdict: group for verdict, group in found.items() if group}


def headline(claims: Sequence[ClaimResult]) -> str:
    """How many claims have which verdict, in one sentence."""
    if len(claims) == 1:
        return f"Verdict: {claims[0].verdict}."
    counts = ", ".join(f"{verdict} {len(group)}" for verdict, group in by_verdict(claims).items())
    return f"{wording.count(len(claims), 'claim')}: {counts}." if counts else "No claim was checked."


def ledger_sentence(ledger: Ledger) -> str:
    """With what the claims were checked."""
    versions = ", ".join(f"{name} {version}" for name, version in ledger.versions.items())
    return f"Checked with {wording.count(ledger.trials, 'trial')} and seed {ledger.seed}, by {versions}."


def value(shown: float | str | None) -> str:
    """What was observed or expected, as it stands in the record; numbers to six digits.

    >>> value("1 -> 2"), value(63), value(0.25), value(None)
    ('1 -> 2', '63', '0.250000', '–')
    """
    return shown if isinstance(shown, str) else wording.number(shown, 6)


def outcome(piece: Evidence) -> str:
    """Whether the piece came out as it says."""
    return {True: "passed", False: "failed", None: "open"}[piece.passed]


def evidence_line(claim: ClaimResult) -> str:
    """The piece that decided the verdict, then how all of them came out."""
    if not claim.evidence:
        return "none was gathered."
    piece = _decisive(claim)
    line = f"{piece.what}: {value(piece.observed)}{_against(piece)}"
    outcomes = [outcome(each) for each in claim.evidence]
    counts = [f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "open") if name in outcomes]
    floating = sum(not each.exact for each in claim.evidence)
    how = "all exact" if not floating else f"{floating} in floating point"
    return f"{line}. {wording.count(len(outcomes), 'check')}: {', '.join(counts)}; {how}."


def _against(piece: Evidence) -> str:
    return "" if piece.passed or piece.expected is None else f" (expected: {value(piece.expected)})"


def _decisive(claim: ClaimResult) -> Evidence:
    """The first failed check of a refuted statement, the first open one of an undecided, else the first of the statement."""
    stated = [piece for piece in claim.evidence if piece.role == "statement"]
    if claim.verdict == "refuted as stated":
        wanted = [piece for piece in stated if piece.passed is False]
    elif claim.verdict == "undecided":
        boundary = [piece for piece in claim.evidence if piece.role == "boundary" and not piece.passed]
        wanted = [piece for piece in stated if piece.passed is None] + boundary
    else:
        wanted = stated
    return (wanted or stated or claim.evidence)[0]


def entries(rows: Sequence[Sequence[str]]) -> str:
    """A matrix on one line, its entries as they stand in the record.

    >>> entries([["0", "1/2"], ["-3", "1"]])
    '[[0, 1/2], [-3, 1]]'
    """
    return "[" + ", ".join(f"[{', '.join(row)}]" for row in rows) + "]"


def python(rows: Sequence[Sequence[str]]) -> str:
    """A matrix as Python that keeps it exact: `1/3` pasted as it stands would become a rounded float.

    >>> python([["0", "1/2"], ["-3", "1"]])
    '[[0, Fraction(1, 2)], [-3, 1]]'
    """

    def entry(text: str) -> str:
        found = _RATIONAL.fullmatch(text)
        if found is None:
            return repr(text)
        top, bottom = found.groups()
        return top if bottom is None else f"Fraction({top}, {bottom})"

    return entries([[entry(text) for text in row] for row in rows])
