"""What rounding a matrix to its number format may leave in the place of a singular value that is zero."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Size = TypeVar("Size", float, Tensor)


def storage_noise(eps: float, size: Size, rows: float | Tensor, columns: float | Tensor) -> Size:
    """eps ||X||_F (1/sqrt(rows) + 1/sqrt(columns)), for X of the Frobenius norm `size` with entries known to a share `eps`.

    The largest singular value of a random matrix whose entries are as large as the rounding errors of X, taken as independent
    and of one size (Marchenko and Pastur 1967).

    >>> storage_noise(0.01, 2.0, 4, 4)
    0.02
    """
    return eps * size * (rows**-0.5 + columns**-0.5)  # type: ignore[return-value]  # a number as size comes with numbers as rows
