"""Vectors with the tokens along the first axis: one row of them is one token, on which nothing could be seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import uncollapse as uc

WIDTH = 16


class TokenFirst(nn.Module):
    """Causal attention over `frames` [token, sequence, feature], positions added."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.places = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(32, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.is_causal = True

    def forward(self, frames: Tensor) -> Tensor:
        x = self.start(frames) + self.places[: len(frames)]
        for block in self.blocks:
            x = block(x, self.is_causal)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).permute(1, 2, 0, 3) for t in self.qkv(self.norm(x)).chunk(3, -1))
        logits = q @ k.mT
        if is_causal:
            logits = logits - 1e4 * torch.ones(len(x), len(x)).triu(1)
        x = x + self.out((logits.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2))
        return x + self.mlp(x)


def test_the_mask_is_removed_where_vectors_have_their_tokens_first() -> None:
    model = TokenFirst().eval()
    batch = {"frames": torch.randn(20, 4, 6, generator=torch.Generator().manual_seed(1))}
    uc.diagnose(model, batches=[batch])
    with uc.without(model, "mask", batch=batch):
        found = model(**batch)
    model.is_causal = False
    torch.testing.assert_close(found, model(**batch))
