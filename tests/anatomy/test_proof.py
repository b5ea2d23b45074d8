"""Anatomy: read off tiny random models of eight families, proved, and refused when the picture is wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.residual_structures import Block as OwnBlock
from tests.helpers.residual_structures import Stack
from tests.helpers.tiny_models import FAMILIES, batch_for, text_batch
from uncollapse.anatomy import proof
from uncollapse.anatomy.examples import example
from uncollapse.anatomy.proof import prove, proved_anatomy
from uncollapse.anatomy.reading_norms import behaves_as_norm
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Block

families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_the_parts_are_found_and_every_identity_holds_bit_for_bit(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    anatomy = proved_anatomy(model, batch_for(tiny))
    assert len(anatomy.blocks) == tiny.blocks
    assert anatomy.norm_placement == tiny.placement
    for block in anatomy.blocks:
        assert [p.kind for p in block.parts] == ["attention", "mlp"]
        (call,) = block.parts[0].attention
        assert (call.heads, call.key_value_heads, call.head_width) == (
            tiny.heads,
            tiny.key_value_heads,
            tiny.head_width,
        )
        projection = model.get_submodule(call.projection.name)
        assert tiny.heads * tiny.head_width in projection.weight.shape
    assert anatomy.proof
    assert all(identity.deviation == 0.0 for identity in anatomy.proof)


@families
def test_proving_leaves_the_model_as_it_was(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().train()
    batch = batch_for(tiny)
    parameters = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = _hooks(model)
    model.eval()
    with torch.no_grad():
        before = model(**batch)[0]
    model.train()
    proved_anatomy(model, batch)
    assert model.training
    assert _hooks(model) == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], before)
    assert all(torch.equal(v, parameters[k]) for k, v in model.state_dict().items())


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@families
def test_eager_attention_with_its_shared_mask_is_read_alike(family: str) -> None:
    tiny = FAMILIES[family]
    model = type(tiny.build())._from_config(tiny.build().config, attn_implementation="eager").eval()
    anatomy = proved_anatomy(model, batch_for(tiny))
    assert len(anatomy.blocks) == tiny.blocks
    assert anatomy.norm_placement == tiny.placement


def test_a_shared_block_counts_every_call() -> None:
    tiny = FAMILIES["albert"]
    anatomy = proved_anatomy(tiny.build().eval(), batch_for(tiny))
    assert len({b.module.name for b in anatomy.blocks}) == 1
    assert [b.module.call for b in anatomy.blocks] == [0, 1, 2]


def test_norms_are_placed_by_what_they_do() -> None:
    tiny = FAMILIES["gemma3"]
    anatomy = proved_anatomy(tiny.build().eval(), batch_for(tiny))
    roles = [(n.module.name.split(".")[-1], n.role, n.place) for n in anatomy.blocks[0].norms]
    assert roles == [
        ("input_layernorm", "before", 0),
        ("q_norm", "inner", 0),
        ("k_norm", "inner", 0),
        ("post_attention_layernorm", "after", 0),
        ("pre_feedforward_layernorm", "before", 1),
        ("post_feedforward_layernorm", "after", 1),
    ]
    assert {n.kind for n in anatomy.blocks[0].norms} == {"rms"}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(6), "layer"),
        (nn.RMSNorm(6), "rms"),
        (nn.Linear(6, 6), None),
        (nn.GELU(), None),
        (nn.Tanh(), None),
        (nn.Sigmoid(), None),
        (nn.Hardsigmoid(), None),
        (nn.Identity(), None),
        (nn.Softmax(-1), None),
        (nn.Dropout(0.5).eval(), None),
    ],
)
def test_a_norm_is_told_by_its_behaviour(module: nn.Module, expected: str | None) -> None:
    assert behaves_as_norm(module, (1, 5, 6)) == expected


def test_the_anatomy_is_remembered_for_the_model_object_and_forgotten_with_it() -> None:
    tiny = FAMILIES["gpt2"]
    model = tiny.build().eval()
    first = proved_anatomy(model, batch_for(tiny))
    assert proved_anatomy(model, batch_for(tiny)) is first
    model.h[1].mlp = nn.Identity()  # another module: the old picture no longer applies
    assert proved_anatomy(model, batch_for(tiny)) is not first
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_the_example_is_one_sequence_of_a_few_real_tokens() -> None:
    batch = text_batch(3, 12)
    batch["attention_mask"] = torch.tensor([[0] * 9 + [1] * 3, [0] * 2 + [1] * 10, [1] * 6 + [0] * 6])
    cut = example(batch)
    assert cut["attention_mask"].tolist() == [[1] * 8]
    assert torch.equal(cut["input_ids"], batch["input_ids"][1:2, 2:10])


# Negative controls: a wrong picture is refused ------------------------------------------------------------------------


def _tampered(monkeypatch: pytest.MonkeyPatch, change: object, family: str) -> None:
    honest = proof.read

    def dishonest(*args: object, several: bool = False) -> Anatomy:
        anatomy = honest(*args, several=several)  # type: ignore[arg-type]
        return replace(anatomy, blocks=tuple(change(b) for b in anatomy.blocks))  # type: ignore[operator]

    monkeypatch.setattr(proof, "read", dishonest)
    tiny = FAMILIES[family]
    with pytest.raises(uc.UnsupportedModel) as caught:
        prove(tiny.build().eval(), example(batch_for(tiny)))
    assert caught.value.identity
    assert "Layout" in caught.value.layout


def _without_last_addition(block: Block) -> Block:
    return replace(block, residuals=block.residuals[:1], parts=block.parts[:1])


def _swapped_operands(block: Block) -> Block:
    residuals = tuple(
        replace(r, additions=tuple(replace(n, leaves=n.leaves[::-1]) for n in r.additions)) for r in block.residuals
    )
    return replace(block, residuals=residuals)


def _without_post_norm(block: Block) -> Block:
    return replace(block, residuals=tuple(replace(r, norms_post=()) for r in block.residuals))


@pytest.mark.parametrize("family", [f for f in FAMILIES if "parallel" not in FAMILIES[f].placement])
def test_a_withheld_addition_is_refused(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    _tampered(monkeypatch, _without_last_addition, family)


@families
def test_stream_and_update_swapped_are_refused(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    _tampered(monkeypatch, _swapped_operands, family)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_forgotten_post_norm_is_refused(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    _tampered(monkeypatch, _without_post_norm, family)


@families
def test_a_block_that_bends_its_output_behind_the_last_addition_is_refused(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    anatomy = proved_anatomy(model, batch_for(tiny))
    block = model.get_submodule(anatomy.blocks[1].module.name)

    def bent(module: nn.Module, args: object, output: object) -> object:
        if isinstance(output, Tensor):
            return output + 0.1 * output.sin()
        return (output[0] + 0.1 * output[0].sin(), *output[1:])  # type: ignore[index]

    block.register_forward_hook(bent)
    with pytest.raises(uc.UnsupportedModel) as caught:
        prove(model, example(batch_for(tiny)))
    assert anatomy.blocks[1].module.name in str(caught.value) or "argument" in str(caught.value)


def test_an_mlp_that_mixes_tokens_is_called_a_mixer() -> None:
    class Mixer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + x.roll(1, dims=1))

    tiny = FAMILIES["gpt2"]
    model = tiny.build().eval()
    model.h[1].mlp = Mixer(32)
    anatomy = proved_anatomy(model, batch_for(tiny))
    assert [b.parts[1].kind for b in anatomy.blocks] == ["mlp", "mixer", "mlp"]


def test_a_part_whose_update_is_zero_does_not_fail_the_proof() -> None:
    tiny = FAMILIES["llama"]
    model = tiny.build().eval()
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.zero_()
    assert len(proved_anatomy(model, batch_for(tiny)).blocks) == 3


def test_a_model_without_attention_is_refused_with_what_was_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(uc.UnsupportedModel, match=r"0 attention calls.*0 residual additions"):
        proved_anatomy(Takes().eval(), {"x": torch.randn(2, 3, 4)})


def test_a_picture_that_misses_a_block_is_refused() -> None:
    class Hides(nn.Module):
        """A block whose residual additions are no torch additions: invisible to tracing."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            attention, _ = self.block.attn(self.block.ln_1(x))
            x = torch.cat([x[None], attention[None]]).sum(0)
            return torch.cat([x[None], self.block.mlp(self.block.ln_2(x))[None]]).sum(0)

    tiny = FAMILIES["gpt2"]
    model = tiny.build().eval()
    model.h[1] = Hides(model.h[1])
    with pytest.raises(uc.UnsupportedModel, match=r"attention in h\.1\.block\.attn belongs to no block"):
        proved_anatomy(model, batch_for(tiny))


def test_a_layout_names_the_blocks_and_is_checked() -> None:
    tiny = FAMILIES["gpt2"]
    model = tiny.build().eval()
    anatomy = proved_anatomy(model, batch_for(tiny), uc.Layout(blocks=("h.0", "h.2")))
    assert [b.module.name for b in anatomy.blocks] == ["h.0", "h.2"]
    with pytest.raises(uc.UnsupportedModel, match=r"no run of 'h\.7'"):
        proved_anatomy(model, batch_for(tiny), uc.Layout(blocks=("h.0", "h.7")))
    with pytest.raises(uc.UnsupportedModel, match="Write Layout"):
        uc.Layout(blocks=())


def test_the_stream_leaf_is_no_part() -> None:
    tiny = FAMILIES["gpt_neox"]
    (block, *_) = proved_anatomy(tiny.build().eval(), batch_for(tiny)).blocks
    assert STREAM not in {p for r in block.residuals for p in r.parts}
    assert block.is_parallel


class Counting(OwnBlock):
    """Notes how deep it is, and goes another way where it finds itself inside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def forward(self, x: Tensor) -> Tensor:
        self.depth += 1
        x = super().forward(x / self.depth)
        self.depth -= 1
        return x


class Filling(OwnBlock):
    """The same with a list that is filled and emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inside.append(1)
        x = super().forward(x / len(self.inside))
        self.inside.pop()
        return x


class FallingBack(OwnBlock):
    """Whatever fails is not tried again."""

    def __init__(self) -> None:
        super().__init__()
        self.has_failed = False

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x / (1 + self.has_failed))
        except Exception:
            self.has_failed = True
            return super().forward(x / 2)


class CountingStack(Stack):
    """A whole model that does."""

    def __init__(self) -> None:
        super().__init__(OwnBlock)
        self.depth = 0

    def forward(self, idx: Tensor) -> Tensor:
        self.depth += 1
        x = self.embed(idx) / self.depth
        for block in self.blocks:
            x = block(x)
        self.depth -= 1
        return x


@pytest.mark.parametrize("make", [CountingStack, *(partial(Stack, b) for b in (Counting, Filling, FallingBack))])
def test_a_run_is_ended_only_where_its_code_would_leave_nothing_behind(make: Callable[[], Stack]) -> None:
    """The proof runs a model and its blocks no further than it looks."""
    model, batch = make().eval(), {"idx": torch.randint(0, 64, (3, 9))}
    anatomy = proved_anatomy(model, batch)
    assert [[part.kind for part in each.parts] for each in anatomy.blocks] == 3 * [["attention", "mlp"]]
    for own in (model, *model.blocks):
        assert getattr(own, "depth", 0) == 0
        assert getattr(own, "inside", []) == []
        assert not getattr(own, "has_failed", False)
