"""What the weights say: beside the same figures computed the long way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.own_models import OwnGPT
from tests.helpers.tiny_models import FAMILIES, text_batch
from tests.monitoring.test_bit_identical import probe
from uncollapse.monitoring.weights import update_entropy


def head(model: nn.Module, block: int, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V [channel, width] and W_O [channel, width] of one head of an `OwnGPT`."""
    attention = model.blocks[block].attention
    rows = slice(8 * number, 8 * number + 8)
    q, k, v = (part[rows].double() for part in attention.qkv.weight.detach().clone().split(32))
    return q, k, v, attention.out.weight.detach().T[rows].double().clone()


def test_the_figures_of_a_head_that_was_changed() -> None:
    model = OwnGPT()
    monitor = uc.Monitor(model, [{"idx": probe()[0]["input_ids"]}], every=1)
    monitor.step(0)
    before = head(model, 1, 2)
    torch.manual_seed(3)
    with torch.no_grad():
        for rows in (slice(16, 24), slice(48, 56), slice(80, 88)):
            model.blocks[1].attention.qkv.weight[rows] += 0.01 * torch.randn(8, 32)
        model.blocks[1].attention.out.weight[:, 16:24] += 0.02 * torch.randn(32, 8)
        model.blocks[0].second.weight[3] += 2
    after = head(model, 1, 2)
    monitor.look(1)
    assert monitor.record is not None
    here = [(h.block, h.head) for h in monitor.record.heads].index((1, 2))
    heads = monitor.readings[1].heads
    for role, old, new in zip(("queries", "keys", "values", "projection"), before, after, strict=True):
        assert heads[f"update_{role}"][here] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        assert [v for i, v in enumerate(heads[f"update_{role}"]) if i != here] == [0.0] * 11
    assert heads["query_key_norm"][here] == pytest.approx(float((after[0].T @ after[1]).norm()), rel=1e-6)
    assert monitor.readings[1].sites["update_gains"] == [None, pytest.approx(2 / 8), 0.0, 0.0]


@pytest.mark.parametrize(("rank", "expected"), [(1, 0.0), (2, math.log(2) / math.log(16))])
def test_the_entropy_of_an_update_of_known_rank(rank: int, expected: float) -> None:
    """W_K stays; W_Q moves in `rank` directions of equal size, as W_K's rows are orthonormal."""
    torch.manual_seed(0)
    q = torch.randn(8, 32, dtype=torch.float64)
    k = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q.T
    directions = torch.linalg.qr(torch.randn(32, rank, dtype=torch.float64)).Q.T
    moved = q.clone()
    moved[:rank] += directions
    assert update_entropy(moved, k, q, k) == pytest.approx(expected, abs=1e-9)


def test_the_entropy_beside_a_whole_decomposition_and_of_no_change() -> None:
    torch.manual_seed(0)
    q, k, r, s = (torch.randn(4, 16, dtype=torch.float64) for _ in range(4))
    sigma = torch.linalg.svdvals(q.T @ k - r.T @ s).square()[:8]
    p = sigma / sigma.sum()
    assert update_entropy(q, k, r, s) == pytest.approx(float(-(p * p.log()).sum() / math.log(8)), rel=1e-9)
    assert math.isnan(update_entropy(q * 0, k, q * 0, k))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_grouped_fused_and_separate_weights_are_read(family: str) -> None:
    model = FAMILIES[family].build()
    monitor = uc.Monitor(model, [text_batch(3, 24)], every=1)
    monitor.step(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    monitor.look(1)
    for role in ("queries", "keys", "values", "projection"):
        assert monitor.readings[1].heads[f"update_{role}"] == pytest.approx([0.1] * 12, rel=1e-4)
    sizes = zip(*(monitor.readings[i].heads["query_key_norm"] for i in (0, 1)), strict=True)
    assert [b / a for a, b in sizes] == pytest.approx([1.21] * 12, rel=1e-5)
