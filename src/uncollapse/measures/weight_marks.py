"""By what weights are known again, so that what they say is computed once for each state of them.

When not to use it: against somebody who wants to deceive. The marks are sums, not a cryptographic hash.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Marks = tuple[Tensor, Tensor]


def weight_marks(matrix: Tensor) -> Marks:
    """By what a matrix is known again, in two readings of it: the sums of its rows' bits, and a random mixture of its columns.

    No version counter is asked. Writing through `.data` does not move it, and a new tensor may lie where the old one lay.
    """
    laid = matrix.T if matrix.T.is_contiguous() else matrix.contiguous()
    width, size = laid.shape[1], laid.element_size()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[math.gcd(width * size, laid.storage_offset() * size, 8)]
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, generator=generator, dtype=torch.float64).to(laid.device, laid.dtype)
    return laid.view(whole).sum(1, dtype=torch.int64), laid @ mixing


def are_alike(first: Marks, second: Marks) -> bool:
    """Whether two marks are those of the same weights, on the same device."""
    return all(a.device == b.device and torch.equal(a, b) for a, b in zip(first, second, strict=True))
