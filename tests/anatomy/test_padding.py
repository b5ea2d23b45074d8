"""Padding under names of the user's own: whose tokens are real, and what padded ones see is nobody's business."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.anatomy.proof import proved_anatomy

WIDTH = 16


class Masked(nn.Module):
    """One attention whose forbidden pairs are told by `keep` [sequence, token]; `number` is added for each reason to forbid."""

    def __init__(self, number: float, *, is_causal: bool, beginning: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.mlp = (
            nn.LayerNorm(WIDTH),
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
        )
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH)) if beginning else None
        self.number, self.is_causal = number, is_causal

    def forward(self, words: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(words)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
            keep = nn.functional.pad(keep, (1, 0), value=1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        logits = q @ k.mT + self.number * (1 - keep[:, None, None].float())
        if self.is_causal:
            logits = logits + self.number * torch.ones(logits.shape[-2:]).triu(1)
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def batch(is_left: bool, sequences: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.ones(sequences, tokens, dtype=torch.long)
    for number, row in enumerate(keep):
        row[: number + 2] = 0
    return {
        "words": torch.randint(0, 32, keep.shape, generator=generator),
        "keep": keep if is_left else keep.flip(-1),
    }


@pytest.mark.parametrize("is_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_causal_is_what_lets_no_later_token_reach_a_real_one(is_left: bool, is_causal: bool) -> None:
    """A padded query of which every key is forbidden, each by the same number, sees them all alike: later ones, too."""
    model = Masked(-1e9, is_causal=is_causal, beginning=False).eval()
    (block,) = proved_anatomy(model, batch(is_left)).blocks
    assert [p.is_causal for p in block.parts if p.kind == "attention"] == [is_causal]


@pytest.mark.parametrize("number", [-100.0, -1e4])
def test_padding_beside_a_token_of_the_models_own_is_seen_whatever_number_hides_it(number: float) -> None:
    """exp(-100) is not quite zero, and neither is the gradient through it."""
    model = Masked(number, is_causal=False, beginning=True).eval()
    given = batch(is_left=False)
    record = uc.diagnose(model, batches=[given]).record
    assert record.probe.tokens == int(given["keep"].sum()) + len(given["keep"])


class MaskedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        logits = q @ k.mT - 1e4 * (1 - keep[:, None, None].float())
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Halved(nn.Module):
    """Autocast in the model's own forward, over a stream that begins in half precision: alone, no block runs without it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(MaskedBlock() for _ in range(2))

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.start(features)
            for block in self.blocks:
                x = block(x, keep)
            return x


def test_the_mask_of_a_model_in_autocast_is_found_under_autocast() -> None:
    given = batch(is_left=False)
    features = torch.randn(*given["keep"].shape, 8, generator=torch.Generator().manual_seed(0))
    record = uc.diagnose(Halved().eval(), batches=[{"features": features, "keep": given["keep"]}]).record
    assert record.probe.tokens == int(given["keep"].sum())


class Renormalised(Masked):
    """Weights are hidden after the softmax, and scaled to sum to one again: what a hidden key does in the softmax cancels, up to
    rounding."""

    def forward(self, words: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(words)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
            keep = nn.functional.pad(keep, (1, 0), value=1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.mT).softmax(-1) * keep[:, None, None]
        weights = weights * torch.ones(weights.shape[-2:]).tril() if self.is_causal else weights
        x = x + self.out((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_beside_a_token_of_the_models_own_is_seen_where_hidden_keys_cancel(is_causal: bool) -> None:
    model = Renormalised(0.0, is_causal=is_causal, beginning=True).eval()
    given = batch(is_left=False)
    record = uc.diagnose(model, batches=[given]).record
    assert record.probe.tokens == int(given["keep"].sum()) + len(given["keep"])


def test_padding_that_only_later_batches_have_is_seen_in_those() -> None:
    model = Renormalised(0.0, is_causal=True, beginning=True).eval()
    whole, given = (
        {"words": torch.tensor([[3, 1, 4]]), "keep": torch.ones(1, 3, dtype=torch.long)},
        batch(is_left=False),
    )
    record = uc.diagnose(model, batches=[whole, given]).record
    assert record.probe.tokens == 4 + int(given["keep"].sum()) + len(given["keep"])


def test_padding_in_another_unit_is_told_while_the_attention_is_away() -> None:
    """What tells it is what the heads write, added or not."""
    model = Masked(-1e9, is_causal=False, beginning=True).eval()
    given = batch(is_left=False)
    with uc.without(model, "attention", batch=given):
        record = uc.diagnose(model, batches=[given]).record
    assert record.probe.tokens == int(given["keep"].sum()) + len(given["keep"])


class Skipping(Masked):
    """The usual shortcut: where a batch has no padding, the mask is not applied at all."""

    def forward(self, words: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(words)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        logits = q @ k.mT
        if self.is_causal:
            logits = logits + torch.full(logits.shape[-2:], self.number).triu(1)
        if not bool(keep.all()):
            logits = logits.masked_fill(keep[:, None, None] == 0, self.number)
        x = x + self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.mark.parametrize("is_padded_first", [False, True])
def test_a_mask_that_is_only_applied_where_there_is_padding(is_padded_first: bool) -> None:
    """What was proved on a batch without padding has no mask in it."""
    model = Skipping(-1e9, is_causal=False, beginning=False).eval()
    given = batch(is_left=False)
    whole = {"words": given["words"], "keep": torch.ones_like(given["keep"])}
    several = [given, whole] if is_padded_first else [whole, given]
    record = uc.diagnose(model, batches=several).record
    alone = [uc.diagnose(model, batches=[one]).record for one in several]
    assert (
        record.probe.tokens
        == sum(one.probe.tokens for one in alone)
        == given["keep"].numel() + int(given["keep"].sum())
    )
    for number, head in enumerate(record.attention):
        for name in ("entropy", "normalized_entropy", "key_share", "value_contraction"):
            found, parts = getattr(head, name), [getattr(one.attention[number], name) for one in alone]
            assert found.mean == pytest.approx(sum(p.mean * p.n for p in parts) / sum(p.n for p in parts), rel=1e-5)


def test_a_removed_mask_is_away_from_batches_with_padding_too() -> None:
    """Padding stays hidden, by an operation that the batch it was proved on does not have."""
    causal, other = (Skipping(-1e9, is_causal=c, beginning=False).eval() for c in (True, False))
    given = batch(is_left=False)
    whole = {"words": given["words"], "keep": torch.ones_like(given["keep"])}
    with uc.without(causal, "mask", batch=whole):
        for one in (whole, given):
            real = one["keep"].bool()
            torch.testing.assert_close(causal(**one)[real], other(**one)[real], rtol=1e-5, atol=1e-5)


class TrueForPadding(nn.Module):
    """The same, where a 1 in a mask of the usual name stands for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked(-1e9, is_causal=False, beginning=False)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.inner(words, 1 - attention_mask)
        return hidden


def test_a_mask_of_the_usual_name_may_be_true_for_padding() -> None:
    """A batch without padding then has a mask without any 1."""
    words = batch(is_left=False)["words"]
    given = {"words": words, "attention_mask": torch.zeros_like(words)}
    (stack,) = proved_anatomy(TrueForPadding().eval(), given).stacks
    assert [(mask.tensor, mask.real) for mask in stack.masks] == [("attention_mask", False)]


class Inverted(nn.Module):
    """A 1 in its mask stands for padding, whatever the mask is called; forbidden pairs are told to a fused call, or filled in."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.is_fused, self.is_causal = nn.Embedding(32, WIDTH), MaskedBlock(), is_fused, True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, block = self.embed(input_ids), self.block
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.qkv(block.norm(x)).chunk(3, -1))
        forbidden = attention_mask.bool()[:, None, None].expand(-1, -1, x.shape[1], -1)
        forbidden = forbidden | torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.is_causal else forbidden
        if self.is_fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~forbidden)
        else:
            mixed = (q @ k.mT).masked_fill(forbidden, -1e9).softmax(-1) @ v
        x = x + block.out(mixed.transpose(1, 2).flatten(2))
        return x + block.mlp(x)


@pytest.mark.parametrize("is_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_mask_is_not_taken_at_its_name(is_left: bool, is_fused: bool) -> None:
    """A few tokens that the name calls real are all padding: they tell nothing about the mask, and others are looked at."""
    given = batch(is_left, tokens=11)
    padded = {"input_ids": given["words"], "attention_mask": 1 - given["keep"]}
    model, real = Inverted(is_fused=is_fused).eval(), given["keep"].bool()
    assert uc.diagnose(model, batches=[padded]).record.probe.tokens == int(real.sum())
    uc.forget(model)
    with uc.without(model, "mask", batch=padded):
        found = model(**padded)[real]
    model.is_causal = False
    torch.testing.assert_close(found, model(**padded)[real])


def test_a_mask_that_leaves_one_token_of_the_first_is_told_from_others() -> None:
    """Its name says nothing, and the first seven columns hold a single real token: no two of them reach each other."""

    class Named(Inverted):
        def forward(self, words: Tensor, hide: Tensor) -> Tensor:
            return super().forward(words, hide)

    generator = torch.Generator().manual_seed(1)
    hide = torch.zeros(4, 9, dtype=torch.bool)
    hide[:, :6] = True
    given = {"words": torch.randint(0, 32, hide.shape, generator=generator), "hide": hide}
    model = Named(is_fused=True).eval()
    with uc.without(model, "mask", batch=given):
        found = model(**given)[~hide]
    model.is_causal = False
    torch.testing.assert_close(found, model(**given)[~hide])


def test_a_mask_of_which_nothing_is_known_keeps_the_causal_one_where_it_is() -> None:
    """One real token in every sequence: whether the other tensor hides the rest, no poking can tell."""
    hide = torch.ones(3, 9, dtype=torch.bool)
    hide[:, -1] = False
    given = {"input_ids": torch.arange(27).view(3, 9), "attention_mask": hide}
    model = Inverted(is_fused=True).eval()
    with pytest.raises(uc.UnsupportedModel), uc.without(model, "mask", batch=given):
        model(**given)


@pytest.mark.parametrize("is_left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_mask_that_says_nothing_of_the_models_own_beginning_is_told_token_by_token(
    is_left: bool, is_causal: bool
) -> None:
    model = Masked(-1e9, is_causal=is_causal, beginning=True).eval()
    given = batch(is_left)
    (stack,) = proved_anatomy(model, given).stacks
    assert [(m.tensor, m.real, m.unit, m.before) for m in stack.masks] == [("keep", True, "token", 1)]
    record = uc.diagnose(model, batches=[given]).record
    assert record.probe.tokens == int(given["keep"].sum()) + len(given["keep"])
    if is_causal:  # what is left is the model that hides padded keys and nothing else
        open_model = Masked(-1e9, is_causal=False, beginning=True).eval()
        with torch.no_grad(), uc.without(model, "mask", batch=given):
            without = model(**given)
        real = torch.nn.functional.pad(given["keep"], (1, 0), value=1).bool()
        with torch.no_grad():
            torch.testing.assert_close(without[real], open_model(**given)[real])


class Flagged(nn.Module):
    """Attention in which a flag takes nats off a token's logits, or hides it behind the softmax."""

    def __init__(self, nats: float, *, is_fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.nats, self.is_fused = nn.Embedding(64, 32), nn.LayerNorm(32), nats, is_fused
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids: Tensor, flag: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        logits, flags = q @ k.mT / math.sqrt(8), flag[:, None, None].to(x.dtype)
        if self.is_fused:
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, -self.nats * flags)
            x = x + self.out(y.transpose(1, 2).flatten(2))
            return x + self.down(self.up(x).relu())
        if math.isfinite(self.nats):
            weights = (logits - self.nats * flags).softmax(-1)
        else:
            weights = logits.softmax(-1) * (1 - flags)
            weights = weights / weights.sum(-1, keepdim=True)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nats", [3.5, 5.0, math.inf])
def test_a_flag_that_makes_a_token_count_less_is_no_mask_in_half_precision(nats: float, dtype: torch.dtype) -> None:
    ids, flag = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0)), torch.zeros(3, 9).long()
    flag[0, 6:] = flag[1, :3] = 1
    anatomy = proved_anatomy(Flagged(nats).to(dtype).eval(), {"input_ids": ids, "flag": flag})
    found = [(mask.tensor, mask.real) for mask in anatomy.stacks[0].masks]
    assert found == ([("flag", False)] if nats == math.inf else [])


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("nats", "hides"), [(5.0, False), (20.0, False), (100.0, True)])
def test_who_is_given_weight_is_not_hidden_however_little_it_is(nats: float, hides: bool, is_fused: bool) -> None:
    """Five nats leave less than rounding shows in bfloat16, and twenty less than it shows in single precision."""
    ids, flag = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0)), torch.zeros(3, 9).long()
    flag[0, 6:] = flag[1, :3] = 1
    for dtype in (torch.float32, torch.bfloat16):
        model = Flagged(nats, is_fused=is_fused).to(dtype).eval()
        anatomy = proved_anatomy(model, {"input_ids": ids, "flag": flag})
        assert [(m.tensor, m.real) for m in anatomy.stacks[0].masks] == ([("flag", False)] if hides else [])


class EndingByItself(nn.Module):
    """Two blocks over the tokens and a learned row behind the last one, which the mask says nothing of."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(32, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.is_causal = is_causal
        self.entropies: list[Tensor] = []

    def forward(self, words: Tensor, keep: Tensor) -> Tensor:
        x = self.embed(words)
        x = torch.cat([x, self.last.expand(len(x), -1, -1)], 1)
        hidden = nn.functional.pad(keep, (0, 1), value=1)[:, None, None] == 0
        if self.is_causal:
            hidden = hidden | torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        self.entropies.clear()
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            weights = (q @ k.mT).masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1)
            self.entropies.append(-torch.xlogy(weights, weights).sum(-1))
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_a_row_of_the_models_own_may_come_after_the_tokens(is_causal: bool, is_padded: bool) -> None:
    """Once a mask and a stream were taken to end with the same token: real tokens were padding, and entropies 0 (VideoPrism)."""
    model, given = EndingByItself(is_causal=is_causal).eval(), batch(is_left=False)
    if not is_padded:
        given["keep"] = torch.ones_like(given["keep"])
    record = uc.diagnose(model, batches=[given]).record
    model(**given)
    real = nn.functional.pad(given["keep"], (0, 1), value=1).bool()
    assert record.probe.tokens == int(real.sum())
    for entry in record.attention:
        own = model.entropies[entry.block][:, entry.head]
        of_rows = [float(own[i][real[i]].mean()) for i in range(len(own))]
        assert entry.entropy is not None
        assert [entry.entropy.mean, entry.entropy.min] == pytest.approx(
            [sum(of_rows) / len(of_rows), min(of_rows)], abs=1e-5
        )


class Turned(Masked):
    """The same, its mask [token, sequence]."""

    def forward(self, words: Tensor, keep: Tensor) -> Tensor:
        return super().forward(words, keep.T)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
def test_of_as_many_sequences_as_tokens_it_is_told_which_axis_is_which(is_causal: bool, is_turned: bool) -> None:
    kind = Turned if is_turned else Masked
    model = kind(-1e9, is_causal=is_causal, beginning=False).eval()
    given = batch(False, sequences=7, tokens=7)
    given["keep"][-2:] = given["keep"][:2]  # a sequence of padding alone would hear everything
    if is_turned:
        given["keep"] = given["keep"].T.contiguous()
    (stack,) = proved_anatomy(model, given).stacks
    (mask,) = stack.masks
    assert (mask.tensor, mask.real, mask.unit, mask.is_transposed) == ("keep", True, "token", is_turned)
    tokens = uc.diagnose(model, batches=[given]).record.probe.tokens
    assert tokens == int(given["keep"].sum())
