"""The leading singular values of many attention matrices, and of the same matrices centred, by products with blocks of vectors.

A matrix enters by its products alone (`Products`), so it may exist as one tile at a time. The products of the centred matrix
B = C_q A C_k span a Krylov space (block Lanczos, fully orthogonalised): its start is a random block and the mean row of A. With
that row in it the space serves A as well, for A = B + 1 a^T + C_q A 1 1^T / n_k. The Rayleigh-Ritz values there never exceed what
they stand for; `error` says how far below they can be.

When not to use it: for all singular values, or for matrices of a few dozen rows. `torch.linalg.svdvals` is as fast there.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """Matrices A [matrix, query, key], zero in padded rows and columns. `queries` [matrix, query] and `keys` [matrix, key] are 1
    for real ones and 0 for padding, in the format that products come in."""

    queries: Tensor
    keys: Tensor

    def begun(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A^T A X for X [matrix, key, vector] whose first column is constant, the mean row of A over real queries [matrix, key],
        and A 1 [matrix, query]."""
        ...

    def centred(self, X: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Y = A X less its mean over the real queries, which is `mean` [matrix, vector], 0 in padded rows; and A^T Y."""
        ...


class Leading(NamedTuple):
    """[matrix] each, float64: sigma_1 and sigma_2 of A, sigma_1 of C_q A C_k, and how far these may be too small, as a share of
    each, or of `SMALL` times sigma_1 of A where that is more. NaN where A is not finite."""

    first: Tensor
    second: Tensor
    contraction: Tensor
    error: Tensor


class Dense:
    """Products of matrices that lie in memory."""

    def __init__(self, A: Tensor, queries: Tensor, keys: Tensor) -> None:
        self.A, self.queries, self.keys = A, queries.to(A.dtype), keys.to(A.dtype)

    def begun(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Y = self.A @ X
        return self.A.mT @ Y, self.A.sum(-2) / self.queries.sum(1, keepdim=True), Y[..., 0]

    def centred(self, X: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        Y = (self.A @ X).sub_(mean.unsqueeze(-2)).mul_(self.queries.unsqueeze(-1))
        return Y, self.A.mT @ Y


WANTED = 6  # Ritz pairs whose residuals are taken: the error of a cluster is that of all its members
SMALL = 1e-4  # of sigma_1: smaller values are known to the same number of digits of that
LOOKS = (2, 3, 5, 8, 12, 16)  # after so many blocks it is seen whether they are enough


def leading(products: Products, *, vectors: int, steps: int, tolerance: float) -> Leading:
    """The leading singular values of all matrices, from at most `steps` products with blocks of `vectors` vectors, and one more to
    begin with; fewer where `error` is within `tolerance` in all matrices before that.

    error: a Ritz value theta of a symmetric matrix with residual r lies below its eigenvalue by at most ||r||^2 / gap, with gap the
    distance to the rest of the spectrum, for which the next Ritz value stands; a cluster of them likewise. The start is random,
    so that with probability one no direction is missed for ever; that none was missed so far is not proved. Y. Saad, "Numerical
    Methods for Large Eigenvalue Problems", 2011, theorems 3.8 and 3.9 (Kato and Temple).
    """
    keys = products.keys
    generator = torch.Generator().manual_seed(vectors)  # any seed serves, as long as it is fixed
    # One draw for all matrices: to each of them it is random.
    drawn = torch.randn(keys.shape[1], vectors, generator=generator, dtype=torch.float64).to(keys) * keys.unsqueeze(-1)
    start, last = drawn[..., :-1], drawn[..., -1:]
    start[..., 0] = keys
    X, mean, sums = products.begun(start)
    finite = X.isfinite().all(-1).all(-1)
    keep = finite[:, None, None]
    X, mean, sums = (
        torch.where(keep, X, 0),
        torch.where(finite[:, None], mean, 0),
        torch.where(finite[:, None], sums, 0),
    )
    basis = _Basis(products, mean, sums, X[..., 0])
    count = products.queries.sum(1)[:, None, None]
    X = X - count * mean.unsqueeze(-1) * (mean.unsqueeze(-2) @ start)  # so that the mean row does not hide the others
    X = torch.cat([mean.unsqueeze(-1), X[..., 1:], last], -1)
    found, steps = None, max(1, min(steps, (keys.shape[1] - 1) // vectors))
    for step in range(1, steps + 1):
        spare = torch.randn(keys.shape[1], vectors, generator=generator, dtype=torch.float64).to(keys)
        X = basis.orthonormal(X, spare)
        y, z = products.centred(X, (mean.unsqueeze(-2) @ X)[..., 0, :])
        basis.take(X, torch.where(keep, y, 0), torch.where(keep, z, 0))
        X = basis.Z[..., -vectors:]
        if step == steps or step in LOOKS:
            found = basis.ritz()
            if bool((found.error[finite] <= tolerance).all()):
                break
    assert found is not None
    return Leading(*(figure.masked_fill(~finite, math.nan) for figure in found))


class _Basis:
    """Orthonormal vectors Q [matrix, key, direction], orthogonal to the constant one, with Y = B Q and Z = A^T B Q."""

    def __init__(self, products: Products, mean: Tensor, sums: Tensor, of_ones: Tensor) -> None:
        self.keys, self.mean, self.sums, self.of_ones = products.keys, mean, sums, of_ones
        self.count_keys, self.count_queries = (t.double().sum(1) for t in (products.keys, products.queries))
        self.queries = products.queries
        self.Q = self.Z = self.keys.new_zeros(*self.keys.shape, 0)
        self.Y = self.keys.new_zeros(*products.queries.shape, 0)

    def orthonormal(self, X: Tensor, spare: Tensor) -> Tensor:
        """The columns of X made orthonormal, and orthogonal to Q and the constant vector; `spare` for those of which nothing is
        left: A has no further direction there. Twice, for where little is left, once leaves a part in the others."""
        left = self._beside(torch.linalg.qr(self._beside(X)).Q)
        X, R = torch.linalg.qr(left)
        gone = R.diagonal(dim1=-2, dim2=-1).abs() < 1e-2  # these columns are made of the others, and their Q of nothing
        if bool(gone.any()):
            left = torch.where(gone.unsqueeze(-2), self._beside(spare.expand_as(X)), left)
            X = torch.linalg.qr(self._beside(torch.linalg.qr(left).Q)).Q
        return self._centred(X)

    def _beside(self, X: Tensor) -> Tensor:
        return self._centred(X - self.Q @ (self.Q.mT @ X)) if self.Q.shape[-1] else self._centred(X)

    def _centred(self, X: Tensor) -> Tensor:
        """Less the mean over real keys; padded rows become 0."""
        mean = (self.keys.unsqueeze(-2) @ X) / self.keys.sum(1)[:, None, None]
        return (X - mean) * self.keys.unsqueeze(-1)

    def take(self, X: Tensor, Y: Tensor, Z: Tensor) -> None:
        self.Q, self.Y, self.Z = (torch.cat(pair, -1) for pair in ((self.Q, X), (self.Y, Y), (self.Z, Z)))

    def ritz(self) -> Leading:
        """Rayleigh and Ritz in the span of Q for B, and in that of Q and the constant unit vector u for A: with a the mean row of A
        and w = Q^T a it is A Q = Y + 1 w^T, and A u = A 1 / sqrt(n_k)."""
        Q, Y, Z, a, sums, of_ones = (t.double() for t in (self.Q, self.Y, self.Z, self.mean, self.sums, self.of_ones))
        root, n_q = self.count_keys.sqrt()[:, None], self.count_queries[:, None, None]
        keys = self.keys.double()
        T = Y.mT @ Y
        squares, V = (t.flip(-1) for t in torch.linalg.eigh(T))
        V = V[..., :WANTED]
        ZV, QV = Z @ V, Q @ V
        n_k = self.count_keys[:, None, None]
        inner = ZV - (keys.unsqueeze(-2) @ ZV) / n_k * keys.unsqueeze(-1) - squares[:, None, :WANTED] * QV
        centred = squares, inner
        w = torch.einsum("mkd,mk->md", Q, a)
        s = sums / root
        whole = T.new_zeros(len(T), Q.shape[-1] + 1, Q.shape[-1] + 1)
        whole[:, 1:, 1:] = T + n_q * w.unsqueeze(-1) * w.unsqueeze(-2)
        whole[:, 0, 1:] = whole[:, 1:, 0] = torch.einsum("mqd,mq->md", Y, s) + s.sum(1, keepdim=True) * w
        whole[:, 0, 0] = s.square().sum(1)
        squares, V = (t.flip(-1) for t in torch.linalg.eigh(whole))
        V = V[..., :WANTED]
        top, rest = V[:, :1], V[:, 1:]
        of_basis = Z @ rest + n_q * a.unsqueeze(-1) * (w.unsqueeze(-2) @ rest)
        u = keys / root
        outer = (of_ones / root).unsqueeze(-1) * top + of_basis
        outer = outer - squares[:, None, :WANTED] * (u.unsqueeze(-1) * top + Q @ rest)
        values, errors = _upper(squares, outer, 2, squares.new_zeros(len(squares)))
        contraction, error = _upper(*centred, 1, values[..., 0])
        drift = (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)).abs().amax((-2, -1))
        error = torch.maximum(error.flatten(), errors.amax(1)).masked_fill(drift > 1e-3, math.inf)
        return Leading(values[..., 0], values[..., 1], contraction.flatten(), error)


def _upper(squares: Tensor, residuals: Tensor, count: int, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of the first `count` Ritz values, and by what share of itself each root may be too small; of `SMALL` times the
    `largest`, or the first of them, where that is more."""
    squares = squares.clamp(min=0)
    sizes = residuals.square().sum(-2)
    values, errors = [], []
    for i in range(count):
        least = torch.full_like(squares[..., 0], math.inf)
        for j in range(i, min(WANTED, squares.shape[1] - 1)):
            gap = squares[..., i] - squares[..., j + 1]
            least = torch.minimum(least, sizes[..., : j + 1].sum(1) / gap.clamp(min=1e-300))
        least = torch.minimum(least, sizes[..., i].sqrt())
        values.append(squares[..., i].sqrt())
        unit = torch.maximum(values[-1], SMALL * torch.maximum(values[0], largest)).clamp(min=1e-300)
        errors.append(((squares[..., i] + least).sqrt() - values[-1]) / unit)
    return torch.stack(values, 1), torch.stack(errors, 1)
