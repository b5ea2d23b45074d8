"""What a claim is, what evidence a check gives, and the one rule that turns evidence into a verdict.

A check never names its verdict. It returns evidence, each piece with a role and a three-valued outcome (`passed` is
None where nothing could be decided), and `verdict` reads the outcome off:

* a failed piece about the *statement* refutes it;
* a piece about the statement, or about the *boundary* (the hypothesis is needed, the exception exists), that could not
  be confirmed leaves it undecided;
* otherwise the kind of the claim and whether it has hypotheses decide how it holds.

Random cases cannot prove a universal statement; the proofs are in docs/theory.md. The checks would expose a mistake in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from flint import ctx

from uncollapse.records.ledger import ClaimResult, Counterexample, Evidence, Role, Verdict

Kind = Literal["universal", "generic", "measured"]
FEWEST = 12  # random cases: with fewer a check may not meet what it looks for, and its verdict would stay open
_PRECISION = 640  # bits of the ball arithmetic; fifty softmax layers use up about half of them


Finding = tuple[list[Evidence], Counterexample | None]


@dataclass(frozen=True)
class Claim:
    """A statement with its check. `check(trials, seed, **variant)` returns evidence and, if any, the counterexample.

    Variants weaken a hypothesis or corrupt the statement; the tests use them to see every verdict change. `title` is what a person
    reads, `formula` the heart of the statement in LaTeX, `theory` the heading of docs/theory.md under which it is proved.
    """

    id: str
    statement: str
    source: str
    check: Callable[..., Finding]
    hypotheses: Sequence[str] = ()
    kind: Kind = "universal"
    _: KW_ONLY
    title: str
    formula: str = ""
    theory: str

    def run(self, trials: int, seed: int, **variant: Any) -> ClaimResult:
        """Check it with at least `FEWEST` trials and read the verdict off the evidence."""
        with ctx.workprec(_PRECISION):
            evidence, counterexample = self.check(max(trials, FEWEST), seed, **variant)
        decided = verdict(self.kind, evidence, bool(self.hypotheses))
        return ClaimResult(
            self.id,
            self.statement,
            self.source,
            decided,
            list(self.hypotheses),
            evidence,
            counterexample,
            title=self.title,
            formula=self.formula,
            theory=self.theory,
        )


def verdict(kind: Kind, evidence: Sequence[Evidence], hypotheses: bool) -> Verdict:
    """The verdict that the evidence supports; see the module's docstring for the rule."""
    stated = [piece.passed for piece in evidence if piece.role == "statement"]
    boundary = [piece.passed for piece in evidence if piece.role == "boundary"]
    if False in stated:
        return "refuted as stated"
    if not stated or None in stated or not all(boundary):
        return "undecided"
    if kind == "measured":
        return "measured"
    if kind == "generic":
        return "holds generically"
    return "holds under hypotheses" if hypotheses else "holds"


def tally(what: str, outcomes: Sequence[bool | None], *, role: Role = "statement", exact: bool = True) -> Evidence:
    """Evidence from many cases: failed if one failed, else open if one is open or none was run, else passed."""
    failed, undecided = outcomes.count(False), outcomes.count(None)
    observed = f"{failed} exceptions in {len(outcomes)} cases" + (f", {undecided} undecided" if undecided else "")
    passed = False if failed else (None if undecided or not outcomes else True)
    return Evidence(what, observed, "0 exceptions", passed, role, exact)


def found(what: str, outcomes: Sequence[bool | None], *, role: Role = "statement", exact: bool = True) -> Evidence:
    """Evidence of existence: it passed if one case did, and failed if every one was decided against it."""
    hits = outcomes.count(True)
    passed = True if hits else (None if None in outcomes or not outcomes else False)
    return Evidence(what, f"{hits} of {len(outcomes)} cases", "at least 1", passed, role, exact)


def equal(what: str, observed: int | str, expected: int | str, *, role: Role = "statement") -> Evidence:
    """Evidence from one exact figure and what it should be."""
    return Evidence(what, observed, expected, observed == expected, role)


def bracketed(what: str, lower: int, upper: int, claimed: int, *, role: Role = "statement") -> Evidence:
    """Evidence on a dimension that is known to lie between two exact integers."""
    passed = False if not lower <= claimed <= upper else (True if lower == upper else None)
    return Evidence(what, f"{lower}" if lower == upper else f"between {lower} and {upper}", claimed, passed, role)


def shown(what: str, observed: int | float | str, passed: bool | None, *, role: Role = "boundary") -> Evidence:
    """Evidence from one example, most often at the boundary of the claim."""
    return Evidence(what, observed, None, passed, role)


PAPER = "G. Cirrincione, Rank, Head-Channel Non-Identifiability, and Symmetry Breaking, arXiv 2604.23681 (2026)"
ABSTRACT = PAPER + ", abstract (only the abstract and the longer one of the arXiv page were at hand, not the body)"
HERE = "derived and proved in docs/theory.md"
