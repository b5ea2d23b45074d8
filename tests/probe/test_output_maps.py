"""W_O however a model writes it down: against the vectors that each head writes, worked out by hand from the weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import uncollapse as uc

WIDTH, HEADS, HEAD_WIDTH = 20, 4, 3  # heads that are not as wide as the stream together
Written = Callable[
    ["Attention", Tensor, Tensor], Tensor
]  # mixed values [batch, token, head, width], what the attention read


class Attention(nn.Module):
    """Causal attention; `write` makes its output from the mixed values, with `self.output` [head, width of a head, width]."""

    def __init__(self, write: Written, is_channel_major: bool = False, *, head_width: int = HEAD_WIDTH) -> None:
        super().__init__()
        self.write, self.is_channel_major = write, is_channel_major
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * head_width)
        self.output = nn.Parameter(torch.randn(HEADS, head_width, WIDTH))
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.each = nn.ModuleList(nn.Linear(head_width, WIDTH, bias=False) for _ in range(HEADS))
        self.whole = nn.Linear(HEADS * head_width, WIDTH)
        self.down, self.up = nn.Linear(HEADS * head_width, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HEADS * head_width)
        self.mixed = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        A = (q @ k.mT).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        y = (A @ v).transpose(1, 2)
        self.mixed = y.detach()
        return self.write(self, y, x)


class Model(nn.Module):
    def __init__(self, write: Written, token_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token_first = token_first
        self.embed = nn.Embedding(30, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.attention = nn.ModuleList(Attention(write) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH)) for _ in range(2)
        )
        self.blocks = nn.ModuleList(
            Block(*each) for each in zip(self.norms, self.norms[2:], self.attention, self.mlps, strict=False)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.attention, self.mlp = first, second, attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


def _flat(self: Attention) -> Tensor:
    return self.output.flatten(0, 1)


def _low_rank(self: Attention, y: Tensor, _: Tensor) -> Tensor:
    y = y.flatten(2)
    return linear(y, _flat(self).T, self.shift) + self.up(self.down(y)) * 0.5


def _adapter_beside_addmm(self: Attention, y: Tensor, _: Tensor) -> Tensor:
    y = y.flatten(2)
    bare = torch.addmm(self.shift, y.flatten(0, 1), _flat(self)).unflatten(0, y.shape[:2])
    return bare + self.up(self.down(y)) * 0.5


def _update(self: Attention) -> Tensor:
    return (self.up.weight @ self.down.weight).T.unflatten(0, (HEADS, -1)) * 0.5


def _none(_: Attention) -> Tensor:
    return torch.zeros(WIDTH)


# How it is written, and as what: W_O [head, width of a head, width] and the bias, by hand.
WAYS: dict[str, tuple[Written, Callable[[Attention], Tensor], Callable[[Attention], Tensor]]] = {
    "einsum over heads": (lambda a, y, _: torch.einsum("bqhd,hde->bqe", y, a.output), lambda a: a.output, _none),
    "a module a head, summed": (
        lambda a, y, _: sum((one(y[:, :, h]) for h, one in enumerate(a.each)), torch.zeros(())),
        lambda a: torch.stack([one.weight.T for one in a.each]),
        _none,
    ),
    "stacked and summed": (
        lambda a, y, _: torch.stack([y[:, :, h] @ a.output[h] for h in range(HEADS)]).sum(0) + a.shift,
        lambda a: a.output,
        lambda a: a.shift,
    ),
    "F.linear": (lambda a, y, _: linear(y.flatten(2), _flat(a).T, a.shift), lambda a: a.output, lambda a: a.shift),
    "matmul": (lambda a, y, _: y.flatten(2) @ _flat(a), lambda a: a.output, _none),
    "baddbmm": (
        lambda a, y, _: torch.baddbmm(a.shift.expand(1, 1, -1), y.flatten(2), _flat(a).expand(len(y), -1, -1)),
        lambda a: a.output,
        lambda a: a.shift,
    ),
    "a low-rank update beside F.linear": (_low_rank, lambda a: a.output + _update(a), lambda a: a.shift),
    "a low-rank update beside addmm": (_adapter_beside_addmm, lambda a: a.output + _update(a), lambda a: a.shift),
    "rotated before a module": (
        lambda a, y, _: a.whole(y.flatten(2) @ _turn(a)),
        lambda a: (_turn(a) @ a.whole.weight.T).unflatten(0, (HEADS, -1)),
        lambda a: a.whole.bias,
    ),
    "channels before heads": (
        lambda a, y, _: a.whole(y.mT.flatten(2)),
        lambda a: a.whole.weight.T.unflatten(0, (-1, HEADS)).transpose(0, 1),
        lambda a: a.whole.bias,
    ),
    "a plain module": (
        lambda a, y, _: a.whole(y.flatten(2)),
        lambda a: a.whole.weight.T.unflatten(0, (HEADS, -1)),
        lambda a: a.whole.bias,
    ),
}


def _turn(self: Attention) -> Tensor:
    S = self.gate.weight[:, : HEADS * HEAD_WIDTH]
    return torch.matrix_exp(S - S.T)


def _batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(30, (4, 11), generator=torch.Generator().manual_seed(1))}


def _attentions(model: Model) -> list[Attention]:
    return [a for a in model.modules() if isinstance(a, Attention)][:2]


@pytest.mark.parametrize("way", WAYS)
def test_contributions_are_those_worked_out_by_hand(way: str) -> None:
    write, by_hand, bias = WAYS[way]
    model, batch = Model(write).eval(), _batch()
    found = list(uc.head_contributions(model, batch))
    with torch.no_grad():
        model(**batch)
        for each, attention in zip(found, _attentions(model), strict=True):
            expected = torch.einsum("bqhd,hde->bqhe", attention.mixed, by_hand(attention))
            torch.testing.assert_close(each.contributions, expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(each.bias, bias(attention), rtol=0, atol=2e-5)
            assert each.added_as_is


@pytest.mark.parametrize("way", WAYS)
def test_figures_from_the_weights_and_energies_are_those_of_the_map_by_hand(way: str) -> None:
    write, by_hand, _ = WAYS[way]
    model, batch = Model(write).eval(), _batch()
    with torch.no_grad():
        for attention in _attentions(model):  # a dead channel of the third head: the map forgets one dimension more
            attention.output[2, 1] = 0
    record = uc.diagnose(model, batches=[batch]).record
    with torch.no_grad():
        model(**batch)
        for entry, attention in zip(record.heads, _attentions(model), strict=True):
            W = by_hand(attention)
            assert entry.output_projection_rank == int(np.linalg.matrix_rank(W.flatten(0, 1).numpy(), tol=1e-4))
            written = torch.einsum("bqhd,hde->bqhe", attention.mixed, W).double()
            energy = (written - written.mean(1, keepdim=True)).square().sum((1, 3))
            share = (energy / energy.sum(-1, keepdim=True)).mean(0)
            assert entry.energy_share is not None
            np.testing.assert_allclose([s.mean for s in entry.energy_share], share, rtol=1e-4)


def test_a_change_of_the_weights_is_seen_at_the_next_call() -> None:
    model, batch = Model(WAYS["einsum over heads"][0]).eval(), _batch()
    before = uc.diagnose(model, batches=[batch]).record.heads[0].output_projection_rank
    with torch.no_grad():
        model.attention[0].output[0] = 0
    (first, _) = uc.head_contributions(model, batch)
    assert not first.contributions[:, :, 0].any()
    after = uc.diagnose(model, batches=[batch]).record.heads[0].output_projection_rank
    assert (before, after) == (12, 9)


def test_a_gate_on_the_mixed_values_leaves_the_projection_its_own_weights() -> None:
    def write(self: Attention, y: Tensor, x: Tensor) -> Tensor:
        return self.whole((y * self.gate(x).unflatten(-1, (HEADS, -1)).sigmoid()).flatten(2))

    model, batch = Model(write).eval(), _batch()
    (found, _) = uc.head_contributions(model, batch)
    reads = []
    attention = _attentions(model)[0]
    attention.whole.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
        W = attention.whole.weight.T.unflatten(0, (HEADS, -1))
        expected = torch.einsum("bqhd,hde->bqhe", reads[0].unflatten(-1, (HEADS, -1)), W)
    torch.testing.assert_close(found.contributions, expected, rtol=0, atol=2e-5)


class Differential(Attention):
    """Two softmaxes, subtracted as two products before one projection reads them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        first, second = ((one @ other.mT).softmax(-1) @ v for one, other in ((q, k), (k, q)))
        self.mixed = torch.cat([first, second], 1).transpose(1, 2).detach()
        return self.write(self, (first - 0.3 * second).transpose(1, 2), x)


@pytest.mark.parametrize("way", ["a plain module", "matmul", "a module a head, summed"])
def test_two_products_that_are_subtracted_before_the_projection_write_each_with_its_factor(way: str) -> None:
    write, by_hand, bias = WAYS[way]
    model, batch = Model(write).eval(), _batch()
    model.blocks[0].attention = Differential(write)  # type: ignore[union-attr]
    found = next(iter(uc.head_contributions(model, batch)))
    attention = model.blocks[0].attention
    assert isinstance(attention, Differential)
    with torch.no_grad():
        model(**batch)
        W = torch.cat([by_hand(attention), -0.3 * by_hand(attention)])
        expected = torch.einsum("bqhd,hde->bqhe", attention.mixed, W)
        torch.testing.assert_close(found.contributions, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.bias, bias(attention), rtol=0, atol=2e-5)


class InChunks(Attention):
    """Four queries at a time: the same heads again, not further ones."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = torch.cat([(some @ k.mT).softmax(-1) @ v for some in q.split(4, 2)], 2).transpose(1, 2)
        self.mixed = y.detach()
        return self.write(self, y, x)


@pytest.mark.parametrize("way", ["a plain module", "channels before heads", "a module a head, summed"])
def test_heads_that_answer_for_some_queries_at_a_time_are_counted_once(way: str) -> None:
    write, by_hand, bias = WAYS[way]
    model, batch = Model(write).eval(), {"input_ids": _batch()["input_ids"][:, :7]}
    attention = model.blocks[0].attention = InChunks(write)  # type: ignore[union-attr]
    found = next(iter(uc.head_contributions(model, batch)))
    (entry, *_) = uc.diagnose(model, batches=[batch]).record.heads
    with torch.no_grad():
        model(**batch)
        expected = torch.einsum("bqhd,hde->bqhe", attention.mixed, by_hand(attention))
        torch.testing.assert_close(found.contributions, expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.bias, bias(attention), rtol=0, atol=2e-5)
    assert (entry.heads, entry.output_projection_rank) == (HEADS, HEADS * HEAD_WIDTH)


def _gate(self: Attention, x: Tensor) -> Tensor:
    """[batch, token, head, width], different at every place."""
    return self.gate(x).unflatten(-1, (HEADS, -1)).sigmoid()


def _gated(way: str, form: str) -> tuple[Written, Callable[[Attention], Tensor]]:
    """A way to write, of mixed values behind a gate, and the map of what has passed the gate."""
    write, by_hand, _ = WAYS[way]

    def gated(self: Attention, y: Tensor, x: Tensor) -> Tensor:
        gate = _gate(self, x)
        if form == "a factor a head":
            gate = gate.mean(-1, keepdim=True)
        if form == "heads first":
            y = (y.transpose(1, 2) * gate.transpose(1, 2)).transpose(1, 2)
        elif form == "flattened":
            y = (y.flatten(2) * gate.flatten(2)).unflatten(-1, (HEADS, -1))
        else:
            y = y * gate
        self.mixed = y.detach()
        return write(self, y, x)

    return gated, by_hand


@pytest.mark.parametrize("form", ["a factor a channel", "a factor a head", "heads first", "flattened"])
@pytest.mark.parametrize("way", ["einsum over heads", "a module a head, summed", "a low-rank update beside F.linear"])
def test_a_gate_before_a_map_that_is_not_one_matrix_is_held_open_while_it_is_found(way: str, form: str) -> None:
    write, by_hand = _gated(way, form)
    model, batch = Model(write).eval(), _batch()
    found = list(uc.head_contributions(model, batch))
    record = uc.diagnose(model, batches=[batch]).record
    with torch.no_grad():
        model(**batch)
        for each, entry, attention in zip(found, record.heads, _attentions(model), strict=True):
            W = by_hand(attention)
            expected = torch.einsum("bqhd,hde->bqhe", attention.mixed, W)
            torch.testing.assert_close(each.contributions, expected, rtol=0, atol=2e-5)
            assert entry.output_projection_rank == int(np.linalg.matrix_rank(W.flatten(0, 1).numpy(), tol=1e-4))
            energy = (expected - expected.mean(1, keepdim=True)).double().square().sum((1, 3))
            assert entry.energy_share is not None
            share = (energy / energy.sum(-1, keepdim=True)).mean(0)
            np.testing.assert_allclose([s.mean for s in entry.energy_share], share, rtol=1e-4)
            assert entry.gauge_dimension is None
            assert "something acts between" in entry.unavailable["gauge_dimension"]


def test_a_gate_on_the_difference_of_two_products_acts_on_both() -> None:
    def write(self: Attention, y: Tensor, x: Tensor) -> Tensor:
        self.mixed = self.mixed * torch.cat([_gate(self, x)] * (self.mixed.shape[2] // HEADS), 2).detach()
        return self.whole((y * _gate(self, x)).flatten(2))

    model, batch = Model(write).eval(), _batch()
    attention = model.blocks[0].attention = Differential(write)  # type: ignore[union-attr]
    found = next(iter(uc.head_contributions(model, batch)))
    with torch.no_grad():
        model(**batch)
        W = attention.whole.weight.T.unflatten(0, (HEADS, -1))
        expected = torch.einsum("bqhd,hde->bqhe", attention.mixed, torch.cat([W, -0.3 * W]))
    torch.testing.assert_close(found.contributions, expected, rtol=0, atol=2e-5)


def test_a_factor_that_the_heads_make_themselves_is_no_gate() -> None:
    def write(self: Attention, y: Tensor, _: Tensor) -> Tensor:
        return torch.einsum("bqhd,hde->bqe", y * y.sum(-1, keepdim=True).sigmoid(), self.output)

    model, batch = Model(write).eval(), _batch()
    with pytest.raises(uc.UnsupportedModel, match="not one affine map of its heads"):
        list(uc.head_contributions(model, batch))


def test_heads_that_are_multiplied_with_each_other_have_no_output_map() -> None:
    def write(self: Attention, y: Tensor, _: Tensor) -> Tensor:
        return torch.einsum("bqhd,hde->bqe", y * y.roll(1, 2), self.output)

    model, batch = Model(write).eval(), _batch()
    with pytest.raises(uc.UnsupportedModel, match="not one affine map of its heads"):
        list(uc.head_contributions(model, batch))
    (entry, *_) = uc.diagnose(model, batches=[batch]).record.heads
    assert entry.output_projection_rank is None
    assert "not one affine map of its heads" in entry.unavailable["output_projection_rank"]
