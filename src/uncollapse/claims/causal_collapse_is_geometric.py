"""Under a causal mask tokens converge by a factor of two per layer, not doubly exponentially: logits from the tokens alone.

Where positions enter the logits (RoPE, a relative bias), the pattern at consensus is not uniform and sets another rate: for
two tokens the share that the second gives to itself, 1/(1 + exp(-|x_1|^2 (1 - cos theta))) under a rotation by theta a step.
That causal masks slow a collapse down to exponential rates is in Wu et al., arXiv 2405.18781, for products of patterns, and in
Karagodin et al., arXiv 2411.04990, for the dynamics on the sphere.
"""

from __future__ import annotations

from typing import Any

from flint import arb, fmpq, fmpq_mat, fmpq_poly

from uncollapse.claims import balls
from uncollapse.claims.draws import Draws, uniform
from uncollapse.claims.ledger import HERE, Claim, Finding, equal, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

LAYERS = 50
ROTATED = ((1, 1), (1, 0))  # two tokens; each position turns queries and keys by one radian more
SLOWER_START = ((0,), (0,), (1,))  # the second token equals the first: the next eigenvalue, 1/3, sets the pace


def last_ratio(x: fmpq_mat, form: fmpq_mat, *, causal: bool) -> Any:
    """The last certified ratio of successive squared diameters of X <- A(X) X; stops before rounding takes over."""
    cloud, forms, one = balls.balls(x), [balls.balls(form)], [balls.balls(exact.identity(x.ncols()))]
    before, ratio = balls.squared_diameter(cloud), None
    for _ in range(LAYERS):
        cloud = balls.attention(cloud, forms, one, causal=causal)
        after = balls.squared_diameter(cloud)
        ratio, before = after / before, after
        if not after > arb(2) ** -160:  # well above what the balls' radii grow to
            break
    return ratio


def rotated_ratio(x: fmpq_mat) -> tuple[Any, Any]:
    """(certified last ratio of successive squared distances, its limit) of two tokens under a causal mask and RoPE.

    The logits are x_2 R x_1 and x_2 . x_2 with R a turn by one radian; the first token stays where it is.
    """
    (a, b), (c, d) = balls.balls(x)
    cosine, sine = arb(1).cos(), arb(1).sin()

    def share(c: Any, d: Any) -> Any:
        """What the second token (c, d) gives to itself."""
        apart = (c * c + d * d) - (c * (cosine * a - sine * b) + d * (sine * a + cosine * b))
        return 1 / (1 + (-apart).exp())

    for _ in range(LAYERS):
        own = share(c, d)
        c, d = a + own * (c - a), b + own * (d - b)
    return share(c, d) ** 2, share(a, b) ** 2


def check(trials: int, seed: int, *, causal: bool = True, rate: fmpq | None = None) -> Finding:
    """`causal=False` removes the mask, `rate` replaces 1/2."""
    draws = Draws("causal-collapse-is-geometric", seed)
    limit = fmpq(1, 2) if rate is None else rate
    spectra, ratios, contrast = [], [], []
    for n in range(2, 7):
        expected = fmpq_poly([1])
        for i in range(1, n + 1):
            expected = expected * fmpq_poly([fmpq(-1, i), 1])
        spectra.append(bool(uniform(n, causal=causal).charpoly() == expected))
    for _ in range(max(1, trials // 20)):
        n, d = draws.randint(2, 3), draws.randint(1, 2)
        x = draws.matrix(n, d, 2)
        while x.tolist()[0] == x.tolist()[1]:
            x = draws.matrix(n, d, 2)
        form = draws.matrix(d, d, 2)
        # Logits within [-1, 1] on the tokens, hence on their convex hull, so that 50 layers are enough.
        form = form / (max(abs(logit) for logit in (x * form * x.transpose()).entries()) or 1)
        ratio = last_ratio(x, form, causal=causal)
        ratios.append(balls.near(ratio, arb(limit * limit), fmpq(1, 10**6)))
        # Small enough for (beta/4) D^2 < 1: with a full mask the ratio then goes to 0.
        contrast.append(balls.at_most(last_ratio(x / 9, form, causal=False), arb(fmpq(1, 10**6))))
    third = last_ratio(exact.rational(SLOWER_START), exact.identity(1), causal=True)
    slower = balls.near(third, arb(fmpq(1, 9)), fmpq(1, 10**6))
    turned, expected_turned = rotated_ratio(exact.rational(ROTATED))
    return [
        tally("the pattern at consensus has the eigenvalues 1, 1/2, ..., 1/n (exact)", spectra),
        tally(f"X <- A(X) X: the ratio of successive squared diameters is {limit * limit} within 1e-6", ratios),
        tally("with a full mask it falls below 1e-6 from a small start", contrast, role="context"),
        shown("a second token equal to the first: the ratio of squares is 1/9 instead", _figure(third), slower),
        shown(
            "with RoPE, one radian a position, from (1, 1), (1, 0): the ratio of squares is not 1/4 but that of its own pattern",
            f"{_figure(turned)}, expected {_figure(expected_turned)}",
            balls.near(turned, expected_turned, fmpq(1, 10**6)),
        ),
        equal(
            "the first token never moves: entries of its pattern off the diagonal",
            sum(entry != 0 for entry in uniform(4, causal=True).tolist()[0][1:]),
            0,
            role="context",
        ),
    ], Counterexample(
        "the rate is 1/2 from every start",
        {"X": exact.text(SLOWER_START), "W_QK": [["1"]]},
        "the second token sits on the first and stays there; the third approaches with ratio 1/3.",
        "three tokens of width one, entries 0 and 1",
    )


def _figure(ratio: Any) -> str:
    return f"{float(ratio.mid()):.6f}"


CLAIM = Claim(
    "causal-collapse-is-geometric",
    "Under a causal mask X <- A(X) X collapses geometrically with ratio 1/2 onto the first token, not doubly "
    "exponentially.",
    HERE,
    check,
    title="Under a causal mask the collapse is geometric, with ratio one half",
    formula=r"\lim_{L \to \infty} \frac{D_{L+1}}{D_L} = \frac{1}{2}",
    theory="4. Attention alone collapses, and how fast",
    hypotheses=(
        "the logits come from the tokens alone: no RoPE, no relative bias",
        "the second token differs from the first",
        "the values are the tokens (W_VO = 1), no residual",
    ),
)
