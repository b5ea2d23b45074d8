"""How much of the heads stays open for three observers: three exact dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.head_channel_ambiguity import projected
from uncollapse.claims.jacobian import flat, matrices, unseen
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def contributions_open(tokens: int, blocks: list[fmpq_mat]) -> int:
    """Dimension of {(c_1 .. c_H): rows of c_h in row(W_h), sum c_h = 0}: coordinates in a basis of each row space."""
    bases = []
    for block in blocks:
        reduced, count = block.rref()
        bases.append(exact.part(reduced, range(count), range(block.ncols())))
    return tokens * exact.null_dimension(exact.above(*bases).transpose())


def product_open(tokens: int, inner: int, width: int, point: list[Any]) -> int:
    """Kernel of the differential of (O, W_O) -> O W_O."""

    def observed(values: list[Any]) -> list[Any]:
        left, right = matrices(values, (tokens, inner), (inner, width))
        return list((left * right).entries())

    return unseen(observed, point)


def check(
    trials: int,
    seed: int,
    *,
    factor_formula: Callable[[int, int, int, int], int] = lambda n, D, d, r: n * D + D * d - r * (n + d - r),
    kernel_formula: Callable[[int, int, int], int] = lambda n, D, rank: n * (D - rank),
) -> Finding:
    """The two formulas can be corrupted; the third is checked against ranks computed block by block."""
    draws = Draws("head-observers", seed)
    outputs, contributions, factors, square = [], [], [], []
    for _ in range(max(1, trials // 5)):
        n, h, k, d = draws.randint(1, 4), draws.randint(1, 3), draws.randint(1, 2), draws.randint(1, 5)
        wide = h * k
        rank = draws.randint(0, min(wide, d))
        projection = draws.of_rank(wide, d, rank) if rank else exact.zeros(wide, d)
        point = draws.matrix(1, n * wide).entries()
        outputs.append(unseen(projected(n, projection), point) == kernel_formula(n, wide, rank))
        square.append(unseen(projected(n, draws.invertible(wide)), point) == 0)
        blocks = [exact.part(projection, range(i * k, i * k + k), range(d)) for i in range(h)]
        contributions.append(contributions_open(n, blocks) == n * (sum(map(exact.rank, blocks)) - rank))
        generic = flat(draws.of_rank(n, wide, min(n, wide)), draws.of_rank(wide, d, min(wide, d)))
        r = min(n, wide, d)
        factors.append(product_open(n, wide, d, generic) == factor_formula(n, wide, d, r))
    at_zero = product_open(1, 1, 1, [0, 0])
    return [
        tally("Y and W_O known, head outputs wanted: n(D - rank W_O) open, for W_O of every rank", outputs),
        tally("nothing is open for a square invertible W_O", square),
        tally("Y and W_O known, contributions O_h W_h wanted: n(sum rank W_h - rank W_O) open", contributions),
        tally("Y alone known: nD + Dd - r(n + d - r) open, r = min(n, D, d), at factors of full rank", factors),
        shown("at O = 0, W_O = 0 more is open than the last formula says", f"{at_zero} against 1", at_zero == 2),
    ], Counterexample(
        "the dimension of {(O, W_O) : O W_O = Y} is the same everywhere",
        {"O": [["0"]], "W_O": [["0"]]},
        "both directions leave the product 0 to first order; the formula says 1.",
        "all three dimensions are one",
    )


CLAIM = Claim(
    "head-observers",
    "Open directions: n(D - rank W_O) of the head outputs and n(sum rank W_h - rank W_O) of the contributions if Y and "
    "W_O are known; nD + Dd - r(n + d - r) of (O, W_O) if only Y is known.",
    HERE,
    check,
    title="How much is ambiguous depends on what the observer knows",
    formula=r"\dim \ker (O \mapsto O W_O) = n (D - \mathrm{rank}\, W_O)",
    theory="7. Heads: who can tell them apart",
    hypotheses=("for the last: O and W_O have full rank",),
)
