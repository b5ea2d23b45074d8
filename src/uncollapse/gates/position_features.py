"""Positions of tokens, and fixed features of them that are right at any position.

When not to use it: for positions that are no whole numbers, or differ in more than one axis (rotary positions of pictures).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

BASE = 10_000.0  # of the wavelengths, from 2π to 2π·BASE: Vaswani et al., arXiv 1706.03762, section 3.5


@dataclass(frozen=True)
class Positions:
    """`values` [row] are positions; `index` [batch, token] says which of them a token has. Without an index the values are those
    of the tokens, the same for every sequence; `start` is the first of them if they count on from there."""

    values: Tensor
    index: Tensor | None = None
    start: int | None = None
    _sinusoids: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def counted(cls, start: int, tokens: int, device: torch.device) -> Positions:
        """start, start + 1, …, for all sequences alike."""
        return cls(torch.arange(start, start + tokens, device=device), start=start)

    @classmethod
    def of(cls, positions: Int[Tensor, "*batch token"]) -> Positions:
        """Given positions, [token] or [batch, token]: each worked on once."""
        if positions.ndim > 1:
            values, index = positions.unique(return_inverse=True)
            if not bool((index == index[:1]).all()):
                return cls(values, index)
            positions = positions[0]
        if len(positions) and bool((positions.diff() == 1).all()):
            return cls.counted(int(positions[0]), len(positions), positions.device)
        return cls(positions)

    def sinusoids(self, width: int, dtype: torch.dtype) -> Tensor:
        """`sinusoids` of the values, made once a pass for all layers that ask."""
        known = self._sinusoids.get((width, dtype))
        if known is None:
            if self.start is None:
                known = sinusoids(self.values, width).to(dtype)
            else:
                known = _counted_sinusoids(self.start, len(self.values), width, dtype, self.values.device)
            self._sinusoids[width, dtype] = known
        return known


def sinusoids(positions: Int[Tensor, " row"], width: int) -> Tensor:
    """Fixed features of positions, [row, width] in float64: sin(i ω_k), cos(i ω_k) in turns, ω_k = 10000^(-2k/width).

    Right to 1e-9 for positions up to 10⁶: the angle is formed in float64. Of an odd width the last is a sine.

    >>> sinusoids(torch.tensor([0, 1]), width=2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]], dtype=torch.float64)
    """
    device = positions.device
    exact = positions.cpu() if device.type == "mps" else positions  # which has no float64
    frequency = BASE ** -(torch.arange(0, width, 2, device=exact.device, dtype=torch.float64) / width)
    angle = exact.double()[:, None] * frequency
    features = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[:, :width]
    return features.float().to(device) if device.type == "mps" else features


@functools.lru_cache(maxsize=4)
def _counted_sinusoids(start: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what one pass leaves here must be fit for training in another
        return sinusoids(torch.arange(start, start + tokens, device=device), width).to(dtype)
