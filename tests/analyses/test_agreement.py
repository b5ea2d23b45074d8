"""The digest of weights, against weights that differ in one place or in their order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from uncollapse.analyses.agreement import digests

SHAPE = (96, 96)  # two rows of 4,096 numbers, and a rest


def model(weight: Tensor) -> nn.Module:
    found = nn.Module()
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def swapped(weight: Tensor) -> Tensor:
    other = weight.clone().view(-1)
    other[[3, -5]] = other[[-5, 3]]
    return other.view(SHAPE)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "the last bit of one number": lambda w: (
        torch.where(torch.arange(w.numel()).view(SHAPE) == 5000, (w.view(torch.int16) ^ 1).view(w.dtype).view(SHAPE), w)
        if w.element_size() == 2
        else torch.where(torch.arange(w.numel()).view(SHAPE) == 5000, torch.nextafter(w, w + 1), w)
    ),
    "two numbers in each other's place": swapped,
    "two numbers of one row of the digest": lambda w: torch.cat([w.view(-1)[[1, 0]], w.view(-1)[2:]]).view(SHAPE),
    "two numbers a row of the digest apart": lambda w: torch.cat(
        [w.view(-1)[4096:4097], w.view(-1)[1:4096], w.view(-1)[:1], w.view(-1)[4097:]]
    ).view(SHAPE),
    "heads in another order": lambda w: w.view(4, 24, 96)[[1, 0, 3, 2]].reshape(SHAPE),
    "transposed": lambda w: w.mT.contiguous(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_have_another_digest(change: str, dtype: torch.dtype) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = CHANGES[change](weight)
    assert not torch.equal(weight, other)
    assert digests(model(weight)) == digests(model(weight.clone()))
    assert digests(model(weight)) != digests(model(other))


def test_what_is_not_in_memory_is_left_out_and_nothing_has_a_digest_too() -> None:
    away = nn.Linear(4, 4, device="meta")
    assert digests(away) == []
    assert digests(model(torch.empty(0))) == [(0, 0)]
