"""Weights that sum to one, and weights that only seem to in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc


@pytest.mark.parametrize("talk", [[[0.75, 0.5], [0.25, 0.5]], [[0.75, 0.5], [0.28, 0.5]]])
def test_mixed_heads_are_a_distribution_where_their_rows_sum_to_one_and_not_where_rounding_hides_that(
    talk: list[list[float]],
) -> None:
    """In bfloat16 rows that sum to 1.03 look like those of a softmax."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.talk = nn.Parameter(torch.tensor(talk))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = torch.einsum("bhqk,hg->bgqk", torch.softmax(q @ k.mT, -1), self.talk)
            return x + self.out((weights @ v).transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(50, 8), nn.ModuleList(Mixed() for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x: Tensor = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Model().to(torch.bfloat16).eval()
    record = uc.diagnose(model, batches=[{"input_ids": torch.randint(0, 50, (4, 9))}]).record
    sums_to_one = [sum(column) == 1.0 for column in zip(*talk, strict=True)]
    for head in record.attention:
        assert (head.entropy is not None) == all(sums_to_one)
        assert all(sums_to_one) or "do not sum to 1" in head.unavailable["entropy"]
