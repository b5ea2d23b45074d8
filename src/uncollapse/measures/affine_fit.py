"""How much of an output no affine map of its input explains, for a stream of tokens: sums in, a held-out share out.

When not to use it: if all tokens fit into memory. `geometry.nonlinear_innovation` takes the tokens themselves and does not
lose digits by squaring.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from uncollapse.measures.storage_noise import storage_noise

HELD_OUT_EVERY = 4  # every so-manyth sequence is to score the fit, the others to make it
_EPS_64 = torch.finfo(torch.float64).eps


class AffineFit:
    """How much of an output no affine map of the input explains: a share of the output's variance on held-out tokens.

    ||Y - XB - 1c||_F^2 / ||Y - 1m||_F^2 over the held-out tokens; (B, c) is the least-squares affine map and m the mean
    output of the other tokens. It is computed from float64 sums over either split: the number of tokens, sum x, sum y,
    X^T X, X^T Y and ||Y||_F^2, all about one origin, the first tokens' mean, for a large common part would swallow the
    digits. Directions of X below its rank tolerance, or below what a decomposition of X^T X can see, are left out.

    0: affine in the input; 1: an affine map says no more than the mean; above 1 it overfitted. Invariant under rotation,
    scale and shift of the output and, short of the cut, under invertible affine maps of the input. NaN where the held-out
    output is constant.

    Misleads like `geometry.nonlinear_innovation`, on few tokens and on massive ones; below 1e-12 or so it is rounding.

    >>> fit, x = AffineFit(), torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(-1)
    >>> fit.add(x[::2], 3 * x[::2] + 2, held_out=False)
    >>> fit.add(x[1::2], 3 * x[1::2] + 2, held_out=True)
    >>> fit.share() < 1e-12
    True

    Source: this project; compare A. Razzhigaev et al., "Your Transformer is Secretly Linear", arXiv 2405.12250.
    """

    def __init__(self) -> None:
        self.origins: tuple[Tensor, Tensor] | None = None
        self.sums: list[Sums | None] = [None, None]
        self.eps = _EPS_64

    def add(self, x: Tensor, y: Tensor, *, held_out: bool) -> None:
        """Take in tokens of `x` [token, feature] and of `y` [token, width], all finite: to make the fit, or to score it."""
        if not len(x):
            return
        self.eps = max(self.eps, torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
        x, y = x.double(), y.double()
        if self.origins is None:
            self.origins = x.mean(0), y.mean(0)
        x, y = x - self.origins[0], y - self.origins[1]
        one = Sums(len(x), x.sum(0), y.sum(0), x.mT @ x, x.mT @ y, y.square().sum())
        known = self.sums[held_out]
        self.sums[held_out] = one if known is None else known.plus(one)

    def move(self, origins: tuple[Tensor, Tensor]) -> None:
        """Count from other origins, of x and of y: the sums of two fits about one origin add up."""
        if self.origins is not None:
            a, m = origins[0].to(self.origins[0]) - self.origins[0], origins[1].to(self.origins[1]) - self.origins[1]
            self.sums = [None if known is None else known.moved(a, m) for known in self.sums]
        self.origins = origins

    def missing(self) -> str | None:
        """Why there is no share, or None if there is one."""
        fitted, scored = self.sums
        if fitted is None or scored is None:
            return f"needs {HELD_OUT_EVERY} sequences or more: one in {HELD_OUT_EVERY} is held out"
        needed = 2 * (len(fitted.x) + 1)
        if fitted.n < needed:
            return f"{fitted.n} tokens to fit, and an affine map of width {len(fitted.x)} wants {needed}"
        return None

    def share(self) -> float:
        """The share of the held-out variance that the fit leaves, once nothing is `missing`."""
        fitted, scored = self.sums
        assert fitted is not None and scored is not None and self.origins is not None  # noqa: PT018 - `missing` was asked
        a, m = fitted.x / fitted.n, fitted.y / fitted.n
        xx, xy, _ = fitted.about(a, m)
        squares, directions = torch.linalg.eigh(xx)
        n, width = fitted.n, len(a)
        energy = xx.trace() + n * (a + self.origins[0]).square().sum()  # of X as it is, not centred
        storage = storage_noise(self.eps, energy.sqrt(), n, width)
        kept = squares > torch.maximum(storage.square(), max(n, width) * _EPS_64 * squares[-1])
        slopes = directions[:, kept] @ ((directions[:, kept].mT @ xy) / squares[kept].unsqueeze(-1))
        xx, xy, total = scored.about(a, m)
        size = total + scored.n * (m + self.origins[1]).square().sum()
        if total <= self.eps**2 * size:  # constant up to rounding: no variance to explain
            return math.nan
        rest = total - 2 * (slopes * xy).sum() + (slopes * (xx @ slopes)).sum()
        return float((rest / total).clamp(min=0))


class Sums(NamedTuple):
    """Over the tokens of one split: their number, sum x, sum y, X^T X, X^T Y, ||Y||_F^2."""

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def plus(self, other: Sums) -> Sums:
        n, (x, y, xx, xy, yy) = self.n + other.n, (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Sums(n, x, y, xx, xy, yy)

    def moved(self, a: Tensor, m: Tensor) -> Sums:
        xx, xy, yy = self.about(a, m)
        return Sums(self.n, self.x - self.n * a, self.y - self.n * m, xx, xy, yy)

    def about(self, a: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X^T X, X^T Y and ||Y||_F^2 with x counted from a and y from m."""
        across = torch.outer(a, self.x)
        xx = self.xx - across - across.mT + self.n * torch.outer(a, a)
        xy = self.xy - torch.outer(self.x, m) - torch.outer(a, self.y) + self.n * torch.outer(a, m)
        return xx, xy, self.yy - 2 * (self.y * m).sum() + self.n * m.square().sum()
