"""Random residual layers with uniform attention: the deviations stay, the common part grows, the distance falls geometrically.

X <- X + U X W with U = 11^T/n: C U = 0, so CX never changes, and the mean token goes x <- x (I + W). With independent centred
entries of variance alpha^2/d, E|x(I + W)|^2 = (1 + alpha^2)|x|^2. So in expected energies, after L layers,

    r^2 = dev / (dev + n m (1 + alpha^2)^L),    dev = |CX|^2, m the squared norm of the first mean token.

At alpha = 1 this falls by 2 a layer; at alpha = 1/sqrt(L) it stays above dev/(dev + e n m) (Noci et al., arXiv 2206.03126).
"""

from __future__ import annotations

import itertools
from math import prod

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, uniform
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

# An entry with mean 0 and variance 1/2 = 1/d: exact expectations by enumeration.
ENTRIES = ((0, fmpq(1, 2)), (1, fmpq(1, 4)), (-1, fmpq(1, 4)))
WIDTH = 2


def energy(x: fmpq_mat) -> fmpq:
    """The squared Frobenius norm."""
    return sum((entry * entry for entry in x.entries()), fmpq(0))


def relative(x: fmpq_mat) -> fmpq:
    """r^2: the share of the energy that is not common to the tokens."""
    return energy(exact.centring(x.nrows()) * x) / energy(x)


def expected_energy(mean: fmpq_mat, alpha: fmpq, layers: int) -> fmpq:
    """E|x (I + W_1)...(I + W_L)|^2 over all W with entries alpha times those above, by enumeration."""
    if not layers:
        return energy(mean)
    total = fmpq(0)
    for drawn in itertools.product(ENTRIES, repeat=WIDTH * WIDTH):
        weight = fmpq_mat(WIDTH, WIDTH, [alpha * entry for entry, _ in drawn])
        total += prod((p for _, p in drawn), start=fmpq(1)) * expected_energy(mean + mean * weight, alpha, layers - 1)
    return total


def check(trials: int, seed: int, *, residual: bool = True, growth: str = "1 + alpha^2") -> Finding:
    """`residual=False` removes it; `growth="1 + alpha"` corrupts the rate."""
    draws = Draws("random-residuals-are-geometric", seed)
    deviations, once, twice = [], [], []
    for trial in range(max(1, trials // 4)):
        n, alpha = draws.randint(2, 4), fmpq(draws.randint(1, 4), draws.randint(1, 4))
        x = draws.matrix(n, WIDTH)
        while not any((uniform(n) * x).entries()) or exact.affine_rank(x) == 0:
            x = draws.matrix(n, WIDTH)
        centre, weight = exact.centring(n), draws.matrix(WIDTH, WIDTH)
        y = (x if residual else x * 0) + uniform(n) * x * weight
        deviations.append(centre * y == centre * x)
        mean = exact.ones(1, n) * x / n
        rate = 1 + (alpha * alpha if growth == "1 + alpha^2" else alpha)
        if alpha != 1:  # where both rates are the same
            once.append(expected_energy(mean, alpha, 1) == rate * energy(mean))
        if trial < 2:
            twice.append(expected_energy(mean, alpha, 2) == rate**2 * energy(mean))
    cloud = exact.rational([[2], [0]])
    after = cloud + uniform(2) * cloud * exact.rational([[-1]])
    return [
        tally("X + U X W: the deviations from the mean do not change", deviations),
        tally("the expected energy of the mean grows by 1 + alpha^2 in one layer (exact, all weights)", once),
        tally("and by its square in two", twice),
        shown(
            "W = -I removes the common part instead: r^2 from 1/2 to 1",
            str(exact.text(after)),
            (relative(cloud), relative(after)) == (fmpq(1, 2), fmpq(1)),
        ),
        shown(
            "dev = 19 n m, L = 24: r at alpha = 1 and at alpha = 1/sqrt(24)",
            f"{(19 / (19 + 2.0**24)) ** 0.5:.2g} and {(19 / (19 + (25 / 24) ** 24)) ** 0.5:.2f}",
            None,
            role="context",
        ),
    ], Counterexample(
        "residual layers with uniform attention bring the tokens together for all weights",
        {"X": exact.text(cloud), "W": [["-1"]], "X + U X W": exact.text(after)},
        "the mean is gone, the tokens are as far apart as tokens can be. It is the expectation over random weights that falls.",
        "two tokens of width one",
    )


CLAIM = Claim(
    "random-residuals-are-geometric",
    "With residuals, uniform attention and random weights of entry variance alpha^2/d, the consensus distance falls geometrically: "
    "r^2 = dev/(dev + n m (1 + alpha^2)^L) in expected energies.",
    "after L. Noci et al., Signal Propagation in Transformers, arXiv 2206.03126 (2022); proved in docs/theory.md",
    check,
    title="With random weights and residuals the distance falls geometrically",
    formula=r"r^2 = \frac{\mathrm{dev}}{\mathrm{dev} + n m (1 + \alpha^2)^L}",
    theory="5. Residual connections",
    hypotheses=(
        "uniform attention",
        "independent centred weights; expected energies, not the expectation of their ratio",
    ),
)
