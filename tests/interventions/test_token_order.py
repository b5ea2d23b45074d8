"""Mask and positions removed: a Transformer without them is a function on sets, tried on every family that can be told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, Family, inputs_for
from tests.helpers.observing import eager
from uncollapse.anatomy.proof import proved_anatomy

TOLD = [
    "bert",
    "albert",
    "roberta",
    "gpt2",
    "llama",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "phi",
    "qwen3",
    "opt",
    "gpt_oss",
    "modernbert",
]
UNTOLD = ["t5", "whisper_encoder", "vit", "wav2vec2", "mpnet", "bloom"]


def states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0]


def permuted(batch: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {k: v[:, order] for k, v in batch.items()}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOLD)
def test_without_mask_and_positions_the_tokens_are_a_set(name: str, backend: str) -> None:
    family = FAMILIES[name]
    model = eager(family.build()) if backend == "eager" else family.build()
    batch = inputs_for(family)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    anatomy = proved_anatomy(model, batch)
    before = states(model, batch)
    masks = name == "modernbert" or any(
        part.is_causal for block in anatomy.blocks for part in block.parts
    )  # or windows
    with uc.without(model, *(["mask"] if masks else []), "positions"):
        plain, moved = states(model, batch), states(model, permuted(batch, order))
    assert moved == pytest.approx(plain[:, order], abs=1e-3 * float(plain.abs().max()))
    assert not torch.allclose(states(model, permuted(batch, order)), before[:, order], atol=1e-2)  # they did matter
    assert torch.equal(states(model, batch), before)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gptj", "bloom", "falcon"])
def test_without_the_mask_the_first_token_hears_the_last(name: str, backend: str) -> None:
    family: Family = FAMILIES[name]
    model = eager(family.build()) if backend == "eager" else family.build()
    batch = inputs_for(family)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -1] = (other["input_ids"][:, -1] + 7) % 60 + 3
    proved_anatomy(model, batch)
    assert torch.allclose(states(model, batch)[:, 0], states(model, other)[:, 0], atol=1e-5)
    with uc.without(model, "mask"):
        assert not torch.allclose(states(model, batch)[:, 0], states(model, other)[:, 0], atol=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding_stays_hidden_without_the_mask(backend: str) -> None:
    family = FAMILIES["llama"]
    model = eager(family.build()) if backend == "eager" else family.build()
    batch = inputs_for(family, 1)
    padded = {
        "input_ids": torch.cat([batch["input_ids"], torch.tensor([[9, 11]])], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(1, 2, dtype=torch.long)], 1),
    }
    proved_anatomy(model, batch)
    with uc.without(model, "mask"):
        assert states(model, padded)[:, :9] == pytest.approx(states(model, batch), abs=1e-5)


def test_uniform_attention_without_a_mask_is_uniform_over_all_tokens() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight.zero_()
    batch = inputs_for(family)
    proved_anatomy(model, batch)
    with uc.without(model, "mask"):
        found = uc.diagnose(model, batches=[batch])
    for (
        head
    ) in found.record.attention:  # the figures are those of the softmax that ran, not of the one that was asked for
        assert head.entropy is not None
        assert head.entropy.mean == pytest.approx(math.log(9), abs=1e-5)
    assert {f.code for f in found.findings} >= {"WIDTH-UNIFORM", "WIDTH-RANK-ONE"}


@pytest.mark.parametrize("name", UNTOLD)
def test_positions_that_cannot_be_taken_away_are_refused(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    proved_anatomy(model, inputs_for(family))
    with pytest.raises(uc.UnsupportedModel, match="Remove another component"), uc.without(model, "positions"):
        pass


@pytest.mark.parametrize("name", [n for n in TOLD if n not in {"bert", "albert", "roberta", "modernbert"}])
def test_without_positions_a_token_still_hears_the_first_also_when_no_mask_is_given(name: str) -> None:
    """Positions that start again look like sequences packed into one row, which a model without a mask keeps apart."""
    family = FAMILIES[name]
    model = family.build()
    ids = inputs_for(family)["input_ids"]
    proved_anatomy(model, {"input_ids": ids})
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 32
    with uc.without(model, "positions"):
        plain, changed = states(model, {"input_ids": ids}), states(model, {"input_ids": other})
        told = states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert not torch.equal(plain[:, 2], changed[:, 2])
    assert torch.allclose(plain, told, atol=1e-6)


class TokenFirst(nn.Module):
    """Token numbers and stream with the axes token, sequence; positions are told as [sequence, token] all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(30, 16), nn.ModuleList(TokenFirstBlock() for _ in range(2))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        x = self.embed(input_ids)
        hidden = torch.zeros(x.shape[1], 1, 1, x.shape[0])
        if attention_mask is not None:
            hidden = (1 - attention_mask[:, None, None].float()) * -1e9
        for block in self.blocks:
            x = block(x, hidden)
        return x


class TokenFirstBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 1, 3, 0, 4)
        y = ((q @ k.mT + hidden).softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)
        x = x + self.out(y)
        return x + self.mlp(x).relu()


def test_positions_of_token_first_numbers_are_refused_in_words() -> None:
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(30, (7, 4), generator=torch.Generator().manual_seed(0))}
    with (
        pytest.raises(uc.UnsupportedModel, match="with token, sequence"),
        uc.without(TokenFirst().eval(), "positions", batch=batch),
    ):
        pass


class BiasAndMask(nn.Module):
    """A causal mask and a bias over distances that become one operand of the logits, `way` says how. Without the mask (`hides`
    False) the same bias is added."""

    def __init__(self, way: str, *, is_fused: bool = False, apart: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hides, self.way, self.apart = nn.Embedding(30, 16), True, way, apart
        self.blocks = nn.ModuleList(BiasAndMaskBlock(is_fused=is_fused) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, places = self.embed(input_ids), torch.arange(input_ids.shape[1])
        distance = (places[:, None] - places).float()[None, None]
        bias = -0.3 * distance.abs()
        own = bias if self.apart else joined(bias, (distance < 0) & self.hides, self.way)
        for block in self.blocks:
            joined_there = joined(own, (distance < 0) & self.hides, self.way) if self.apart else own
            x = block(x, joined_there, attention_mask)
        return x


class BiasAndMaskBlock(nn.Module):
    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp, self.is_fused = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16), is_fused

    def forward(self, x: Tensor, bias: Tensor, attention_mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.is_fused:
            if attention_mask is not None:
                bias = bias.masked_fill(attention_mask[:, None, None] == 0, -1e9)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            logits = q @ k.mT + bias
            if attention_mask is not None:
                logits = logits.masked_fill(attention_mask[:, None, None] == 0, -1e9)
            y = logits.softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x).relu()


def joined(bias: Tensor, hidden: Tensor, way: str) -> Tensor:
    """One operand of a bias and of a mask, in one of the ways in which people write it."""
    least = torch.finfo(bias.dtype).min
    if way == "filled":
        return bias.masked_fill(hidden, -math.inf)
    if way == "filled in place":
        return bias.clone().masked_fill_(hidden, -1e9)
    if way == "chosen":
        return torch.where(hidden, least, bias)
    if way == "chosen from a tensor":
        return torch.where(~hidden, bias, torch.full_like(bias, -1e4))
    if way == "written into":
        found = bias.expand(1, 2, *bias.shape[2:]).clone()
        found[hidden.expand_as(found)] = -math.inf
        return found
    mask = torch.zeros_like(bias).masked_fill(hidden, -math.inf)
    if way == "subtracted":
        return bias - hidden.float() * 1e9
    if way == "two masks":
        further = torch.zeros_like(bias).masked_fill(hidden.tril(-3) | hidden.triu(3), -1e9)
        return (bias + mask + further).to(bias.dtype).contiguous()
    if way == "mask first":
        mask += bias
        return mask
    return (mask + bias).expand(1, 2, *bias.shape[2:])[:, :1]


WAYS = [
    "filled",
    "filled in place",
    "chosen",
    "chosen from a tensor",
    "written into",
    "subtracted",
    "two masks",
    "mask first",
    "added and moved",
]


# Of each kind one is told in every run, and one without the fused call.
ALWAYS = {("filled", False), *((way, True) for way in ("filled", "chosen", "written into", "two masks", "mask first"))}


@pytest.mark.parametrize(
    ("way", "is_fused"),
    [
        pytest.param(way, is_fused, marks=[] if (way, is_fused) in ALWAYS else [pytest.mark.slow])
        for way in WAYS
        for is_fused in (True, False)
    ],
)
def test_a_bias_stays_where_a_mask_was_put_into_it(way: str, is_fused: bool) -> None:
    """Whatever puts the mask in, and wherever: once for all blocks, or once in each pass of a block."""
    model = BiasAndMask(way, is_fused=is_fused, apart=way in {"chosen", "added and moved"}).eval()
    batch = {"input_ids": torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        whole = model(**batch)
        with uc.without(model, "mask", batch=batch):
            got = model(**batch)
        assert torch.equal(model(**batch), whole)
        model.hides = False
        expected = model(**batch)
    assert not torch.allclose(expected, whole)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("is_fused", [True, False])
def test_of_a_mask_and_a_bias_made_once_for_all_blocks_the_mask_is_removed_in_one_block_alone(is_fused: bool) -> None:
    model = BiasAndMask("filled", is_fused=is_fused).eval()
    batch = {"input_ids": torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))}
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _m, args, out: seen.extend([args[0], args[1], out]))
    with torch.no_grad():
        whole = model(**batch)
        with uc.without(model, "mask", blocks=[1], batch=batch):
            seen.clear()
            got = model(**batch)
        x, bias, output = seen
        open_bias = -0.3 * (torch.arange(7)[:, None] - torch.arange(7)).float().abs()[None, None]
        assert bool(bias.isinf().any())  # the others are still given the mask
        assert torch.equal(output, model.blocks[1](x, open_bias, None))
        assert torch.equal(got, model.blocks[2](output, bias, None))
        assert not torch.equal(got, whole)


@pytest.mark.parametrize("is_fused", [True, False])
def test_padding_stays_hidden_where_a_mask_leaves_its_bias(is_fused: bool) -> None:
    model = BiasAndMask("filled", is_fused=is_fused).eval()
    ids = torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        with uc.without(model, "mask", batch=batch):
            got = model(**batch)
        model.hides = False
        expected = model(**batch)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


class TableWithMask(BiasAndMask):
    """A bias that was filled before the model runs: what it was at a forbidden pair nobody knows."""

    def __init__(self) -> None:
        super().__init__("filled")
        places = torch.arange(7)
        distance = (places[:, None] - places).float()[None, None]
        self.register_buffer("table", (-0.3 * distance.abs()).masked_fill(distance < 0, -math.inf))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, self.table, attention_mask)
        return x


def test_a_mask_that_was_one_with_a_bias_before_the_model_ran_is_not_taken_for_a_mask_alone() -> None:
    batch = {"input_ids": torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))}
    with pytest.raises(uc.UnsupportedModel, match="also adds a bias"), uc.without(TableWithMask(), "mask", batch=batch):
        pass


class SmallNumbers(BiasAndMask):
    """What is filled in is a number that a bias may have, too: nobody says that it forbids."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, places = self.embed(input_ids), torch.arange(input_ids.shape[1])
        distance = (places[:, None] - places).float()[None, None]
        bias = (-0.3 * distance.abs()).masked_fill(distance < 0, -5.0)
        hidden = torch.zeros_like(bias).masked_fill(distance < -3, -math.inf)
        for block in self.blocks:
            x = block(x, bias + hidden, attention_mask)
        return x


def test_a_small_number_that_is_filled_into_a_bias_is_part_of_the_bias() -> None:
    model = SmallNumbers("filled").eval()
    batch = {"input_ids": torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(0))}
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
    with torch.no_grad(), uc.without(model, "mask", batch=batch):
        seen.clear()
        model(**batch)
    x, output = seen
    distance = (torch.arange(7)[:, None] - torch.arange(7)).float()[None, None]
    with torch.no_grad():
        assert torch.equal(output, model.blocks[0](x, (-0.3 * distance.abs()).masked_fill(distance < 0, -5.0), None))


class Windowed(TokenFirst):
    """Token-first, and no token sees one that is more than three away: on a piece of three tokens that forbids nothing."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x, places = self.embed(input_ids), torch.arange(len(input_ids))
        hidden = -1e9 * ((places - places[:, None]).abs() > 3).float()
        return self.blocks[0](x, hidden)


def test_a_mask_over_token_first_numbers_is_taken_away() -> None:
    """The first row of such a batch is one token of every sequence: nothing that is asked of it alone has a mask."""
    torch.manual_seed(0)
    model = Windowed().eval()
    batch = {"input_ids": torch.randint(30, (9, 4), generator=torch.Generator().manual_seed(0))}
    other = {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][-1] = (other["input_ids"][-1] + 1) % 30
    with torch.no_grad(), uc.without(model, "mask", batch=batch):
        assert not torch.equal(model(**batch)[0], model(**other)[0])
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], model(**other)[0])


class OneMaskBesideAnother(nn.Module):
    """A causal mask that is filled in, and a window that is put in otherwise."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out, self.way = nn.Embedding(31, 16), nn.Linear(16, 48), nn.Linear(16, 16), way
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, count = self.embed(input_ids), input_ids.shape[1]
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        ones = torch.ones(count, count, dtype=torch.bool)
        logits, far = (q @ k.mT).masked_fill(~ones.tril(), -math.inf), ones.tril(-3)
        if self.way == "filled":
            logits = logits.masked_fill(far, -1e4)
        elif self.way == "diagonals":
            for offset in range(3, count):
                logits.diagonal(-offset, -2, -1).fill_(-math.inf)
        elif self.way == "one head":
            for offset in range(3, count):
                logits[:, 1].diagonal(-offset, -2, -1).fill_(-math.inf)
        elif self.way == "rows":
            for row in range(3, count):
                logits[..., row, : row - 2] = -math.inf
        elif self.way == "by number":
            i, j = far.nonzero().unbind(1)
            logits[..., i, j] = -1e9
        if self.way == "steep":  # one head, a product of its own, looks at one key only
            steep, other = ((1e4 * logits[:, 0]).softmax(-1) @ v[:, 0], logits[:, 1].softmax(-1) @ v[:, 1])
            return x + self.out(torch.cat([steep, other], -1)) + self.down(self.up(x).relu())
        weights = logits.softmax(-1)
        if self.way == "behind":
            rows = [
                torch.cat([torch.zeros_like(row[..., : max(i - 2, 0)]), row[..., max(i - 2, 0) :]], -1)
                for i, row in enumerate(weights.unbind(-2))
            ]
            weights = torch.stack(rows, -2)
            weights = weights / weights.sum(-1, keepdim=True)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("way", ["diagonals", "one head", "rows", "by number", "behind"])
def test_a_mask_that_was_overlooked_beside_another_is_not_left_in_silence(way: str) -> None:
    model, batch = OneMaskBesideAnother(way).eval(), {"input_ids": torch.randint(31, (3, 9))}
    with (
        pytest.raises(uc.UnsupportedModel, match="Another mask was overlooked"),
        uc.without(model, "mask", batch=batch),
    ):
        pass
    with uc.without(model, "mlp", batch=batch):  # nothing else is refused
        pass


@pytest.mark.parametrize("way", ["filled", "steep"])
def test_without_masks_that_are_all_found_none_is_left(way: str) -> None:
    model, batch = OneMaskBesideAnother(way).eval(), {"input_ids": torch.randint(31, (3, 9))}
    other = {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] = (batch["input_ids"][:, 0] + 1) % 31
    with torch.no_grad(), uc.without(model, "mask", batch=batch):
        assert bool((model(**batch) != model(**other)).any(-1).all())


class InChunks(nn.Module):
    """Causal attention that answers for four of its queries at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        self.is_causal = True

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mask = (
            torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1) if self.is_causal else torch.zeros(x.shape[1], 1)
        )
        pairs = zip(q.split(4, 2), mask.split(4), strict=True)
        y = torch.cat([(some @ k.mT + own).softmax(-1) @ v for some, own in pairs], 2)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def test_a_mask_is_not_removed_from_the_first_chunk_of_queries_alone() -> None:
    """The batch it was proved on was one chunk long."""
    model = InChunks().eval()
    short, longer = ({"input_ids": torch.arange(n)[None]} for n in (4, 10))
    with uc.without(model, "mask", batch=short):
        model(**short)
        with pytest.raises(uc.UncollapseError, match="got answers for 4 of them"):
            model(**longer)


def test_a_mask_is_removed_from_every_chunk_of_queries() -> None:
    model = InChunks().eval()
    batch = {"input_ids": torch.arange(7)[None]}
    with uc.without(model, "mask", batch=batch):
        found = model(**batch)
        with pytest.raises(
            uc.UncollapseError, match=r"as many calls as on the example \(2\), got answers for 8 of them"
        ):
            model(input_ids=torch.arange(10)[None])
    model.is_causal = False
    torch.testing.assert_close(found, model(**batch))


def test_three_tokens_are_put_in_another_order_too() -> None:
    """Turning three tokens by three is no other order, and whatever a model knows of it passes for nothing."""
    family = FAMILIES["mpnet"]  # learned positions, and a relative bias besides
    model = family.build()
    batch = {k: v[:, :3] if v.ndim == 2 else v for k, v in inputs_for(family).items()}
    proved_anatomy(model, batch)
    with pytest.raises(uc.UnsupportedModel, match="still depend on their order"), uc.without(model, "positions"):
        pass
