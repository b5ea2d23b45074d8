"""The noise gains of output projections whose numbers are random: what the gain of a trained one is compared with.

A large gain is not the work of training. The stacked write spaces of a square random projection have a smallest singular value of
about 1/d, so their gain grows with the width. When not to use it: as a bound. A trained projection may be better or worse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from uncollapse.errors import InputError

_DRAWN_AT_MOST = 128  # dimensions of one draw; 256 of them take a second then


class RandomGain(NamedTuple):
    """The 5 %, 50 % and 95 % points of the noise gains of random projections: `together` of `heads.conditioning`, `single` of
    `heads.head_noise_gain`."""

    together: tuple[float, float, float]
    single: tuple[float, float, float]


@functools.cache
def random_noise_gain(heads: int, head_width: int, width: int) -> RandomGain:
    """The noise gains that an output projection of this size has if its numbers are random. What to compare a gain with.

    Entries independent and normal; only the write spaces matter, so any law that is invariant under rotation gives the same.
    From 256 draws with a fixed seed. With D = H d_k = d above 128 from the law at the hard edge of the spectrum instead, which
    the draws come to as the stream grows wide: P(x <= t) = 1 - exp(-t/2 - sqrt t), conditioning 2 d (1 - 1/H) / sqrt x, and the
    gain of a head sqrt(d_k (d - d_k)) / sqrt x (docs/theory.md). With 128 < D < d the draws are smaller, in the same proportions;
    their points lie further apart than the true ones.

    All 1 for a single head; infinite where D > d, for random weights and any others.

    A gain like that of random numbers is nothing that training brought about, and it is not small: it grows with the width.

    >>> [round(gain) for gain in random_noise_gain(12, 32, 384).together]
    [428, 1292, 14068]

    Edelman, Eigenvalues and condition numbers of random matrices, 1988, for the law. Raises `InputError` for sizes below 1.
    """
    if min(heads, head_width, width) < 1:
        raise InputError(
            f"random_noise_gain: expected sizes of at least 1, got heads={heads}, head_width={head_width}, width={width}. "
            "The projection may not have been read. Pass the sizes of the output projection."
        )
    mixed = heads * head_width
    if mixed > width:
        return RandomGain((math.inf,) * 3, (math.inf,) * 3)
    if heads == 1:
        return RandomGain((1.0,) * 3, (1.0,) * 3)
    if mixed == width > _DRAWN_AT_MOST:
        roots = [
            math.sqrt(1 - 2 * math.log(above)) - 1 for above in (0.05, 0.5, 0.95)
        ]  # sqrt x of each share, the largest first
        together, single = 2 * width * (1 - 1 / heads), math.sqrt(head_width * (width - head_width))
        return RandomGain(*((g / roots[0], g / roots[1], g / roots[2]) for g in (together, single)))
    import torch  # here, so that a page can be drawn from a record without it

    size = head_width if mixed <= _DRAWN_AT_MOST else max(1, _DRAWN_AT_MOST // heads)
    stream = round(width * size / head_width)  # no less than heads * size, since width is no less than mixed
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(256, heads, size, stream, generator=generator, dtype=torch.float64)
    bases = torch.linalg.solve_triangular(torch.linalg.cholesky(W @ W.mT), W, upper=False).flatten(1, 2)
    squares, left = torch.linalg.eigh(bases @ bases.mT)
    kappa = (squares[:, -1] / squares[:, 0]).sqrt()
    alone = torch.linalg.matrix_norm((left / squares.sqrt()[:, None]).unflatten(1, (heads, size)), 2).flatten()
    points = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    together_low, together_middle, together_high = kappa.quantile(points).tolist()
    low, middle, high = alone.quantile(points).tolist()
    return RandomGain((together_low, together_middle, together_high), (low, middle, high))


def random_write_space_overlap(head_width: int, width: int) -> tuple[float, float]:
    """Mean and standard deviation of the overlap of two heads' write spaces (`heads.write_space_overlap`) under random weights.

    r = min(d_k, d) dimensions of d in random position: mean r/d, variance 2 (d - r)^2 / (d^2 (d - 1)(d + 2)), exact. That is
    ||P Q||_F^2 / r for two random projections of rank r, of which one may be fixed: the second moment of a Grassmannian.

    >>> random_write_space_overlap(64, 768)[0]
    0.08333333333333333

    Raises `InputError` for sizes below 1.
    """
    if min(head_width, width) < 1:
        raise InputError(
            f"random_write_space_overlap: expected sizes of at least 1, got head_width={head_width}, width={width}. "
            "The projection may not have been read. Pass the sizes of the output projection."
        )
    share = min(head_width, width) / width
    return share, 0.0 if share == 1 else (1 - share) * math.sqrt(2 / ((width - 1) * (width + 2)))


def beside_random(gain: float, random: Sequence[float]) -> str:
    """A noise gain beside that of random projections, in words: below the 5 % point, between, or above the 95 % point.

    >>> beside_random(44.0, (428.0, 1292.0, 14068.0)), beside_random(1000.0, (428.0, 1292.0, 14068.0))
    ('better than random', 'as random')
    """
    if gain < random[0]:
        return "better than random"
    return "worse than random" if gain > random[-1] else "as random"
