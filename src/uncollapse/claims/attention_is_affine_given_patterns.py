"""With patterns and norm scales frozen, an attention stack is an affine map of the tokens: a sum over paths."""

from __future__ import annotations

import itertools

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, shifted, softmax
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

Layer = tuple[list[fmpq_mat], list[fmpq_mat], fmpq_mat, fmpq_mat]  # patterns, weights, bias row, norm's 1/s

NONLINEAR = ((1,), (-1,))


def column(x: fmpq_mat) -> fmpq_mat:
    """Row-major vec."""
    return fmpq_mat(x.nrows() * x.ncols(), 1, x.entries())


def forward(x: fmpq_mat, layers: list[Layer], patterns: str) -> fmpq_mat:
    """Pre-norm: X + sum_h A_h N W_h + 1b, N = S^-1 X P with the scale frozen. `patterns="live"` computes A_h from N."""
    for given, weights, bias, scale in layers:
        normed = scale * x * exact.centring(x.ncols())
        update = exact.zeros(x.nrows(), x.ncols())
        for pattern, weight in zip(given, weights, strict=True):
            update = update + (_live(normed) if patterns == "live" else pattern) * normed * weight
        x = x + shifted(update, bias)
    return x


def _live(x: fmpq_mat) -> fmpq_mat:
    """A rational pattern that follows the tokens: weights 1 + <x_i, x_j>^2, normalised by row."""
    rows = [[1 + logit * logit for logit in row] for row in (x * x.transpose()).tolist()]
    return exact.from_rows([[weight / sum(row) for weight in row] for row in rows], x.nrows())


def sum_over_paths(layers: list[Layer], tokens: int, width: int) -> fmpq_mat:
    """sum over paths of A_path kron W_path^T; in each layer a path takes the residual or one head."""
    total = exact.zeros(tokens * width, tokens * width)
    for path in itertools.product(*(range(len(weights) + 1) for _, weights, _, _ in layers)):
        left, right = exact.identity(tokens), exact.identity(width)
        for step, (patterns, weights, _, scale) in zip(path, layers, strict=True):
            if step:
                left = patterns[step - 1] * scale * left
                right = right * exact.centring(width) * weights[step - 1]
        total = total + exact.kronecker(left, right.transpose())
    return total


def check(trials: int, seed: int, *, patterns: str = "frozen") -> Finding:
    """`patterns="live"` lets the patterns follow the tokens."""
    draws = Draws("attention-is-affine-given-patterns", seed)
    paths, midpoints = [], []
    for trial in range(trials):
        n, d = draws.randint(1, 3), draws.randint(2, 3)
        layers: list[Layer] = []
        for _ in range(2):
            h = draws.randint(1, 2)
            scale = exact.diagonal([draws.randint(1, 5) for _ in range(n)]).inv()
            masks = [draws.pattern(n, causal=trial % 2 == 0) for _ in range(h)]
            layers.append((masks, [draws.matrix(d, d) for _ in range(h)], draws.matrix(1, d), scale))
        x, z, origin = draws.matrix(n, d), draws.matrix(n, d), exact.zeros(n, d)
        fx, fz, f0, middle = (forward(point, layers, patterns) for point in (x, z, origin, (x + z) / 2))
        midpoints.append(middle * 2 == fx + fz)
        paths.append(column(fx - f0) == sum_over_paths(layers, n, d) * column(x))
    x = exact.rational(NONLINEAR)
    once, twice = softmax(x * x.transpose()) * x, softmax(x * x.transpose() * 4) * x * 2
    linear = once * 2
    return [
        tally(f"vec f(X) - vec f(0) = (sum over paths of A_path kron W_path^T) vec X, {patterns} patterns", paths),
        tally("f((X + Z)/2) = (f(X) + f(Z))/2", midpoints),
        shown(
            "unfrozen softmax attention is not linear: f(2X) against 2 f(X)",
            f"{twice[0, 0]} against {linear[0, 0]}",
            twice != linear,
        ),
    ], Counterexample(
        "softmax attention is linear in X",
        {"X": exact.text(x), "f(X)": exact.text(once), "f(2X)": exact.text(twice)},
        "f(X) = softmax(ln 2 * X X^T) X is 3/5 on the first token of X, and 510/257 on that of 2X.",
        "two tokens of width one with entries of absolute value one",
    )


CLAIM = Claim(
    "attention-is-affine-given-patterns",
    "An attention stack with residuals is affine in X: vec Y = (sum over paths A_path kron W_path^T) vec X + constant.",
    HERE,
    check,
    title="Given its patterns, attention is affine",
    formula=r"\mathrm{vec}\, Y = \sum_{\mathrm{paths}} (A_{\mathrm{path}} \otimes W_{\mathrm{path}}^T)\, \mathrm{vec}\, X "
    r"+ \mathrm{const}",
    theory="6. What the MLP adds",
    hypotheses=("the attention patterns are held fixed", "the norms' scales are held fixed"),
)
