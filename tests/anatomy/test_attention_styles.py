"""Ways of writing an attention that are not softmax(Q K') V in one go: the figures are those of what the model itself mixed by."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.anatomy.proof import proved_anatomy

WIDTH, HEADS = 24, 4


class Styled(nn.Module):
    """Queries, keys and values, and `style`, which mixes them; `seen` are the weights [sequence, head, query, key] it mixed by."""

    def __init__(self, style: Callable[[Styled, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.style, self.seen = style, list[Tensor]()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.talk = nn.Parameter(torch.eye(HEADS) + 0.1 * torch.rand(HEADS, HEADS))
        self.talk_again = nn.Linear(HEADS, HEADS, bias=False)
        nn.init.uniform_(self.talk_again.weight, 0, 1)
        self.wide = nn.Linear(WIDTH, HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(3 * x).chunk(3, -1))
        mixed = self.style(self, q, k, v)
        return mixed if mixed.ndim == 3 else self.out(mixed.transpose(1, 2).flatten(2))


class StyledBlock(nn.Module):
    def __init__(self, style: Callable[[Styled, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Styled(style)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class StyledModel(nn.Module):
    def __init__(self, style: Callable[[Styled, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(32, WIDTH), nn.ModuleList(StyledBlock(style) for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        return x


def weights_met(model: StyledModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The weights that each block's own code mixed by in one pass."""
    attentions = [block.attention for block in model.blocks if isinstance(block, StyledBlock)]
    for attention in attentions:
        attention.seen.clear()
    with torch.no_grad():
        model(**batch)
    return [attention.seen[-1].double() for attention in attentions]


def restyle(model: StyledModel, style: Callable[[Styled, Tensor, Tensor, Tensor], Tensor]) -> None:
    for block in model.blocks:
        assert isinstance(block, StyledBlock)
        block.attention.style = style


def causal(logits: Tensor) -> Tensor:
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + logits.shape[-1] - logits.shape[-2])
    return logits.masked_fill(later, -math.inf)


def talking(before: bool, after: bool) -> Callable[[Styled, Tensor, Tensor, Tensor], Tensor]:
    """Talking heads (Shazeer et al. 2020): a map of the heads in front of the softmax, behind it, or both."""

    def mix(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if before:
            logits = torch.einsum("bhqk,hg->bgqk", logits, self.talk)
        weights = causal(logits).softmax(-1)
        if after:
            weights = self.talk_again(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            weights = weights / weights.sum(-1, keepdim=True)
        self.seen.append(weights)
        return weights @ v

    return mix


def grouped(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads a key, without repeating it, and a column of zeros in front: no axis of the weights is as long as the keys."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, ::2], v[:, ::2]
    logits = causal(torch.einsum("bgrqd,bgkd->bgrqk", q, k))
    logits = torch.cat([torch.zeros_like(logits[..., :1]), logits], -1)
    weights, values = logits.softmax(-1), nn.functional.pad(v, (0, 0, 1, 0))
    self.seen.append((weights / weights[..., 1:].sum(-1, keepdim=True))[..., 1:].flatten(1, 2))
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, values).flatten(1, 2)


def into_the_stream(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values as wide as the stream: one einsum mixes them and adds up the heads."""
    wide = self.wide(v.transpose(1, 2).flatten(2)).unflatten(-1, (HEADS, WIDTH))
    weights = causal(q @ k.transpose(-1, -2)).softmax(-1)
    self.seen.append(weights)
    return torch.einsum("bhqk,bkhd->bqd", weights, wide)


def distances(self: Styled, q: Tensor, k: Tensor, v: Tensor, mask: Callable[[Tensor], Tensor] = causal) -> Tensor:
    """Bloom's: slopes that the model keeps make the operand that baddbmm adds, the mask in it."""
    size = q.shape[2]
    distance = (torch.arange(size) - torch.arange(size)[:, None]).abs()
    bias = mask(-self.talk.diagonal()[:, None, None] * distance)[None].expand(len(q), -1, -1, -1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = torch.baddbmm(bias.flatten(0, 1), q, k.mT).softmax(-1)
    self.seen.append(weights.unflatten(0, (-1, HEADS)))
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


STYLES = {
    "heads talk before the softmax": talking(True, False),
    "heads talk behind the softmax": talking(False, True),
    "heads talk before and behind the softmax": talking(True, True),
    "grouped, with a column of zeros": grouped,
    "heads added up by the einsum": into_the_stream,
    "distances with a mask, added by baddbmm": distances,
}


@pytest.mark.parametrize("style", STYLES)
def test_the_entropies_are_those_of_what_the_model_mixed_by(style: str) -> None:
    model = StyledModel(STYLES[style]).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    record = uc.diagnose(model, batches=[batch]).record
    for number, weights in enumerate(weights_met(model, batch)):
        entropy = -torch.xlogy(weights, weights).sum(-1).mean((0, 2))
        found = {a.head: a for a in record.attention if a.block == number}
        assert len(found) == HEADS
        for head in range(HEADS):
            measured = found[head].entropy
            assert measured is not None, found[head].unavailable
            assert measured.mean == pytest.approx(float(entropy[head]), rel=1e-4)
            share = found[head].normalized_entropy
            assert share is not None
            assert share.mean == pytest.approx(np.mean(_normalised(weights[:, head])), rel=1e-4)


def soft(is_fused: bool) -> Callable[[Styled, Tensor, Tensor, Tensor], Tensor]:
    """Logits in the hundreds beside a mask of -100 that is added: later tokens keep some weight in some rows. Behind the softmax
    stands a column of zeros, which takes most of other rows."""

    def mix(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = -100.0 * torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).triu(1)
        q = 25 * q
        logits = q @ k.mT / q.shape[-1] ** 0.5 + mask
        weights = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1).softmax(-1)[..., :-1]
        self.seen.append(weights)
        if not is_fused:
            return weights @ v
        k, v = (nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=nn.functional.pad(mask, (0, 1)))

    return mix


@pytest.mark.parametrize("is_fused", [False, True], ids=["product", "fused"])
def test_a_pair_is_forbidden_where_it_has_no_share_of_its_row_whatever_a_sink_takes(is_fused: bool) -> None:
    """A pair that a mask lowers and that keeps more than 1e-30 of its row's largest weight is a key of that row, in that head."""
    model = StyledModel(soft(is_fused)).double().eval()  # where no weight underflows
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    record = uc.diagnose(model, batches=[batch]).record
    leaking = 0
    for number, block in enumerate(model.blocks):
        assert isinstance(block, StyledBlock)
        block.attention.seen.clear()
        with torch.no_grad():
            model(**batch)
        for head, weights in enumerate(block.attention.seen[-1].double().numpy().transpose(1, 0, 2, 3)):
            found: list[list[float]] = [[] for _ in weights]
            for sequence, i in np.ndindex(3, 11):
                row = weights[sequence, i]
                keys = (np.arange(11) <= i) | (row > 1e-30 * row.max())
                leaking += int(keys[i + 1 :].sum())
                p = row[keys] / max(row[keys].sum(), 1e-300)
                if row.max() > 0 and keys.sum() > 1:
                    found[sequence].append(float(-(p[p > 0] * np.log(p[p > 0])).sum() / math.log(keys.sum())))
            share = next(a for a in record.attention if (a.block, a.head) == (number, head)).normalized_entropy
            assert share is not None
            assert share.mean == pytest.approx(np.mean([np.mean(of) for of in found]), rel=1e-3)
    assert leaking > 50


def _normalised(weights: Tensor) -> list[float]:
    """Entropy over log T of every row that is allowed T > 1 keys, of weights [sequence, query, key] of a causal head."""
    rows = [row[: i + 1] for one in weights.numpy() for i, row in enumerate(one) if i]
    return [float(-(r * np.log(r)).sum() / math.log(len(r))) for r in rows]


def test_heads_that_an_einsum_adds_up_are_contributions_by_themselves() -> None:
    model = StyledModel(into_the_stream).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    (first, _) = uc.head_contributions(model, batch)
    block = model.blocks[0]
    assert isinstance(block, StyledBlock)
    with torch.no_grad():
        model(**batch)
        added = block.attention(block.norm1(model.embed(batch["idx"])))
        wide = block.attention.wide(block.attention.qkv(3 * block.norm1(model.embed(batch["idx"]))).chunk(3, -1)[2])
        weights = block.attention.seen[-1]
    want = torch.einsum("bhqk,bkhd->bqhd", weights, wide.unflatten(-1, (HEADS, WIDTH)))
    torch.testing.assert_close(first.contributions, want)
    torch.testing.assert_close(first.contributions.sum(2) + first.bias, added)


def test_of_a_mask_that_is_one_operand_with_a_bias_the_bias_stays() -> None:
    """What the bias of a forbidden pair is, the model's own code says when it masks none."""
    model = StyledModel(distances).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        with uc.without(model, "mask", batch=batch):
            got = model(**batch)
        whole = model(**batch)
        restyle(model, functools.partial(distances, mask=lambda bias: bias))
        expected = model(**batch)
    assert not torch.equal(whole, expected)
    assert torch.equal(got, expected)


def choosing(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An indexer chooses the keys of each query (DeepSeek's sparse attention): its own heads are added up by a product of data with
    data, and what that gives only says who is seen."""
    scores = (q[:, :2, :, :3] @ k[:, :1, :, :3].mT).relu()  # [sequence, head, query, key]
    shares = q[:, :2, :, 3].softmax(1)
    index = (shares.permute(0, 2, 1)[:, :, None] @ scores.permute(0, 2, 1, 3)).squeeze(2)
    kept = torch.zeros_like(index).scatter(-1, causal(index).topk(2, -1).indices, 1.0)
    logits = causal((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(kept[:, None] == 0, -math.inf))
    logits = torch.where(logits.isneginf().all(-1, keepdim=True), causal(q @ k.mT), logits)
    weights = logits.softmax(-1)
    self.seen.append(weights)
    return weights @ v


def test_what_only_chooses_the_keys_of_an_attention_is_none_itself() -> None:
    model = StyledModel(choosing).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    record = uc.diagnose(model, batches=[batch]).record
    assert [(a.block, a.head) for a in record.attention] == [(b, h) for b in range(2) for h in range(HEADS)]
    for number, weights in enumerate(weights_met(model, batch)):
        entropy = -torch.xlogy(weights, weights).sum(-1).mean((0, 2))
        for a in (a for a in record.attention if a.block == number):
            assert a.entropy is not None, a.unavailable
            assert a.entropy.mean == pytest.approx(float(entropy[a.head]), rel=1e-4)


class Remembering(nn.Module):
    """Every block's attention sees the tokens of a text before, too: their keys are made from them, and stand in front."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(32, WIDTH), nn.ModuleList(RememberingBlock() for _ in range(2))

    def forward(self, idx: Tensor, before: Tensor) -> Tensor:
        x, memory = self.embed(idx), self.embed(before)
        for block in self.blocks:
            x = block(x, memory)
        return x


class RememberingBlock(StyledBlock):
    def __init__(self) -> None:
        super().__init__(into_the_stream)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        own = self.attention
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in own.qkv(self.norm1(x)).chunk(3, -1))
        _, older, others = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in own.qkv(memory).chunk(3, -1))
        k, v = torch.cat([older, k], 2), torch.cat([others, v], 2)
        x = x + own.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def test_keys_of_another_text_are_no_sink() -> None:
    """A sink is a key that no token makes. Tokens of another stream are tokens, and nothing is said of some of the keys alone."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "idx": torch.randint(0, 32, (3, 11), generator=generator),
        "before": torch.randint(0, 32, (3, 5), generator=generator),
    }
    record = uc.diagnose(Remembering().eval(), batches=[batch]).record
    assert {(a.entropy, a.unavailable["entropy"]) for a in record.attention} == {
        (None, "it attends to tokens of its own stream and to those of another at once")
    }


def overlapping(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two pieces of the sequence, whose keys are those of both."""
    q = torch.stack(q.chunk(2, 2), 2)
    weights = torch.einsum("bhpqd,bhkd->bhpqk", q, k).softmax(-1)
    wide = v[:, :, None].expand(-1, -1, 2, -1, -1)
    return torch.einsum("bhpqk,bhpkd->bhpqd", weights, wide).flatten(2, 3)


def test_pieces_of_a_sequence_that_see_the_same_keys_are_no_heads() -> None:
    model = StyledModel(overlapping).eval()
    batch = {"idx": torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(1))}
    for a in uc.diagnose(model, batches=[batch]).record.attention:
        assert a.entropy is None
        assert "answers for" in a.unavailable["entropy"]


def normed(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


# Ways to hide pairs, from logits and from what is hidden to weights.
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lower triangle of the weights": lambda x, later: normed(
        x.softmax(-1).tril() if bool(later.any()) else x.softmax(-1)
    ),
    "lower triangle of the exponentials": lambda x, later: normed(x.exp().tril() if bool(later.any()) else x.exp()),
    "the lesser of two": lambda x, later: torch.minimum(x, torch.where(later, -1e9, math.inf)).softmax(-1),
    "so many times the mask": lambda x, later: torch.add(x, later.float(), alpha=-1e4).softmax(-1),
    "so many times the mask less": lambda x, later: torch.sub(x, later.float(), alpha=1e4).softmax(-1),
    "an einsum of weights and mask": lambda x, later: normed(
        torch.einsum("bhij,ij->bhij", x.softmax(-1), (~later).float())
    ),
    "a product that is added": lambda x, later: torch.addcmul(x, later.float(), torch.tensor(-1e9)).softmax(-1),
    "a method that chooses": lambda x, later: x.where(~later, x.new_tensor(-math.inf)).softmax(-1),
    "a tensor full of one number": lambda x, later: torch.where(later, torch.full_like(x, -1e4), x).softmax(-1),
    "ones and zeros, then a number": lambda x, later: (x * (~later).float() - 1e9 * later.float()).softmax(-1),
    "drawn towards a tensor full of one number": lambda x, later: torch.lerp(
        x, torch.full_like(x, -1e9), later.float().expand_as(x)
    ).softmax(-1),
    "the mask less the logits": lambda x, later: torch.sub(-1e9 * later.float(), x).softmax(-1),
}
# Of each kind one is told in every run.
FURTHER = {
    "lower triangle of the exponentials",
    "so many times the mask less",
    "an einsum of weights and mask",
    "a product that is added",
    "ones and zeros, then a number",
}


def hiding(way: str, *, hides: bool = True) -> Callable[[Styled, Tensor, Tensor, Tensor], Tensor]:
    def mix(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1) & hides
        weights = MASKS[way](q @ k.mT / q.shape[-1] ** 0.5, later)
        self.seen.append(weights)
        return weights @ v

    return mix


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.slow] if w in FURTHER else []) for w in MASKS])
def test_a_mask_is_one_whatever_operation_hides_by_it(way: str) -> None:
    model = StyledModel(hiding(way)).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    record = uc.diagnose(model, batches=[batch]).record
    for number, weights in enumerate(weights_met(model, batch)):
        for a in (a for a in record.attention if a.block == number):
            assert a.normalized_entropy is not None, a.unavailable
            assert a.normalized_entropy.mean == pytest.approx(np.mean(_normalised(weights[:, a.head])), rel=1e-4)
    with torch.no_grad(), uc.without(model, "mask", batch=batch):
        got = model(**batch)
    restyle(model, hiding(way, hides=False))
    with torch.no_grad():
        torch.testing.assert_close(got, model(**batch))


def cut_in_place(self: Styled, q: Tensor, k: Tensor, v: Tensor, *, hides: bool = True) -> Tensor:
    """The weights themselves are written over: what they were before is gone."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return normed(weights.tril_() if hides else weights) @ v


def test_a_mask_that_is_written_into_the_weights_is_removed_and_its_pairs_are_not_counted_as_allowed() -> None:
    model = StyledModel(cut_in_place).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    for a in uc.diagnose(model, batches=[batch]).record.attention:
        assert a.entropy is not None
        assert a.unavailable["normalized_entropy"] == "pairs have no weight that nothing was seen to forbid"
    with torch.no_grad(), uc.without(model, "mask", batch=batch):
        got = model(**batch)
    restyle(model, functools.partial(cut_in_place, hides=False))
    with torch.no_grad():
        torch.testing.assert_close(got, model(**batch))


def drawn_towards(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Logits that are drawn to a low number where a pair is hidden, by something that was made of the logits: it is open which
    operand hides."""
    logits = q @ k.mT
    later = torch.ones(logits.shape[-2:]).triu(1).expand_as(logits)
    weights = torch.lerp(logits, 0 * logits - 1e9, later).softmax(-1)
    self.seen.append(weights)
    return weights @ v


def test_pairs_without_weight_that_nothing_was_seen_to_forbid_are_not_counted_as_allowed() -> None:
    model = StyledModel(drawn_towards).eval()
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    for a in uc.diagnose(model, batches=[batch]).record.attention:
        assert a.entropy is not None
        assert a.normalized_entropy is None
        assert a.entropy_floor is None
        assert a.key_share is None
        assert a.unavailable["normalized_entropy"] == "pairs have no weight that nothing was seen to forbid"


def recurrent(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A delta rule: it mixes values of which each was corrected by those before. The state at the end is made, and let go."""
    own = torch.eye(k.shape[2]) + (k @ k.mT / 8).tril(-1)
    corrected = torch.linalg.solve_triangular(own, v, upper=False)
    _ = k.mT @ corrected
    return (q @ k.mT).tril() @ corrected


def test_a_state_that_nothing_returned_depends_on_is_no_attention_without_a_block() -> None:
    """Layers of both kinds in turn, as Qwen3-Next has them."""
    model = StyledModel(unchunked).eval()
    model.blocks.insert(0, StyledBlock(recurrent))
    batch = {"idx": torch.randint(0, 32, (3, 11), generator=torch.Generator().manual_seed(1))}
    found = proved_anatomy(model, batch)
    assert [[part.kind for part in block.parts] for block in found.blocks] == [
        ["mixer", "mlp"],
        *[["attention", "mlp"]] * 2,
    ]


def chunked(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Four queries at a time: how many calls that are depends on the text."""
    causally = causal(q @ k.transpose(-1, -2))
    weights = [rows.softmax(-1) for rows in causally.split(4, 2)]
    return torch.cat([some @ v for some in weights], 2)


def test_a_longer_text_is_not_measured_by_its_first_queries_alone() -> None:
    """Proved on three tokens, which are one call; eleven tokens are three, and the first is not all of them."""
    model = StyledModel(chunked).eval()
    batches = [
        {"idx": torch.randint(0, 32, (3, length), generator=torch.Generator().manual_seed(1))} for length in (3, 11)
    ]
    for head in uc.diagnose(model, batches=batches).record.attention:
        assert head.entropy is None
        assert head.unavailable["entropy"]


def test_queries_in_chunks_are_read_for_texts_of_every_length() -> None:
    """Each batch by itself is proved on as many chunks as it has, however many were met before; so is what is taken away."""
    model, whole = StyledModel(chunked).eval(), StyledModel(unchunked).eval()
    whole.load_state_dict(model.state_dict())
    for length in (11, 7, 14, 11):
        batch = {"idx": torch.randint(0, 32, (3, length), generator=torch.Generator().manual_seed(1))}
        records = [uc.diagnose(each, batches=[batch]).record for each in (model, whole)]
        for head, want in zip(records[0].attention, records[1].attention, strict=True):
            assert head.entropy is not None, head.unavailable
            assert want.entropy is not None
            assert head.entropy.mean == pytest.approx(want.entropy.mean, rel=1e-4)
        outputs, written = [], []
        for each in (model, whole):
            with torch.no_grad(), uc.without(each, "mask", batch=batch):
                outputs.append(each(**batch))
            written.append(next(c.contributions for c in uc.head_contributions(each, batch) if c.block == 1))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(written[0], written[1], rtol=1e-4, atol=1e-4)


def unchunked(self: Styled, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q @ k.transpose(-1, -2)).softmax(-1) @ v
