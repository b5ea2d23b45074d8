"""Attention with residuals and no MLP keeps the exact rank at every depth; its tokens may still converge."""

from __future__ import annotations

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, heads, uniform, with_residual
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

DEPTH, LONG = 4, 60
APPROACHING = ((1, 0), (0, 1))  # X; A = 11^T/2, W = I: the mean doubles in every layer, the difference stays
_SIZE = 10**6


def squared_consensus(x: fmpq_mat) -> fmpq:
    """||CX||_F^2 / ||X||_F^2, exactly."""
    return _energy(exact.centring(x.nrows()) * x) / _energy(x)


def _energy(x: fmpq_mat) -> fmpq:
    return sum((entry * entry for entry in x.entries()), fmpq(0))


def approaching(x: fmpq_mat, weight: fmpq_mat, layers: int) -> list[fmpq]:
    """The squared consensus distances of X <- X + (11^T/n) X W, layer by layer."""
    distances = [squared_consensus(x)]
    for _ in range(layers):
        x = with_residual(x, [uniform(x.nrows())], [weight])
        distances.append(squared_consensus(x))
    return distances


def check(trials: int, seed: int, *, residual: bool = True, measure: str = "rank") -> Finding:
    """`residual=False` keeps attention alone; `measure="distance"` reads collapse as tokens converging."""
    draws = Draws("residual-needs-no-mlp", seed)
    kept, together = [], []
    for trial in range(trials):
        n, d = draws.choice([(2, 2), (3, 2), (3, 4), (4, 3)])
        start = draws.of_rank(n, d, draws.randint(1, min(n, d)))
        while not any((uniform(n) * start).entries()):  # without a mean nothing grows
            start = draws.of_rank(n, d, draws.randint(1, min(n, d)))
        x = start
        for _ in range(DEPTH):
            patterns = [uniform(n)] if trial % 2 else [draws.pattern(n), draws.pattern(n, causal=True)]
            x = (with_residual if residual else heads)(x, patterns, [draws.matrix(d, d, _SIZE) for _ in patterns])
        kept.append(exact.rank(x) >= exact.rank(start))
        if trial % 10 == 0:
            # A whole neighbourhood of W = I: the mean grows by 7/4 a layer or more, the differences do not move.
            weight = exact.identity(d) + draws.matrix(d, d, 1) * fmpq(1, 4 * d)
            deviations, mean = exact.centring(n) * start, uniform(n) * start
            grown = _energy(mean) * fmpq(7, 4) ** (2 * LONG)
            together.append(approaching(start, weight, LONG)[-1] <= _energy(deviations) / (_energy(deviations) + grown))
    x = exact.rational(APPROACHING)
    path = approaching(x, exact.identity(2), 10)
    evidence = [
        shown(
            "near W = I the rank stays and the tokens converge: squared consensus distance after 10 layers",
            str(path[-1]),
            path[-1] == fmpq(1, 1 + 4**10),
        ),
    ]
    near = f"on a neighbourhood of W = I the mean grows by 7/4 a layer or more, for {LONG} layers, so the tokens meet (A uniform)"
    if measure == "distance":
        apart: list[bool | None] = [not case for case in together]
        evidence.append(
            tally(f"the consensus distance does not fall like that over {LONG} layers, for W near I", apart)
        )
    else:
        what = f"rank after {DEPTH} layers without MLP >= rank X, for a drawn W, hence for almost all"
        evidence = [tally(what, kept), *evidence, tally(near, together, role="boundary")]
    return evidence, Counterexample(
        "residuals alone keep the tokens apart (they keep the rank)",
        {"X": exact.text(x), "A": exact.text(uniform(2)), "W": exact.text(exact.identity(2))},
        "X <- X + A X W keeps rank 2 for ever, and its squared consensus distance after L layers is 1/(1 + 4^L); a "
        "whole neighbourhood of W behaves in the same way, so this is not an exceptional set.",
        "two tokens; the identity for X and for W",
    )


CLAIM = Claim(
    "residual-needs-no-mlp",
    "Attention with residual connections and no MLP keeps the exact rank of X at every depth, for almost all weights.",
    ABSTRACT + ": 'without contribution from the MLP'",
    check,
    title="Residual connections keep the rank without an MLP, at every depth",
    formula=r"\mathrm{rank}\, X_L \ge \mathrm{rank}\, X_0",
    theory="5. Residual connections",
    kind="generic",
)
