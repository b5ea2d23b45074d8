"""What a record says was taken for what, on models that are written here and therefore known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.records.anatomy import AnatomyRecord, AttentionCallRecord, NotMeasured, PartRecord
from uncollapse.records.encoding import from_json, to_json

WIDTH, HEADS = 32, 4


class _Attention(nn.Module):
    """Multi-head attention with the heads folded behind the sequences. `way` says how the weights are made."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), way

    def forward(self, x: Tensor) -> Tensor:
        sequences, tokens, _ = x.shape
        q, k, v = (
            part.reshape(sequences, tokens, HEADS, -1).transpose(1, 2).flatten(0, 1)
            for part in self.qkv(x).chunk(3, -1)
        )
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        if self.way == "fused":
            unfolded = [t.unflatten(0, (sequences, HEADS)) for t in (q, k, v)]
            mixed = nn.functional.scaled_dot_product_attention(*unfolded, is_causal=True).flatten(0, 1)
        else:
            logits = torch.bmm(q, k.mT) / math.sqrt(q.shape[-1])
            if self.way == "sigmoid":
                weights = torch.sigmoid(logits)
            elif self.way == "sink":
                weights = torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)[..., 1:]
            else:
                weights = logits.masked_fill(later, -1e4).softmax(-1)
            mixed = torch.bmm(weights, v)
        return self.out(mixed.unflatten(0, (sequences, HEADS)).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), _Attention(way)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self, *ways: str) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(50, WIDTH), nn.ModuleList(map(_Block, ways))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x  # type: ignore[no-any-return]


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"ids": torch.randint(50, (4, 12))}, {"ids": torch.randint(50, (2, 9))}]


def layout(count: int) -> uc.Layout:
    return uc.Layout(blocks=tuple(f"blocks.{number}" for number in range(count)))


def anatomy_of(*ways: str) -> AnatomyRecord:
    torch.manual_seed(0)
    found = uc.diagnose(_Model(*ways).eval(), batches=batches(), layout=layout(len(ways))).record
    assert found.anatomy is not None
    assert from_json(to_json(found), type(found)).anatomy == found.anatomy
    return found.anatomy


def attention_of(anatomy: AnatomyRecord, block: int) -> tuple[PartRecord, AttentionCallRecord]:
    part = anatomy.blocks[block].parts[0]
    assert part.kind == "attention"
    (call,) = part.attention
    return part, call


@pytest.fixture(scope="module")
def known() -> AnatomyRecord:
    return anatomy_of("masked", "fused", "sink")


def test_blocks_parts_norms_and_the_stream(known: AnatomyRecord) -> None:
    assert [block.module for block in known.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    for number, block in enumerate(known.blocks):
        assert (block.block, block.placement, block.stack) == (number, "pre", None)
        assert block.axes is not None
        assert (block.axes.sequence, block.axes.token, block.axes.width) == (0, [1], 2)
        assert [part.kind for part in block.parts] == ["attention", "mlp"]
        assert (block.parts[1].reads, block.parts[1].writes) == (f"blocks.{number}.mlp.0", f"blocks.{number}.mlp.2")
        norms = [(norm.norm, norm.role, norm.part) for norm in block.norms]
        assert norms == [(f"blocks.{number}.first", "before", 0), (f"blocks.{number}.second", "before", 1)]
    assert [(stack.blocks, stack.masks, stack.ids) for stack in known.stacks] == [([0, 1, 2], [], "ids")]
    assert known.not_measured == []


def test_the_axes_the_product_and_what_forbids_pairs(known: AnatomyRecord) -> None:
    part, call = attention_of(known, 0)
    assert call.product == "bmm #1 of blocks.0.attention"
    assert (call.weights, call.softmax) == (0, "softmax #0 of blocks.0.attention")
    assert call.axes == ["sequence·head", "query", "key"]
    assert (call.heads, call.key_value_heads, call.head_width) == (4, 4, 8)
    assert call.output_projection == "blocks.0.attention.out"
    assert [(f.operation.partition(" #")[0], f.argument) for f in call.forbids] == [("masked_fill", None)]
    assert part.causal is True
    _, fused = attention_of(known, 1)
    assert fused.weights is None
    assert fused.axes == ["sequence", "head", "query", "key"]
    assert [f.argument for f in fused.forbids] == ["is_causal"]
    _, free = attention_of(known, 2)
    assert free.forbids == []


def test_the_pass_bears_it_out_on_the_users_batches(known: AnatomyRecord) -> None:
    for block in (0, 1, 2):
        part, _ = attention_of(known, block)
        assert part.deviation is not None
        assert 0 <= part.deviation < 1e-5
        assert part.row_sums is not None
        low, high = part.row_sums
        if block == 2:  # a zero logit beside twelve keys takes a part of every row
            assert 0.5 < low < high < 0.99
        else:
            assert low == pytest.approx(1, abs=1e-5)
            assert high == pytest.approx(1, abs=1e-5)


def test_what_was_not_measured_says_where_and_why() -> None:
    anatomy = anatomy_of("masked", "sigmoid")
    (missing,) = anatomy.not_measured
    assert (missing.block, missing.what) == (1, "attention")
    assert missing.reason.startswith("its weights are no distribution over the keys: rows sum to ")
    part, call = attention_of(anatomy, 1)
    assert call.softmax is None
    assert (part.deviation, part.row_sums) == (None, None)
    assert call.output_projection == "blocks.1.attention.out"


def test_a_refusal_in_one_batch_of_several_is_not_hidden() -> None:
    class Rarely(_Attention):
        """Squares its weights on short texts, so that rows no longer sum to one."""

        def forward(self, x: Tensor) -> Tensor:
            sequences, tokens, _ = x.shape
            q, k, v = (t.reshape(sequences, tokens, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = (q @ k.mT).softmax(-1)
            weights = weights.pow(2.0 if tokens == 9 else 1.0)
            return self.out((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = _Model("masked", "masked").eval()
    model.blocks[1].attention = Rarely("")
    found = uc.diagnose(model, batches=batches(), layout=layout(2)).record
    assert found.anatomy is not None
    (missing,) = found.anatomy.not_measured
    assert (missing.block, missing.what) == (1, "attention")
    assert missing.reason.startswith(
        "in some of the batches its weights are no distribution over the keys: rows sum to "
    )


def test_the_other_records_have_it_too() -> None:
    torch.manual_seed(0)
    model, given = _Model("masked", "sigmoid").eval(), batches()
    heads = uc.identify(model, batches=given, layout=layout(2)).record.anatomy
    ablation = uc.ablate(model, batches=given, layout=layout(2), without=[("mlp",)]).record.anatomy
    symmetries = uc.symmetries(model, batches=given, layout=layout(2)).record.anatomy
    for anatomy in (heads, ablation, symmetries):
        assert anatomy is not None
        assert [block.module for block in anatomy.blocks] == ["blocks.0", "blocks.1"]
        assert NotMeasured in {type(missing) for missing in anatomy.not_measured}
