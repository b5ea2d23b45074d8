"""Rigorous real arithmetic: every number is a ball (a midpoint and a radius) that certainly contains the true value.

For what rationals cannot hold: exponentials with real logits, logarithms, several softmax layers. A comparison answers
True or False only where the balls do not overlap, and None otherwise; a claim with a None in it is undecided.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from flint import arb, arb_mat, fmpq, fmpq_mat

Rows = list[list[Any]]


def balls(matrix: fmpq_mat) -> Rows:
    """The matrix as rows of balls."""
    return [[arb(entry) for entry in row] for row in matrix.tolist()]


def at_most(left: Any, right: Any) -> bool | None:
    """left <= right, or None where the balls overlap."""
    if left <= right:
        return True
    return False if left > right else None


def near(value: Any, target: Any, distance: Any) -> bool | None:
    """|value - target| <= distance, or None where the balls cannot tell."""
    return at_most(abs(arb(value) - arb(target)), arb(distance))


def product(left: Rows, right: Rows) -> Rows:
    """The matrix product."""
    columns = [list(column) for column in zip(*right, strict=True)]
    return [[sum((a * b for a, b in zip(row, column, strict=True)), arb(0)) for column in columns] for row in left]


def total(*terms: Rows) -> Rows:
    """The sum of matrices."""
    return [[sum(entries, arb(0)) for entries in zip(*rows, strict=True)] for rows in zip(*terms, strict=True)]


def softmax(logits: Rows, *, causal: bool = False, factors: Rows | None = None) -> Rows:
    """Row softmax; with `causal` row i sees columns 0..i. `factors` are e^B of a bias B that is added to the logits."""
    rows = []
    for i, row in enumerate(logits):
        allowed = row[: i + 1] if causal else row
        weights = [entry.exp() for entry in allowed]
        if factors is not None:
            weights = [weight * factor for weight, factor in zip(weights, factors[i], strict=False)]
        mass = sum(weights, arb(0))
        rows.append([weight / mass for weight in weights] + [arb(0)] * (len(row) - len(allowed)))
    return rows


def attention(
    x: Rows, logit_forms: Sequence[Rows], weights: Sequence[Rows], *, causal: bool = False, factors: Rows | None = None
) -> Rows:
    """The sum over heads of softmax(X M_h X^T + B) X W_h: self-attention without a residual; `factors` are e^B."""
    across = [list(column) for column in zip(*x, strict=True)]
    terms = []
    for form, weight in zip(logit_forms, weights, strict=True):
        pattern = softmax(product(product(x, form), across), causal=causal, factors=factors)
        terms.append(product(product(pattern, x), weight))
    return total(*terms)


def squared_distance(left: Sequence[Any], right: Sequence[Any]) -> Any:
    """The squared Euclidean distance of two rows."""
    return sum(((a - b) * (a - b) for a, b in zip(left, right, strict=True)), arb(0))


def squared_diameter(x: Rows) -> Any:
    """max over pairs of rows of the squared distance."""
    return functools.reduce(arb.max, itertools.starmap(squared_distance, itertools.combinations_with_replacement(x, 2)))


def certainly_full_rank(rows: Rows) -> bool | None:
    """True where the determinant of a square matrix of balls stays away from 0; None where it may be 0."""
    determinant = arb_mat(len(rows), len(rows), [entry for row in rows for entry in row]).det()
    return None if determinant.contains(0) else True


def exactly(value: fmpq | int) -> Any:
    """One rational as a ball."""
    return arb(value)
