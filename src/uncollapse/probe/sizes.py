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
    found = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    if x.dtype != torch.float64 and x.numel():
        low, high = found.aminmax()
        if not bool((low > TINY) & (high < HUGE)):
            found = torch.linalg.vector_norm(x.double(), dim=-1)
    return found.double()
