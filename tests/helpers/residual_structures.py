"""Small Transformers whose residual streams are written the ways people write them. Each knows its own truth: `off` names the
sublayers that it leaves out itself, and `seen` keeps its stream, at the embedding and behind each block, as it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


class Owned(nn.Module):
    """What every model here has: what it leaves out, and what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.off: set[str] = set()
        self.seen: list[Tensor] = []

    def keep(self, stream: Tensor) -> Tensor:
        self.seen.append(stream.detach().clone())
        return stream


def left_out(model: Owned, batch: dict[str, Tensor], gone: Collection[str]) -> tuple[Tensor, Tensor]:
    """What the model gives, and what it gives when it leaves out these sublayers itself."""
    with torch.no_grad():
        whole = model(**batch)
        model.off = set(gone)
        without: Tensor = model(**batch)
        model.off = set()
    return whole, without


class Block(nn.Module):
    """A pre-norm block; subclasses say how the stream and an update are put together."""

    owner: list[Owned]
    norm1: nn.Module
    norm2: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention(), mlp()
        self.owner = []

    def attend(self, x: Tensor) -> Tensor:
        update = self.attention(self.norm1(x))
        return torch.zeros_like(update) if self.owner and "attention" in self.owner[0].off else update

    def think(self, x: Tensor) -> Tensor:
        update = self.mlp(self.norm2(x))
        return torch.zeros_like(update) if self.owner and "mlp" in self.owner[0].off else update

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x + update

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attend(x))
        return self.add(x, self.think(x))


class Stack(Owned):
    """Token numbers in, blocks one after another."""

    def __init__(self, block: Callable[[], Block], blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, WIDTH)
        made = [block() for _ in range(blocks)]
        for each in made:
            each.owner = [self]
        self.blocks = nn.ModuleList(made)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.keep(self.embed(idx))
        for block in self.blocks:
            x = self.keep(block(x))
        return x


# Scales and spellings --------------------------------------------------------------------------------------------------


class FloatScale(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return 0.8 * x + 0.5 * update


class LearnedScale(Block):
    """A learned residual weight on the stream, the other operand first."""

    def __init__(self) -> None:
        super().__init__()
        self.keeping = nn.Parameter(torch.tensor(0.9))

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return update + self.keeping * x


class FeatureScale(Block):
    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.linspace(0.5, 1.5, WIDTH))
        self.gamma = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return self.alpha * x + self.gamma * update


class ScaleMadeOnTheSpot(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x * torch.full((WIDTH,), 0.7) + update / torch.tensor(2.0)


class AddWithAlpha(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.add(x, update, alpha=0.3)


class AddInPlace(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x.clone().add_(update)


class PlusEquals(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attend(x)
        x += self.think(x)
        return x


class Addcmul(Block):
    """LayerScale as one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.3))

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma, update)


class AddcmulUpdateFirst(Addcmul):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x.addcmul(update, self.gamma)


class Lerp(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.lerp(x, update, 0.25)


class Minus(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return x - update


class StackAndSum(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return torch.stack([x, update]).sum(0)


class SumOfAList(Block):
    def add(self, x: Tensor, update: Tensor) -> Tensor:
        return sum([x, update])  # type: ignore[return-value]


class OutputScale(Block):
    """What leaves the block is scaled once more."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class NormalisedStep(Block):
    """nGPT: a step of learned length from the stream towards the update, and back onto the sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.full((WIDTH,), 0.3))
        self.norm1 = self.norm2 = nn.Identity()
        self.sphere1, self.sphere2 = (nn.RMSNorm(WIDTH, elementwise_affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for name, sphere, update in (("attention", self.sphere1, self.attend), ("mlp", self.sphere2, self.think)):
            x = x + self.step * (update(x) - x)
            x = x if name in self.owner[0].off else sphere(x)  # a sublayer is left out with its own norm
        return x


class HandWrittenNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / centred.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class ParallelByHand(Block):
    """Attention and MLP side by side, behind a norm written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.norm2 = HandWrittenNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x) + self.think(x)


class Highway(Block):
    """g f + (1 - g) x with a gate made from the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gate1, self.gate2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate1(x))
        x = g * self.attend(x) + (1 - g) * x
        g = torch.sigmoid(self.gate2(x))
        return g * self.think(x) + (1 - g) * x


class HighwayLerp(Highway):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.lerp(x, self.attend(x), torch.sigmoid(self.gate1(x)))
        return torch.lerp(x, self.think(x), torch.sigmoid(self.gate2(x)))


# What else is added ----------------------------------------------------------------------------------------------------


class EmbeddingAgain(Block):
    """modded-nanoGPT: x = a x + b x0 at the head of each block, and a value residual in the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.lambdas, self.mixing = nn.Parameter(torch.tensor([1.1, 0.3])), nn.Parameter(torch.tensor(0.6))
        self.norm1 = self.norm2 = nn.RMSNorm(WIDTH, elementwise_affine=False)

    def forward(self, x: Tensor, x0: Tensor, v1: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.attention.qkv(self.norm1(x)).chunk(3, -1))
        v1 = v if v1 is None else v1
        v = (1 - self.mixing) * v + self.mixing * v1.view_as(v)
        q, k = nn.functional.rms_norm(q, (q.shape[-1],)), nn.functional.rms_norm(k, (k.shape[-1],))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        update = self.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + (torch.zeros_like(update) if "attention" in self.owner[0].off else update)
        return x + self.think(x), v1


class ModdedNanoGPT(Stack):
    """With skips from the first half of the blocks to the second, as in a U-net, and a soft cap on the logits."""

    def __init__(self) -> None:
        super().__init__(EmbeddingAgain, 4)
        for block in self.blocks:
            block.mlp = nn.Sequential(nn.Linear(WIDTH, 64), SquaredReLU(), nn.Linear(64, WIDTH))
        self.skip_weights = nn.Parameter(torch.tensor([0.7, 0.4]))
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, idx: Tensor) -> Tensor:
        x = x0 = nn.functional.rms_norm(self.embed(idx), (WIDTH,))
        self.keep(x)
        v1: Tensor | None = None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= 2:
                x = x + self.skip_weights[i - 2] * skips.pop()
            x, v1 = block(x, x0, v1)
            self.keep(x)
            if i < 2:
                skips.append(x)
        return 15 * torch.tanh(self.head(nn.functional.rms_norm(x, (WIDTH,))) / 15)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


def plain_rms(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],))


class NanochatBlock(Block):
    """nanochat: norms without gains as functions, rotary positions and then a norm of queries and keys, fewer keys than queries,
    a value embedding let in by a gate that reads some of the features, ReLU²."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm1, self.norm2, self.attention
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out, self.gate = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(8, HEADS // 2, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64, bias=False), SquaredReLU(), nn.Linear(64, WIDTH, bias=False))

    def forward(self, x: Tensor, values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        given = plain_rms(x)
        q, (k, v) = (
            self.q(given).unflatten(-1, (HEADS, -1)),
            self.kv(given).unflatten(-1, (2, HEADS // 2, -1)).unbind(2),
        )
        v = v + 2 * torch.sigmoid(self.gate(given[..., :8])).unsqueeze(-1) * values.view_as(v)
        cos, sin = rotation
        turned = []
        for t in (q, k):
            first, second = t.chunk(2, -1)
            turned.append(plain_rms(torch.cat([first * cos + second * sin, second * cos - first * sin], -1)))
        q, k, v = (t.transpose(1, 2) for t in (*turned, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        update = self.out(mixed.transpose(1, 2).flatten(2))
        x = x + (torch.zeros_like(update) if "attention" in self.owner[0].off else update)
        update = self.mlp(plain_rms(x))
        return x + (torch.zeros_like(update) if "mlp" in self.owner[0].off else update)


class Nanochat(Stack):
    """With scales of the stream and of the embedding for every layer, in the model's own loop, and a soft cap on the logits."""

    def __init__(self) -> None:
        super().__init__(NanochatBlock)
        self.stream_scales, self.x0_scales = (
            nn.Parameter(torch.tensor([1.0, 0.9, 1.1])),
            nn.Parameter(torch.full((3,), 0.1)),
        )
        self.values, self.head = nn.Embedding(64, WIDTH // 2), nn.Linear(WIDTH, 64, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        angle = torch.arange(idx.shape[1])[:, None] / 100.0 ** (torch.arange(4) / 4)
        rotation = angle.cos()[:, None], angle.sin()[:, None]
        x = x0 = self.keep(plain_rms(self.embed(idx)))
        for i, block in enumerate(self.blocks):
            x = self.keep(block(self.stream_scales[i] * x + self.x0_scales[i] * x0, self.values(idx), rotation))
        return 20 * torch.tanh(self.head(plain_rms(x)) / 20)


class MixesInTheAddition(Block):
    def forward(self, x: Tensor, x0: Tensor) -> Tensor:  # type: ignore[override]
        x = 0.2 * x0 + 0.9 * x + self.attend(x)
        return x + self.think(x)


class MixingStack(Stack):
    def __init__(self) -> None:
        super().__init__(MixesInTheAddition)

    def forward(self, idx: Tensor) -> Tensor:
        x = x0 = self.keep(self.embed(idx))
        for block in self.blocks:
            x = self.keep(block(x, x0))
        return x


class MixtureOfDepths(Block):
    """Only half of the tokens go through the block, chosen by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.inner = nn.Linear(WIDTH, 1), Block()

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, picked = self.router(x).squeeze(-1).topk(x.shape[1] // 2, dim=1)
        picked, order = picked.sort(1)
        return picked, weights.gather(1, order).sigmoid().unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        picked, _ = self.chosen(x)
        places = picked[..., None].expand(-1, -1, WIDTH)
        self.inner.owner = self.owner
        return x.scatter(1, places, self.inner(x.gather(1, places)))


class WeightedMixtureOfDepths(MixtureOfDepths):
    """The router's weight scales each update, and the tokens are put back by their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        picked, weight = self.chosen(x)
        rows = torch.arange(x.shape[0])[:, None]
        some = x[rows, picked]
        some = some + weight * self.attend(some)
        some = some + weight * self.think(some)
        out = x.clone()
        out[rows, picked] = some
        return out


# States ----------------------------------------------------------------------------------------------------------------


@dataclass
class State:
    stream: Tensor
    depth: int = 0


class Pair(NamedTuple):
    stream: Tensor
    other: Tensor


class Plain:
    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


class StateStack(Stack):
    """The stream travels inside a state of the kind `wrap` makes."""

    def __init__(self, wrap: Callable[[Tensor], Any], get: Callable[[Any], Tensor], block: type[Block]) -> None:
        super().__init__(block)
        self.wrap, self.get = wrap, get

    def forward(self, idx: Tensor) -> Tensor:
        state = self.wrap(self.keep(self.embed(idx)))
        for block in self.blocks:
            returned = block(state)
            state = state if returned is None else returned
            self.keep(self.get(state))
        return self.get(state)


class DictBlock(Block):
    def forward(self, state: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"depth": state["depth"] + 1, "x": Block.forward(self, state["x"])}


class NestedBlock(Block):
    def forward(self, state: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"inner": (state["inner"][0], [Block.forward(self, state["inner"][1][0])])}


class DataclassBlock(Block):
    def forward(self, state: State) -> State:  # type: ignore[override]
        return State(Block.forward(self, state.stream), state.depth + 1)


class NamedTupleBlock(Block):
    def forward(self, state: Pair) -> Pair:  # type: ignore[override]
        return Pair(Block.forward(self, state.stream), state.other)


class WritesBlock(Block):
    """Writes into the state and returns nothing."""

    def forward(self, state: Plain) -> None:  # type: ignore[override]
        state.stream = Block.forward(self, state.stream)


class ListBlock(Block):
    def forward(self, state: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
        return [state[0], Block.forward(self, state[1])]


# Additions in the model's own loop -------------------------------------------------------------------------------------


class ViT(Owned):
    """vit-pytorch: a list of pairs, no module is a block."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, WIDTH)
        self.transformer = Pairs(self, depth)

    def forward(self, idx: Tensor) -> Tensor:
        return self.transformer(self.embed(idx))


class PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Pairs(nn.Module):
    def __init__(self, owner: Owned, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([PreNorm(Attention(False)), PreNorm(mlp())]) for _ in range(depth))
        self.norm, self.owner = nn.LayerNorm(WIDTH), [owner]

    def forward(self, x: Tensor) -> Tensor:
        (owner,) = self.owner
        owner.keep(x)
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            attend, think = pair
            x = attend(x) * ("attention" not in owner.off) + x
            x = think(x) * ("mlp" not in owner.off) + x
            owner.keep(x)
        return self.norm(x)


class PostNormLoop(Owned):
    """Everything in one forward, post-norm; `again`: the embedding comes back before every layer."""

    def __init__(self, depth: int = 3, norm: Callable[[], nn.Module] | None = None, *, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, WIDTH)
        self.attentions = nn.ModuleList(Attention() for _ in range(depth))
        self.mlps = nn.ModuleList(mlp() for _ in range(depth))
        made = norm or functools.partial(nn.LayerNorm, WIDTH)
        self.norms = nn.ModuleList(made() for _ in range(2 * depth))
        self.again = nn.Parameter(torch.tensor([0.9, 0.3])) if again else None

    def forward(self, idx: Tensor) -> Tensor:
        x = x0 = self.keep(self.embed(idx))
        for i, (attend, think) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x if self.again is None else self.again[0] * x + self.again[1] * x0
            x = x if "attention" in self.off else self.norms[2 * i](x + attend(x))
            x = x if "mlp" in self.off else self.norms[2 * i + 1](x + think(x))
            self.keep(x)
        return x


class GainedRMS(nn.Module):
    """Llama's RMS norm: the stream, multiplied by what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Residual(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class XTransformers(Owned):
    """x-transformers: one flat list of (norm, layer, residual), attention and feed-forward in turn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), Attention() if i % 2 == 0 else mlp(), Residual()]) for i in range(6)
        )
        self.final = nn.LayerNorm(WIDTH)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.keep(self.embed(idx))
        for i, layers in enumerate(self.layers):
            assert isinstance(layers, nn.ModuleList)
            norm, layer, add = layers
            update = layer(norm(x))
            off = ("mlp" if i % 2 else "attention") in self.off
            x = add(torch.zeros_like(update) if off else update, x)
            if i % 2:
                self.keep(x)
        return self.final(x)


class MixingLoop(Owned):
    """The embedding comes back before every layer of the model's own loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.a, self.b = nn.Parameter(torch.full((3,), 0.9)), nn.Parameter(torch.full((3,), 0.2))

    def forward(self, idx: Tensor) -> Tensor:
        x = x0 = self.keep(self.embed(idx))
        for i, block in enumerate(self.blocks):
            x = self.a[i] * x + self.b[i] * x0
            assert isinstance(block, Block)
            x = x + block.attention(block.norm1(x)) * ("attention" not in self.off)
            x = x + block.mlp(block.norm2(x)) * ("mlp" not in self.off)
            self.keep(x)
        return x


class OneBlockLoop(Owned):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.attention, self.mlp = (
            nn.Embedding(64, WIDTH),
            nn.LayerNorm(WIDTH),
            Attention(),
            mlp(),
        )

    def forward(self, idx: Tensor) -> Tensor:
        x = self.keep(self.embed(idx))
        x = x + self.attention(self.norm(x)) * ("attention" not in self.off)
        return self.keep(x + self.mlp(x) * ("mlp" not in self.off))


class Wrapped(Owned):
    """A model within another, which hands on to it."""

    def __init__(self, inner: Owned) -> None:
        super().__init__()
        self.inner, self.seen = inner, inner.seen

    def forward(self, idx: Tensor) -> Tensor:
        self.inner.off = self.off
        return self.inner(idx)


class WithHead(Stack):
    """One block and a head in one forward: what comes out is no stream."""

    def __init__(self) -> None:
        super().__init__(Block, 1)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(super().forward(idx).transpose(0, 1))


# Several streams side by side ------------------------------------------------------------------------------------------

STREAMS = 3


class HyperConnections(Block):
    """Fixed weights: three streams on an axis of their own, mixed before and behind each sublayer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.read, self.write = (
            nn.Parameter(torch.rand(size)) for size in ((STREAMS, STREAMS), (STREAMS,), (STREAMS,))
        )

    def forward(self, h: Tensor) -> Tensor:
        for sublayer in (self.attend, self.think):
            update = sublayer(torch.einsum("n,btnd->btd", self.read, h))
            h = torch.einsum("mn,btnd->btmd", self.mix, h) + self.write[:, None] * update[:, :, None]
        return h


class DynamicHyperConnection(nn.Module):
    """Zhu et al., Hyper-Connections (2409.19606), algorithm 2: the weights of each token are made from its streams."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.zeros(STREAMS, 1 + STREAMS)
        start[0, 0] = 1
        start[:, 1:] = torch.eye(STREAMS)
        self.static_alpha, self.static_beta = nn.Parameter(start), nn.Parameter(torch.ones(STREAMS))
        self.dynamic_alpha = nn.Parameter(0.3 * torch.randn(WIDTH, 1 + STREAMS))
        self.dynamic_beta = nn.Parameter(0.3 * torch.randn(WIDTH))
        self.alpha_scale, self.beta_scale = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        self.norm = nn.LayerNorm(WIDTH)

    def width(self, h: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(h)
        alpha = torch.tanh(normed @ self.dynamic_alpha) * self.alpha_scale + self.static_alpha
        beta = torch.tanh(normed @ self.dynamic_beta) * self.beta_scale + self.static_beta
        return alpha.transpose(-1, -2) @ h, beta

    def depth(self, mixed: Tensor, update: Tensor, beta: Tensor) -> Tensor:
        return torch.einsum("btd,btn->btnd", update, beta) + mixed[..., 1:, :]


class DynamicHyperConnections(Block):
    def __init__(self) -> None:
        super().__init__()
        self.connections = nn.ModuleList(DynamicHyperConnection() for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for connection, sublayer in zip(self.connections, (self.attend, self.think), strict=True):
            assert isinstance(connection, DynamicHyperConnection)
            mixed, beta = connection.width(h)
            h = connection.depth(mixed, sublayer(mixed[..., 0, :]), beta)
        return h


class FoldedHyperConnections(DynamicHyperConnections):
    """The streams of a sequence one after another along the first axis, as in the package hyper-connections."""

    def forward(self, h: Tensor) -> Tensor:
        for connection, sublayer in zip(self.connections, (self.attend, self.think), strict=True):
            assert isinstance(connection, DynamicHyperConnection)
            mixed, beta = connection.width(h.unflatten(0, (-1, STREAMS)).movedim(1, 2))
            update = sublayer(mixed[..., 0, :])
            written = torch.einsum("btd,btn->btnd", update, beta).movedim(2, 1).flatten(0, 1)
            h = written + mixed[..., 1:, :].movedim(2, 1).flatten(0, 1)
        return h


class ManifoldConstrained(Block):
    """mHC (2512.24880): weights from all streams of a token together; the mixture is doubly stochastic, by Sinkhorn's iteration."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (STREAMS, STREAMS, STREAMS * STREAMS)
        self.maps = nn.ParameterList(0.1 * torch.randn(STREAMS * WIDTH, sum(sizes)) for _ in range(2))
        self.bias = nn.ParameterList(torch.randn(sum(sizes)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for i, sublayer in enumerate((self.attend, self.think)):
            made = 0.5 * (nn.functional.rms_norm(h.flatten(-2), (STREAMS * WIDTH,)) @ self.maps[i]) + self.bias[i]
            pre, post, mix = made.split((STREAMS, STREAMS, STREAMS * STREAMS), -1)
            mix = mix.unflatten(-1, (STREAMS, STREAMS)).exp()
            for _ in range(5):
                mix = mix / mix.sum(-1, keepdim=True)
                mix = mix / mix.sum(-2, keepdim=True)
            update = sublayer((pre.sigmoid().unsqueeze(-2) @ h).squeeze(-2))
            h = mix @ h + 2 * post.sigmoid().unsqueeze(-1) * update.unsqueeze(-2)
        return h


class Independent(Block):
    """HY-V4: a sublayer reads the sum of the streams, weighed per token, and writes to each of them. None is mixed on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterList(0.1 * torch.randn(STREAMS * WIDTH, 2 * STREAMS) for _ in range(2))
        self.bias = nn.ParameterList(torch.randn(2 * STREAMS) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for i, sublayer in enumerate((self.attend, self.think)):
            made = nn.functional.rms_norm(h.flatten(2), (STREAMS * WIDTH,)) @ self.maps[i] + self.bias[i]
            pre, post = made.split(STREAMS, -1)
            update = sublayer(torch.sum(pre.sigmoid().unsqueeze(-1) * h, dim=2))
            h = 2 * post.sigmoid().unsqueeze(-1) * update.unsqueeze(-2) + h
        return h


class StreamsFirst(HyperConnections):
    """The axis of the streams comes first."""

    def forward(self, h: Tensor) -> Tensor:
        for sublayer in (self.attend, self.think):
            update = sublayer((self.read[:, None, None, None] * h).sum(0))
            h = torch.einsum("mn,nbtd->mbtd", self.mix, h) + torch.einsum("n,btd->nbtd", self.write, update)
        return h


class HyperConnected(Stack):
    """Copies of the embedding, and at the end their sum."""

    def __init__(self, block: Callable[[], Block] = HyperConnections) -> None:
        super().__init__(block)
        self.scales = nn.Parameter(torch.rand(STREAMS, 1) + 0.5)

    def expanded(self, x: Tensor) -> Tensor:
        return x[:, :, None] * self.scales

    def reduced(self, h: Tensor) -> Tensor:
        return h.sum(2)

    def side_by_side(self, h: Tensor) -> Tensor:
        """As [sequence, token, stream, width]."""
        return h

    def forward(self, idx: Tensor) -> Tensor:
        h = self.expanded(self.embed(idx))
        self.keep(self.side_by_side(h))
        for block in self.blocks:
            h = block(h)
            self.keep(self.side_by_side(h))
        return self.reduced(h)


class FoldedHyperConnected(HyperConnected):
    def __init__(self) -> None:
        super().__init__(FoldedHyperConnections)

    def expanded(self, x: Tensor) -> Tensor:
        return super().expanded(x).movedim(2, 1).flatten(0, 1)

    def reduced(self, h: Tensor) -> Tensor:
        return h.unflatten(0, (-1, STREAMS)).sum(1)

    def side_by_side(self, h: Tensor) -> Tensor:
        return h.unflatten(0, (-1, STREAMS)).movedim(1, 2)


class StreamsFirstStack(HyperConnected):
    def __init__(self) -> None:
        super().__init__(StreamsFirst)

    def expanded(self, x: Tensor) -> Tensor:
        return super().expanded(x).movedim(2, 0)

    def reduced(self, h: Tensor) -> Tensor:
        return h.sum(0)

    def side_by_side(self, h: Tensor) -> Tensor:
        return h.movedim(0, 2)


class FlatHyperConnections(HyperConnections):
    """The streams of a token one after another along the features."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.unflatten(-1, (STREAMS, WIDTH))).flatten(2)


class FlatHyperConnected(HyperConnected):
    def __init__(self) -> None:
        super().__init__(FlatHyperConnections)

    def expanded(self, x: Tensor) -> Tensor:
        return super().expanded(x).flatten(2)

    def reduced(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (STREAMS, WIDTH)).sum(2)

    def side_by_side(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (STREAMS, WIDTH))


HYPER_CONNECTED: dict[str, Callable[[], HyperConnected]] = {
    "fixed": HyperConnected,
    "dynamic": functools.partial(HyperConnected, DynamicHyperConnections),
    "folded": FoldedHyperConnected,
    "manifold-constrained": functools.partial(HyperConnected, ManifoldConstrained),
    "independent": functools.partial(HyperConnected, Independent),
    "streams first": StreamsFirstStack,
    "flat": FlatHyperConnected,
}


# What is refused -------------------------------------------------------------------------------------------------------


class InPieces(Block):
    """The second half of the block runs on four tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return torch.cat([piece + self.think(piece) for piece in x.split(4, 1)], 1)


STRUCTURES: dict[str, Callable[[], Owned]] = {
    **{
        block.__name__: functools.partial(Stack, block)
        for block in (
            Block,
            FloatScale,
            LearnedScale,
            FeatureScale,
            ScaleMadeOnTheSpot,
            AddWithAlpha,
            AddInPlace,
            PlusEquals,
            Addcmul,
            AddcmulUpdateFirst,
            Lerp,
            Minus,
            StackAndSum,
            SumOfAList,
            OutputScale,
            NormalisedStep,
            ParallelByHand,
            Highway,
            HighwayLerp,
            MixtureOfDepths,
            WeightedMixtureOfDepths,
        )
    },
    "modded-nanoGPT": ModdedNanoGPT,
    "nanochat": Nanochat,
    "mixing in the addition": MixingStack,
    "dict": lambda: StateStack(lambda x: {"depth": 0, "x": x}, lambda s: s["x"], DictBlock),
    "nested": lambda: StateStack(lambda x: {"inner": (None, [x])}, lambda s: s["inner"][1][0], NestedBlock),
    "dataclass": lambda: StateStack(State, lambda s: s.stream, DataclassBlock),
    "named tuple": lambda: StateStack(lambda x: Pair(x, x * 0), lambda s: s.stream, NamedTupleBlock),
    "written object": lambda: StateStack(Plain, lambda s: s.stream, WritesBlock),
    "list": lambda: StateStack(lambda x: [x * 0, x], lambda s: s[1], ListBlock),
    "vit-pytorch": ViT,
    "post-norm loop": PostNormLoop,
    "one block in a post-norm loop": functools.partial(PostNormLoop, 1),
    "post-norm loop, its own norm, the embedding again": functools.partial(PostNormLoop, 3, GainedRMS, again=True),
    "x-transformers": XTransformers,
    "mixing loop": MixingLoop,
    "one block in a loop": OneBlockLoop,
    "one block in a loop, wrapped": lambda: Wrapped(OneBlockLoop()),
    "one block with a head, wrapped": lambda: Wrapped(WithHead()),
}
