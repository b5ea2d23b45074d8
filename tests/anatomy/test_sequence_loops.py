"""Attention that runs once for each sequence, in a loop over a batch or over pieces that lie end to end, as people write it.
Figures equal those of NumPy, sequence by sequence, from the weights and what entered each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import uncollapse as uc
from tests.helpers.observing import observe
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics
from uncollapse.probe.passes import Observations

WIDTH, HEADS, EACH = 24, 3, 8
FIGURES = ["entropy", "max_logit", "value_contraction", "contraction"]


class Looping(nn.Module):
    """Attention that goes through its sequences one by one: `pieces` are their rows [token, width], in whatever order."""

    def __init__(self, style: str, bias: bool = False) -> None:
        super().__init__()
        self.style = style
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None) -> Tensor:
        """[token, width] each. hide [token]: True for a padded key."""
        if self.style == "a loop over heads, too":
            apart = zip(*(t.split(EACH, -1) for t in (q, k, v)), strict=True)
            return torch.cat([self.head(*each, hide) for each in apart], -1)
        q, k, v = (t.unflatten(-1, (HEADS, EACH)).transpose(0, 1) for t in (q, k, v))
        if self.style == "fused":
            allowed = None if hide is None else ~hide[None, None, None, :]
            mixed = functional.scaled_dot_product_attention(q[None], k[None], v[None], allowed)[0]
        elif self.style == "einsum":
            scores = torch.einsum("hqd,hkd->hqk", q, k) / math.sqrt(EACH)
            scores = scores if hide is None else scores.masked_fill(hide[None, None], -math.inf)
            mixed = torch.einsum("hqk,hkd->hqd", scores.softmax(-1), v)
        else:
            scores = q @ k.mT / math.sqrt(EACH)
            scores = scores if hide is None else scores.masked_fill(hide[None, None], -1e9)
            mixed = scores.softmax(-1) @ v
        return mixed.transpose(0, 1).flatten(1)

    @staticmethod
    def head(q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None) -> Tensor:
        scores = q @ k.mT / math.sqrt(EACH)
        scores = scores if hide is None else scores.masked_fill(hide[None], -1e9)
        return scores.softmax(-1) @ v

    def order(self, pieces: Sequence[Tensor]) -> list[int]:
        numbers = list(range(len(pieces)))
        if self.style == "backwards":
            return numbers[::-1]
        if self.style == "longest first":
            return sorted(numbers, key=lambda i: -len(pieces[i]))
        return numbers

    def forward(self, pieces: Sequence[Tensor], hide: Tensor | None = None) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        if self.style == "projections inside":
            for i, piece in enumerate(pieces):
                own = None if hide is None else hide[i]
                found[i] = self.out(self.attend(self.query(piece), self.key(piece), self.value(piece), own))
            return list(found.values())
        lengths = [len(piece) for piece in pieces]
        joined = torch.cat(list(pieces))
        q, k, v = (m(joined).split(lengths) for m in (self.query, self.key, self.value))
        for i in self.order(pieces):
            others = (i, i - 1) if self.style == "hears its neighbour" else (i,)
            keys, values = (torch.cat([t[j] for j in others]) for t in (k, v))
            found[i] = self.attend(q[i], keys, values, None if hide is None else hide[i])
        return list(self.out(torch.cat([found[i] for i in range(len(pieces))])).split(lengths))


class OneByOne(nn.Module):
    """A module of its own, called once for each sequence."""

    def __init__(self, _: str) -> None:
        super().__init__()
        self.inner = Looping("eager")

    def forward(self, pieces: Sequence[Tensor], hide: Tensor | None = None) -> list[Tensor]:
        return [self.inner([piece], None if hide is None else hide[i : i + 1])[0] for i, piece in enumerate(pieces)]


class Block(nn.Module):
    """Pre-norm; the stream is [sequence, token, width], or rows laid end to end, with `lengths`."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = OneByOne(style) if style == "a module's run each" else Looping(style)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor | None, hide: Tensor | None) -> Tensor:
        read = self.before(x)
        if lengths is None:
            x = x + torch.stack(self.attention([read[i] for i in range(len(read))], hide))
        else:
            x = x + torch.cat(self.attention(read.split(lengths.tolist())))
        return x + self.down(functional.gelu(self.up(self.after(x))))


class Model(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Block(style) for _ in range(2)])

    def forward(self, x: Tensor, lengths: Tensor | None = None, hide: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, lengths, hide)
        return x


def built(style: str) -> Model:
    torch.manual_seed(0)
    model = Model(style).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def batch(*lengths: int, is_packed: bool, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(seed))
    if is_packed:
        return {"x": drawn, "lengths": torch.tensor(lengths)}
    return {"x": drawn.view(len(lengths), lengths[0], 5)}


def entered(model: nn.Module, given: dict[str, Tensor]) -> list[list[np.ndarray]]:
    """What enters each block, sequence by sequence."""
    found: list[list[np.ndarray]] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].double()
        found.append([p.numpy() for p in (x.split(given["lengths"].tolist()) if "lengths" in given else x)])

    hooks = [block.register_forward_pre_hook(note) for block in model.blocks]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return found


def linear(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ module.weight.detach().double().numpy().T + module.bias.detach().double().numpy()


def figures(block: Block, x: np.ndarray, real: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Of each head, for one sequence [token, width]: NumPy, in float64."""
    real = np.ones(len(x), dtype=bool) if real is None else real
    x = x[real]
    norm, attention = block.before, getattr(block.attention, "inner", block.attention)
    read = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    q, k, v = (linear(m, read) for m in (attention.query, attention.key, attention.value))
    weight = attention.out.weight.detach().double().numpy()
    found: dict[str, list[float]] = {name: [] for name in (*FIGURES, "energy")}
    for head in range(HEADS):
        own = slice(head * EACH, head * EACH + EACH)
        logits = q[:, own] @ k[:, own].T / math.sqrt(EACH)
        A = np.exp(logits - logits.max(-1, keepdims=True))
        A /= A.sum(-1, keepdims=True)
        mixed, C = A @ v[:, own], np.eye(len(x)) - 1 / len(x)
        found["entropy"].append(float(-(A * np.log(A)).sum(-1).mean()))
        found["max_logit"].append(float(logits.max()))
        found["value_contraction"].append(float(np.linalg.norm(C @ mixed) / np.linalg.norm(C @ v[:, own])))
        found["contraction"].append(float(np.linalg.norm(C @ A @ C, 2)))
        found["energy"].append(float(np.linalg.norm(C @ mixed @ weight[:, own].T) ** 2))
    energy = np.array(found.pop("energy"))
    return {name: np.array(each) for name, each in found.items()} | {"energy": energy / energy.sum()}


def expected(model: Model, batches: Sequence[dict[str, Tensor]], number: int) -> dict[str, np.ndarray]:
    """The means over all sequences at one block, and how many these are."""
    several = []
    with np.errstate(invalid="ignore"):  # of one token nothing is spread
        for given in batches:
            hide = given.get("hide")
            for i, x in enumerate(entered(model, given)[number]):
                several.append(figures(model.blocks[number], x, None if hide is None else ~hide[i].numpy()))
        means = {name: np.nanmean([each[name] for each in several], 0) for name in several[0]}
    return means | {"count": np.array(len(several))}


def measured(statistics: AttentionStatistics) -> dict[str, np.ndarray]:
    rows = {name: ATTENTION_MEASURES.index(name) for name in FIGURES}
    found = {n: np.array([statistics.values.summary(r, h)[0] for h in range(HEADS)]) for n, r in rows.items()}
    found["energy"] = np.array([statistics.energy.summary(h)[0] for h in range(HEADS)])
    return found | {"count": np.array(statistics.values.summary(rows["entropy"], 0)[3])}


def require_right(model: Model, batches: Sequence[dict[str, Tensor]], observed: Observations) -> None:
    for number, statistics in enumerate(observed.attention):
        assert set(statistics.reasons.values()) <= {"several products mix values, which may be the same ones"}
        assert statistics.call.heads == HEADS
        got, wanted = measured(statistics), expected(model, batches, number)
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-4, err_msg=f"{name} of block {number}")
        assert statistics.deviation < 1e-5


PACKED = ["fused", "backwards", "longest first", "a loop over heads, too", "projections inside", "a module's run each"]
IN_A_BATCH = ["eager", "einsum", "backwards", "a module's run each"]


@pytest.mark.parametrize(
    ("style", "is_packed"),
    [(style, True) for style in PACKED] + [(style, False) for style in IN_A_BATCH],
    ids=[f"{style}, end to end" for style in PACKED] + [f"{style}, a batch" for style in IN_A_BATCH],
)
def test_figures_are_those_of_each_sequence_by_itself(style: str, is_packed: bool) -> None:
    model = built(style)
    sizes = [(5, 9, 2), (4, 4), (6, 1, 7, 7, 3), (8,)] if is_packed else [(7, 7), (5,) * 5, (6,)]
    batches = [batch(*lengths, is_packed=is_packed, seed=i) for i, lengths in enumerate(sizes)]
    require_right(model, batches, observe(model, batches, level="full"))


def test_a_corpus_may_begin_with_one_sequence() -> None:
    """Nothing repeats there; the model is proved anew on the batch that shows the loop."""
    model = built("eager")
    batches = [batch(6, is_packed=True), batch(5, 3, is_packed=True, seed=1), batch(4, is_packed=True, seed=2)]
    alone = observe(model, batches[::2], level="full")
    require_right(model, batches[::2], alone)
    record = uc.diagnose(model, batches=batches).record
    wanted = expected(model, batches, 0)["entropy"]
    assert [h.entropy.mean for h in record.attention[:HEADS]] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert [h.entropy.n for h in record.attention] == [4] * 2 * HEADS


@pytest.mark.parametrize("style", ["fused", "a loop over heads, too"])
def test_padding_is_that_of_each_sequence(style: str) -> None:
    model, batches = built(style), []
    for seed, real in enumerate(([7, 4], [5, 3, 6])):
        given = batch(*(max(real),) * len(real), is_packed=False, seed=seed)
        batches.append(given | {"hide": torch.arange(max(real)) >= torch.tensor(real)[:, None]})
    require_right(model, batches, observe(model, batches, level="full"))


def test_sequences_with_the_same_content_are_told_apart() -> None:
    model = built("backwards")
    given = batch(5, 5, 3, is_packed=True)
    given["x"][5:10] = given["x"][:5]
    require_right(model, [given], observe(model, [given], level="full"))


@pytest.mark.parametrize("is_packed", [True, False], ids=["end to end", "batch"])
def test_a_loop_whose_turns_hear_other_sequences_is_not_measured(is_packed: bool) -> None:
    model = built("hears its neighbour")
    given = batch(6, 6, 6, is_packed=is_packed)
    try:
        observed = observe(model, [given])
    except uc.UnsupportedModel:
        return
    for statistics in observed.attention:
        assert "entropy" in statistics.reasons


class InItsOwnCode(nn.Module):
    """A block with the loop in its own forward. What comes after it is counted by the same operations."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.before, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, EACH)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        found: list[Any] = [None] * len(x)
        if self.style == "heads outside":
            found = [[None] * HEADS for _ in x]
            for head in range(HEADS):
                for i in range(len(x)):
                    found[i][head] = (q[i, head] @ k[i, head].mT / EACH).softmax(-1) @ v[i, head]
            found = [torch.stack(each) for each in found]
        elif self.style == "the softmax outside":
            weights = (q @ k.mT / EACH).softmax(-1)
            found = [weights[i] @ v[i] for i in range(len(x))]
        elif self.style == "only the tokens that are not zero":
            for i in range(len(x)):
                real = x[i].abs().sum(-1) > 0
                mixed = (q[i][:, real] @ k[i][:, real].mT / EACH).softmax(-1) @ v[i][:, real]
                found[i] = torch.zeros_like(q[i]).masked_scatter(real[None, :, None], mixed)
        elif self.style == "by what the sequences hold":
            for i in x.square().sum((1, 2)).argsort().tolist():
                found[i] = (q[i] @ k[i].mT / EACH).softmax(-1) @ v[i]
        else:
            for i in range(len(x)):
                scores = q[i] @ k[i].mT / EACH + self.bias[:, : x.shape[1], : x.shape[1]]
                found[i] = scores.softmax(-1) @ v[i]
        return x + self.out(torch.stack(found).transpose(1, 2).flatten(2))


class OfBlocks(nn.Module):
    def __init__(self, style: str) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([InItsOwnCode(style) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def entropy_of(block: InItsOwnCode, x: np.ndarray) -> np.ndarray:
    read = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + block.before.eps)
    q, k, _ = np.split(linear(block.qkv, read), 3, -1)
    found = []
    for head in range(HEADS):
        own = slice(head * EACH, head * EACH + EACH)
        logits = q[:, own] @ k[:, own].T / EACH
        if block.style == "a bias in the loop":
            logits += block.bias.detach().double().numpy()[head, : len(x), : len(x)]
        A = np.exp(logits - logits.max(-1, keepdims=True))
        A /= A.sum(-1, keepdims=True)
        found.append(-(A * np.log(A)).sum(-1).mean())
    return np.array(found)


@pytest.mark.parametrize(
    ("style", "is_read"),
    [
        ("heads outside", False),
        ("the softmax outside", True),
        ("only the tokens that are not zero", False),
        ("by what the sequences hold", False),
        ("a bias in the loop", False),
    ],
)
def test_loops_that_shift_what_comes_after_them_are_right_or_not_measured(style: str, is_read: bool) -> None:
    torch.manual_seed(0)
    model = OfBlocks(style).eval()
    batches = [batch(*(6,) * 5, is_packed=False), batch(*(7,) * 2, is_packed=False, seed=1)]
    try:
        observed = observe(model, batches)
    except uc.UncollapseError:
        assert not is_read
        return
    row = ATTENTION_MEASURES.index("entropy")
    for number, statistics in enumerate(observed.attention):
        if "entropy" in statistics.reasons:
            assert not is_read, statistics.reasons["entropy"]
            continue
        wanted = [entropy_of(model.blocks[number], x) for given in batches for x in entered(model, given)[number]]
        got = [statistics.values.summary(row, h)[0] for h in range(HEADS)]
        assert got == pytest.approx(np.mean(wanted, 0).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_turns_are_told_in_half_precision(kind: str) -> None:
    model, given = built("longest first"), batch(5, 9, 2, 7, is_packed=True)
    wanted = expected(model, [given], 0)["entropy"]
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            statistics = observe(model, [given]).attention[0]
    else:
        dtype = getattr(torch, kind)
        statistics = observe(model.to(dtype), [given | {"x": given["x"].to(dtype)}]).attention[0]
    assert measured(statistics)["entropy"] == pytest.approx(wanted, rel=0.05)
    assert measured(statistics)["count"] == 4


@pytest.mark.parametrize("is_packed", [False, True])
@torch.no_grad()
def test_what_is_left_without_the_attention_is_looked_at_sequence_by_sequence(is_packed: bool) -> None:
    """Once such a model could not be ablated: runs of a block by itself, which end early, counted as its runs in the pass."""
    model, given = built("fused"), batch(7, 7, 7, is_packed=is_packed)
    _, alone = uc.ablate(model, batches=[given], without=[("attention",)]).runs
    x = model.embed(given["x"]).reshape(3, 7, WIDTH)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x = x + block.down(functional.gelu(block.up(block.after(x))))
        spread = np.asarray([np.linalg.norm(s - s.mean(0)) / np.linalg.norm(s) for s in x.double().numpy()])
        found = alone.trajectory[number + 1].consensus_distance
        assert found is not None
        np.testing.assert_allclose(
            [found.mean, found.min, found.max], [spread.mean(), spread.min(), spread.max()], rtol=1e-5
        )


def test_symmetries_of_sequences_laid_end_to_end_are_told_or_say_why_not() -> None:
    """A piece of such a batch is none that its model runs on; once that ended in a traceback."""
    record = uc.symmetries(built("fused"), batches=[batch(5, 9, 7, is_packed=True)]).record
    assert record.tests
    assert all(test.defect is not None or test.unavailable["defect"] for test in record.tests)


@torch.no_grad()
def test_without_its_attention_nothing_says_which_rows_are_one_sequence() -> None:
    """Inside a `without` of one's own the whole model is not at hand. Once every token was a sequence of rank 1."""
    model, given = built("fused"), batch(5, 9, 7, is_packed=True)
    with uc.without(model, "attention", batch=given):
        plain = model(**given)
        record = uc.diagnose(model, batches=[given]).record
        assert torch.equal(model(**given), plain)
    assert all(
        site.effective_rank is None and "no attention is left" in site.unavailable["effective_rank"]
        for site in record.trajectory
    )
