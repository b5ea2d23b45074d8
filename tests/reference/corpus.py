"""The cloud of a corpus, written out: NumPy, one cloud, points as rows."""

from __future__ import annotations

import math

import numpy as np


def cut(values, x, eps):
    """Singular values without those at the level of rounding."""
    n, d = x.shape
    size = math.sqrt((x**2).sum())
    largest = np.linalg.svd(x, compute_uv=False)[0]
    return [v for v in values if v > eps * size * (n**-0.5 + d**-0.5) + max(n, d) * 2.0**-52 * largest]


def whole(x, eps):
    return cut(np.linalg.svd(x, compute_uv=False), x, eps)


def centred(x, eps):
    return cut(np.linalg.svd(x - x.mean(axis=0), compute_uv=False), x, eps)


def variances(x):
    """Descending, one for each dimension."""
    return np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]


def effective_rank(values):
    shares = [v / math.fsum(values) for v in values]
    return math.exp(-math.fsum(p * math.log(p) for p in shares))


def participation_ratio(x):
    covariance = np.cov(x.T, bias=True)
    return np.trace(covariance) ** 2 / (covariance**2).sum()


def stable_rank(x):
    return variances(x).sum() / variances(x)[0]


def isoscore(x):
    """Step by step, as in the algorithm."""
    d = x.shape[1]
    _, _, directions = np.linalg.svd(x - x.mean(axis=0), full_matrices=True)
    diagonal = np.diag(np.cov((x @ directions.T).T))
    normalised = diagonal / np.linalg.norm(diagonal) * math.sqrt(d)
    defect = np.linalg.norm(normalised - np.ones(d)) / math.sqrt(2 * (d - math.sqrt(d)))
    return ((d - defect**2 * (d - math.sqrt(d))) ** 2 - d) / (d * (d - 1))


def directions_holding(x, share):
    found = variances(x)
    return next(k for k in range(1, len(found) + 1) if found[:k].sum() >= share * found.sum() * (1 - 1e-13))


def top_share(x, count):
    return variances(x)[:count].sum() / variances(x).sum()


def alpha(values):
    """Weighted least squares by the normal equations, as in Stringer et al.'s code, and the half width without the quantile."""
    last = min(100, len(values))
    places = np.arange(4, last + 1)
    y = np.log(np.array(values[3:last]) ** 2)
    A = np.stack([-np.log(places), np.ones(len(places))], axis=1)
    w = 1 / places
    normal = A.T @ (A * w[:, None])
    b = np.linalg.solve(normal, A.T @ (w * y))
    spread = (w * (y - A @ b) ** 2).sum() / (len(places) - 2)
    return b[0], math.sqrt(spread * np.linalg.inv(normal)[0, 0])


def mean_cosine(x):
    found = [
        float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        for i, a in enumerate(x)
        for j, b in enumerate(x)
        if i != j
    ]
    return math.fsum(found) / len(found)


def mean_share(x):
    return len(x) * (x.mean(axis=0) ** 2).sum() / (x**2).sum()


def novelty(x, y):
    _, values, directions = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    k = next(k for k in range(1, len(values) + 1) if (values[:k] ** 2).sum() >= 0.9 * (values**2).sum())
    apart = y - y.mean(axis=0)
    rest = apart - apart @ directions[:k].T @ directions[:k]
    return (rest**2).sum() / (apart**2).sum()


def cka(x, y):
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L))


def unbiased_cka(x, y):
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def hsic(x, y):
    """Song et al., equation 5, of the kernels as they are."""
    n, one = len(x), np.ones(len(x))
    K, L = x @ x.T, y @ y.T
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (np.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def cosine(x, y):
    return float(np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]))
