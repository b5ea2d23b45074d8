"""Measures of one token cloud, written out: NumPy arrays and Fractions, one sequence, no masks, no batches."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

Rows = list[list[Fraction]]


def exact_rank(rows: Rows) -> int:
    """Gaussian elimination over the rationals."""
    rows = [list(row) for row in rows]
    found = 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column] != 0), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] / rows[found][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def exact_affine_rank(rows: Rows) -> int:
    """The rank of the differences to the first token."""
    return exact_rank([[a - b for a, b in zip(row, rows[0], strict=True)] for row in rows])


def exact_participation_ratio(rows: Rows) -> Fraction:
    gram = [[sum((a * b for a, b in zip(one, other, strict=True)), Fraction(0)) for other in rows] for one in rows]
    return sum(gram[i][i] for i in range(len(rows))) ** 2 / sum(entry**2 for row in gram for entry in row)


def exact_squared_consensus_distance(rows: Rows) -> Fraction:
    n = len(rows)
    mean = [sum(column) / n for column in zip(*rows, strict=True)]
    apart = sum((a - m) ** 2 for row in rows for a, m in zip(row, mean, strict=True))
    return apart / sum(a**2 for row in rows for a in row)


def singular_values(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(x, compute_uv=False)


def centred(x: np.ndarray) -> np.ndarray:
    once = x - x.mean(axis=0)
    return once - once.mean(axis=0)


def rank_tolerance(x: np.ndarray, eps: float) -> float:
    n, d = x.shape
    noise = eps * math.sqrt((x**2).sum()) * (1 / math.sqrt(n) + 1 / math.sqrt(d))
    return noise + max(n, d) * 2.0**-52 * singular_values(x)[0]


def rank(x: np.ndarray, eps: float) -> int:
    return sum(value > rank_tolerance(x, eps) for value in singular_values(x))


def affine_rank(x: np.ndarray, eps: float) -> int:
    return sum(value > rank_tolerance(x, eps) for value in singular_values(centred(x)))


def attainable_rank(x: np.ndarray, eps: float) -> int:
    return min(x.shape)


def attainable_affine_rank(x: np.ndarray, eps: float) -> int:
    return min(x.shape[0] - 1, x.shape[1])


def rank_gap(x: np.ndarray, eps: float) -> float:
    values, r = singular_values(x), rank(x, eps)
    return values[r - 1] / values[r] if r < len(values) and values[r] > 0 else math.inf


def effective_rank(x: np.ndarray, eps: float) -> float:
    values = singular_values(x)
    entropy = 0.0
    for value in values:
        share = value / values.sum()
        entropy -= share * math.log(share) if share > 0 else 0.0
    return math.exp(entropy)


def energy_entropy_rank(x: np.ndarray) -> float:
    """exp H(sigma^2 / sum sigma^2), the middle of the chain of inequalities."""
    shares = singular_values(x) ** 2 / (x**2).sum()
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def stable_rank(x: np.ndarray, eps: float) -> float:
    return (x**2).sum() / singular_values(x)[0] ** 2


def participation_ratio(x: np.ndarray, eps: float) -> float:
    squares = singular_values(x) ** 2
    return squares.sum() ** 2 / (squares**2).sum()


def consensus_distance(x: np.ndarray, eps: float) -> float:
    return math.sqrt((centred(x) ** 2).sum() / (x**2).sum())


def token_similarity(x: np.ndarray, eps: float) -> float:
    cosines = [
        float(x[i] @ x[j]) / math.sqrt(float(x[i] @ x[i]) * float(x[j] @ x[j]))
        for i in range(len(x))
        for j in range(len(x))
        if i != j
    ]
    return math.fsum(cosines) / len(cosines)


def out_of_span_energy(update: np.ndarray, embeddings: np.ndarray) -> float:
    """What least squares on the embeddings leaves of each row of the update."""
    left = 0.0
    for row in update:
        weights = np.linalg.lstsq(embeddings.T, row, rcond=None)[0]
        left += ((row - weights @ embeddings) ** 2).sum()
    return left / (update**2).sum()


def nonlinear_innovation(inputs: np.ndarray, outputs: np.ndarray, held_out: list[int], fitted: list[int]) -> float:
    """Least squares with a column of ones, scored on the tokens it has not seen."""
    design = np.hstack([inputs, np.ones((len(inputs), 1))])
    weights = np.linalg.lstsq(design[fitted], outputs[fitted], rcond=None)[0]
    left = outputs[held_out] - design[held_out] @ weights
    return (left**2).sum() / ((outputs[held_out] - outputs[fitted].mean(axis=0)) ** 2).sum()
