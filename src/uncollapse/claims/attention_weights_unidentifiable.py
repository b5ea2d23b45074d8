"""How many directions of an attention row its output does not show.

Counted at the logits: a row is softmax(s), and a step ds moves its output by ds (diag a - a^T a) V. One of the steps that move
nothing is the shift of all logits, which moves no weight either; the others are open directions of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

from flint import fmpq

from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

VALUES = ((0,), (1,), (2,))  # three keys, values of width one
ROWS = ((fmpq(1, 3), fmpq(1, 3), fmpq(1, 3)), (fmpq(1, 2), 0, fmpq(1, 2)))


def check(
    trials: int, seed: int, *, formula: Callable[[int, int, int], int] = lambda n, rank, with_ones: n - with_ones
) -> Finding:
    """`formula` takes n, rank V and rank [V, 1]."""
    draws = Draws("attention-weights-unidentifiable", seed)
    dimensions, others = [], []
    for _ in range(trials):
        n, k = draws.randint(2, 6), draws.randint(1, 3)
        values = draws.matrix(n, k)
        seen = exact.beside(values, exact.ones(n))  # what a row shows: its output, and that it sums to one
        row = exact.rational([[draws.randint(1, 5) for _ in range(n)]])
        row = row / sum(row.entries())
        slope = (exact.diagonal(row.entries()) - row.transpose() * row) * values
        moving_nothing = exact.null_dimension(slope.transpose()) - 1  # without the shift
        dimensions.append(moving_nothing == formula(n, exact.rank(values), exact.rank(seen)))
        for along in exact.null_space(seen.transpose()).transpose().tolist():
            # Its entries sum to 0, so some are negative: as far as the first weight is 0, and all rows on the way are positive.
            step = min(weight / -slower for weight, slower in zip(row.entries(), along, strict=True) if slower < 0)
            edge = row + exact.rational([along]) * step
            others.append((min(edge.entries()), edge * seen) == (fmpq(0), row * seen))
    values, rows = exact.rational(VALUES), exact.rational(ROWS)
    same = rows * values
    return [
        tally("steps of the logits that move weights and no output: exactly n - rank [V W_h, 1]", dimensions),
        tally("along each open one, other positive rows that sum to one give the same output", others),
        shown(
            "weights (1/3, 1/3, 1/3) and (1/2, 0, 1/2) on values 0, 1, 2",
            str(exact.text(same)),
            same == exact.ones(2),
        ),
    ], Counterexample(
        "the output of attention shows its weights",
        {"V": exact.text(values), "A": exact.text(rows), "A V": exact.text(same)},
        "both rows sum to one and give the same output.",
        "three keys: with two keys of different values the row is determined",
    )


CLAIM = Claim(
    "attention-weights-unidentifiable",
    "The output of a head leaves n - rank [V W_h, 1] directions of each row of its attention open: with more keys than d_k + 1, "
    "attention weights cannot be told from what they do.",
    "G. Brunner et al., On Identifiability in Transformers, arXiv 1908.04211 (2019), with the row sum as a second observation",
    check,
    title="Attention weights cannot be read off the output",
    formula=r"\dim \{ z : z V = 0,\; z \mathbf{1} = 0 \} = n - \mathrm{rank}\, [V, \mathbf{1}]",
    theory="10. Entropy",
)
