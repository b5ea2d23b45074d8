"""With a bias that depends on the offset, tokens converge at the rate of the bias's own pattern, not doubly exponentially."""

from __future__ import annotations

from typing import Any, Literal

from flint import arb, fmpq, fmpq_mat, fmpq_poly

from uncollapse.claims import balls
from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

LAYERS = 60
Bias = Literal["offset", "none", "key"]


def factors_of_offset(n: int, own: fmpq, other: fmpq) -> fmpq_mat:
    """e^B for a bias that is one number on the diagonal and another off it."""
    return exact.from_rows([[own if i == j else other for j in range(n)] for i in range(n)], n)


def own_pattern(factors: fmpq_mat) -> fmpq_mat:
    """softmax(B), exactly: the pattern wherever the tokens' part of a row's logits is the same for all keys."""
    rows = [[entry / sum(row, fmpq(0)) for entry in row] for row in factors.tolist()]
    return exact.from_rows(rows, factors.ncols())


def derivative(token: fmpq_mat, change: fmpq_mat, form: fmpq_mat, factors: fmpq_mat) -> fmpq_mat:
    """That of X -> softmax(X M X^T + B) X at X = 1 token^T in the direction `change`, by the product and quotient rules."""
    n = change.nrows()
    pattern = own_pattern(factors)
    equal = exact.ones(n) * token
    logits = change * form * equal.transpose() + equal * form * change.transpose()
    moved = []
    for weights, slopes in zip(pattern.tolist(), logits.tolist(), strict=True):
        mean = sum((p * s for p, s in zip(weights, slopes, strict=True)), fmpq(0))
        moved.append([p * (s - mean) for p, s in zip(weights, slopes, strict=True)])
    return exact.from_rows(moved, n) * equal + pattern * change


def last_ratio(x: fmpq_mat, form: fmpq_mat, factors: fmpq_mat) -> Any:
    """The last certified ratio of successive squared diameters of X <- softmax(X M X^T + B) X."""
    cloud, forms, one = balls.balls(x), [balls.balls(form)], [balls.balls(exact.identity(x.ncols()))]
    bias = balls.balls(factors)
    before, ratio = balls.squared_diameter(cloud), None
    for _ in range(LAYERS):
        cloud = balls.attention(cloud, forms, one, factors=bias)
        after = balls.squared_diameter(cloud)
        ratio, before = after / before, after
        if not after > arb(2) ** -160:  # well above what the balls' radii grow to
            break
    return ratio


def check(trials: int, seed: int, *, bias: Bias = "offset", rate: fmpq | None = None) -> Finding:
    """`bias` "none" and "key" (one number a key, the same in every row) take the hypothesis away, `rate` replaces |lambda_2|."""
    draws = Draws("relative-bias-collapse-is-geometric", seed)
    slopes, spectra, powers, ratios, contrast = [], [], [], [], []
    for trial in range(trials):
        n, d = draws.randint(2, 4), draws.randint(1, 3)
        any_factors = exact.from_rows([[fmpq(draws.randint(1, 6)) for _ in range(n)] for _ in range(n)], n)
        change, form = draws.matrix(n, d, 3), draws.matrix(d, d, 3)
        found = derivative(draws.matrix(1, d, 3), change, form, any_factors)
        slopes.append(bool(found == own_pattern(any_factors) * change))
        if trial % 20:
            continue
        own, other = fmpq(draws.randint(3, 6)), fmpq(draws.randint(1, 2))
        second = (own - other) / (own + (n - 1) * other)
        pattern = own_pattern(factors_of_offset(n, own, other))
        spectra.append(bool(pattern.charpoly() == fmpq_poly([-1, 1]) * fmpq_poly([-second, 1]) ** (n - 1)))
        x = draws.matrix(n, d, 2)
        while exact.affine_rank(x) == 0:
            x = draws.matrix(n, d, 2)
        centred = x - exact.ones(n, n) * x / n
        powers.append(bool(pattern**5 * x - exact.ones(n, n) * pattern**5 * x / n == centred * second**5))
        small = form / (4 * max(abs(logit) for logit in (x * form * x.transpose()).entries()) or 1)
        chosen = factors_of_offset(n, own, other) if bias == "offset" else _without_offsets(n, draws, bias)
        limit = second if rate is None else rate
        ratios.append(balls.near(last_ratio(x, small, chosen), arb(limit * limit), fmpq(1, 10**6)))
        contrast.append(
            balls.at_most(last_ratio(x, small, factors_of_offset(n, fmpq(1), fmpq(1))), arb(fmpq(1, 10**6)))
        )
    keys = exact.from_rows([[fmpq(3), fmpq(1)]] * 2, 2)
    start = exact.rational([[1], [-1]]) / 4
    sink = last_ratio(start, exact.identity(1), keys)
    return [
        tally(
            "at consensus the derivative of X <- softmax(X M X^T + B) X is P = softmax(B), whatever M (exact)", slopes
        ),
        tally(
            "b on the diagonal and c off it: P has the eigenvalues 1 and (e^b - e^c)/(e^b + (n-1)e^c) (exact)", spectra
        ),
        tally("logits from the bias alone: five layers multiply X - 1 mean by lambda_2^5 (exact)", powers),
        tally(
            "logits from tokens and bias: the ratio of successive squared diameters is lambda_2^2 within 1e-6", ratios
        ),
        tally("with the bias at zero it falls below 1e-6", contrast, role="context"),
        shown(
            "a bias by key alone, the same in every row: the ratio falls below 1e-6 too",
            f"{float(sink.upper()):.1e}",
            balls.at_most(sink, arb(fmpq(1, 10**6))),
        ),
    ], Counterexample(
        "any bias on the logits keeps the collapse from being doubly exponential",
        {"X": exact.text(start), "W_QK": [["1"]], "exp(B)": exact.text(keys)},
        "every row of softmax(B) is (3/4, 1/4): equal rows move all tokens to one point, and only the tokens' own logits are left "
        "to keep them apart. The diameter is cubed again.",
        "two tokens of width one, factors of at most 3",
    )


def _without_offsets(n: int, draws: Draws, bias: Bias) -> fmpq_mat:
    row = [fmpq(1) if bias == "none" else fmpq(draws.randint(1, 4)) for _ in range(n)]
    return exact.from_rows([row] * n, n)


CLAIM = Claim(
    "relative-bias-collapse-is-geometric",
    "With a bias B of the offset on the logits, X <- softmax(X M X^T + B) X collapses geometrically, at the rate |lambda_2| of "
    "the bias's own pattern P = softmax(B), not doubly exponentially.",
    HERE,
    check,
    title="With a relative position bias the collapse is geometric",
    formula=r"\lim_{L \to \infty} \frac{\lVert C X_{L+1} \rVert}{\lVert C X_L \rVert} = |\lambda_2(\mathrm{softmax}(B))|",
    theory="4. Attention alone collapses, and how fast",
    hypotheses=(
        "softmax over all keys, no residual, the values are the tokens (W_VO = 1)",
        "the rows of P are not all equal, so that lambda_2 != 0 for the biases checked (one number on the diagonal, one off it)",
        "the tokens start near consensus, or the logits are small",
    ),
)
