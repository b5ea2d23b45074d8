"""How large vectors are, at the cost of reading them once.

When not to use it: for a difference of sizes. What the two have in common takes its digits away.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY, HUGE = 1e-12, 1e18  # between them single precision keeps the squares of a vector


def single(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norms(x: Tensor) -> Tensor:
    """Of the vectors along the last axis, in float64: from squares in the format at hand, or in float64 where these might leave its
    range."""
    found = as_they_are(x, torch.promote_types(x.dtype, torch.float32))
    if x.dtype != torch.float64 and x.numel() and not within_reach(found):
        found = as_they_are(x.double())
    return found.double()


def within_reach(sizes: Tensor) -> bool:
    """Whether single precision keeps the squares of vectors of all these sizes. NaN and 0 are none of them."""
    low, high = sizes.aminmax()
    return float(low) > TINY and float(high) < HUGE


def as_they_are(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`norms` in the format of `x` or another one, whatever its squares are there. Vectors are read as they lie in memory: heads
    that are split off a width lie beside each other, and one head after another costs up to five times as much."""
    strides = x.stride()[:-1]
    order = sorted(range(x.ndim - 1), key=strides.__getitem__, reverse=True)
    if order == list(range(x.ndim - 1)):
        plain: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
        return plain
    found: Tensor = torch.linalg.vector_norm(x.permute(*order, x.ndim - 1), dim=-1, dtype=dtype)
    return found.permute(*(order.index(axis) for axis in range(x.ndim - 1)))
