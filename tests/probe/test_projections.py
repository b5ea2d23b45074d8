"""How much of what heads write is the rounding of a number format."""

from __future__ import annotations

import pytest
import torch

from uncollapse.measures.heads import contribution_energy
from uncollapse.probe.projections import MOST_ROUNDING, projected_cloud, rounding_share

HEADS, WIDTH, TOKENS = 4, 64, 50


@pytest.mark.parametrize(("spread", "is_lost"), [(1.0, False), (0.03, True)])
def test_tokens_that_rounding_tells_apart_as_much_as_their_heads_are_noticed(spread: float, is_lost: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1, WIDTH, generator=generator, dtype=torch.float64)
    exact = common + spread * torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    matrix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    rounded = exact.bfloat16()
    share = rounding_share(rounded, matrix.double().square().sum(-1), contribution_energy(exact, matrix, HEADS), None)
    noise = contribution_energy(rounded.double() - exact, matrix, HEADS).sum()
    assert share == pytest.approx(float(noise / contribution_energy(exact, matrix, HEADS).sum()), rel=0.5)
    assert (share > MOST_ROUNDING) == is_lost


def test_padded_tokens_do_not_count() -> None:
    mixed = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(TOKENS)[None] < TOKENS - 1
    energy = contribution_energy(mixed, torch.eye(WIDTH), HEADS, mask)
    before = rounding_share(mixed, torch.ones(WIDTH, dtype=torch.float64), energy, mask)
    mixed[:, -1] = 1e4
    assert rounding_share(mixed, torch.ones(WIDTH, dtype=torch.float64), energy, mask) == before


def test_as_many_tokens_as_sequences_are_told_apart_by_the_heads_or_not_at_all() -> None:
    heads_output = torch.randn(5, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    laid = heads_output.transpose(1, 2).flatten(2)
    for given in (laid, laid.transpose(0, 1)):
        found = projected_cloud(given, heads_output, 5)
        assert found is not None
        assert torch.equal(found, laid)
        assert projected_cloud(0.5 * given, heads_output, 5) is None  # a gate: nothing tells the axes
