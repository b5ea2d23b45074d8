"""Attention laid out in another order than the formulas': every group says no with the reason, and none acts as if it were not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.symmetry.acting import acting, drawn, transformed
from uncollapse.symmetry.channels import channels_of
from uncollapse.symmetry.pass_groups import KeyPermutation, LogitScaling, LogitShift
from uncollapse.symmetry.weight_groups import HeadPermutation, QueryKeyGauge, ValueOutputGauge

HEADS, CHANNELS = 4, 8
Mixing = Callable[[Tensor, Tensor, Tensor], Tensor]  # of [sequence, head, token, channel], to the same
BATCH = {"input_ids": torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))}


class Attention(nn.Module):
    def __init__(self, mix: Mixing) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(self.mix(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, mix: Mixing) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(mix), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Own(nn.Module):
    def __init__(self, mix: Mixing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.blocks = nn.Embedding(64, 32), nn.ModuleList(Block(mix) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * CHANNELS**-0.5


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = logits(q, k)
    e = torch.exp(L - L.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


def keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    none = torch.zeros(len(q), 1, q.shape[2], q.shape[2])
    return nn.functional.scaled_dot_product_attention(q, k, attn_mask=none, value=v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    A = (torch.einsum("bqhd,bkhd->bhqk", q, k) * CHANNELS**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bhqd", A, v)


def heads_before_sequences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sequences = len(q)
    q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * CHANNELS**-0.5).softmax(-1), v).unflatten(0, (-1, sequences)).transpose(0, 1)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1)


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ logits(q, k).softmax(-1).mT).mT


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(k, q).softmax(-2).mT @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).sigmoid() @ v


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = CHANNELS // 2
    one, other = (logits(q[..., s], k[..., s]).softmax(-1) for s in (slice(half), slice(half, None)))
    return (one - 0.4 * other) @ v


UNUSUAL = {
    "einsum": (einsum, "einsum in an order of axes"),
    "heads before sequences": (heads_before_sequences, "laid out in an order"),
    "heads first": (heads_first, "laid out in an order"),
    "values first": (values_first, "matmul in an order of axes"),
    "sigmoid": (sigmoid, "not the softmax of one set of logits"),
    "differential": (differential, "not the softmax of one set of logits"),
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def built(mix: Mixing) -> tuple[nn.Module, Anatomy]:
    model = Own(mix).double().eval()
    return model, proved_anatomy(model, BATCH)


def gap(model: nn.Module, anatomy: Anatomy, element: Any) -> float:
    with torch.no_grad():
        before = model(**BATCH)
        with acting(model, anatomy, element):
            return float((model(**BATCH) - before).norm() / before.norm())


def elements() -> list[Any]:
    order = KeyPermutation.random(generator(), torch.ones(3, 9, dtype=torch.bool))
    return [order, LogitShift.random(generator()), LogitScaling(2.0)]


@pytest.mark.parametrize("case", UNUSUAL)
def test_another_layout_is_refused_by_every_group_with_the_reason(case: str) -> None:
    mix, reason = UNUSUAL[case]
    model, anatomy = built(mix)
    for one in channels_of(model, anatomy, BATCH):
        assert (one.queries, one.keys, one.values, one.projection, one.pairs) == (None,) * 5
        assert not one.heads_alike
        for what in ("queries", "keys", "values", "projection", "rotary", "logits", "heads"):
            assert reason in one.reasons[what]
        for group in (HeadPermutation, ValueOutputGauge, QueryKeyGauge):
            assert not group.surviving(one).survives
            assert reason in group.surviving(one).surviving
            assert not drawn(group, [one], generator())
    for element in elements():
        with pytest.raises(uc.InputError, match=reason), acting(model, anatomy, element):
            pass


@pytest.mark.parametrize("mix", [plain, written_out, keywords])
def test_the_usual_layout_is_acted_on_however_it_is_written(mix: Mixing) -> None:
    model, anatomy = built(mix)
    order, shift, scaling = elements()
    assert gap(model, anatomy, shift) < 1e-13
    assert gap(model, anatomy, scaling) > 1e-4
    with torch.no_grad():
        before = model(**BATCH)
        found = channels_of(model, anatomy, BATCH)
        for group in (HeadPermutation, ValueOutputGauge, QueryKeyGauge):
            assert len(drawn(group, found, generator())) == 2
            with transformed(model, drawn(group, found, generator())):
                assert float((model(**BATCH) - before).norm() / before.norm()) < 1e-13
    # The permutation acts on the values: on those of the same model with its weights' own axes, it is the same.
    same, other = built(plain)
    with torch.no_grad(), acting(model, anatomy, order), acting(same, other, order):
        assert torch.allclose(model(**BATCH), same(**BATCH), atol=1e-12)


def of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each key's weights sum to one, not each query's."""
    e = torch.exp(logits(q, k))
    return e / e.sum(-2, keepdim=True) @ v


def softmax_of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return logits(q, k).softmax(-2) @ v


def sink_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = logits(q, k)
    return torch.cat([torch.zeros_like(L[..., :1]), L], -1).softmax(-1)[..., 1:] @ v


def sink_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = logits(q, k)
    return torch.cat([L, torch.zeros_like(L[..., :1])], -1).softmax(-1)[..., :-1] @ v


def sink_beside_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = logits(q, k) + (k @ q.mT).mT * 0.1
    return torch.cat([L, torch.zeros_like(L[..., :1])], -1).softmax(-1)[..., :-1] @ v


def shared_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    L = logits(q, k)
    return L.softmax(-1) @ v + (2 * L).softmax(-1) @ v.roll(1, -1)


@pytest.mark.parametrize("mix", [sink_beside_sums, shared_logits])
def test_keys_that_cannot_be_told_from_sinks_are_refused_in_the_pass(mix: Mixing) -> None:
    model, anatomy = built(mix)
    for element in elements()[1:]:
        with pytest.raises(uc.InputError, match=r"two attention calls share|belong to no key"):
            gap(model, anatomy, element)


@pytest.mark.parametrize("mix", [keys_first, of_columns, softmax_of_columns, sink_in_front])
def test_rows_along_another_axis_and_sinks_in_front_are_refused_in_the_pass(mix: Mixing) -> None:
    model, anatomy = built(mix)
    for one in channels_of(model, anatomy, BATCH) if mix is not sink_in_front else []:
        assert not drawn(QueryKeyGauge, [one], generator())
        assert "its softmax is over another axis" in one.reasons["logits"] or "row by row" in one.reasons["logits"]
    for element in elements()[1:]:
        with pytest.raises(uc.InputError, match="expected attention laid out"), acting(model, anatomy, element):
            model(**BATCH)


def test_sinks_behind_the_keys_are_left_alone_and_see_the_shift() -> None:
    model, anatomy = built(sink_behind)
    assert gap(model, anatomy, LogitShift.random(generator())) > 1e-4
    assert gap(model, anatomy, LogitShift.identity()) == 0
