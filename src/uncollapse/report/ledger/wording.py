"""How a ledger of claims is put into words, shared by the page and the terminal so that both say the same.

Verdicts are only repeated here; they were decided where the evidence was gathered.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from uncollapse.records.ledger import ClaimResult, Evidence, Ledger, Verdict
from uncollapse.report import wording

# What each verdict means. What is wrong or open comes first.
MEANINGS: dict[Verdict, str] = {
    "refuted as stated": "false as stated in its source; a counterexample or failing cases show where",
    "undecided": "the checks could not decide it, so nothing is claimed",
    "holds": "proved without further hypotheses, and no checked case contradicts it",
    "holds generically": "true for almost every choice of weights; exceptions exist, and one is shown",
    "holds under hypotheses": "true if the listed hypotheses hold; nothing is claimed otherwise",
    "measured": "a floating-point measurement that agrees with the statement, given with its interval; not a theorem",
}
HOW_TO_READ = (
    "One rule turns the evidence into a verdict. If a check of the statement failed, the claim is refuted. If a check is open, or "
    "a boundary could not be shown, it is undecided. Otherwise it holds, with the hypotheses listed. Random cases cannot prove a "
    "universal statement; they would expose a mistake in a proof. The proofs are in the project's docs/theory.md."
)
_RATIONAL = re.compile(r"(-?\d+)(?:/(\d+))?")


# A measurement that disagrees is refuted, and one that cannot tell is undecided.
BADGES: dict[Verdict, str] = {"measured": "measured: agrees"}


def badge(verdict: Verdict) -> str:
    """A verdict in few words; of a measurement also that it agreed.

    >>> badge("measured"), badge("holds")
    ('measured: agrees', 'holds')
    """
    return BADGES.get(verdict, verdict)


def title(claim: ClaimResult) -> str:
    """What the claim is called: its title, and in older records its id."""
    return claim.title or claim.id


def theory_link(claim: ClaimResult) -> str | None:
    """Where on the page the claim's section of the theory is; None for a heading that is not one of those written out."""
    return f"#theory-{theory_anchor(claim.theory)}" if claim.theory in _written("theory") else None


def theory_anchor(heading: str) -> str:
    """The anchor of a heading: lower case, without punctuation, blanks as hyphens.

    >>> theory_anchor("4. Attention alone collapses, and how fast")
    '4-attention-alone-collapses-and-how-fast'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def mathml(claim: ClaimResult) -> Markup | None:
    """The claim's formula as MathML, where it is one of those that were written out; else None. The record's own text is never
    taken for markup."""
    return Markup(_written("formulas")[claim.formula]) if claim.formula in _written("formulas") else None


def theory(claims: Sequence[ClaimResult]) -> dict[str, Markup]:
    """The sections of docs/theory.md that these claims point to, by heading, as HTML that was written out by `make ledger-page`."""
    wanted = {claim.theory for claim in claims}
    return {heading: Markup(text) for heading, text in _written("theory").items() if heading in wanted}


@functools.cache
def _written(name: str) -> dict[str, str]:
    """One of the files of our own beside the page."""
    text = resources.files("uncollapse.report.ledger").joinpath(f"{name}.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found


def by_verdict(claims: Sequence[ClaimResult]) -> dict[Verdict, list[ClaimResult]]:
    """The claims of each verdict that occurs."""
    found = {verdict: [claim for claim in claims if claim.verdict == verdict] for verdict in MEANINGS}
    return {verdict: group for verdict, group in found.items() if group}


def headline(claims: Sequence[ClaimResult]) -> str:
    """How many claims have which verdict, in one sentence."""
    if len(claims) == 1:
        return f"Verdict: {badge(claims[0].verdict)}."
    counts = ", ".join(f"{verdict} {len(group)}" for verdict, group in by_verdict(claims).items())
    return f"{wording.count(len(claims), 'claim')}: {counts}." if counts else "No claim was checked."


def ledger_sentence(ledger: Ledger) -> str:
    """The trials, seed and versions that the claims were checked with."""
    versions = ", ".join(f"{name} {version}" for name, version in ledger.versions.items())
    return f"Checked with {wording.count(ledger.trials, 'trial')} and seed {ledger.seed}, using {versions}."


def value(shown: float | str | None) -> str:
    """What was observed or expected, as it stands in the record; numbers to six digits.

    >>> value("1 -> 2"), value(63), value(0.25), value(None)
    ('1 -> 2', '63', '0.250000', '–')
    """
    return shown if isinstance(shown, str) else wording.number(shown, 6)


def outcome(piece: Evidence) -> str:
    """Whether the check came out as it says."""
    return {True: "passed", False: "failed", None: "open"}[piece.passed]


def evidence_line(claim: ClaimResult) -> str:
    """The check that decided the verdict, then how all of them came out."""
    if not claim.evidence:
        return "none."
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
    """The first failed check of a refuted statement, the first open one of an undecided statement, otherwise the first."""
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
    """A matrix as exact Python: `1/3` pasted unchanged would become a rounded float.

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
