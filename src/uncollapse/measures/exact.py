"""Matrices over the rationals: ranks that are decided, not estimated.

A float is a rational number whose denominator is a power of two, so *every* float matrix has an exact rank, and this
module gives it. That is rarely the number a practitioner wants: rounding noise has full rank, so the exact rank of a
measured cloud is nearly always min(n, d). Use `geometry.rank` for measured data. Use this module where entries are what
they say they are: in proofs, counterexamples and the claims ledger.

Square roots (standard deviations) leave the rationals. Two tools bring questions about them back: `square_classes`, for
membership of a vector of square roots in a rational column space, and `root_scaled`, a rational matrix that acts as
diag(roots) times a rational one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from flint import fmpq, fmpq_mat, fmpz_mat, nmod_mat
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures.admission import require_plain

# 2^61 - 1 is prime: a rank modulo it never exceeds the rational rank, so a full one settles the question at once.
_PRIME = (1 << 61) - 1


def rational(matrix: Any, *, name: str = "exact.rational") -> fmpq_mat:
    """The same matrix over the rationals, entry by entry equal. Floats are taken at their exact binary value.

    `matrix` is a flint matrix, rows of int, Fraction, fmpq or float, or a `token width` tensor of any real dtype. `name` is
    the function that refuses.

    >>> from fractions import Fraction
    >>> rational([[0.5, 1], [Fraction(1, 3), 2]])
    [1/2, 1]
    [1/3, 2]

    Raises `InputError` for anything ragged, not two-dimensional, complex, or not finite.
    """
    if isinstance(matrix, fmpq_mat):
        return matrix
    if isinstance(matrix, fmpz_mat):
        return fmpq_mat(matrix)
    if isinstance(matrix, Tensor):
        if matrix.ndim:
            require_plain(name, "matrix", matrix)
        if matrix.ndim != 2 or matrix.is_complex():
            raise InputError(
                f"{name}: expected a real tensor with axes (token, width), got shape {tuple(matrix.shape)} of "
                f"{matrix.dtype}. There may be a batch axis too many. Take one matrix, or call exact.rank on the batch."
            )
        width = matrix.shape[1]
        rows = matrix.detach().cpu().to(torch.float64 if matrix.is_floating_point() else torch.int64).tolist()
    else:
        try:
            rows = [list(row) for row in matrix]
        except TypeError:
            raise InputError(
                f"{name}: expected rows of numbers, got {type(matrix).__name__}. It may be a single row, or one number. "
                "Pass a list with a list for each token."
            ) from None
        width = len(rows[0]) if rows else 0
        if any(len(row) != width for row in rows):
            raise InputError(
                f"{name}: expected rows of one length, got lengths {sorted({len(row) for row in rows})}. "
                "A row may have lost an entry. Give every token the same width."
            )
    return fmpq_mat(len(rows), width, [number(entry, name=name) for row in rows for entry in row])


def number(value: Any, *, name: str = "exact.number") -> fmpq:
    """One exact rational: an int, Fraction, fmpq, or a float at its binary value. `name` is the function that refuses.

    >>> number(0.1)
    3602879701896397/36028797018963968
    """
    if isinstance(value, fmpq):
        return value
    try:
        top, bottom = value.as_integer_ratio()
    except (AttributeError, OverflowError, ValueError, TypeError):
        raise InputError(
            f"{name}: expected a finite rational number, got {value!r}. A NaN or an infinity may have come "
            "out of an overflow. Remove it, or compute in a wider dtype."
        ) from None
    return fmpq(int(top), int(bottom))


@overload
def rank(matrix: Tensor, mask: Tensor | None = None) -> int | Tensor: ...
@overload
def rank(matrix: Any, mask: Tensor | None = None) -> int: ...
def rank(matrix: Any, mask: Tensor | None = None) -> int | Tensor:
    """How many independent directions the tokens span, decided in rational arithmetic; a count.

    rank X = the size of the largest non-zero minor of X, X with one row a token.

    Between 0 and min(n, d); 1 when all tokens are multiples of one; invariant under invertible row and column
    operations, non-uniform scaling included.

    It misleads on measured floats: rounding noise has full rank. `geometry.rank` takes a tolerance, this takes none:

    >>> from fractions import Fraction
    >>> third = torch.tensor([[1.0, 3.0], [1 / 3, 1.0]], dtype=torch.float64)  # 1/3 is rounded, so not quite singular
    >>> rank(third), rank([[1, 3], [Fraction(1, 3), 1]])
    (2, 1)

    A tensor may have leading batch axes (then the answer is an integer tensor with those axes) and a boolean `mask`
    with axes (batch, token), True for real tokens. Raises `InputError` for anything not finite or not a matrix.
    """
    return _each("exact.rank", matrix, mask, _rank)


@overload
def affine_rank(matrix: Tensor, mask: Tensor | None = None) -> int | Tensor: ...
@overload
def affine_rank(matrix: Any, mask: Tensor | None = None) -> int: ...
def affine_rank(matrix: Any, mask: Tensor | None = None) -> int | Tensor:
    """The dimension of the flat through all tokens, decided in rational arithmetic; a count.

    rank(CX) with C = I - 11^T/n: the rank of the differences of the rows. It equals rank X - [1 in col X].

    Between 0 and min(n-1, d); 0 exactly at consensus (all tokens equal); invariant under translation and invertible
    column operations. It misleads on measured floats as `rank` does.

    >>> affine_rank([[1, 1], [2, 2], [3, 3]]), affine_rank([[1, 2], [1, 2]])
    (1, 0)

    Takes what `rank` takes and raises what it raises.
    """
    return _each("exact.affine_rank", matrix, mask, _affine_rank)


def _each(name: str, matrix: Any, mask: Tensor | None, measure: Any) -> int | Tensor:
    if mask is None and not (isinstance(matrix, Tensor) and matrix.ndim > 2):
        answer: int = measure(rational(matrix, name=name))
        return answer
    if (
        not isinstance(matrix, Tensor)
        or matrix.ndim < 2
        or (isinstance(mask, Tensor) and mask.shape != matrix.shape[:-1])
    ):
        shapes = [tuple(getattr(given, "shape", ())) for given in (matrix, mask)]
        raise InputError(
            f"{name}: expected a tensor with axes (batch, token, width) and a mask with axes (batch, token), got "
            f"shapes {shapes[0]} and {shapes[1]}. The mask may belong to another batch. "
            "Pass one boolean for each token."
        )
    require_plain(name, "matrix", matrix)
    if mask is not None and not isinstance(mask, Tensor):
        raise InputError(
            f"{name}: expected a tensor as mask, got {type(mask).__name__}. It may be an array or a list. "
            "Pass torch.as_tensor(...) of it."
        )
    if mask is not None:
        require_plain(name, "mask", mask)
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(
            f"{name}: expected a boolean mask, got {mask.dtype}. An additive or 0/1 attention mask reads differently. "
            "Pass attention_mask.bool() of the 0/1 mask."
        )
    batch, (tokens, width) = matrix.shape[:-2], matrix.shape[-2:]
    clouds = matrix.reshape(math.prod(batch), tokens, width)
    keep = (
        torch.ones(clouds.shape[:2], dtype=torch.bool)
        if mask is None
        else mask.reshape(math.prod(batch), tokens).bool().cpu()
    )
    counts = [measure(rational(cloud.cpu()[kept], name=name)) for cloud, kept in zip(clouds, keep, strict=True)]
    return int(counts[0]) if not batch else torch.tensor(counts, dtype=torch.int64).reshape(batch)


def _rank(matrix: fmpq_mat) -> int:
    integers, _ = matrix.numer_denom()
    full = min(matrix.nrows(), matrix.ncols())
    # Elimination over the integers takes seconds on 128 x 768 floats; the modular rank takes milliseconds and is a
    # lower bound, so only truly deficient matrices pay.
    if full > 8 and nmod_mat(integers, _PRIME).rank() == full:
        return full
    return int(integers.rank())


def _affine_rank(matrix: fmpq_mat) -> int:
    rows = matrix.tolist()
    if not rows:
        return 0
    return _rank(from_rows([[a - b for a, b in zip(row, rows[0], strict=True)] for row in rows[1:]], matrix.ncols()))


def from_rows(rows: Sequence[Sequence[Any]], columns: int) -> fmpq_mat:
    """A matrix from rows of exact numbers; `columns` is needed where there are no rows."""
    return fmpq_mat(len(rows), columns, [entry for row in rows for entry in row])


def zeros(rows: int, columns: int) -> fmpq_mat:
    """The zero matrix."""
    return fmpq_mat(rows, columns, [0] * (rows * columns))


def identity(size: int) -> fmpq_mat:
    """The identity matrix."""
    return diagonal([1] * size)


def ones(rows: int, columns: int = 1) -> fmpq_mat:
    """The all-ones matrix; with one argument the all-ones column."""
    return fmpq_mat(rows, columns, [1] * (rows * columns))


def centring(size: int) -> fmpq_mat:
    """I - 11^T/n: subtracts the mean over tokens from the left, over features from the right."""
    return identity(size) - ones(size, size) * fmpq(1, size)


def diagonal(values: Sequence[Any]) -> fmpq_mat:
    """The diagonal matrix of `values`."""
    size = len(values)
    return fmpq_mat(size, size, [values[i] if i == j else 0 for i in range(size) for j in range(size)])


def beside(*blocks: fmpq_mat) -> fmpq_mat:
    """The blocks next to one another, as columns of one matrix."""
    return above(*(block.transpose() for block in blocks)).transpose()


def above(*blocks: fmpq_mat) -> fmpq_mat:
    """The blocks on top of one another, as rows of one matrix."""
    return from_rows([row for block in blocks for row in block.tolist()], blocks[0].ncols())


def part(matrix: fmpq_mat, rows: Sequence[int], columns: Sequence[int]) -> fmpq_mat:
    """The submatrix of the named rows and columns, in the order given."""
    entries = matrix.tolist()
    return from_rows([[entries[i][j] for j in columns] for i in rows], len(columns))


def kronecker(left: fmpq_mat, right: fmpq_mat) -> fmpq_mat:
    """The Kronecker product; with row-major vec, vec(A X B) = (A kron B^T) vec(X)."""
    a, b = left.tolist(), right.tolist()
    return from_rows([[x * y for x in p for y in q] for p in a for q in b], left.ncols() * right.ncols())


def null_dimension(matrix: Any) -> int:
    """The dimension of {v : M v = 0}: columns minus rank.

    >>> null_dimension([[1, 1, 0]])
    2
    """
    exact = rational(matrix, name="exact.null_dimension")
    return int(exact.ncols()) - _rank(exact)


def null_space(matrix: Any) -> fmpq_mat:
    """A basis of {v : M v = 0}, one basis vector a column.

    >>> null_space([[1, 1, 0]]).ncols()
    2
    """
    exact = rational(matrix, name="exact.null_space")
    reduced, count = exact.rref()
    rows, width = reduced.tolist()[:count], exact.ncols()
    pivots = [next(j for j, entry in enumerate(row) if entry != 0) for row in rows]
    basis = []
    for free in (j for j in range(width) if j not in set(pivots)):
        vector = [fmpq(0)] * width
        vector[free] = fmpq(1)
        for pivot, row in zip(pivots, rows, strict=True):
            vector[pivot] = -row[free]
        basis.append(vector)
    return from_rows(basis, width).transpose()


def in_column_space(matrix: Any, vectors: Any) -> bool:
    """Whether every column of `vectors` is a combination of the columns of `matrix`.

    >>> in_column_space([[1, 0], [0, 1], [0, 0]], [[2], [3], [0]])
    True
    """
    space, candidate = (rational(given, name="exact.in_column_space") for given in (matrix, vectors))
    return _rank(beside(space, candidate)) == _rank(space)


def in_row_space(matrix: Any, vectors: Any) -> bool:
    """Whether every row of `vectors` is a combination of the rows of `matrix`."""
    space, candidate = (rational(given, name="exact.in_row_space") for given in (matrix, vectors))
    return in_column_space(space.transpose(), candidate.transpose())


def square_root(value: Any) -> fmpq | None:
    """The rational square root of a rational, or `None` where it is irrational (or the value is negative).

    >>> square_root(fmpq(9, 4)), square_root(2)
    (3/2, None)
    """
    exact = number(value, name="exact.square_root")
    if exact < 0:
        return None
    top, bottom = math.isqrt(int(exact.p)), math.isqrt(int(exact.q))
    return fmpq(top, bottom) if top * top == exact.p and bottom * bottom == exact.q else None


def square_classes(squares: Sequence[Any]) -> list[tuple[fmpq, list[fmpq]]]:
    """The vector of square roots of positive rationals, split by square class.

    Returns pairs (m, t) with sqrt(squares) = sum of sqrt(m) * t over the pairs, every t rational, no quotient of two
    m a square. Square roots of such m are linearly independent over the rationals (Besicovitch 1940), hence for a
    rational matrix B: sqrt(squares) lies in the real column space of B if and only if every t does. That decides
    membership of irrational vectors by rational arithmetic alone. The class of the rational roots, if any, has m = 1.

    >>> square_classes([4, 2, 9, 8])
    [(1, [2, 0, 3, 0]), (2, [0, 1, 0, 2])]
    """
    values = [number(value, name="exact.square_classes") for value in squares]
    classes: list[tuple[fmpq, list[fmpq]]] = []
    for index, value in enumerate(values):
        for m, part_ in classes:
            root = square_root(value / m)
            if root is not None:
                part_[index] = root
                break
        else:
            own = square_root(value)
            part_ = [fmpq(0)] * len(values)
            part_[index] = fmpq(1) if own is None else own
            classes.append((value if own is None else fmpq(1), part_))
    return classes


def root_scaled(matrix: fmpq_mat, squares: Sequence[Any]) -> tuple[fmpq_mat, int]:
    """diag(sqrt(squares)) * matrix over the field the roots generate, written out as a rational matrix.

    Returns (R, e): every entry became an e x e rational block that multiplies as the field element does, so
    rank R = e * rank(diag(sqrt(squares)) matrix), and rational combinations of the rows act as kron(combination, I_e).
    The field has degree e = 2^k, k the number of square classes that are independent; keep the rows few.

    >>> big, degree = root_scaled(rational([[1, 1], [2, 3]]), [2, 3])
    >>> degree, rank(big) // degree
    (4, 2)
    """
    generators: list[fmpq] = []
    forms: list[tuple[fmpq, int]] = []  # each root as a rational times the product of the generators in a bit set
    for value in (number(square, name="exact.root_scaled") for square in squares):
        for subset in range(1 << len(generators)):
            product = math.prod((g for k, g in enumerate(generators) if subset >> k & 1), start=fmpq(1))
            root = square_root(value / product)
            if root is not None:
                forms.append((root, subset))
                break
        else:
            generators.append(value)
            forms.append((fmpq(1), 1 << (len(generators) - 1)))
    degree = 1 << len(generators)
    blocks = []
    for subset in range(degree):
        block = identity(1)
        for k, g in enumerate(generators):
            root_of_g = from_rows([[fmpq(0), g], [fmpq(1), fmpq(0)]], 2)
            block = kronecker(block, root_of_g if subset >> k & 1 else identity(2))
        blocks.append(block)
    rows = []
    for row, (factor, subset) in zip(matrix.tolist(), forms, strict=True):
        rows.append(kronecker(from_rows([row], matrix.ncols()), blocks[subset] * factor))
    return above(*rows), degree


def text(matrix: Any) -> list[list[str]]:
    """The matrix as rows of strings such as "3/2", for JSON and for copying.

    >>> text([[0.5, 2]])
    [['1/2', '2']]
    """
    return [[str(entry) for entry in row] for row in rational(matrix, name="exact.text").tolist()]
