"""A live norm layer's own gamma, beta and eps, found by running it, and the three brackets of its change of rank.

There is no table of names: some layers multiply by 1 + weight, some have no weight, some name their eps differently. The
result is compared with what the layer did to real tokens (`NormLaw.holds`) before it is used.

When not to use it: for a layer that does not behave like a norm, or for a matrix of your own, which
`normalization.rank_change` takes directly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.anatomy.offloaded_weights import held_weights
from uncollapse.anatomy.sharded_weights import whole_weights
from uncollapse.errors import InputError
from uncollapse.measures import normalization
from uncollapse.measures.storage_noise import storage_noise

_EPS_64 = torch.finfo(torch.float64).eps


class Images(NamedTuple):
    """What a norm made of sequences. `holds`: whether it made it by its law. [sequence] each: `full`, whether the image without
    beta has every rank that it can have; its `rank` and `affine_rank` then; `given_affine`, that of the output itself, NaN where it
    does not follow."""

    holds: bool
    full: Tensor
    rank: Tensor
    affine_rank: Tensor
    given_affine: Tensor


@dataclass(frozen=True)
class NormLaw:
    """A norm layer as gamma * (x P) / s + beta, s^2 = var + eps (P = I and the mean square for `rms`), found by running it."""

    kind: Literal["layer", "rms"]
    gamma: Tensor
    beta: Tensor
    eps: float

    def normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output without beta in float64, and what the error of an entry is relative to: the entry before the
        mean was removed, and the mean."""
        x = x.double()
        gamma = self.gamma.to(x.device)
        centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        scale = gamma / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        origin = x.abs() + (x.abs().mean(-1, keepdim=True) if self.kind == "layer" else 0)
        return centred * scale, origin * scale.abs()

    def holds(self, x: Tensor, y: Tensor, precision: torch.dtype) -> bool:
        """Whether the layer made tokens `y` [token, width] of `x`, up to a few roundings. All finite. Roundings of single
        precision at least: many layers compute in that, whatever they are given."""
        if x.shape != y.shape:
            return False
        normed, origin = self.normed(x)
        beta = self.beta.to(x.device)
        error = (y.double() - normed - beta).square().sum().sqrt()
        rounding = max(torch.finfo(precision).eps, torch.finfo(torch.float32).eps)
        return bool(error <= 16 * rounding * (origin + beta.abs()).square().sum().sqrt())

    def brackets(self, x: Tensor, before: normalization.Ranks, precision: torch.dtype) -> tuple[int, int, int] | None:
        """The three brackets of `normalization.rank_change` for the tokens `x` [token, width] of known ranks.

        A norm's image mostly has every rank it can have, which one Cholesky factorisation certifies with room to spare;
        the singular values decide the rest. None where the ranks before and after cannot be compared: where tokens so large
        that the others are below the tolerance hide directions that the norm shows, or where it divides by 0.
        """
        tokens, width = x.shape
        normed, origin = self.normed(x)
        eps = torch.finfo(precision).eps
        size = origin.square().sum().sqrt()
        # Above the cut of `rank_change`, whose doubts about rounding it shares.
        cut = storage_noise(eps, size, tokens, width) + 4 * (tokens + width) * _EPS_64 * size
        least = torch.maximum((2 * cut).square(), 64 * max(tokens, width) * _EPS_64 * normed.square().sum())
        kernel = self._kernel().to(x.device)
        most = width - len(kernel)
        centred = normed - normed.mean(0)
        if tokens <= most:
            full, image = _exceeds(normed @ normed.mT, least), normalization.Ranks(tokens, tokens - 1)
        else:
            filling = normed.square().sum() * kernel.mT @ kernel  # lifts what no norm can fill
            full = all(_exceeds(each.mT @ each + filling, least) for each in (normed, centred))
            image = normalization.Ranks(most, most)
        if full:
            found = before.rank - before.affine_rank, image.rank - image.affine_rank, before.rank - image.rank
        else:
            try:
                found = normalization.rank_change(
                    x, gamma=self.gamma, eps=self.eps, kind=self.kind, precision=precision
                ).brackets
            except InputError:
                return None
        return found if min(found) >= 0 and max(found[:2]) <= 1 else None

    def images(self, x: Tensor, y: Tensor, real: Tensor, precision: torch.dtype) -> Images:
        """`holds` for all tokens, and for each sequence of `x` [sequence, token, width] with the output `y` the certificate of
        `brackets`. `real` [sequence, token] marks tokens that are real and finite."""
        real = real.unsqueeze(-1)
        x, y = torch.where(real, x, 0).double(), torch.where(real, y, 0).double()
        gamma, beta = self.gamma.to(x.device), self.beta.to(x.device)
        width, count = x.shape[-1], real.sum((-2, -1))
        sizes = x.abs()
        weights = torch.stack([gamma.square(), (gamma * beta).abs()], -1)
        squared, crossed = (x.square() @ weights[:, 0]).unsqueeze(-1), sizes @ weights
        scale = x.square().mean(-1, keepdim=True)
        if self.kind == "layer":
            mean = sizes.mean(-1, keepdim=True)
            squared = squared + 2 * mean * crossed[..., :1] + mean.square() * weights[:, 0].sum()
            crossed = crossed[..., 1:] + mean * weights[:, 1].sum()
            x = x - x.mean(-1, keepdim=True)
            scale = x.square().mean(-1, keepdim=True)
        else:
            crossed = crossed[..., 1:]
        scale = torch.where(real, (scale + self.eps).rsqrt(), 0)
        normed = x * scale * gamma
        squared, crossed = squared * scale.square(), crossed * scale
        # As in `holds`: ||origin + |beta|||_F over all tokens.
        allowed = (squared + 2 * crossed + real * beta.square().sum()).sum()
        apart = torch.where(real, y - normed - beta, 0).square().sum((-2, -1))
        rounding = max(torch.finfo(precision).eps, torch.finfo(torch.float32).eps)
        holds = bool(apart.sum() <= (16 * rounding) ** 2 * allowed)
        eps = torch.finfo(precision).eps
        n, size = count.clamp(min=1).double(), squared.sum((-2, -1)).sqrt()
        cut = storage_noise(eps, size, n, width) + 4 * (n + width) * _EPS_64 * size
        energy = normed.square().sum((-2, -1))
        # The output has its own tolerance (`geometry.rank`), and differs from the law by rounding: it has the rank as well where
        # the image is above both.
        output = y.square().sum((-2, -1)).sqrt()
        storage = storage_noise(eps, output, n, width)
        own = storage + (n + width) * _EPS_64 * output + apart.sqrt()
        least = torch.maximum((2 * cut).square(), 64 * max(x.shape[-2:]) * _EPS_64 * energy)
        more = torch.maximum(least, 2 * own.square())
        kernel = self._kernel().to(x.device)
        most = width - len(kernel)
        usable = (count > 0) & energy.isfinite() & (energy > 0)
        if x.shape[-2] <= most:
            gram = normed @ normed.mT
            gram = gram + torch.diag_embed((~real[..., 0]) * (1 + energy + more).unsqueeze(-1))
            full = usable & _all_exceed(gram, least)
            rank, affine = count.double(), (count - 1).double()
            given = affine.masked_fill(~(full & _all_exceed(gram, more)), math.nan)
        else:
            gram = normed.mT @ normed
            total = normed.sum(-2)
            filling = energy[:, None, None] * (kernel.mT @ kernel)
            centred = gram - total.unsqueeze(-1) * (total / n.unsqueeze(-1)).unsqueeze(-2)
            full = usable & (count > most) & _all_exceed(gram + filling, least) & _all_exceed(centred + filling, least)
            rank = affine = torch.full_like(energy, most)
            given = self._given_affine_rank(y, real, kernel, centred + filling, energy, storage, own, apart, full)
        return Images(holds, full, rank, affine, given)

    @staticmethod
    def _given_affine_rank(
        y: Tensor,
        real: Tensor,
        kernel: Tensor,
        filled: Tensor,
        energy: Tensor,
        storage: Tensor,
        own: Tensor,
        apart: Tensor,
        full: Tensor,
    ) -> Tensor:
        """The affine rank of outputs with more tokens than features, NaN where it is not certain. Off the kernel K all eigenvalues
        of M, that of Y^T C Y, are above some mu, as a Cholesky factor says. Along it there is rounding only, and the rest explains
        a part of that: what is left for v = (K - w) / ||K - w|| is above the tolerance, or below. Below, it is no rank: no least
        singular value is larger than ||C Y v||. Above, it is one: with s = ||C Y (K - w)||^2 less ||g||^2 / mu, g its gradient by
        w, the squared distance to the rest, all eigenvalues are at least 1 / ((1 + ||w||^2) / s + d / mu), the inverse's trace.
        """
        n = real.sum((-2, -1)).clamp(min=1).double()
        width = y.shape[-1]
        least = torch.maximum(1e-4 * energy / width, 8 * own.square())
        mu = (least.sqrt() - apart.sqrt()).square()
        identity = torch.eye(width, dtype=filled.dtype, device=filled.device)
        factor, info = torch.linalg.cholesky_ex(filled - least[:, None, None] * identity)
        certain = full & (info == 0)
        if not len(kernel):
            return torch.full_like(energy, width).masked_fill(~certain, math.nan)
        if len(kernel) > 1 or not bool(certain.any()):
            return torch.full_like(energy, math.nan)

        def centred(x: Tensor) -> Tensor:
            return torch.where(real, x - x.sum(-2, keepdim=True) / n[:, None, None], 0)

        factor = torch.where(certain[:, None, None], factor, identity)
        along = centred(y @ kernel.mT)
        w = torch.cholesky_solve((along.mT @ y).mT, factor)
        w = w - kernel.mT @ (kernel @ w)
        left = centred(y @ (kernel.mT - w))
        length, size = 1 + w.square().sum((-2, -1)), left.square().sum((-2, -1))
        lacking = (size / length).sqrt() < 0.999 * storage
        gradient = (left.mT @ y).mT
        gradient = (gradient - kernel.mT @ (kernel @ gradient)).square().sum((-2, -1))
        distance = size - gradient / mu
        lowest = 1 / (1.001 * (length + gradient / mu.square()) / distance + width / mu)
        there = (distance > 0) & (lowest.sqrt() > 1.001 * (own - apart.sqrt()))
        found = torch.where(lacking, width - 1.0, float(width)).to(energy)
        return found.masked_fill(~(certain & (lacking | there)), math.nan)

    def _kernel(self) -> Tensor:
        """An orthonormal basis, in rows, of the features' directions that no output (without beta) has a part in."""
        zero = (self.gamma == 0).nonzero().flatten()
        if self.kind == "layer" and not len(zero):
            return (1 / self.gamma / torch.linalg.vector_norm(1 / self.gamma)).unsqueeze(0)
        return torch.eye(len(self.gamma), dtype=torch.float64)[zero]


def _exceeds(gram: Tensor, least: Tensor) -> bool:
    """Whether all eigenvalues are above."""
    shifted = gram - least * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return bool(torch.linalg.cholesky_ex(shifted).info == 0)


def _all_exceed(grams: Tensor, least: Tensor) -> Tensor:
    """Of each, whether all eigenvalues are above."""
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    shifted = torch.where(grams.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), grams, 0)
    return torch.linalg.cholesky_ex(shifted - least[:, None, None] * identity).info == 0


def norm_law(
    norm: nn.Module | Callable[[Tensor], Tensor],
    kind: Literal["layer", "rms"],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> NormLaw | None:
    """gamma, beta and eps of a norm (a module or a function) that takes tensors of `shape`, by running it: no names, no
    conventions about them.

    With f(x) = gamma z(x) + beta and z odd, beta is the even part of f and gamma the odd one over z. Tokens of deviation t
    come out smaller by t / sqrt(t^2 + eps), which gives eps; where a number that the module holds agrees, it is that one.
    None where the layer cannot be run on such tokens.

    >>> layer = nn.LayerNorm(8, eps=1e-3)
    >>> law = norm_law(layer, "layer", torch.Size((1, 4, 8)), torch.float32, torch.device("cpu"))
    >>> law.eps, bool((law.gamma - 1).abs().max() < 1e-5), bool(law.beta.abs().max() < 1e-6)
    (0.001, True, True)
    """
    run = norm.forward if isinstance(norm, nn.Module) else norm
    width, rows, size = shape[-1], 8, 64.0
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if kind == "layer":
        tokens = tokens - tokens.mean(-1, keepdim=True)
    tokens = (tokens / tokens.square().mean(-1, keepdim=True).sqrt()).to(dtype)

    def parts(t: float) -> tuple[Tensor, Tensor]:
        x = (t * tokens).reshape(rows, *(1 for _ in shape[1:-1]), width).to(device)
        plus, minus = (run(v).detach().cpu().double().reshape(rows, width) for v in (x, -x))
        return (plus - minus) / 2, (plus + minus) / 2

    try:
        with held_weights(norm) if isinstance(norm, nn.Module) else contextlib.nullcontext():
            odd, even = parts(size)
            z = tokens.double()
            z = z - z.mean(-1, keepdim=True) if kind == "layer" else z
            z = z / z.square().mean(-1, keepdim=True).sqrt()
            gamma, beta = (odd * z).sum(0) / z.square().sum(0), even.mean(0)
            eps = _eps(lambda t: float((parts(t)[0] * odd).sum() / odd.square().sum()))
    except (RuntimeError, ValueError, TypeError):
        return None
    held = vars(norm).values() if isinstance(norm, nn.Module) else ()
    eps = next((v for v in held if isinstance(v, float) and abs(v - eps) <= 0.05 * eps), eps)
    law = NormLaw(kind, gamma * (1 + eps / size**2) ** 0.5, beta, eps)
    return law if all(bool(t.isfinite().all()) for t in (gamma, beta)) and bool(gamma.any()) else None


def proved_law(
    norm: nn.Module | Callable[[Tensor], Tensor], kind: Literal["layer", "rms"], given: Tensor, output: Tensor
) -> NormLaw | None:
    """The `norm_law` of a norm that made `output` of `given`; None where it has none, or made something else."""
    with whole_weights(norm) if isinstance(norm, nn.Module) else contextlib.nullcontext():
        law, width = norm_law(norm, kind, given.shape, given.dtype, given.device), given.shape[-1]
    precision = max(given.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if law is None or not law.holds(given.reshape(-1, width), output.reshape(-1, width), precision):
        return None
    return law


def _eps(shrinkage: Callable[[float], float]) -> float:
    """eps from how much tokens of deviation t are shrunk: r = t / sqrt(t^2 + eps), read off where r is near one half."""
    best, found = 0.45, 0.0
    for power in range(2, 24, 2):
        t = 2.0**-power
        r = shrinkage(t)
        if abs(r - 0.5) < best:
            best, found = abs(r - 0.5), t**2 * (r**-2 - 1)
    return found
