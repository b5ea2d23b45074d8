"""Can what comes after the sum over heads find the heads again? It depends on what it knows of the output projection.

Whatever follows is a function of Y = O W_O. If W_O has full row rank and the MLP may be chosen for this W_O, one hidden layer
computes O = Y W_O^+ exactly: ReLU([Z, -Z]) [I; -I] = Z. If W_O has a kernel, or the same MLP has to serve two factorisations
of one Y, it returns the same for different head outputs.
"""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, relu, shifted
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

PROJECTION = ((0, 1), (1, 0))  # two heads of width one
OUTPUTS = ((1, -2),)
OBSERVERS = ("knows an invertible W_O", "W_O has a kernel", "does not know W_O")


def unmixed(y: fmpq_mat, projection: fmpq_mat) -> fmpq_mat:
    """ReLU(Y [W^-1, -W^-1]) [I; -I]: an MLP of hidden width 2D that returns O from Y = O W."""
    inverse, width = projection.inv(), projection.nrows()
    first = exact.from_rows([[*row, *(-e for e in row)] for row in inverse.tolist()], 2 * width)
    second = exact.above(exact.identity(width), -exact.identity(width))
    return relu(y * first) * second


def check(trials: int, seed: int, *, observer: str = OBSERVERS[0]) -> Finding:
    """`observer` says whose evidence decides about the statement; that of the other two is context."""
    draws = Draws("mlp-cannot-unmix", seed)
    outcomes: dict[str, list[bool | None]] = {name: [] for name in OBSERVERS}
    for _ in range(trials):
        n, h, k = draws.randint(1, 3), draws.randint(2, 3), draws.randint(1, 2)
        width = h * k
        outputs = draws.matrix(n, width)
        square = draws.invertible(width)
        outcomes[OBSERVERS[0]].append(unmixed(outputs * square, square) != outputs)

        d = draws.randint(2, 3)
        narrow = draws.of_rank(width, d, min(width - 1, d))
        kernel = exact.null_space(narrow.transpose())  # v with v W_O = 0
        shift = draws.matrix(n, kernel.ncols(), 5)
        while not any(shift.entries()):
            shift = draws.matrix(n, kernel.ncols(), 5)
        other = outputs + shift * kernel.transpose()
        mlp = draws.matrix(d, 5), draws.matrix(1, 5), draws.matrix(5, width)
        outcomes[OBSERVERS[1]].append(_seen(outputs * narrow, mlp) == _seen(other * narrow, mlp))

        change = draws.invertible(width)
        while outputs * change == outputs:
            change, outputs = draws.invertible(width), draws.matrix(n, width)
        changed, projection = outputs * change, change.inv() * square
        mlp = draws.matrix(width, 5), draws.matrix(1, 5), draws.matrix(5, width)
        outcomes[OBSERVERS[2]].append(_seen(outputs * square, mlp) == _seen(changed * projection, mlp))
    words = {
        OBSERVERS[
            0
        ]: "the MLP [W_O^-1, -W_O^-1] then [I; -I] fails to return the head outputs of an invertible, known W_O",
        OBSERVERS[1]: "W_O with a kernel: different head outputs with one Y, on which any MLP returns the same",
        OBSERVERS[2]: "W_O unknown: (O, W_O) and (O T, T^-1 W_O) have one Y, on which any MLP returns the same",
    }
    o, w = exact.rational(OUTPUTS), exact.rational(PROJECTION)
    back = unmixed(o * w, w)
    evidence = [
        tally(words[name], outcomes[name], role="statement" if name == observer else "context") for name in OBSERVERS
    ]
    evidence.append(shown("two heads of width one, W_O a swap: the MLP returns", str(exact.text(back)), back == o))
    return evidence, Counterexample(
        "no MLP after the output projection can tell the heads apart, whatever it knows",
        {
            "O": exact.text(o),
            "W_O": exact.text(w),
            "Y = O W_O": exact.text(o * w),
            "W_1": exact.text(exact.from_rows([[*row, *(-e for e in row)] for row in w.inv().tolist()], 4)),
            "W_2": exact.text(exact.above(exact.identity(2), -exact.identity(2))),
            "ReLU(Y W_1) W_2": exact.text(back),
        },
        "the hidden layer holds the positive and the negative part of every head output; their difference is the output.",
        "two heads of width one, one token; a hidden layer of twice the width",
    )


def _seen(y: fmpq_mat, mlp: tuple[fmpq_mat, fmpq_mat, fmpq_mat]) -> tuple[fmpq_mat, fmpq_mat]:
    """The sum over heads, and what the MLP makes of it."""
    first, bias, second = mlp
    return y, relu(shifted(y * first, bias)) * second


CLAIM = Claim(
    "mlp-cannot-unmix",
    "No MLP after the output projection can recover the head outputs from their sum Y.",
    ABSTRACT,
    check,
    title="The MLP cannot recover the heads",
    formula=r"\mathrm{ReLU}(Y [W_O^{-1}, -W_O^{-1}]) [I; -I] = O",
    theory="6. What the MLP adds",
)
