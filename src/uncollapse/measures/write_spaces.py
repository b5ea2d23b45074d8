"""The spaces that the heads of an output projection write into, from products instead of a decomposition of the whole matrix.

Each head's rows are orthonormalised by themselves: S is these bases on top of each other. The triangle R of S^T = Q R has an
inverse whose rows give every noise gain: (S S^T)^-1 = R^-1 R^-T, and a head's gain is the norm of its rows of R^-1. Of a large
stack R is first taken from the Gram matrix S S^T = R^T R, which loses kappa(S)^2 eps_64: 3e-8 at `LARGEST_GRAM_CONDITION`. Beyond
that it comes from a QR decomposition, which loses kappa(S) eps_64: 1e-9 at `LARGEST_CONDITION`. Ranks are settled by lower bounds
with room to spare. Whatever lies near a tolerance, or beyond that condition number, is left to the singular value decomposition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures.admission import at_size_one, described, require_plain
from uncollapse.measures.gram import column_gram
from uncollapse.measures.storage_noise import storage_noise
from uncollapse.measures.symmetric_eigenvalues import eigenvalues

LARGEST_GRAM_CONDITION = 3e4
LARGEST_CONDITION = 1e7
ROOM = 2.0  # a bound settles a comparison with a tolerance if it holds by this factor

_EPS_64 = torch.finfo(torch.float64).eps
_SMALL = 512  # up to this size all eigenvalues cost no more than the largest, and a QR decomposition next to nothing
_VECTORS, _STEPS, _CHECKED = 8, 60, 4  # of a block Krylov space: of each block, blocks, and blocks between two looks
_CONVERGED = 1e-8  # what may be missing of an eigenvalue, as a share of it
_LEAST_VECTORS, _ITERATIONS = 16, 6
_NEARLY_ORTHONORMAL = 1e-3  # then the second Cholesky factor is as good as exact
_SOLVED = 256  # triangles up to this size are solved for the identity


class WriteSpaces:
    """An output projection, decomposed once. Each of the figures of `heads` takes it in place of the matrix.

    `bases` are orthonormal rows [head, direction, width] spanning row(W_h), zero beyond the rank, `ranks` [head] their
    numbers, `rank` that of W_O. `cosines` [direction, direction] are the products of all bases, B B^T; `largest` and `least`
    the ends of the singular values of the bases on top of each other; `gains` [head] the noise gains of `head_noise_gain`. All
    in float64, ranks as in `kernel_dimension`.

    >>> spaces = WriteSpaces(torch.eye(4), heads=2)
    >>> spaces.rank, spaces.gains
    (4, tensor([1., 1.], dtype=torch.float64))

    Raises `InputError` as `contribution_ambiguity` does.
    """

    def __init__(self, output_projection: Tensor, heads: int, *, name: str = "WriteSpaces") -> None:
        if not isinstance(output_projection, Tensor):
            raise InputError(
                f"{name}: expected a tensor as output_projection, got {type(output_projection).__name__}. "
                "It may be an array or a list. Pass torch.as_tensor(...) of it."
            )
        require_plain(name, "output_projection", output_projection)
        # No figure depends on the scale of the whole.
        self.blocks = at_size_one(row_blocks(name, output_projection, heads), (0, 1, 2))[0]
        self.dtype, self.heads = computed_in(self.blocks), heads
        self.bases, corners = _orthonormal_rows(self.blocks)
        sigma = torch.linalg.svdvals(corners)
        cuts = torch.stack([tolerance(b, s[0], self.dtype) for b, s in zip(self.blocks, sigma, strict=True)])
        kept = torch.ones_like(sigma, dtype=torch.bool)
        unclear = (sigma[:, -1] <= ROOM * cuts).nonzero().flatten()
        if len(unclear):
            _, found, rows = torch.linalg.svd(self.blocks[unclear], full_matrices=False)
            kept[unclear] = found > cuts[unclear, None]
            self.bases[unclear] = rows * kept[unclear, :, None]
        self.ranks = kept.sum(-1)
        self._least_of_heads = sigma[:, -1].min()

    # Singular values ----------------------------------------------------------------------------------------------
    @functools.cached_property
    def stacked(self) -> Tensor:
        """The bases on top of each other [direction, width], without their zero rows."""
        if bool((self.ranks == self.bases.shape[1]).all()):
            return self.bases.flatten(0, 1)
        return torch.cat([basis[: int(rank)] for basis, rank in zip(self.bases, self.ranks, strict=True)])

    @functools.cached_property
    def stack(self) -> tuple[Tensor, Tensor]:
        """U and sigma of the stacked bases: what everything below falls back on."""
        left, sigma, _ = torch.linalg.svd(self.stacked, full_matrices=False)
        return left, sigma

    @functools.cached_property
    def cosines(self) -> Tensor:
        return column_gram(self.bases.flatten(0, 1).T)

    @functools.cached_property
    def _corner(self) -> Tensor:
        """The triangle R of the smaller side: S^T = Q R, or S = Q R where the stack is taller than wide."""
        rows, width = self.stacked.shape
        return torch.linalg.qr(self.stacked.T if rows <= width else self.stacked, mode="r").R

    @functools.cached_property
    def _inverse(self) -> Tensor | None:
        """R^-1; None where R is singular to the last digit."""
        return self._rooted[0]

    @functools.cached_property
    def _rooted(self) -> tuple[Tensor | None, Tensor | None]:
        """R^-1 and what it says of the least singular value. Each None where it is not known."""
        rows, width = self.stacked.shape
        if _SMALL < rows <= width:
            whole = len(self.cosines) == rows
            inverse = _inverse_root(self.cosines if whole else column_gram(self.stacked.T))
            if inverse is not None:
                least = _least_singular_value(inverse)
                if float(self.largest / least) <= LARGEST_GRAM_CONDITION:
                    return inverse, least
        corner = self._corner
        eye = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, eye, upper=True)
        if not bool(inverse.isfinite().all()):
            return None, None
        least = _least_singular_value(inverse)
        is_trusted = bool(least.isfinite()) and float(self.largest / least) <= LARGEST_CONDITION
        return inverse, least if is_trusted else None

    @functools.cached_property
    def largest(self) -> Tensor:
        """The largest singular value of the stacked bases."""
        cosines = self.cosines
        return _largest_eigenvalue(lambda rows: rows @ cosines, cosines).sqrt()

    @functools.cached_property
    def least(self) -> Tensor:
        """The least singular value of the stacked bases."""
        least = self._rooted[1]
        return self.stack[1][-1] if least is None else least

    @functools.cached_property
    def tolerance(self) -> Tensor:
        """Up to where a singular value of the stacked bases may be rounding."""
        return tolerance(self.stacked, self.largest, self.dtype)

    @functools.cached_property
    def are_independent(self) -> bool:
        """Whether the write spaces are linearly independent; not so where no head writes anything."""
        rows, width = self.stacked.shape
        if not 0 < rows <= width:
            return False
        least, cut = float(self.least), float(self.tolerance)
        if not cut / ROOM < least < ROOM * cut:
            return least > cut
        return float(self.stack[1][-1]) > cut

    @functools.cached_property
    def rank(self) -> int:
        """The rank of W_O. sigma_min(W_O) >= min_h sigma_min(W_h) sigma_min(S), which settles full rank."""
        W = self.blocks.flatten(0, 1)
        size, full = torch.linalg.matrix_norm(W), min(W.shape)
        if bool((self.ranks == self.blocks.shape[1]).all()):
            cut = tolerance(W, size, self.dtype)  # the norm is no less than the largest singular value
            if bool(self._least_of_heads * self.least > ROOM * cut):
                return full
        return numerical_rank(W, self.dtype)

    # Gains --------------------------------------------------------------------------------------------------------
    @functools.cached_property
    def gains(self) -> Tensor:
        """1 / sin of the smallest angle between each head's write space and the sum of all others, see `head_noise_gain`."""
        if not len(self.stacked):
            return self.stacked.new_zeros(self.heads)
        if self.are_independent and float(self.largest / self.least) <= LARGEST_CONDITION and self._inverse is not None:
            return self._norms_of_heads(self._inverse)
        if not self.are_independent and bool((self.ranks > 0).all()) and self._all_undetermined():
            return self.stacked.new_full((self.heads,), math.inf)
        return self._gains_by_decomposition()

    def _norms_of_heads(self, rows: Tensor) -> Tensor:
        """The spectral norm of each head's rows; 0 for a head without any."""
        norms = rows.new_zeros(self.heads)
        own = [each @ each.T for each in rows.split(self.ranks.tolist())]
        written = self.ranks.nonzero().flatten().tolist()
        for h, values in zip(written, eigenvalues([own[h][None] for h in written]), strict=True):
            norms[h] = values[0, -1].sqrt()
        return norms

    def _all_undetermined(self) -> bool:
        """Whether every head lies, by more than the tolerance, in directions of the stack that are cut off. False where a lower
        bound does not show it."""
        stack, cut = self.stacked, float(self.tolerance)
        sizes = self.ranks.tolist()
        rows, width = stack.shape
        if rows > width:
            # What is kept lies in the columns of Q, so that at least the rest of a head is cut off.
            shares = [
                size - float(q.square().sum())
                for size, q in zip(sizes, torch.linalg.qr(stack).Q.split(sizes), strict=True)
            ]
            return min(shares) > ROOM * cut
        inverse, corner = self._inverse, self._corner
        if inverse is None:
            return False
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, min(_LEAST_VECTORS, rows), generator=generator, dtype=torch.float64).to(stack.device)
        for _ in range(_ITERATIONS):
            x = torch.linalg.qr(inverse @ (inverse.T @ torch.linalg.qr(x).Q)).Q
        image = corner @ x
        squares, turn = torch.linalg.eigh(image.T @ image)
        below = squares.clamp(min=0).sqrt() < cut / ROOM
        x, squares = x @ turn[:, below], squares[below]
        if not len(squares):
            return False
        # A vector u with S S^T u = lambda u + r has at most ||r|| / (cut^2 - lambda) outside of what is cut off.
        residual = float((corner.T @ (corner @ x) - x * squares).norm())
        outside = residual / (cut**2 - float(squares.max()))
        return all((float(u.norm()) - outside) ** 2 > ROOM * cut and float(u.norm()) > outside for u in x.split(sizes))

    def _gains_by_decomposition(self) -> Tensor:
        gains = self.stacked.new_zeros(self.heads)
        sizes = self.ranks.tolist()
        left, sigma = self.stack
        cut = tolerance(self.stacked, sigma[0], self.dtype)
        kept = left[:, sigma > cut]
        scaled = kept / sigma[: kept.shape[1]]
        for h, (size, directions, amplified) in enumerate(
            zip(sizes, kept.split(sizes), scaled.split(sizes), strict=True)
        ):
            if size:
                lost = size - float(directions.square().sum()) if kept.shape[1] < len(left) else 0.0
                gains[h] = math.inf if lost > cut else torch.linalg.matrix_norm(amplified, 2)
        return gains


def _orthonormal_rows(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows [head, direction, width] and the corner R [head, direction, direction] of each head's W^T = Q R.

    By Cholesky factors of Gram matrices, twice (CholeskyQR2). Where the first time leaves rows that are not nearly orthonormal, a
    head's condition number is too large for that, and Householder's QR does it. Yamamoto et al., Roundoff error analysis of the
    CholeskyQR2 algorithm, 2015."""
    size, width = blocks.shape[1:]
    if size <= width:
        first = torch.linalg.cholesky_ex(blocks @ blocks.mT).L
        rows = torch.linalg.solve_triangular(first, blocks, upper=False)
        gram = rows @ rows.mT
        eye = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        if bool(((gram - eye).abs() < _NEARLY_ORTHONORMAL).all()):  # false for NaN
            second = torch.linalg.cholesky_ex(gram).L
            return torch.linalg.solve_triangular(second, rows, upper=False), (first @ second).mT
    columns, corners = torch.linalg.qr(blocks.mT)
    return columns.mT.contiguous(), corners


def _inverse_root(gram: Tensor) -> Tensor | None:
    """R^-1 of G = R^T R; None where G is not positive definite to the last digit."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        return None
    inverse = _inverse_of_lower(lower).T
    return inverse if bool(inverse.isfinite().all()) else None


def _inverse_of_lower(triangle: Tensor) -> Tensor:
    """Of a lower triangle, by halves: nearly all of it is products, of half the size that solving for the identity takes."""
    size = len(triangle)
    if size <= _SOLVED:
        eye = torch.eye(size, dtype=triangle.dtype, device=triangle.device)
        return torch.linalg.solve_triangular(triangle, eye, upper=False)
    half = size // 2
    inverse = torch.zeros_like(triangle)
    inverse[:half, :half] = _inverse_of_lower(triangle[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(triangle[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ (triangle[half:, :half] @ inverse[:half, :half]))
    return inverse


def _least_singular_value(inverse: Tensor) -> Tensor:
    return _largest_eigenvalue(lambda rows: rows @ inverse @ inverse.T, inverse).rsqrt()


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Of a positive semi-definite map of as many dimensions as `like` has rows. `apply` maps rows [vector, dimension], which reads
    a matrix faster than columns do. By a block Krylov space, until the error that is left is small: a Ritz value lies below its
    eigenvalue by at most its residual, and by at most the square of that over the distance to the rest of the spectrum; a cluster
    of them likewise (Saad, Numerical Methods for Large Eigenvalue Problems, 2011, theorem 3.8)."""
    n = len(like)
    if n > _SMALL:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(n, _VECTORS, generator=generator, dtype=torch.float64).to(like.device)
        basis = block = torch.linalg.qr(start).Q.T
        images = apply(block)
        for step in range(2, _STEPS + 1):
            block = images[-_VECTORS:]
            for _ in range(2):  # once is not enough in floating point
                block = torch.linalg.qr((block - block @ basis.T @ basis).T).Q.T
            basis, images = torch.cat([basis, block]), torch.cat([images, apply(block)])
            if step % _CHECKED == 0:
                values, mixtures = (found.flip(-1) for found in torch.linalg.eigh(basis @ images.T))
                leading = mixtures[:, :_VECTORS].T
                residuals = leading @ images - values[:_VECTORS, None] * (leading @ basis)
                squares = residuals.square().sum(1)
                gaps = values[0] - values[1 : _VECTORS + 1]
                missing = (squares.cumsum(0) / gaps).where(gaps > 0, math.inf).min().minimum(squares[0].sqrt())
                if bool(missing <= _CONVERGED * values[0]):
                    return values[0]
    whole = apply(torch.eye(n, dtype=torch.float64, device=like.device))
    return torch.linalg.eigvalsh((whole + whole.T) / 2)[-1]


# Matrices -----------------------------------------------------------------------------------------------------------


def computed_in(W: Tensor) -> torch.dtype:
    """The format whose rounding counts as noise in a computation with these numbers: float32 if it holds all of them exactly.

    Not the format of storage: a model in bfloat16 can be computed with in float32, and its numbers are then the same.
    """
    return torch.float32 if bool((W.float().double() == W).all()) else torch.float64


def numerical_rank(W: Tensor, dtype: torch.dtype) -> int:
    """How many singular values of W stand above the tolerance of a computation in `dtype`."""
    sigma = torch.linalg.svdvals(W)
    return int((sigma > tolerance(W, sigma[0], dtype)).sum())


def tolerance(W: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to `dtype` and a decomposition in float64 may leave in the place of a singular value that is 0."""
    rows, columns = W.shape
    stored = storage_noise(torch.finfo(dtype).eps, torch.linalg.matrix_norm(W), rows, columns)
    return stored + max(rows, columns) * _EPS_64 * largest


def float64_matrix(name: str, W: Tensor, finite: bool = True) -> Tensor:
    """W in float64. Raises `InputError` in the name of a function for anything but a matrix, finite if wanted."""
    if W.ndim != 2 or not W.is_floating_point() or not W.numel():
        raise InputError(
            f"{name}: expected a floating-point matrix [row, column], got {described(W)}. "
            "Quantised weights have no such matrix. Pass the dense weight, [mixed, width] for an output projection."
        )
    if finite and not bool(W.isfinite().all()):
        raise InputError(
            f"{name}: expected finite numbers in {described(W)}, got NaN or infinity. "
            "Training may have diverged. Pass the weights of an earlier checkpoint."
        )
    return W.detach().double()


def row_blocks(name: str, W: Tensor, heads: int, finite: bool = True) -> Tensor:
    """The row blocks [head, head_width, width] in float64."""
    matrix = float64_matrix(name, W, finite)
    if heads < 1 or matrix.shape[0] % heads:
        raise InputError(
            f"{name}: expected output_projection[mixed, width] with mixed a multiple of heads = {heads}, got "
            f"{described(W)}. nn.Linear stores the transpose, [width, mixed]. Pass linear.weight.T."
        )
    return matrix.reshape(heads, -1, matrix.shape[1])
