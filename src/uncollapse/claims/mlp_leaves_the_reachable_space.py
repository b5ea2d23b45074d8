"""What is true about `mlp_leaves_the_span`: attention stays in the reachable space of its weights, a nonlinear MLP can leave it."""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, relu, with_residual
from uncollapse.claims.ledger import HERE, Claim, Finding, found, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

SMALLEST = ((1, -1),)
STAYS = ((1, 0), (-1, 0))  # ReLU keeps span e_1, although its hidden units see both signs


def reachable(x: fmpq_mat, layers: list[list[fmpq_mat]]) -> fmpq_mat:
    """Rows spanning sum over paths of row(X) W_path: every layer adds the images under each of its heads."""
    space = x
    for weights in layers:
        space = exact.above(space, *(space * weight for weight in weights))
    return space


def check(trials: int, seed: int, *, activation: str = "relu", norms: bool = False) -> Finding:
    """`activation="linear"` takes the nonlinearity away; `norms=True` lets a mean subtraction in."""
    draws = Draws("mlp-leaves-the-reachable-space", seed)
    proper, stays, linear_stays, leaves = [], [], [], []
    for _ in range(trials):
        # All weights preserve one k-dimensional row space U: block-triangular in the basis T.
        d = draws.randint(3, 5)
        k = draws.randint(1, d - 2)
        n, basis = draws.randint(1, 4), draws.invertible(d)
        inverse = basis.inv()

        def preserving(d: int = d, k: int = k, basis: fmpq_mat = basis, inverse: fmpq_mat = inverse) -> fmpq_mat:
            block = draws.matrix(d, d, 2).tolist()
            rows = [[0 if i < k <= j else entry for j, entry in enumerate(row)] for i, row in enumerate(block)]
            return inverse * exact.from_rows(rows, d) * basis

        start = x = draws.matrix(n, k) * exact.part(basis, range(k), range(d))
        layers = [[preserving() for _ in range(2)] for _ in range(2)]
        space = reachable(start, layers)
        proper.append(exact.rank(space) < d)
        for weights in layers:
            x = with_residual(x, [draws.pattern(n) for _ in weights], weights)
            if norms:
                x = x * exact.centring(d)
        stays.append(exact.in_row_space(space, x))
        first, second = preserving(), preserving()
        both = exact.above(space, space * first, space * first * second)
        hidden = x * first
        linear_stays.append(norms or exact.in_row_space(both, hidden * second))
        output = (relu(hidden) if activation == "relu" else hidden) * second
        leaves.append(not exact.in_row_space(exact.above(both, x), output))
    x = exact.rational(SMALLEST)
    # An example of it, so that it never hangs on the draws: all weights the identity.
    leaves.append(not exact.in_row_space(x, relu(x) if activation == "relu" else x))
    centred = exact.rational([[0, 1]]) * exact.centring(2)
    image, positive, inside = relu(x), exact.ones(1, 2), exact.rational(STAYS)
    return [
        tally("the reachable space of the drawn weights is not the whole width", proper),
        tally("two attention layers with residuals stay in the reachable space, for the patterns drawn", stays),
        tally("a linear MLP whose weights preserve the same space stays in it", linear_stays),
        found(f"some token-wise {activation} MLP with such weights leaves it", leaves),
        shown(
            "it need not, although its hidden unit sees both signs: X = (1, 0), (-1, 0)",
            str(exact.text(relu(inside))),
            exact.in_row_space(inside, relu(inside)),
        ),
        shown(
            "tokens on which ReLU is the identity stay: x = (1, 1)",
            str(exact.text(relu(positive))),
            exact.in_row_space(positive, relu(positive)),
        ),
        shown(
            "a mean subtraction alone leaves the span: x = (0, 1)",
            str(exact.text(centred)),
            not exact.in_row_space([[0, 1]], centred),
        ),
        shown(
            "all weights the identity: ReLU leaves the span of (1, -1)",
            str(exact.text(image)[0]),
            not exact.in_row_space(x, image),
        ),
    ], Counterexample(
        "every ReLU MLP that sees both signs, with weights that preserve the reachable space, leaves it",
        {
            "X": exact.text(inside),
            "W_h = W_1 = W_2": exact.text(exact.identity(2)),
            "ReLU(X W_1) W_2": exact.text(relu(inside)),
        },
        "zeroing coordinates maps span e_1 into itself, so the ReLU of these tokens stays in it.",
        "two tokens of width two, one non-zero entry each: one token with both signs in one hidden unit does not exist",
    )


CLAIM = Claim(
    "mlp-leaves-the-reachable-space",
    "For all patterns at once, attention with residuals keeps every token in the sum over paths of row(X) W_path; a "
    "token-wise nonlinear MLP whose weights preserve that space can leave it (it need not), a linear one cannot.",
    HERE,
    check,
    title="A nonlinear MLP can leave the space that attention reaches",
    formula=r"R = \sum_{\mathrm{paths}} \mathrm{row}(X)\, W_{\mathrm{path}}",
    theory="6. What the MLP adds",
    hypotheses=(
        "no norms and no biases in the attention stack",
        "the reachable space is not the whole width",
        "for leaving it: zeroing the negative hidden units of some token leads out of that space",
    ),
)
