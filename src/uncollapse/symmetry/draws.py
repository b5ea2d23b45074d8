"""Random elements of the groups, well conditioned and from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_SCALE = 1.7  # of a random element, and 1/1.7 the smallest: condition at most 2.9


def signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).double() * 2 - 1


def scales(count: int, generator: torch.Generator) -> Tensor:
    """Positive numbers away from one, between 1.25 and `LARGEST_SCALE` or the inverse of such."""
    low, high = math.log(1.25), math.log(LARGEST_SCALE)
    sizes = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return (sizes * signs(count, generator)).exp()


def well_conditioned(width: int, generator: torch.Generator) -> Tensor:
    """A random matrix with singular values of `scales`: turned at random before and after."""

    def turned() -> Tensor:
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()

    return turned() @ (scales(width, generator)[:, None] * turned())


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order that is not the one it was."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order
