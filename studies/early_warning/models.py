"""A small language model in plain PyTorch, with the switches that make it fail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 128  # ASCII


@dataclass(frozen=True)
class Shape:
    """How the model is built. `post`: the norm stands behind the residual addition; `bounded`: queries and keys are normalised."""

    blocks: int = 4
    width: int = 48
    heads: int = 4
    tokens: int = 48
    post: bool = False
    bounded: bool = False
    mlp: bool = True


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.read = nn.Linear(shape.width, 3 * shape.width)
        self.write = nn.Linear(shape.width, shape.width)
        head = shape.width // shape.heads
        self.norms = nn.ModuleList(nn.LayerNorm(head) for _ in range(2)) if shape.bounded else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.read(x).chunk(3, -1))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.write(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.post = shape.post
        self.attention = Attention(shape)
        self.mlp = (
            nn.Sequential(nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width))
            if shape.mlp
            else None
        )
        self.first, self.second = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.first(x + self.attention(x))
            return x if self.mlp is None else self.second(x + self.mlp(x))
        x = x + self.attention(self.first(x))
        return x if self.mlp is None else x + self.mlp(self.second(x))


class LanguageModel(nn.Module):
    """Characters in, next characters out. Weights are drawn with standard deviation 0.02, as in GPT-2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.Identity() if shape.post else nn.LayerNorm(shape.width)
        self.predict = nn.Linear(shape.width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("write.weight", "mlp.2.weight")) and not shape.post
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.blocks) if deep else 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))
