"""Seeded exact matrices: clouds, attention patterns, weights. The same seed gives the same draws on every machine.

Attention patterns come in two ways. `Draws.pattern` draws any positive row-stochastic matrix, which is what a frozen
pattern may be. `softmax` is the real thing, exactly: with logits that are integer multiples of ln 2 (weights scaled by
ln 2) every softmax weight is a rational number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from flint import fmpq, fmpq_mat

from uncollapse.measures import exact


class Draws(random.Random):
    """A stream of exact random matrices for one claim and one seed."""

    def __init__(self, claim: str, seed: int) -> None:
        super().__init__(f"{claim}/{seed}")

    def matrix(self, rows: int, columns: int, size: int = 3) -> fmpq_mat:
        """Integer entries in [-size, size]."""
        return fmpq_mat(rows, columns, [self.randint(-size, size) for _ in range(rows * columns)])

    def of_rank(self, rows: int, columns: int, count: int, size: int = 3) -> fmpq_mat:
        """Integer entries, rank exactly `count`."""
        while True:
            drawn = self.matrix(rows, count, size) * self.matrix(count, columns, size)
            if exact.rank(drawn) == count:
                return drawn

    def invertible(self, size: int) -> fmpq_mat:
        """A square integer matrix of full rank."""
        return self.of_rank(size, size, size)

    def pattern(self, tokens: int, *, causal: bool = False, sinks: bool = False) -> fmpq_mat:
        """A row-stochastic matrix, positive where allowed; with `sinks` rows lose some of their mass."""
        rows = []
        for i in range(tokens):
            weights = [self.randint(1, 5) if not causal or j <= i else 0 for j in range(tokens)]
            total = sum(weights) + (self.randint(1, 9) if sinks else 0)
            rows.append([fmpq(weight, total) for weight in weights])
        return exact.from_rows(rows, tokens)

    def rotation(self, size: int) -> fmpq_mat:
        """A rational orthogonal matrix, by Cayley's formula from a skew one."""
        skew = self.matrix(size, size, 2)
        skew = skew - skew.transpose()
        one = exact.identity(size)
        return (one - skew) * (one + skew).inv()


def softmax(logits: fmpq_mat, *, causal: bool = False) -> fmpq_mat:
    """Row softmax of ln(2) * logits, exactly, for integer logits.

    >>> softmax(exact.rational([[1, 0], [3, 3]]))
    [2/3, 1/3]
    [1/2, 1/2]
    """
    rows = []
    for i, row in enumerate(logits.tolist()):
        weights = [fmpq(2) ** int(entry.p) if not causal or j <= i else fmpq(0) for j, entry in enumerate(row)]
        total = sum(weights, fmpq(0))
        rows.append([weight / total for weight in weights])
    return exact.from_rows(rows, logits.ncols())


def uniform(tokens: int, *, causal: bool = False) -> fmpq_mat:
    """The pattern of all logits equal: each token averages the tokens it may see."""
    return softmax(exact.zeros(tokens, tokens), causal=causal)


def heads(x: fmpq_mat, patterns: Sequence[fmpq_mat], weights: Sequence[fmpq_mat]) -> fmpq_mat:
    """The sum over heads of A_h X W_h."""
    total = exact.zeros(x.nrows(), weights[0].ncols())
    for pattern, weight in zip(patterns, weights, strict=True):
        total = total + pattern * x * weight
    return total


def with_residual(x: fmpq_mat, patterns: Sequence[fmpq_mat], weights: Sequence[fmpq_mat]) -> fmpq_mat:
    """X + the sum over heads of A_h X W_h."""
    return x + heads(x, patterns, weights)


def shifted(x: fmpq_mat, bias: fmpq_mat) -> fmpq_mat:
    """Every row of x plus the one row of `bias`."""
    return x + exact.ones(x.nrows()) * bias


def relu(x: fmpq_mat) -> fmpq_mat:
    """max(entry, 0), entry by entry."""
    return exact.from_rows([[max(entry, fmpq(0)) for entry in row] for row in x.tolist()], x.ncols())
