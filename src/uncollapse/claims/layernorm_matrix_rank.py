"""The zero-bias sentence: layer normalisation loses a rank exactly when 1_d lies in the row space."""

from __future__ import annotations

from flint import fmpq

from uncollapse.claims.draws import Draws
from uncollapse.claims.layernorm_rank_formula import clouds, output_ranks
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import rank_change
from uncollapse.records.ledger import Counterexample

SMALLEST = ((0, 1), (1, 0))


def check(trials: int, seed: int, *, where: str = "anywhere") -> Finding:
    """`where="ones outside the row space"` keeps only clouds on which the sentence is true."""
    draws = Draws("layernorm-matrix-rank", seed)
    outcomes, characterised = [], []
    for x, gamma, beta, eps in clouds(draws, trials, zeros=False):
        rank, _ = output_ranks(x, gamma, [0] * len(beta), eps)
        contains = exact.in_row_space(x, exact.ones(1, x.ncols()))
        characterised.append((rank == exact.rank(x)) == (not contains))
        if where == "anywhere" or not contains:
            outcomes.append(rank == exact.rank(x))
    evidence = [tally(f"rank LN X = rank X with beta = 0 and gamma without zeros ({where})", outcomes)]
    if where != "anywhere":
        return evidence, None
    x = exact.rational(SMALLEST)
    for eps in (fmpq(0), fmpq(1)):
        change = rank_change(x, eps=eps)
        story = f"{change.before.rank} -> {change.after.rank}"
        evidence.append(
            shown(f"rank unchanged on the 2 x 2 swap, eps {eps}", story, change.rank == 0, role="statement")
        )
    evidence.append(
        tally("instead: the rank is kept if and only if 1_d lies outside row X", characterised, role="context")
    )
    return evidence, Counterexample(
        "layer normalisation without bias preserves the matrix rank",
        {"X": exact.text(x), "LN X (eps = 0)": exact.text([[-1, 1], [1, -1]])},
        "row X contains (1, 1), which the mean subtraction maps to 0: rank 2 -> 1.",
        "fewest entries, then smallest sum of entries, among non-negative integer matrices whose rank changes at "
        "eps = 0 and eps = 1 alike",
    )


CLAIM = Claim(
    "layernorm-matrix-rank",
    "With zero bias, layer normalisation preserves the matrix rank.",
    ABSTRACT,
    check,
    title="Layer normalisation without a bias keeps the matrix rank",
    formula=r"\mathrm{rank}(S^{-1} X P \Gamma) = \mathrm{rank}\, X",
    theory="2. Layer normalisation",
)
