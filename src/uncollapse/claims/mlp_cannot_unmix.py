"""Whatever comes after the sum over heads is a function of the sum."""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, relu, shifted
from uncollapse.claims.ledger import PAPER, Claim, Finding, tally
from uncollapse.measures import exact


def check(trials: int, seed: int, *, reads: str = "sum") -> Finding:
    """`reads="heads"` lets the MLP see the head outputs before the projection."""
    draws = Draws("mlp-cannot-unmix", seed)
    same_sum, same_output = [], []
    for _ in range(trials):
        n, d, h, k = draws.randint(1, 3), draws.randint(2, 3), draws.randint(2, 3), draws.randint(1, 2)
        width = h * k
        first, second = draws.matrix(max(width, d), 5), draws.matrix(5, d)
        projection = draws.of_rank(width, d, min(width, d) - int(width <= d))  # so that a kernel exists
        outputs = draws.matrix(n, width)
        kernel = exact.null_space(projection.transpose())  # v with v W_O = 0
        other = outputs + draws.matrix(n, kernel.ncols(), 5) * kernel.transpose()
        if other == outputs:
            continue
        bias = draws.matrix(1, 5)

        def downstream(
            o: fmpq_mat,
            projection: fmpq_mat = projection,
            first: fmpq_mat = first,
            second: fmpq_mat = second,
            bias: fmpq_mat = bias,
        ) -> fmpq_mat:
            read = o if reads == "heads" else o * projection
            weights = exact.part(first, range(read.ncols()), range(5))
            return o * projection + relu(shifted(read * weights, bias)) * second

        same_sum.append(outputs * projection == other * projection)
        same_output.append(downstream(outputs) == downstream(other))
    return [
        tally("two different sets of head outputs have the same sum Y", same_sum),
        tally(f"a ReLU MLP after them (reading the {reads}) gives the same result on both", same_output),
    ], None


CLAIM = Claim(
    "mlp-cannot-unmix",
    "No MLP after the output projection can tell head outputs apart that the projection has summed to the same Y.",
    PAPER + ", abstract",
    check,
)
