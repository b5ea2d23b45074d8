"""`without`: exactly the architecture with the component left out, on every layout; restored bit for bit, always."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, Family, inputs_for
from tests.helpers.tiny_models import text_batch
from tests.reference import architectures
from uncollapse.anatomy.probing import float64_kept
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 6, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64, "attn_implementation": "eager"}
REFERENCES: dict[str, tuple[Any, Callable[[nn.Module, Tensor, Collection[str]], list[Tensor]]]] = {
    "post-norm": (hf.BertConfig(**TEXT), architectures.bert),
    "pre-norm": (hf.GPT2Config(**GPT2), architectures.gpt2),
    "parallel": (hf.GPTNeoXConfig(**TEXT), architectures.gpt_neox),
    "sandwich": (hf.Gemma2Config(**GEMMA), architectures.gemma2),
}
COMBINATIONS = [c for n in range(4) for c in itertools.combinations(("norm", "residual", "mlp"), n)]
COMBINATIONS += [("attention",), ("attention", "norm"), ("attention", "mlp")]
ONE_RESIDUAL = [("attention-residual",), ("mlp-residual",), ("attention-residual", "mlp"), ("mlp-residual", "norm")]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def random_double(config: Any) -> nn.Module:
    """Weights large enough that every component matters, in float64."""
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def block_outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    anatomy = proved_anatomy(model, batch)
    clouds: list[Tensor] = []
    hooks = [
        model.get_submodule(b.module.name).register_forward_hook(
            lambda _m, _i, output: clouds.append((output if isinstance(output, Tensor) else output[0]).clone())
        )
        for b in anatomy.blocks
    ]
    with torch.no_grad(), float64_kept(model):
        model(**batch)
    for hook in hooks:
        hook.remove()
    return clouds


def consensus(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2))


@pytest.mark.parametrize(
    ("layout", "without"),
    [
        *itertools.product(REFERENCES, COMBINATIONS),
        *itertools.product([layout for layout in REFERENCES if layout != "parallel"], ONE_RESIDUAL),
        ("parallel", ("attention-residual", "mlp")),
        ("parallel", ("attention", "mlp-residual", "norm")),
        ("parallel", ("attention-residual", "mlp-residual")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "nothing",
)
def test_it_is_the_architecture_with_the_component_left_out(layout: str, without: tuple[str, ...]) -> None:
    config, reference = REFERENCES[layout]
    model = random_double(config)
    batch = text_batch(2, 12)
    proved_anatomy(model, batch)
    if without:
        with uc.without(model, *without):
            got = block_outputs(model, batch)
    else:
        got = block_outputs(model, batch)
    expected = reference(model, batch["input_ids"], without)
    assert len(got) == 6
    for ours, theirs in zip(got, expected, strict=True):
        # Relative to the whole cloud, a few hundred roundings; the distances are compared below, where they are tiny.
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()
        assert consensus(ours) == pytest.approx(consensus(theirs), rel=1e-6, abs=1e-12)


def test_a_collapse_is_followed_far_below_single_precision() -> None:
    model = random_double(hf.BertConfig(**TEXT | {"num_hidden_layers": 8}))
    batch = text_batch(2, 12)
    proved_anatomy(model, batch)
    with uc.without(model, "residual"):
        got = [float(consensus(x).max()) for x in block_outputs(model, batch)]
    expected = [float(consensus(x).max()) for x in architectures.bert(model, batch["input_ids"], ("residual",))]
    assert min(expected) < 1e-12
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-14)


@families
@pytest.mark.parametrize(
    "components", [("mlp",), ("attention",), ("residual",), ("norm",), ("norm", "residual", "mlp")], ids="-".join
)
def test_every_family_loses_the_component_and_gets_it_back_bit_for_bit(
    family: Family, components: tuple[str, ...]
) -> None:
    model = family.build()
    batch = inputs_for(family)

    def output() -> Tensor:
        with torch.no_grad():
            return next(tensors_in(model(**batch))).clone()

    before = output()
    proved_anatomy(model, batch)
    with uc.without(model, *components):
        changed = output()
    assert not torch.equal(changed, before)
    assert torch.equal(output(), before)
    assert not any("forward" in vars(m) for m in model.modules())


@families
def test_subsets_of_blocks_and_nesting_add_up(family: Family) -> None:
    model = family.build()
    batch = inputs_for(family)
    proved_anatomy(model, batch)

    def output() -> Tensor:
        with torch.no_grad():
            return next(tensors_in(model(**batch))).clone()

    whole = output()
    with uc.without(model, "mlp", "residual", blocks=[0]):
        together = output()
    with uc.without(model, "mlp", blocks=[0]):
        alone = output()
        with uc.without(model, "residual", blocks=[0]):
            assert torch.equal(output(), together)
        assert torch.equal(output(), alone)
    with uc.without(model, "mlp", blocks=[1]):
        assert not torch.equal(output(), alone)
    with uc.without(model, "mlp", blocks=range(family.blocks)):
        everywhere = output()
    with uc.without(model, "mlp", blocks=[0]), uc.without(model, "mlp", blocks=range(1, family.blocks)):
        assert torch.equal(output(), everywhere)
    assert torch.equal(output(), whole)


def test_leaving_by_an_exception_restores_everything() -> None:
    model = FAMILIES["bert"].build()
    batch = inputs_for(FAMILIES["bert"])
    proved_anatomy(model, batch)
    with torch.no_grad():
        before = model(**batch)[0]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail() -> None:
        with uc.without(model, "norm"), uc.without(model, "mlp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], before)


def test_the_final_norm_goes_only_with_all_plus_outer() -> None:
    model = FAMILIES["llama"].build()
    batch = inputs_for(FAMILIES["llama"])
    proved_anatomy(model, batch)
    seen: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    for blocks in (None, "all+outer"):
        with torch.no_grad(), uc.without(model, "norm", blocks=blocks):
            # Only now: what is removed is looked at on passes of its own before.
            hook = model.norm.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
            given.append(model(**batch)[0])
            hook.remove()
    inside, outer = given
    assert torch.equal(inside, seen[0][1])
    assert torch.equal(outer, seen[1][0])


def test_a_model_never_seen_is_proved_on_its_dummy_inputs_on_token_numbers_or_on_the_batch_given() -> None:
    model = FAMILIES["gpt2"].build()
    with uc.without(model, "mlp"):
        pass

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = FAMILIES["gpt2"].build()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(tokens).last_hidden_state

    class OfVectors(Plain):
        def forward(self, vectors: Tensor) -> Tensor:
            return self.body(inputs_embeds=vectors).last_hidden_state

    with uc.without(Plain(), "mlp"):  # any token numbers will do
        pass
    with uc.without(Plain(), "mlp", batch={"tokens": text_batch()["input_ids"]}):
        pass
    with pytest.raises(uc.InputError, match="Pass batch="), uc.without(OfVectors(), "mlp"):
        pass
    with uc.without(OfVectors(), "mlp", batch={"vectors": torch.randn(2, 5, model.config.hidden_size)}):
        pass


@pytest.mark.parametrize(
    ("components", "blocks", "message"),
    [
        ((), None, "got none"),
        (("mpl",), None, "got 'mpl'"),
        (("mlp",), [7], r"block numbers from 0 to 2, got \[7\]"),
        (("mlp",), "some", "got 'some'"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(components: tuple[str, ...], blocks: Any, message: str) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(uc.InputError, match=message), uc.without(model, *components, blocks=blocks):
        pass


@pytest.mark.parametrize("component", ["attention-residual", "mlp-residual"])
def test_a_residual_that_parallel_sublayers_share_cannot_go_for_one_of_them(component: str) -> None:
    model = FAMILIES["gpt_neox"].build()
    batch = inputs_for(FAMILIES["gpt_neox"])
    proved_anatomy(model, batch)
    with torch.no_grad():
        before = model(**batch)[0]
        with pytest.raises(uc.InputError, match="share the residual"), uc.without(model, component):
            pass
        assert torch.equal(model(**batch)[0], before)
        with uc.without(model, "norm"):
            without_norm = model(**batch)[0]
            with pytest.raises(uc.InputError, match="share the residual"), uc.without(model, component):
                pass
            assert torch.equal(model(**batch)[0], without_norm)


def test_gradient_checkpointing_is_refused() -> None:
    model = FAMILIES["llama"].build().train()
    model.activation_checkpointing_enable()
    with pytest.raises(uc.UnsupportedModel, match="without gradient checkpointing"), uc.without(model, "mlp"):
        pass


def test_gradients_flow_through_what_is_left() -> None:
    model = FAMILIES["gpt2"].build()
    batch = inputs_for(FAMILIES["gpt2"])
    proved_anatomy(model, batch)
    with uc.without(model, "mlp"):
        model(**batch)[0].square().sum().backward()
    assert model.h[0].attn.c_proj.weight.grad is not None
    assert model.h[0].mlp.c_fc.weight.grad is None or not model.h[0].mlp.c_fc.weight.grad.any()


def test_positions_can_be_taken_away_from_a_model_kept_in_double() -> None:
    """What keeps the precision must not hide that the model takes position_ids."""
    model = FAMILIES["bert"].build().double().eval()
    ids = torch.arange(1, 9)[None]
    proved_anatomy(model, {"input_ids": ids})
    with torch.no_grad(), float64_kept(model), uc.without(model, "positions"):
        output = model(input_ids=ids).last_hidden_state
        moved = model(input_ids=ids.flip(1)).last_hidden_state
    assert (moved.flip(1) - output).abs().max() < 1e-12
