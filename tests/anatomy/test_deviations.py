"""A stream that is carried element by element: rounding obeys that law, in whatever number format, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uncollapse.anatomy.deviations import carry_gap

HALVES = [torch.bfloat16, torch.float16]


def runs(carry: Callable[..., Tensor], dtype: torch.dtype, largest: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Three streams [sequence, token, feature] before and after. Feature 5 of the streams is `largest` times as large."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(48, generator=generator).to(dtype) for _ in range(3))
    found = []
    for _ in range(3):
        x = torch.randn(3, 7, 48, generator=generator)
        x[..., 5] *= largest
        found.append((x.to(dtype), carry(x.to(dtype), a, b, c)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("largest", [1.0, 50.0])
def test_factors_and_shifts_are_the_law_to_the_rounding_of_their_format(dtype: torch.dtype, largest: float) -> None:
    for carry in (
        lambda x, a, b, c: a * x,
        lambda x, a, b, c: a * x + c,
        lambda x, a, b, c: b * (a * (b * (a * x))) + c,
        lambda x, a, b, c: b * (a * x + c) + c,
    ):
        assert carry_gap(runs(carry, dtype, largest)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("largest", [1.0, 50.0])
def test_what_is_left_of_something_else_is_no_rounding(dtype: torch.dtype, largest: float) -> None:
    """A twentieth of the stream is more than half precision loses, also beside a feature that is far larger."""
    assert carry_gap(runs(lambda x, a, b, c: x + 0.05 * torch.sin(3 * x), dtype, largest)) > 0.0
