"""Attention alone: one layer cubes the tokens' diameter. Checked in ball arithmetic with our own, sharp constant."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from flint import arb, fmpq, fmpq_mat

from uncollapse.claims import balls
from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

# Two tokens of width one, x and -x, have Y = v tanh(w x^2) (x, -x): with w = 1, v = 2 they move apart for ever.
EXPANDING = (((1,), (-1,)), ((1,),), ((2,),))
DONG = 4  # the factor of their theorem; ours is 1.86 (docs/theory.md), so an example alone does not show it
GAUGE = (((1, 1), (0, 0)), ((1, 0), (1, 0)))


def sized(draws: Draws, width: int, largest: fmpq) -> fmpq_mat:
    """A d x d matrix of spectral norm exactly `largest`: a diagonal between two rational rotations."""
    diagonal = [largest] + [largest * fmpq(draws.randint(-4, 4), 4) for _ in range(width - 1)]
    return draws.rotation(width) * exact.diagonal(diagonal) * draws.rotation(width)


def layer(draws: Draws, heads: int, width: int) -> tuple[list[fmpq_mat], list[fmpq_mat], fmpq]:
    """Logit forms W_Q W_K^T/sqrt(d_k), values W_V W_O and beta = sum_h ||M_h|| ||W_h||."""
    sizes = [(fmpq(draws.randint(1, 8), 4), fmpq(draws.randint(1, 8), 4)) for _ in range(heads)]
    forms, values = [sized(draws, width, m) for m, _ in sizes], [sized(draws, width, w) for _, w in sizes]
    return forms, values, sum((m * w for m, w in sizes), fmpq(0))


def squared_diameter(x: fmpq_mat) -> fmpq:
    """max over pairs of tokens of their squared distance, exactly."""
    rows = x.tolist()
    return max(sum(((p - q) * (p - q) for p, q in zip(a, b, strict=True)), fmpq(0)) for a in rows for b in rows)


def after(factor: fmpq, squared: fmpq, exponent: int, layers: int) -> fmpq:
    """The bound on the squared diameter after so many layers, (factor)^((p - 1)/(e - 1)) D^p squared, p = e^layers."""
    power = exponent**layers
    return factor ** ((power - 1) // (exponent - 1) * 2) * squared**power


def check(
    trials: int, seed: int, *, constant: fmpq | int | None = None, exponent: int = 3, causal: bool = False
) -> Finding:
    """`constant` replaces 1/4, `exponent` replaces 3, `causal=True` adds a mask: each breaks the inequality."""
    draws = Draws("attention-only-collapse", seed)
    factor = fmpq(1, 4) if constant is None else fmpq(1) * constant
    one, several, gauge = [], [], []
    for trial in range(trials):
        n, d, h = draws.randint(2, 3), draws.randint(1, 2), draws.randint(1, 2)
        x = draws.matrix(n, d, 4) / draws.choice([1, 4, 32])
        while exact.affine_rank(x) == 0:
            x = draws.matrix(n, d, 4)
        forms, values, beta = layer(draws, h, d)
        if trial % 4 == 0:  # the extremal pair, at a small scale
            x = exact.rational([[1], [-1]]) / draws.choice([2, 8, 64])
            forms, values, beta = [exact.identity(1)], [exact.identity(1)], fmpq(1)
        forms_b, values_b = [balls.balls(m) for m in forms], [balls.balls(m) for m in values]
        y = balls.attention(balls.balls(x), forms_b, values_b, causal=causal)
        start = squared_diameter(x)
        bound = (factor * beta) ** 2 * start**exponent
        one.append(balls.at_most(balls.squared_diameter(y), arb(bound)))
        if trial % 5 == 1:
            # Scale the tokens until beta D^2 < 1, so that the condition (beta/4) D^2 < 1 holds, then run three layers.
            shrink = 1 + math.isqrt(int(beta * start))
            small, depth = balls.balls(x / shrink), 3
            for _ in range(depth):
                small = balls.attention(small, forms_b, values_b, causal=causal)
            limit = after(factor * beta, start / shrink**2, exponent, depth)
            several.append(balls.at_most(balls.squared_diameter(small), arb(limit)))
        for form, value in zip(forms, values, strict=True):
            gauge += _within_dongs_gauge(x, form, value)
    expansion = _expansion()
    a, b = (exact.rational(m) for m in GAUGE)
    whole, parts = _gauge_squared(balls.balls(a + b)), [_gauge_squared(balls.balls(m)).sqrt() for m in (a, b)]
    fails = whole.sqrt() > sum(parts)
    evidence = [
        tally(f"one layer: diam(Y) <= {factor} beta diam(X)^{exponent}, beta = sum_h ||M_h|| ||W_h||", one),
        tally(f"three layers: diam <= ({factor} beta)^((p-1)/{exponent - 1}) diam(X)^p, p = {exponent}^3", several),
        tally("Dong's form in the gauge sqrt(||Z||_1 ||Z||_inf), gamma = sqrt(n max a), logit range <= 1", gauge),
        shown(
            "above the condition tokens may move apart: growth of the diameter in each of 6 layers",
            expansion[0],
            expansion[1],
        ),
        shown("that gauge is not a norm: the triangle inequality fails, 9 > 8", "9 against 8", fails, role="context"),
    ]
    x, m, w = (exact.rational(part) for part in EXPANDING)
    return evidence, Counterexample(
        "attention without residual and MLP collapses whatever its weights",
        {"X": exact.text(x), "W_QK": exact.text(m), "W_VO": exact.text(w)},
        "the tokens become 2 tanh(x^2) (x, -x): the diameter grows by more than 3/2 in every layer. "
        "beta diam(X)^2/4 = 2 is not below 1.",
        "two tokens of width one, integer weights of absolute value at most 2",
    )


def _expansion() -> tuple[str, bool | None]:
    x, m, w = (balls.balls(exact.rational(part)) for part in EXPANDING)
    growth: list[bool | None] = []
    for _ in range(6):
        y = balls.attention(x, [m], [w])
        growth.append(balls.at_most(arb(fmpq(9, 4)) * balls.squared_diameter(x), balls.squared_diameter(y)))
        x = y
    return f"at least 3/2 in {growth.count(True)} of 6", None if None in growth else all(growth)


def _gauge_squared(z: balls.Rows) -> Any:
    """||Z||_1 ||Z||_inf: the largest column sum times the largest row sum of absolute values."""
    return _largest_sum(list(zip(*z, strict=True))) * _largest_sum(z)


def _largest_sum(rows: Sequence[Sequence[Any]]) -> Any:
    """The largest row sum of absolute values."""
    return functools.reduce(arb.max, [sum((abs(entry) for entry in row), arb(0)) for row in rows])


def in_dongs_gauge(x: fmpq_mat, form: fmpq_mat, value: fmpq_mat) -> tuple[Any, Any]:
    """(g(Y - 1y)^2, (4 gamma ||M||_1 g(W) g(R)^3)^2) of one head, R = X - 1 mean, gamma = sqrt(n max a); as balls."""
    n = x.nrows()
    mean = exact.ones(1, n) * x / n
    residual = x - exact.ones(n) * mean
    common = balls.softmax(balls.balls(mean * form * residual.transpose()))  # a, one row
    y = balls.attention(balls.balls(x), [balls.balls(form)], [balls.balls(value)])
    middle = balls.total(balls.balls(mean), balls.product(common, balls.balls(residual)))
    centre = balls.product(middle, balls.balls(value))
    rest = [[a - b for a, b in zip(row, centre[0], strict=True)] for row in y]
    peak = functools.reduce(arb.max, common[0])
    form_1 = max(sum(abs(entry) for entry in column) for column in form.transpose().tolist())
    right = DONG**2 * n * peak * arb(form_1 * form_1)
    right *= _gauge_squared(balls.balls(value)) * _gauge_squared(balls.balls(residual)) ** 3
    return _gauge_squared(rest), right


def _within_dongs_gauge(x: fmpq_mat, form: fmpq_mat, value: fmpq_mat) -> list[bool | None]:
    """Whether the inequality holds, where the hypothesis on the logits does: e_ij = r_i M r_j within a range of 1."""
    residual = exact.centring(x.nrows()) * x
    if max(max(row) - min(row) for row in (residual * form * residual.transpose()).tolist()) > 1:
        return []
    left, right = in_dongs_gauge(x, form, value)
    return [balls.at_most(left, right)]


CLAIM = Claim(
    "attention-only-collapse",
    "Without residual, norm and MLP one layer of self-attention cubes the tokens' diameter D: D' <= (beta/4) D^3 with "
    "beta = sum_h ||W_QK,h|| ||W_h||/sqrt(d_k), hence D_L <= (beta/4)^((3^L-1)/2) D^(3^L): a doubly exponential decay.",
    "Y. Dong, J.-B. Cordonnier, A. Loukas, Attention is not all you need, arXiv 2103.03404 (2021), on attention alone; "
    "this version, with its constant, derived and proved in docs/theory.md",
    check,
    title="Attention alone collapses doubly exponentially",
    formula=r"D_1 \le \frac{\beta}{4} D_0^3,\quad \beta = \sum_h \lVert M_h \rVert \lVert W_h \rVert",
    theory="4. Attention alone collapses, and how fast",
    hypotheses=(
        "softmax over all keys (no causal mask), rows sum to one",
        "for the collapse: (beta/4) D^2 < 1; the inequality itself needs no smallness",
        "in Dong's gauge: one head, logits of the residual within a range of 1, gamma = sqrt(n max_j a_j)",
    ),
)
