"""A mixture of experts written by hand, in several ways, and a padded batch for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (5, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, -4:], mask[3, -7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


class Layer(nn.Module):
    """A pre-norm block whose MLP chooses, written by hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24)])
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.score = nn.Linear(24, 4)
        self.up = nn.ModuleList([nn.Linear(24, 36) for _ in range(4)])
        self.down = nn.ModuleList([nn.Linear(36, 24) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))

    def expert(self, number: int, x: Tensor) -> Tensor:
        return self.down[number](functional.gelu(self.up[number](x)))

    def mlp(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(-1)
        match self.kind:
            case "one expert a token":
                kept = functional.one_hot(weights.argmax(-1), 4) * weights
                return torch.stack([self.expert(i, x) * kept[..., i : i + 1] for i in range(4)]).sum(0)
            case "the other experts are zero":
                chosen = weights.topk(2, -1).indices
                kept = torch.zeros_like(weights).scatter(-1, chosen, 1.0) * weights
                return torch.stack([self.expert(i, x) * kept[..., i : i + 1] for i in range(4)]).sum(0)
            case "all experts":
                return torch.stack([self.expert(i, x) * weights[..., i : i + 1] for i in range(4)]).sum(0)
            case _:  # a choice that nothing follows from
                self.seen = weights.topk(2, -1).indices
                return self.expert(0, x)


class Mixture(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(99, 24)
        self.layers = nn.ModuleList([Layer(kind), Layer(kind)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x
