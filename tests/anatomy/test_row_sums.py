"""Weights that sum to one, weights that only seem to in half precision, and weights that are no numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.anatomy.test_double_precision import MaskedBehindTheSoftmax


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


def test_sequences_that_are_no_numbers_are_named_as_the_reason() -> None:
    """Once the reason was that nothing depended on the tokens, or that each sequence was mixed by a call of its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.attention, self.out = MaskedBehindTheSoftmax(torch.float32), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            x: Tensor = self.embed(input_ids)
            return x + self.out(self.attention(x))

    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        model.embed.weight[7:] = float("nan")
    ids = torch.arange(72).reshape(6, 12) % 50
    ids[0] %= 7
    (missing,) = uc.diagnose(model, batches=[{"input_ids": ids}]).record.anatomy.not_measured
    assert "is not finite" in missing.reason
