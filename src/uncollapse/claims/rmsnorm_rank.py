"""RMSNorm keeps the rank, and moves the affine rank by the difference of two brackets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.layernorm_rank_formula import clouds
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import deviation_squares, rank_change
from uncollapse.records.ledger import Counterexample

ZERO_IN_GAMMA = (((1, 0), (0, 1)), (1, 0))


def output_ranks(x: fmpq_mat, gamma: list[Any], eps: Any) -> tuple[int, int]:
    """Rank and affine rank of RMSNorm(x), over the field of its square roots."""
    squares = deviation_squares(x, eps, "rms")
    output, degree = exact.root_scaled(x * exact.diagonal(gamma), [1 / square for square in squares])
    centred = exact.kronecker(exact.centring(x.nrows()), exact.identity(degree)) * output
    return exact.rank(output) // degree, exact.rank(centred) // degree


def check(
    trials: int, seed: int, *, gamma_zeros: bool = False, formula: Callable[[int, int], int] = lambda one, r: one - r
) -> Finding:
    """`gamma_zeros=True` drops the hypothesis; `formula` corrupts the affine part."""
    draws = Draws("rmsnorm-rank", seed)
    kept, affine = [], []
    for x, gamma, _, eps in clouds(draws, trials, zeros=gamma_zeros):  # a token that is zero has no deviation either
        rank, affine_rank = output_ranks(x, gamma, eps)
        told = rank_change(x, gamma=gamma, eps=eps, kind="rms")
        kept.append(rank == exact.rank(x))
        affine.append(affine_rank - exact.affine_rank(x) == formula(*told.brackets[:2]))
    x, gamma = exact.rational(ZERO_IN_GAMMA[0]), list(ZERO_IN_GAMMA[1])
    lost = rank_change(x, gamma=gamma, kind="rms")
    return [
        tally("rank RMSNorm(X) = rank X", kept),
        tally("the affine rank changes by [1_n in col X] - [r in col X], r the root mean squares", affine),
        shown(
            "a zero in gamma costs rank: the identity with gamma = (1, 0)", f"2 -> {lost.after.rank}", lost.rank == -1
        ),
    ], Counterexample(
        "RMSNorm preserves the rank for every gamma",
        {"X": exact.text(x), "gamma": exact.text([gamma])},
        "the second column of the output is 0: rank 2 -> 1.",
        "the smallest shape with rank 2 and one zero in gamma",
    )


CLAIM = Claim(
    "rmsnorm-rank",
    "RMSNorm preserves the rank exactly and changes the affine rank by [1_n in col X] - [r in col X].",
    HERE,
    check,
    title="RMS normalisation keeps the rank, and changes the affine rank by a formula",
    formula=r"\mathrm{affrank}(\mathrm{RMS}\, X) - \mathrm{affrank}\, X = "
    r"[\mathbf{1} \in \mathrm{col}\, X] - [r \in \mathrm{col}\, X]",
    theory="2. Layer normalisation",
    hypotheses=("gamma has no zero", "no token is zero, or eps > 0"),
)
