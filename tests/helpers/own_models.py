"""A model of nobody's library: plain PyTorch, written for these tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class OwnAttention(nn.Module):
    """Causal attention as in a one-file GPT."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(width, 2))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
            scores = scores.masked_fill(torch.ones(tokens, tokens).tril() == 0, float("-inf"))
            y = nn.functional.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class OwnBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = OwnAttention(width, heads, fused)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class OwnGPT(nn.Module):
    def __init__(self, fused: bool = True, width: int = 32, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.position = nn.Embedding(64, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(OwnBlock(width, heads, fused) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token(idx) + self.position(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens(sequences: int = 3, length: int = 9) -> Tensor:
    return torch.randint(0, 64, (sequences, length), generator=torch.Generator().manual_seed(0))
