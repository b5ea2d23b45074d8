"""What each head writes: against the projections' own inputs, weights and outputs, caught by plain hooks beside the product."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers import tiny_models
from tests.helpers.families import FAMILIES, Family, inputs_for
from tests.helpers.projections import PROJECTIONS, hooked, projections, weight_of
from tests.reference import identifiability as reference
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.gates.projection import PositionGatedProjection
from uncollapse.probe import contributions
from uncollapse.probe.contributions import HeadContributions, head_contributions

# What the family does to the projection's output before it is added: nothing, or a norm, a LayerScale, a multiplier.
CHANGED_BEFORE_ADDED = {"gemma2", "gemma3", "olmo2", "dinov2", "granite"}


def bound(read: Tensor, module: nn.Module, output: Tensor) -> np.ndarray:
    """How far two sums of D products may differ, element by element, and one rounding of the result: eps sqrt(D) |O| |W|."""
    eps = torch.finfo(output.dtype).eps
    size = np.abs(read.double().numpy()) @ np.abs(weight_of(module))
    return eps * (4 * math.sqrt(read.shape[-1]) * size + np.abs(output.double().numpy())) + 1e-300


def require_sum(found: HeadContributions, read: Tensor, module: nn.Module, output: Tensor) -> None:
    total = found.contributions.sum(-2) + found.bias
    gap = np.abs(total.double().numpy() - output.double().numpy())
    assert (gap <= bound(read, module, output)).all(), (gap / bound(read, module, output)).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_are_the_products_and_sum_to_the_output(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), inputs_for(family)
    found = list(head_contributions(model, batch))
    runs = hooked(model, projections(model, PROJECTIONS[name]), batch)
    assert len(found) == len(runs) == family.blocks + family.decoder_blocks
    for each, (module, read, output) in zip(found, runs, strict=True):
        expected = reference.contributions(read, weight_of(module), family.heads)
        assert each.contributions.shape == expected.shape == (*read.shape[:2], family.heads, output.shape[-1])
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        require_sum(each, read, module, output)
        own = getattr(module, "bias", None)
        assert torch.equal(each.bias, torch.zeros(output.shape[-1]) if own is None else own.detach())
        assert each.added_as_is == (name not in CHANGED_BEFORE_ADDED)
        assert each.mask.all()
        assert each.mask.shape == read.shape[:2]


def test_the_bound_of_the_sum_would_notice_a_head_left_out_or_a_bias_counted_twice() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build(), inputs_for(family)
    (each, *_) = head_contributions(model, batch)
    (module, read, output), *_ = hooked(model, projections(model, "attn.c_proj"), batch)
    limit = bound(read, module, output)
    for total in (each.contributions[..., 1:, :].sum(-2) + each.bias, each.contributions.sum(-2) + 2 * each.bias):
        assert (np.abs((total - output).numpy()) > limit).mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "bart"])
def test_the_sum_holds_in_every_number_format(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, batch = family.build().to(dtype), inputs_for(family)
    found = list(head_contributions(model, batch))
    for each, (module, read, output) in zip(
        found, hooked(model, projections(model, PROJECTIONS[name]), batch), strict=True
    ):
        assert read.dtype == output.dtype == dtype
        assert each.contributions.dtype == torch.promote_types(dtype, torch.float32)
        require_sum(each, read, module, output)


def test_blocks_kinds_and_stacks_are_those_of_an_encoder_and_a_decoder() -> None:
    family = FAMILIES["t5"]
    model, batch = family.build(), inputs_for(family)
    found = [(c.block, c.stack, c.kind, c.contributions.shape[1]) for c in head_contributions(model, batch)]
    encoder = [(b, "encoder", "self", 9) for b in range(3)]
    decoder = [(b, "decoder", kind, 7) for b in (3, 4) for kind in ("self", "cross")]
    assert found == encoder + decoder


def test_only_the_blocks_asked_for() -> None:
    family = FAMILIES["albert"]  # one module three times: the runs must be told apart
    model, batch = family.build(), inputs_for(family)
    runs = hooked(model, projections(model, "attention.dense"), batch)
    (found,) = head_contributions(model, batch, blocks=[1])
    assert found.block == 1
    expected = reference.contributions(runs[1][1], weight_of(runs[1][0]), 4)
    np.testing.assert_allclose(found.contributions.numpy(), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - reference.contributions(runs[2][1], weight_of(runs[2][0]), 4)).max() > 0.1


def test_one_block_at_a_time() -> None:
    """The iterator makes a block's contributions when it is reached, and the model has run once by then."""
    family = FAMILIES["llama"]
    model, batch = family.build(), inputs_for(family)
    uc.diagnose(model, batches=[batch])  # proves the anatomy
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    found = head_contributions(model, batch)
    assert len(passes) == 1
    handle.remove()
    first = next(found).contributions.clone()
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.mul_(2)  # not yet reached
    second = next(found)
    (again,) = head_contributions(model, batch, blocks=[1])
    torch.testing.assert_close(second.contributions, again.contributions)
    (same,) = head_contributions(model, batch, blocks=[0])
    assert torch.equal(first, same.contributions)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_marked_and_real_tokens_do_not_feel_it(side: str) -> None:
    family = FAMILIES["bert"]
    model = family.build()
    ids = inputs_for(family)["input_ids"][:1]
    alone = list(head_contributions(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    zeros = torch.zeros(1, 3, dtype=torch.long)
    pad = (lambda t: torch.cat([zeros, t], 1)) if side == "left" else (lambda t: torch.cat([t, zeros], 1))
    positions = torch.arange(9)[None]
    batch = {"input_ids": pad(ids), "attention_mask": pad(torch.ones_like(ids)), "position_ids": pad(positions)}
    padded = list(head_contributions(model, batch))
    for one, other in zip(alone, padded, strict=True):
        assert torch.equal(other.mask, batch["attention_mask"].bool())
        torch.testing.assert_close(other.contributions[other.mask], one.contributions[0], rtol=1e-4, atol=1e-5)


def test_a_decoders_mask_is_its_own() -> None:
    family = FAMILIES["bart"]
    batch = inputs_for(family)
    batch["attention_mask"][0, 6:] = 0
    batch["decoder_attention_mask"][1, 5:] = 0
    for each in head_contributions(family.build(), batch):
        key = "attention_mask" if each.stack == "encoder" else "decoder_attention_mask"
        assert torch.equal(each.mask, batch[key].bool())


# Models of one's own ---------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """torch's own layers, which write the output projection in the attention's own code."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first, norm_first=True)
        self.embed = nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.encoder(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sequences", [3, 5])
def test_a_projection_written_in_the_attentions_own_code(batch_first: bool, sequences: int) -> None:
    torch.manual_seed(1)
    model = Tokens(batch_first).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(64, (sequences, 5))
    found = list(head_contributions(model, {"ids": ids}))
    inputs: list[Tensor] = []
    for layer in model.encoder.layers:
        layer.norm1.register_forward_hook(lambda _, __, out: inputs.append(out))
    model.train()  # the fast path of the evaluation mode would not call the norm
    with torch.no_grad():
        model(ids)
    assert len(found) == len(inputs) == 2
    for each, normed, layer in zip(found, inputs, model.encoder.layers, strict=True):
        normed = normed if batch_first else normed.transpose(0, 1)
        attention = layer.self_attn
        q, k, v = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).double().chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
        mixed = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).flatten(2).detach()
        expected = reference.contributions(mixed, attention.out_proj.weight.detach().numpy().T, 4)
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=2e-6)
        assert torch.equal(each.bias, attention.out_proj.bias.detach())
        assert each.added_as_is


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_gates_around_the_projection_have_acted_on_the_contributions(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), inputs_for(family)
    gated = {}
    for place, module in list(model.named_modules()):
        if place.endswith(PROJECTIONS[name]):
            gated[place] = PositionGatedProjection(module, family.heads, position_width=8, perturbation=1.0, seed=3)
            model.set_submodule(place, gated[place])
    found = list(head_contributions(model, batch))
    runs = hooked(model, list(gated.values()), batch)
    for each, (module, read, output) in zip(found, runs, strict=True):
        gates = module.gates(torch.arange(read.shape[1])).detach().double().numpy()  # [token, head]
        assert gates.std() > 0.1
        plain = reference.contributions(read, weight_of(module.projection), family.heads)
        expected = gates[..., None] * plain
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        assert np.abs(expected - plain).max() > 0.1
        torch.testing.assert_close(each.contributions.sum(-2) + each.bias, output, rtol=1e-5, atol=1e-5)
        assert each.added_as_is


class Adapted(nn.Module):
    """A low-rank update beside a frozen layer, as adapters put it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_an_adapter_is_part_of_the_projection() -> None:
    family = FAMILIES["bert"]
    model, batch = family.build(), inputs_for(family)
    for place, module in list(model.named_modules()):
        if place.endswith("attention.output.dense"):
            model.set_submodule(place, Adapted(module))
    adapted = [m for m in model.modules() if isinstance(m, Adapted)]
    for each, (module, read, output) in zip(
        head_contributions(model, batch), hooked(model, adapted, batch), strict=True
    ):
        W = weight_of(module.base_layer) + weight_of(module.down) @ weight_of(module.up)
        expected = reference.contributions(read, W, 4)
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        torch.testing.assert_close(each.contributions.sum(-2) + each.bias, output, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_weights_keep_their_precision() -> None:
    family = FAMILIES["llama"]
    model, batch = family.build(), inputs_for(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = list(head_contributions(model, batch))
        runs = hooked(model, projections(model, "self_attn.o_proj"), batch)
    for each, (module, read, output) in zip(found, runs, strict=True):
        assert output.dtype == torch.bfloat16
        assert each.contributions.dtype == torch.float32
        expected = reference.contributions(read.float(), weight_of(module), 4)
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=1e-5)


def test_inside_without_the_rest_of_the_model_is_measured() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build(), inputs_for(family)
    plain = list(head_contributions(model, batch))
    with uc.without(model, "residual", blocks=[0]):
        found = list(head_contributions(model, batch))
        runs = hooked(model, projections(model, "attn.c_proj"), batch)
    for each, (module, read, _) in zip(found, runs, strict=True):
        expected = reference.contributions(read, weight_of(module), 4)
        np.testing.assert_allclose(each.contributions.numpy(), expected, rtol=0, atol=1e-5)
    assert torch.equal(plain[0].contributions, found[0].contributions)
    assert not torch.allclose(plain[1].contributions, found[1].contributions)


# The model and the request ----------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    family = FAMILIES["gemma3"]
    model, batch = family.build().train(), inputs_for(family)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    torch.manual_seed(0)
    expected = model(**batch).last_hidden_state
    found = list(head_contributions(model, batch))
    torch.manual_seed(0)
    assert torch.equal(model(**batch).last_hidden_state, expected)
    assert model.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before
    assert not any("forward" in vars(m) for m in model.modules())
    assert not any(t.requires_grad for each in found for t in tensors_in([each.contributions, each.bias]))


def test_a_model_in_training_is_measured_without_its_dropout() -> None:
    family = FAMILIES["bert"]
    model, batch = family.build(), inputs_for(family)
    assert model.config.attention_probs_dropout_prob > 0
    calm = list(head_contributions(model, batch))
    model.train()
    for one, other in zip(calm, head_contributions(model, batch), strict=True):
        assert torch.equal(one.contributions, other.contributions)
    assert model.training


@pytest.mark.parametrize("blocks", [[3], [-1], "01", [0.5]])
def test_a_block_that_is_not_there_is_refused(blocks: Any) -> None:
    family = FAMILIES["bert"]
    with pytest.raises(uc.InputError, match=r"head_contributions: expected block numbers from 0 to 2, got"):
        head_contributions(family.build(), inputs_for(family), blocks=blocks)


def test_a_batch_that_is_none_is_refused_at_once() -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(uc.InputError, match="a dict from the model's argument names"):
        head_contributions(model, "words")  # type: ignore[arg-type]


class Squared(nn.Linear):
    """No linear map of what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * x)


def test_a_projection_that_is_no_linear_map_is_refused() -> None:
    family: Family = FAMILIES["bert"]
    model = family.build()
    layer = model.encoder.layer[1].attention.output
    squared = Squared(32, 32)
    layer.dense = squared
    found = head_contributions(model, inputs_for(family))
    next(found)
    with pytest.raises(uc.UnsupportedModel, match=r"linear map of the heads, got encoder\.layer\.1.*not an affine map"):
        next(found)


class GatedChannels(nn.Module):
    """Attention over channels (XCiT), a gate for each head, one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.out = nn.Linear(12, 36), nn.Linear(12, 2), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 4, 1)
        y = ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2)
        return self.out((y * self.gate(x).sigmoid().unsqueeze(-1)).flatten(2))


def test_heads_of_an_attention_that_was_not_read_are_refused_behind_a_gate() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = GatedChannels(), nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(x)
            return x + self.mlp(x)

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = nn.Embedding(20, 12), nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(uc.UnsupportedModel, match="was not read: it mixes features, not tokens"):
        list(head_contributions(Channels().eval(), {"input_ids": torch.arange(18).view(3, 6)}))


def test_it_is_a_public_name() -> None:
    assert uc.head_contributions is contributions.head_contributions
    assert uc.HeadContributions is HeadContributions


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_contributions_carry_gradients_when_asked(family: str) -> None:
    """The derivative of what a head writes, by the values' own weights, against a difference of two passes."""
    model, batch = tiny_models.FAMILIES[family].build().double().eval(), tiny_models.text_batch()
    (plain,) = uc.head_contributions(model, batch, blocks=[1])
    assert not plain.contributions.requires_grad
    (found,) = uc.head_contributions(model, batch, blocks=[1], grad=True)
    assert torch.equal(found.contributions, plain.contributions)
    weight = dict(model.named_parameters())[
        "h.1.attn.c_attn.weight" if family == "gpt2" else "layers.1.self_attn.v_proj.weight"
    ]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found.contributions[:, :, 2].square().sum(), weight)
    sizes = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
            (moved,) = uc.head_contributions(model, batch, blocks=[1])
            weight.sub_(step * direction)
        sizes.append(float(moved.contributions[:, :, 2].square().sum()))
    assert float((gradient * direction).sum()) == pytest.approx((sizes[0] - sizes[1]) / 2e-6, rel=1e-4)
