"""Exact Jacobians of maps that are affine in every single coordinate, and the dimension of what they cannot see.

Products of weight matrices are of that kind: changing one entry changes the output linearly. A unit step then is the
derivative, with nothing left over, and the rank of the Jacobian is an exact integer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flint import fmpq, fmpq_mat

from uncollapse.measures import exact

Values = list[Any]


def jacobian(function: Callable[[Values], Values], point: Sequence[Any]) -> fmpq_mat:
    """One column a coordinate: f(point + e_i) - f(point). Exact where f is affine in each coordinate alone."""
    here = function(list(point))
    columns = []
    for index in range(len(point)):
        stepped = list(point)
        stepped[index] = stepped[index] + 1
        columns.append([after - before for after, before in zip(function(stepped), here, strict=True)])
    return exact.from_rows(columns, len(here)).transpose()


def unseen(function: Callable[[Values], Values], point: Sequence[Any]) -> int:
    """The dimension of the kernel of the Jacobian: directions of the parameters that leave the output where it is."""
    return exact.null_dimension(jacobian(function, point))


def matrices(values: Sequence[Any], *shapes: tuple[int, int]) -> list[fmpq_mat]:
    """The flat values cut into matrices of these shapes, in order."""
    cut, start = [], 0
    for rows, columns in shapes:
        cut.append(fmpq_mat(rows, columns, list(values[start : start + rows * columns])))
        start += rows * columns
    return cut


def flat(*blocks: fmpq_mat) -> list[fmpq]:
    """All entries, block by block, row by row."""
    return [entry for block in blocks for entry in block.entries()]


def between(
    function: Callable[[Values], Values], point: Sequence[Any], moves: Sequence[Sequence[Any]]
) -> tuple[int, int]:
    """(lower, upper) bound of the dimension of the gauge at a generic point.

    The kernel of the Jacobian on finitely many probes can only be too large; the independent `moves` that do lie in the
    kernel for an algebraic reason are certainly there.
    """
    slope = jacobian(function, point)
    if not moves:
        return 0, exact.null_dimension(slope)
    columns = exact.from_rows([list(move) for move in moves], len(point)).transpose()
    invisible = [
        list(move) for move, image in zip(moves, (slope * columns).transpose().tolist(), strict=True) if not any(image)
    ]
    return exact.rank(exact.from_rows(invisible, len(point))), exact.null_dimension(slope)


def generic(bounds: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bounds at a generic point from those at several: degenerate draws only lose moves and enlarge kernels."""
    return max(lower for lower, _ in bounds), min(upper for _, upper in bounds)
