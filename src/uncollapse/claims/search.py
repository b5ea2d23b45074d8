"""The smallest integer matrix with a property, by exhaustion: how the stored counterexamples were found and are kept.

Small means: fewest entries first, then the smallest sum of absolute entries, then the fewest tokens, then the first in
lexicographic order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from flint import fmpq_mat


def candidates(shapes: Iterable[tuple[int, int]], entries: Iterable[int]) -> Iterator[fmpq_mat]:
    """All integer matrices of these shapes with these entries, smallest first."""
    alphabet = sorted(entries, key=lambda entry: (abs(entry), -entry))
    for size, group in itertools.groupby(sorted(shapes, key=lambda s: (s[0] * s[1], s[0])), lambda s: s[0] * s[1]):
        fillings = sorted(itertools.product(alphabet, repeat=size), key=lambda filling: sum(map(abs, filling)))
        by_weight = itertools.groupby(fillings, key=lambda filling: sum(map(abs, filling)))
        kept = list(group)
        for _, same in by_weight:
            together = list(same)
            for rows, columns in kept:
                for filling in together:
                    yield fmpq_mat(rows, columns, list(filling))


def smallest(
    shapes: Iterable[tuple[int, int]], entries: Iterable[int], has: Callable[[fmpq_mat], bool]
) -> fmpq_mat | None:
    """The first candidate with the property, or None."""
    return next((matrix for matrix in candidates(shapes, entries) if has(matrix)), None)
