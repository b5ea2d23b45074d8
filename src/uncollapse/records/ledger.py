"""The record of `verify`: every claim with its evidence, its counterexample and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "holds generically", "holds under hypotheses", "refuted as stated", "measured", "undecided"]

Role = Literal["statement", "boundary", "context"]
LEDGER_SCHEMA: Literal["uncollapse/ledger/1"] = "uncollapse/ledger/1"


@dataclass(frozen=True)
class Evidence:
    """One check. `passed` says whether it came out as `what` says; None if that could not be decided.

    `exact` means decided in rational or rigorous interval arithmetic, not in floating point.
    """

    what: str
    observed: int | float | str
    expected: int | float | str | None = None
    passed: bool | None = None
    role: Role = "statement"
    exact: bool = True


@dataclass(frozen=True)
class Counterexample:
    """Matrices to copy, as rows of rationals such as "3/2", and what they show. `minimal` says in which sense it is smallest."""

    refutes: str
    matrices: dict[str, list[list[str]]]
    shows: str
    minimal: str


@dataclass(frozen=True)
class ClaimResult:
    """One claim of the ledger: its id, its statement, its verdict. `title` is what a person reads, `formula` the heart of the
    statement in LaTeX, `theory` the heading of docs/theory.md under which it is proved; empty in older records."""

    id: str
    statement: str
    source: str
    verdict: Verdict
    hypotheses: list[str]
    evidence: list[Evidence]
    counterexample: Counterexample | None
    title: str = ""
    formula: str = ""
    theory: str = ""


@dataclass(frozen=True)
class Ledger:
    """All claims that were checked, and the versions, trials and seed they were checked with."""

    versions: dict[str, str]
    trials: int
    seed: int
    claims: list[ClaimResult]
    schema: Literal["uncollapse/ledger/1"] = LEDGER_SCHEMA
