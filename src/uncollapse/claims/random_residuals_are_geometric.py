"""Random residual layers with uniform attention: the deviations stay, the common part grows, the distance falls geometrically.

X <- X + U X W with U = 11^T/n: C U = 0, so CX never changes, and the mean token goes x <- x (I + W). With independent centred
entries of variance alpha^2/d, E|x(I + W)|^2 = (1 + alpha^2)|x|^2. So in expected energies, after L layers,

    r^2 = dev / (dev + n m (1 + alpha^2)^L),    dev = |CX|^2, m the squared norm of the first mean token.

At alpha = 1 this falls by 2 a layer; at alpha = 1/sqrt(L) it stays above dev/(dev + e n m) (Noci et al., arXiv 2206.03126).
n independent tokens have dev = (n - 1) n m in expectation.
"""

from __future__ import annotations

import itertools
import statistics
from math import prod, sqrt

import torch
from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, uniform
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

# An entry with mean 0 and variance 1/2 = 1/d: exact expectations by enumeration.
ENTRIES = ((0, fmpq(1, 2)), (1, fmpq(1, 4)), (-1, fmpq(1, 4)))
WIDTH = 2
TOKENS, LAYERS = 16, 24  # of the figures: dev/(n m) = 15
DRAWN_WIDTH = 64


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


def squared(spread: fmpq | int, growth: fmpq, layers: int) -> fmpq:
    """r^2 after so many layers by the formula, at dev/(n m) = `spread`; the mean's energy grows by `growth` a layer."""
    return fmpq(spread) / (spread + growth**layers)


def drawn(alpha: float, seed: int, count: int) -> list[float]:
    """r after `LAYERS` layers, Gaussian tokens and weights of width `DRAWN_WIDTH`. CX stays: only the mean token is followed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(TOKENS, DRAWN_WIDTH, generator=generator, dtype=torch.float64)
        mean = x.mean(0)
        spread = float((x - mean).square().sum())
        for _ in range(LAYERS):
            weight = torch.randn(DRAWN_WIDTH, DRAWN_WIDTH, generator=generator, dtype=torch.float64)
            mean = mean + mean @ weight * (alpha / sqrt(DRAWN_WIDTH))
        found.append(sqrt(spread / (spread + TOKENS * float(mean.square().sum()))))
    return found


def check(trials: int, seed: int, *, residual: bool = True, growth: str = "1 + alpha^2") -> Finding:
    """`residual=False` removes it; `growth="1 + alpha"` corrupts the rate."""
    draws = Draws("random-residuals-are-geometric", seed)
    deviations, once, twice, parts, alike = [], [], [], [], []
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
        spread = energy(centre * x) / (n * energy(mean))
        parts.append(relative(x) == squared(spread, rate, 0))
        once.append(expected_energy(mean, alpha, 1) == rate * energy(mean))
        if trial < 2:
            twice.append(expected_energy(mean, alpha, 2) == rate**2 * energy(mean))
            # With A = 1 every token moves as the mean does, and the deviations with them.
            tokens = [exact.part(centre * x, [i], range(WIDTH)) for i in range(n)]
            grown = sum((expected_energy(token, alpha, 1) for token in tokens), fmpq(0))
            alike.append(grown == (1 + alpha * alpha) * energy(centre * x))
    cloud = exact.rational([[2], [0]])
    after = cloud + uniform(2) * cloud * exact.rational([[-1]])
    return [
        tally("X + U X W: the deviations from the mean do not change", deviations),
        tally("the expected energy of the mean grows by 1 + alpha^2 in one layer (exact, all weights)", once),
        tally("and by its square in two", twice),
        tally("the energy of X is dev + n m: r^2 = dev/(dev + n m) before the first layer", parts),
        shown(
            "W = -I removes the common part instead: r^2 from 1/2 to 1",
            str(exact.text(after)),
            (relative(cloud), relative(after)) == (fmpq(1, 2), fmpq(1)),
        ),
        tally(
            "attention to oneself, A = I: the deviations grow as the mean does, and r^2 stays", alike, role="boundary"
        ),
        *_at_depth(max(20, trials // 4), seed),
    ], Counterexample(
        "residual layers with uniform attention bring the tokens together for all weights",
        {"X": exact.text(cloud), "W": [["-1"]], "X + U X W": exact.text(after)},
        "the mean is gone, the tokens are as far apart as tokens can be. It is the expectation over random weights that falls.",
        "two tokens of width one",
    )


def _at_depth(count: int, seed: int) -> list[Evidence]:
    """r after 24 layers: by the formula and, as the median over drawn weights, measured."""
    evidence = []
    for name, square in (("1", fmpq(1)), (f"1/sqrt({LAYERS})", fmpq(1, LAYERS))):
        exactly = squared(TOKENS - 1, 1 + square, LAYERS)
        seen = statistics.median(drawn(sqrt(float(square)), seed, count))
        by_formula = sqrt(float(exactly))
        evidence.append(
            Evidence(
                f"dev = {TOKENS - 1} n m, L = {LAYERS}, alpha = {name}: r by the formula, and the median of {count} draws of width "
                f"{DRAWN_WIDTH} within a factor of 3/2",
                f"{by_formula:.2g} and {seen:.2g}",
                None,
                2 * by_formula < 3 * seen < 4.5 * by_formula,
                "context",
                exact=False,
            )
        )
    return evidence


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
        "uniform attention (with A = I nothing falls)",
        "independent centred weights; expected energies, not the expectation of their ratio",
    ),
)
