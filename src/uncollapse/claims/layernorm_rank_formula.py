"""The exact rank formula of layer normalisation, against the layer itself over the field its deviations generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.layernorm_affine_rank import LARGE
from uncollapse.claims.ledger import HERE, Claim, Finding, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import deviation_squares, rank_change


def output_ranks(x: fmpq_mat, gamma: list[Any], beta: list[Any], eps: Any) -> tuple[int, int]:
    """Rank and affine rank of LN(x), without the formula: the output written over the field of its square roots."""
    product = x * exact.centring(x.ncols()) * exact.diagonal(gamma)
    output, degree = exact.root_scaled(product, [1 / square for square in deviation_squares(x, eps)])
    one = exact.identity(degree)
    output = output + exact.kronecker(exact.ones(x.nrows()) * exact.rational([beta]), one)
    centred = exact.kronecker(exact.centring(x.nrows()), one) * output
    return exact.rank(output) // degree, exact.rank(centred) // degree


def clouds(draws: Draws, trials: int, *, zeros: bool = True) -> Any:
    """Small clouds of every regime with gamma, beta and eps; tokens the layer is undefined on are left out."""
    for trial in range(trials):
        n, d = draws.randint(1, 3 if trial % 4 else 4), draws.randint(1, 4)
        x = draws.matrix(n, d, draws.choice([1, 2, 4]))
        if trial % 3 == 1:
            x = draws.matrix(n, 1, 2) * draws.matrix(1, d, 2) + exact.ones(n) * draws.matrix(1, d, 2)
        if trial % 3 == 2:
            x = exact.ones(n) * draws.matrix(1, d, 2) + draws.matrix(n, 1, 2) * exact.ones(1, d)
        eps = draws.choice([fmpq(0), fmpq(0), fmpq(1, 4), fmpq(3)])
        if 0 in deviation_squares(x, eps):
            eps = LARGE
        gamma = [draws.choice([0, 1, 2] if zeros and trial % 2 else [-2, 1, 3]) for _ in range(d)]
        yield x, gamma, [draws.randint(-1, 1) for _ in range(d)], eps


def check(
    trials: int, seed: int, *, formula: Callable[[int, int, int], int] = lambda one, s, kernel: one - s - kernel
) -> Finding:
    """`formula` takes the three brackets; the corrupted ones of the tests drop or flip a term."""
    draws = Draws("layernorm-rank-formula", seed)
    change, bias, rank, bounds, kernel_size = [], [], [], [], []
    for x, gamma, beta, eps in clouds(draws, trials):
        rank_after, affine_after = output_ranks(x, gamma, beta, eps)
        plain_rank, plain_affine = output_ranks(x, gamma, [0] * len(beta), eps)
        told = rank_change(x, gamma=gamma, beta=beta, eps=eps)
        change.append(affine_after - exact.affine_rank(x) == formula(*told.brackets))
        rank.append(rank_after == told.after.rank in (affine_after, affine_after + 1))
        bias.append((affine_after, rank_after - plain_rank in (-1, 0, 1)) == (plain_affine, True))
        zeros = gamma.count(0)
        kernel = exact.null_dimension(exact.diagonal(gamma) * exact.centring(len(gamma)))
        kernel_size.append(kernel == max(1, zeros))
        bounds.append(-1 - max(1, zeros) <= affine_after - exact.affine_rank(x) <= 1)
    return [
        tally("affine rank of LN X minus that of X is [1 in col X] - [s in col XPG] - dim(row X meet ker GP)", change),
        tally("the rank of LN X is what the formula with the bias says, the affine rank or one more", rank),
        tally("a bias leaves the affine rank alone and moves the rank by at most one", bias),
        tally("dim ker GP = max(1, number of zeros of gamma)", kernel_size),
        tally("the change lies between -1 - max(1, zeros of gamma) and +1", bounds),
    ], None


CLAIM = Claim(
    "layernorm-rank-formula",
    "affrank(LN X) - affrank(X) = [1_n in col X] - [s in col X P G] - dim(row X meet ker G P), for every gamma, beta "
    "and eps for which the layer is defined; s holds the tokens' standard deviations.",
    HERE,
    check,
    title="The exact change of the affine rank under layer normalisation",
    formula=r"\mathrm{affrank}(\mathrm{LN}\, X) - \mathrm{affrank}\, X = [\mathbf{1} \in \mathrm{col}\, X] "
    r"- [s \in \mathrm{col}\, X P \Gamma] - \dim(\mathrm{row}\, X \cap \ker \Gamma P)",
    theory="2. Layer normalisation",
)
