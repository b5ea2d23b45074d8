"""Channels: rows of parameters found by what the model does, checked against its own attention operands and published code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from torch import Tensor, nn

from tests.helpers.families import FAMILIES, inputs_for
from uncollapse.anatomy.interception import intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import ModuleCall
from uncollapse.symmetry import patterns
from uncollapse.symmetry.acting import head_weights
from uncollapse.symmetry.channels import Channels, channels_of
from uncollapse.symmetry.studied_calls import Rows
from uncollapse.symmetry.weight_groups import QueryKeyGauge, ValueOutputGauge

families = pytest.mark.parametrize("family", FAMILIES)
ROLES = ("queries", "keys", "values")


def found(model: nn.Module, batch: dict[str, Any]) -> list[Channels]:
    return channels_of(model, proved_anatomy(model, batch), batch)


@functools.cache
def of_family(family: str) -> tuple[nn.Module, list[Channels]]:
    model = FAMILIES[family].build()
    return model, found(model, inputs_for(FAMILIES[family]))


def encoder(batch_first: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model, {"src": torch.randn(3, 9, 32)}


def met(model: nn.Module, batch: dict[str, Any], one: Channels) -> dict[str, Tensor]:
    """What the attention call met in an ordinary pass: the operands [batch, head, token, channel], what the products read."""
    seen: dict[str, Tensor] = {}
    call = one.call
    heads = {"queries": call.query_operand, "keys": call.key_operand}

    def compared(function: Any, args: Any, kwargs: Any) -> Any:
        operands = list(tensors_in([args, kwargs]))
        for role, number in heads.items():
            seen[role] = operands[number].detach()
        if call.similarity != call.product:  # keys come as [channel, token]
            seen["keys"] = seen["keys"].mT
        return (mixed if call.similarity == call.product else _run)(function, args, kwargs)

    def mixed(function: Any, args: Any, kwargs: Any) -> Any:
        seen["values"] = list(tensors_in([args, kwargs]))[call.value_operand].detach()
        seen["mixed"] = function(*args, **kwargs).detach()
        return seen["mixed"]

    def _run(function: Any, args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)

    handlers = {call.product: mixed} | ({} if call.similarity is None else {call.similarity: compared})
    hooks = []
    for role in (*ROLES, "projection"):
        place = getattr(call, role)
        if isinstance(place, ModuleCall):
            runs: list[int] = []

            def read(
                _: nn.Module, args: Any, output: Any, role: str = role, place: Any = place, runs: Any = runs
            ) -> None:
                if len(runs) == place.call:
                    seen[f"{role} read"], seen[f"{role} made"] = args[0].detach(), output.detach()
                runs.append(1)

            hooks.append(model.get_submodule(place.name).register_forward_hook(read))
    with probing(model), intercepted(model, handlers):
        model(**batch)
    for hook in hooks:
        hook.remove()
    sizes = len(next(iter(batch.values())))
    for role in (*ROLES, "mixed"):
        if role in seen and seen[role].ndim == 3:
            seen[role] = seen[role].unflatten(0, (sizes, -1))
    return seen


def close(first: Tensor, second: Tensor) -> bool:
    return bool((first.double() - second.double()).abs().max() <= 1e-5 * second.double().abs().max())


@families
def test_values_and_projection_are_those_of_an_ordinary_pass(family: str) -> None:
    model, all_channels = of_family(family)
    batch = inputs_for(FAMILIES[family])
    for one in all_channels:
        seen = met(model, batch, one)
        weights = head_weights(model, one, ("values", "projection"))
        read = seen["values read"].double().reshape(len(seen["values"]), -1, weights.values.shape[1])
        values = torch.einsum("bti,gic->bgtc", read, weights.values)
        if weights.value_bias is not None:
            values = values + weights.value_bias[:, None]
        operand = seen["values"]
        own = list(one.groups) if operand.shape[1] == one.call.heads else range(one.group_count)
        assert close(operand, values[:, own])
        written = torch.einsum("bhtc,hcw->btw", seen["mixed"].double(), weights.projection)
        if weights.output_bias is not None:
            written = written + weights.output_bias
        assert close(seen["projection made"].reshape(written.shape), written)


WITHOUT_QUERIES = {"deberta_v2", "deepseek_v3"}
PLAIN = ["bert", "albert", "mpnet", "gpt2", "opt", "bloom", "t5", "bart", "vit", "whisper_encoder", "wav2vec2"]


@pytest.mark.parametrize("family", PLAIN)
def test_queries_and_keys_are_those_of_an_ordinary_pass(family: str) -> None:
    model, all_channels = of_family(family)
    for one in all_channels:
        seen = met(model, inputs_for(FAMILIES[family]), one)
        weights = head_weights(model, one, ("queries", "keys"))
        for role, matrices, bias in (
            ("queries", weights.queries, weights.query_bias),
            ("keys", weights.keys, weights.key_bias),
        ):
            made = torch.einsum("bti,gic->bgtc", seen[f"{role} read"].double(), matrices)
            if bias is not None:
                made = made + bias[:, None]
            scale = seen[role].double().norm() / made.norm()  # some models divide the queries by sqrt(d_k) here
            assert close(seen[role], scale * made)


# Which rows hold the first channel of each head: from the code of each architecture.
FUSED = {
    "gpt2": (1, [0, 8, 16, 24], [32, 40, 48, 56], [64, 72, 80, 88]),  # [3, head, channel], stored transposed
    "modernbert": (0, [0, 8, 16, 24], [32, 40, 48, 56], [64, 72, 80, 88]),  # [3, head, channel]
    "gpt_neox": (0, [0, 24, 48, 72], [8, 32, 56, 80], [16, 40, 64, 88]),  # [head, 3, channel]
    "bloom": (0, [0, 24, 48, 72], [8, 32, 56, 80], [16, 40, 64, 88]),  # [head, 3, channel]
    "falcon": (0, [0, 8, 16, 24], [32], [40]),  # the heads, then one key and one value
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_taken_apart(family: str) -> None:
    axis, *first = FUSED[family]
    for one in of_family(family)[1]:
        rows = [one.queries, one.keys, one.values]
        assert len({r.place for r in rows if r is not None}) == 1
        for row, expected in zip(rows, first, strict=True):
            assert row is not None
            assert row.axis == axis
            assert row.features == tuple(tuple(range(f, f + 8)) for f in expected)


@families
def test_heads_of_a_group_are_neighbours_and_the_projection_reads_head_after_head(family: str) -> None:
    tiny = FAMILIES[family]
    model, all_channels = of_family(family)
    assert len(all_channels) == sum(kind != "mlp" for block in tiny.parts for kind in block)
    for one in all_channels:
        per_group = tiny.heads // tiny.key_value_heads
        assert one.groups == tuple(h // per_group for h in range(tiny.heads))
        assert isinstance(one.projection, Rows)
        width = tiny.head_width
        assert one.projection.features == tuple(tuple(range(h * width, (h + 1) * width)) for h in range(tiny.heads))
        assert model.get_parameter(one.projection.place).shape[one.projection.axis] == tiny.heads * width


ROTARY: dict[str, tuple[tuple[int, int], ...]] = {
    "bert": (),
    "t5": (),
    "llama": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "gpt_oss": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "modernbert": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "gptj": ((0, 1), (2, 3)),  # rotary_dim 4, neighbours
    "phi": ((0, 2), (1, 3)),  # half of 8 channels
    "gpt_neox": ((0, 1),),  # a quarter of 8 channels
    "qwen3": tuple((i, i + 8) for i in range(8)),
    "olmo2": ((0, 4), (1, 5), (2, 6), (3, 7)),
}


@pytest.mark.parametrize("family", ROTARY)
def test_rotated_pairs_are_those_of_the_rotary_embedding(family: str) -> None:
    for one in of_family(family)[1]:
        assert one.pairs == ROTARY[family]
        assert one.rotary_width == 2 * len(ROTARY[family])
        turned = {c for pair in ROTARY[family] for c in pair}
        assert set(one.free) == set(range(len(one.queries.features[0]))) - turned
        assert "rotary" not in one.reasons


NORMS = {"qwen3": "head", "gemma3": "head", "cohere": "head", "olmo2": "layer"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_QUERIES))
def test_norms_of_queries_and_keys_are_told_by_what_they_do(family: str) -> None:
    assert {one.norm for one in of_family(family)[1]} == {NORMS.get(family)}


@families
def test_heads_are_alike_unless_they_have_something_of_their_own(family: str) -> None:
    """Relative position biases, ALiBi, sinks, norm gains a head. T5's cross-attention has no relative bias."""
    own = {"mpnet", "t5", "bloom", "gpt_oss", "cohere", "olmo2", *WITHOUT_QUERIES}
    for one in of_family(family)[1]:
        assert one.heads_alike == (family not in own or (family == "t5" and one.kind == "cross"))
        assert one.heads_alike or one.reasons["heads"]
        assert one.sinks == (family == "gpt_oss")


@families
def test_looking_changes_nothing(family: str) -> None:
    model = FAMILIES[family].build()
    batch = inputs_for(FAMILIES[family])
    anatomy = proved_anatomy(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with probing(model):
        before = next(tensors_in(model(**batch))).clone()
    channels_of(model, anatomy, batch)
    with probing(model):
        assert torch.equal(next(tensors_in(model(**batch))), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bloom", "gpt_oss"])
def test_one_pattern_at_a_time_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, together = of_family(family)
    monkeypatch.setattr(patterns, "PATTERNS", 1)
    assert found(FAMILIES[family].build(), inputs_for(FAMILIES[family])) == together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "olmo2", "gptj"])
def test_every_number_format_gives_the_same(family: str, dtype: torch.dtype) -> None:
    batch = inputs_for(FAMILIES[family])
    expected = of_family(family)[1]
    assert found(FAMILIES[family].build().to(dtype), batch) == expected


def test_more_features_than_half_precision_can_count() -> None:
    config = hf.LlamaConfig(
        hidden_size=80,
        num_attention_heads=40,
        num_key_value_heads=20,
        head_dim=64,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config).to(torch.bfloat16).eval()
    (one,) = found(model, inputs_for(FAMILIES["llama"]))
    assert one.queries.features == tuple(tuple(range(64 * h, 64 * h + 64)) for h in range(40))
    assert one.keys.features == tuple(tuple(range(64 * g, 64 * g + 64)) for g in range(20))
    assert one.rotary_width == 64


def test_attention_written_in_one_function_is_taken_apart() -> None:
    for one in found(*encoder()):
        rows = {role: getattr(one, role) for role in (*ROLES, "projection")}
        assert [rows[r].weight for r in ROLES] == ["in_proj_weight"] * 3
        assert [rows[r].features[0][0] for r in ROLES] == [0, 32, 64]
        assert {rows[r].bias for r in ROLES} == {"in_proj_bias"}
        assert (rows["projection"].place, rows["projection"].axis) == (
            f"layers.{one.block}.self_attn.out_proj.weight",
            1,
        )


# Reasons --------------------------------------------------------------------------------------------------------------
def test_a_layer_that_runs_again_and_again_is_one_set_of_weights() -> None:
    _, all_channels = of_family("albert")
    assert len(all_channels) == 3
    assert len({one.values.place for one in all_channels}) == 1
    assert not any(one.reasons for one in all_channels)


def test_queries_and_keys_with_position_terms_are_refused_in_words() -> None:
    for family in WITHOUT_QUERIES:
        for one in of_family(family)[1]:
            assert one.keys is None
            assert "several learned products" in one.reasons["keys"]
            assert one.values is not None


def bert_with(change: Callable[[Any], None]) -> list[Channels]:
    model = FAMILIES["bert"].build()
    change(model.encoder.layer[1].attention)
    return found(model, inputs_for(FAMILIES["bert"]))


def weight_normed(attention: Any) -> None:
    nn.utils.parametrizations.weight_norm(attention.self.value)


def tied(attention: Any) -> None:
    attention.self.value.weight = attention.self.key.weight


def same_module(attention: Any) -> None:
    attention.self.value = attention.self.key


class Doubling(nn.Linear):
    """A linear map with something of its own behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Narrow(nn.Linear):
    """A linear map that keeps its weights in eight bits."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def quantised(attention: Any) -> None:
    attention.self.value = Narrow()


def doubled(attention: Any) -> None:
    attention.self.value = Doubling(32, 32)


class Gated(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.rand(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.gate)


def gated(attention: Any) -> None:
    attention.output.dense = Gated(attention.output.dense)


def normed(attention: Any) -> None:
    attention.self.value = nn.Sequential(attention.self.value, nn.LayerNorm(32))


def biased_later(attention: Any) -> None:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.linspace(0, 1, 32)

    attention.self.value = nn.Sequential(attention.self.value, Later())


def clipped(attention: Any) -> None:
    attention.self.key = nn.Sequential(attention.self.key, nn.Hardtanh(-4.0, 4.0))


def rectified(attention: Any) -> None:
    attention.self.key = nn.Sequential(attention.self.key, nn.ReLU())


REFUSED: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "quantised": (quantised, "values", "quantised (float8_e4m3fn)"),
    "weight norm": (weight_normed, "values", "no weight matrix of its own"),
    "tied weights": (tied, "values", "also the weight of another module"),
    "one module for two roles": (same_module, "values", "the same rows"),
    "more than a weight": (doubled, "values", "more than its weight and bias say"),
    "a gate": (gated, "projection", "gated, normalised or mixed"),
    "a norm on the values": (normed, "values", "normalised"),
    "a bias elsewhere": (biased_later, "values", "something is added"),
    "clipped keys": (clipped, "logits", "neither linear in their weights"),
    "rectified keys": (
        rectified,
        "logits",
        "neither linear in their weights",
    ),  # twice as large for twice the features, and yet
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_acted_on_says_why(case: str) -> None:
    change, role, words = REFUSED[case]
    healthy, changed, last = bert_with(change)
    assert words in changed.reasons[role]
    if role != "logits":
        assert getattr(changed, role) is None
    assert not healthy.reasons
    assert not last.reasons


class Attention(nn.Module):
    """Attention in which, if asked, queries meet a table of positions too, or values go past the attention as well."""

    def __init__(self, positions: bool, past: bool, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.table = nn.Parameter(torch.randn(9, 8))
        self.positions, self.past, self.fused = positions, past, fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        added = q @ self.table[: x.shape[1]].T if self.positions else torch.zeros(len(x), 4, x.shape[1], x.shape[1])
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        else:
            mixed = torch.softmax(q @ k.mT * 8**-0.5 + added, -1) @ v
        mixed = mixed + v.roll(1, 2) if self.past else mixed
        return self.o(mixed.transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Own(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(OwnBlock(Attention(**options)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("fused", [False, True])
def test_queries_that_meet_positions_too_and_values_that_go_past_are_noticed(fused: bool) -> None:
    batch = {"input_ids": torch.randint(3, 64, (3, 9))}
    for positions, past in ((False, False), (True, False), (False, True)):
        for one in found(Own(positions=positions, past=past, fused=fused), batch):
            assert ("logits" in one.reasons) == positions
            assert ("projection" in one.reasons) == past
            assert (one.projection is None) == past
            assert QueryKeyGauge.surviving(one).survives == (not positions)
            assert ValueOutputGauge.surviving(one).survives == (not past)
    words = [one.reasons["logits"] for one in found(Own(positions=True, past=False, fused=fused), batch)]
    assert all("another way than by their product" in w for w in words)


class Few(Own):
    """Takes four sequences at most."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if len(input_ids) > 4:
            raise ValueError("too many sequences")
        return super().forward(input_ids)


def test_a_model_that_cannot_take_many_sequences_is_shown_one_pattern_at_a_time() -> None:
    batch = {"input_ids": torch.randint(3, 64, (3, 9))}
    few, many = (found(kind(positions=False, past=False, fused=True), batch) for kind in (Few, Own))
    assert few == many
    assert not few[0].reasons


def test_a_weight_that_another_part_of_the_model_runs_too_is_refused() -> None:
    model = FAMILIES["bert"].build()
    value = model.encoder.layer[1].attention.self.value
    model.encoder.layer[1].intermediate.register_forward_pre_hook(lambda _, args: (args[0] + value(args[0]),))
    one = found(model, inputs_for(FAMILIES["bert"]))[1]
    assert "also runs outside of the attention" in one.reasons["values"]
    assert one.values is None


def test_a_projection_that_two_blocks_share_without_their_values_is_refused() -> None:
    model = FAMILIES["bert"].build()
    layers = model.encoder.layer
    layers[1].attention.output.dense = layers[0].attention.output.dense
    first, second, third = found(model, inputs_for(FAMILIES["bert"]))
    assert "shared by attention calls" in first.reasons["projection"]
    assert "shared by attention calls" in second.reasons["projection"]
    assert first.queries is not None
    assert third.projection is not None


def test_offloaded_weights_are_refused() -> None:
    model = cpu_offload(FAMILIES["bert"].build())
    for one in found(model, inputs_for(FAMILIES["bert"])):
        assert one.values is None
        assert "offloaded" in one.reasons["values"]


def test_the_products_nearest_behind_the_operands_are_named() -> None:
    """In GPT-2 one module makes all three, in DeBERTa the keys of positions are added."""
    _, (one, *_) = of_family("gpt2")
    expected = ModuleCall("h.0.attn.c_attn", 0)
    assert (one.call.queries, one.call.keys, one.call.values) == (expected, expected, expected)
    deberta = of_family("deberta_v2")[1][0].call
    assert (deberta.queries, deberta.keys, deberta.similarity) == (None, None, None)
    assert deberta.values == ModuleCall("encoder.layer.0.attention.self.value_proj", 0)
