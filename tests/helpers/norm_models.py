"""Small Transformers whose norms are written in the many ways people write them; `off` runs the same model without any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everybody writes

D, HEADS = 32, 4
Norm = Callable[[Tensor], Tensor]


class Gains(nn.Module):
    """A scale and a shift, and a norm module of their own, for the norms below to use."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(D))
        self.shift = nn.Parameter(0.3 * torch.randn(D))
        self.module = nn.LayerNorm(D)


def _by_hand(x: Tensor, p: Gains) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-5) * p.scale + p.shift


def _centred_first(x: Tensor, p: Gains) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * p.scale + p.shift


def _in_place(x: Tensor, p: Gains) -> Tensor:
    y = x - x.mean(-1, keepdim=True)
    y /= (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y *= p.scale
    y += p.shift
    return y


def _cast(x: Tensor, p: Gains) -> Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * p.scale


def _var_mean(x: Tensor, p: Gains) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * p.scale


WRITTEN: dict[str, tuple[str, Callable[[Tensor, Gains], Tensor]]] = {
    "layer_norm": ("layer", lambda x, p: F.layer_norm(x, (D,), p.scale, p.shift)),
    "native_layer_norm": ("layer", lambda x, p: torch.native_layer_norm(x, (D,), p.scale, p.shift, 1e-5)[0]),
    "rms_norm": ("rms", lambda x, p: F.rms_norm(x, (D,), p.scale)),
    "rms_norm without gains": ("rms", lambda x, p: F.rms_norm(x, (D,))),
    "rms by hand": ("rms", lambda x, p: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * p.scale),
    "rms in another precision": ("rms", _cast),
    "layer by hand": ("layer", _by_hand),
    "layer by hand, centred first": ("layer", _centred_first),
    "layer by hand, in place": ("layer", _in_place),
    "var_mean": ("layer", _var_mean),
    "over its length": ("rms", lambda x, p: x / x.norm(dim=-1, keepdim=True)),
    "normalize": ("rms", lambda x, p: F.normalize(x, dim=-1) * D**0.5 * p.scale),
    "addcmul": ("layer", lambda x, p: torch.addcmul(p.shift, F.layer_norm(x, (D,)), p.scale)),
    "group_norm of one group": (
        "layer",
        lambda x, p: F.group_norm(x.transpose(1, 2), 1, p.scale, p.shift).transpose(1, 2),
    ),
    "a module with a scale behind it": ("layer", lambda x, p: p.module(x) * p.scale),
}


class Attention(nn.Module):
    def __init__(self, inner: Norm | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.inner = nn.Linear(D, 3 * D), nn.Linear(D, D), inner

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.inner is not None:
            q, k = self.inner(q), self.inner(k)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A block that calls `norms[i]` at its i-th place: before attention and MLP, then behind them."""

    def __init__(self, placement: str, norms: list[Norm], inner: Norm | None = None) -> None:
        super().__init__()
        self.placement, self.norms = placement, norms
        self.attention, self.mlp = Attention(inner), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.norms
        if self.placement == "pre":
            x = x + self.attention(first(x))
            return x + self.mlp(second(x))
        if self.placement == "post":
            x = first(x + self.attention(x))
            return second(x + self.mlp(x))
        if self.placement == "sandwich":
            x = x + third(self.attention(first(x)))
            return x + fourth(self.mlp(second(x)))
        if self.placement == "output":
            x = x + third(self.attention(x))
            return x + fourth(self.mlp(x))
        normed = first(x)
        return x + self.attention(normed) + self.mlp(normed)


class Stack(nn.Module):
    """Embedding, blocks, head; `outer` norms behind the embedding and the last block; `off` leaves every norm out."""

    def __init__(
        self,
        placement: str,
        norm: Callable[[Tensor, Gains], Tensor],
        *,
        outer: bool = False,
        between: bool = False,
        inner: Norm | None = None,
    ) -> None:
        super().__init__()
        self.off, self.outer, self.between = False, outer, between
        self.gains = nn.ModuleList(Gains() for _ in range(10))
        self.embedding, self.head = nn.Embedding(50, D), nn.Linear(D, 50)
        self.calls: list[Norm] = [self._switched(norm, gains) for gains in self.gains]
        self.blocks = nn.ModuleList(Block(placement, self.calls[4 * i : 4 * i + 4], inner) for i in range(2))

    def _switched(self, norm: Callable[[Tensor, Gains], Tensor], gains: nn.Module) -> Norm:
        return lambda x: x if self.off else norm(x, gains)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.outer:
            x = self.calls[8](x)
        for block in self.blocks:
            x = block(x)
            if self.between:
                x = self.calls[9](x)
        if self.outer:
            x = self.calls[9](x)
        return self.head(x)


def ids() -> Tensor:
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


class Adaptive(nn.Module):
    """A norm whose scale and shift come from a condition, as a module of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.made = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.made(condition)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class AdaptiveBlock(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.attention, self.mlp = style, Attention(), Mlp()
        self.first, self.second = Adaptive(), Adaptive()
        self.made = nn.Linear(D, 6 * D)
        if style == "zero start":
            nn.init.zeros_(self.made.weight)
            nn.init.zeros_(self.made.bias)

    def _normed(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if self.style == "rms":
            return F.rms_norm(x, (D,)) * (1 + scale) + shift
        if self.style == "film":
            return self.first.norm(x) * (scale + 0.5) + shift
        return self.first.norm(x) * (1 + scale) + shift

    def forward(self, x: Tensor, condition: Tensor, off: bool) -> Tensor:
        if self.style == "module":
            x = x + self.attention(x if off else self.first(x, condition))
            return x + self.mlp(x if off else self.second(x, condition))
        if self.style == "behind":
            x = x + (self.attention(x) if off else self.first(self.attention(x), condition))
            return torch.lerp(x, self.mlp(x) if off else self.second(self.mlp(x), condition), 0.4)
        made = self.made(F.silu(condition))[:, None].chunk(6, -1)
        x = x + made[2] * self.attention(x if off else self._normed(x, made[0], made[1]))
        return x + made[5] * self.mlp(x if off else self._normed(x, made[3], made[4]))


class Conditioned(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.off = False
        self.embedding, self.conditions, self.head = nn.Embedding(50, D), nn.Embedding(5, D), nn.Linear(D, 50)
        self.blocks = nn.ModuleList(AdaptiveBlock(style) for _ in range(2))

    def forward(self, input_ids: Tensor, label: Tensor) -> Tensor:
        x, condition = self.embedding(input_ids), self.conditions(label)
        for block in self.blocks:
            x = block(x, condition, self.off)
        return self.head(x)


class OwnForward(nn.Module):
    """Blocks whose forward is given as a function of the block, the stream and the norm in force."""

    def __init__(
        self,
        forward: Callable[[nn.Module, Tensor, Norm], Tensor],
        norm: Norm,
        parts: Callable[[], dict[str, nn.Module]],
    ) -> None:
        super().__init__()
        self.off, self.norm = False, norm
        self.embedding, self.head = nn.Embedding(50, D), nn.Linear(D, 50)

        class One(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, part in parts().items():
                    setattr(self, name, part)
                self.gain = nn.Parameter(torch.full((D,), 0.3))
                self.table = nn.Parameter(torch.randn(16, D))
                self.weight = nn.Parameter(torch.randn(D, D))

            def forward(self, x: Tensor, norm: Norm) -> Tensor:
                return forward(self, x, norm)

        self.blocks = nn.ModuleList(One() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, (lambda y: y) if self.off else self.norm)
        return self.head(x)
