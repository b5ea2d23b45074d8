"""A small language model in plain PyTorch, with the switches that make it fail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 128  # ASCII


@dataclass(frozen=True)
class Shape:
    """How the model is built. `post`: the norm stands behind the residual addition. `bounded`: queries and keys are normalised.
    `wide_start`: Xavier's weights instead of GPT-2's small ones. `attention_only`: neither MLPs nor residual connections."""

    blocks: int = 4
    width: int = 48
    heads: int = 4
    tokens: int = 48
    post: bool = False
    bounded: bool = False
    wide_start: bool = False
    attention_only: bool = False


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
    kept: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.post = shape.post
        self.attention, self.first = Attention(shape), nn.LayerNorm(shape.width)
        self.mlp = self.second = None
        if not shape.attention_only:
            self.mlp = nn.Sequential(
                nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
            )
            self.second = nn.LayerNorm(shape.width)
        # How much of the stream a residual connection keeps.
        self.register_buffer("kept", torch.zeros(()) if shape.attention_only else torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.second is None:
            return self.kept * x + self.attention(self.first(x))
        if self.post:
            x = self.first(x + self.attention(x))
            return self.second(x + self.mlp(x))
        x = self.kept * x + self.attention(self.first(x))
        return self.kept * x + self.mlp(self.second(x))


class LanguageModel(nn.Module):
    """Characters in, next characters out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        self.norm = nn.Identity() if shape.post else nn.LayerNorm(shape.width)
        self.predict = nn.Linear(shape.width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            if shape.wide_start and name.startswith("blocks"):
                nn.init.xavier_uniform_(weight)
            else:
                deep = name.endswith(("write.weight", "mlp.2.weight")) and not shape.post
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.blocks) if deep else 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))
