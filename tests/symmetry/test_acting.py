"""The groups acting on live models: laws, what leaves the function alone and what does not, everything put back."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.reference.heads import nullity
from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.operands import Lead
from uncollapse.anatomy.probing import float64_kept, probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall
from uncollapse.symmetry.acting import acting, drawn, head_weights, transformed
from uncollapse.symmetry.channels import Channels, channels_of
from uncollapse.symmetry.pass_groups import KeyPermutation, LogitScaling, LogitShift, TokenPermutation
from uncollapse.symmetry.weight_groups import HeadPermutation, HeadWeights, QueryKeyGauge, ValueOutputGauge

GROUPS = {"heads": HeadPermutation, "value-output": ValueOutputGauge, "query-key": QueryKeyGauge}
EXACT, BROKEN = 1e-9, 1e-4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def doubled(model: nn.Module) -> nn.Module:
    """In float64, norms without an epsilon: a scale in front of a norm then changes nothing at all."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused experts know no float64
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if "RMSNorm" in type(module).__name__ or "CohereLayerNorm" in type(module).__name__:
                setattr(module, name, 1e-30) if hasattr(module, name) else None
    return model.double().eval()


@functools.cache
def live(family: str) -> tuple[nn.Module, dict[str, Tensor], Anatomy, list[Channels], Tensor]:
    """A model in float64, its batch, anatomy, channels, and output."""
    if family == "encoder":
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model: nn.Module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        batch: dict[str, Tensor] = {"src": torch.randn(3, 9, 32)}
    else:
        model, batch = FAMILIES[family].build(), inputs_for(FAMILIES[family])
    model = doubled(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    anatomy = proved_anatomy(model, batch)
    return model, batch, anatomy, channels_of(model, anatomy, batch), output(model, batch)


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with probing(model), float64_kept(model):
        return next(tensors_in(model(**batch))).clone()


def gap(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# The function is left alone ---------------------------------------------------------------------------------------------
ALL = {"heads", "value-output", "query-key"}
SURVIVES: dict[str, set[str]] = dict.fromkeys([*FAMILIES, "encoder"], ALL) | {
    "mpnet": ALL - {"heads"},  # a relative bias a head
    "bloom": ALL - {"heads"},  # a slope a head
    "gpt_oss": ALL - {"heads"},  # a sink a head
    "cohere": ALL - {"heads"},  # norm gains a head
    "olmo2": ALL - {"heads"},  # norm gains a channel of each head
    "deberta_v2": {"value-output"},  # keys and queries of positions are added to the logits
    "deepseek_v3": {"value-output"},  # a key is joined from two products
}


@pytest.mark.parametrize("family", SURVIVES)
def test_what_survives_leaves_the_function_alone_and_weights_come_back(family: str) -> None:
    model, batch, _, channels, before = live(family)
    bits = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    acted = set()
    for name, group in GROUPS.items():
        elements = drawn(group, channels, generator())
        if not elements:
            continue
        acted.add(name)
        with transformed(model, elements):
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, bits[n][2])]
            assert gap(output(model, batch), before) < EXACT
        assert len(moved) >= len(elements)
        for n, p in model.named_parameters():
            assert p is bits[n][0]
            assert p.data_ptr() == bits[n][1]
            assert torch.equal(p, bits[n][2])
        assert torch.equal(output(model, batch), before)
    assert acted == SURVIVES[family]


@pytest.mark.parametrize("family", SURVIVES)
def test_a_logit_shift_is_seen_by_nobody_but_sinks_and_a_scaling_by_everybody(family: str) -> None:
    model, batch, anatomy, _, before = live(family)
    with acting(model, anatomy, LogitShift.random(generator())):
        shifted = gap(output(model, batch), before)
    assert shifted > BROKEN if family == "gpt_oss" else shifted < EXACT
    with acting(model, anatomy, LogitScaling.random(generator())):
        assert gap(output(model, batch), before) > BROKEN
    with acting(model, anatomy, LogitScaling(1.0)):
        assert gap(output(model, batch), before) < EXACT
    assert torch.equal(output(model, batch), before)


# An element outside of the surviving subgroup is seen -------------------------------------------------------------------
def full(count: int, width: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(torch.randn(count, width, width, generator=generator(seed), dtype=torch.float64)).Q * 1.3


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "phi", "modernbert", "qwen3", "cohere", "olmo2"])
def test_a_change_of_basis_that_does_not_commute_is_seen(family: str) -> None:
    model, batch, _, channels, before = live(family)
    one = channels[0]
    element = QueryKeyGauge.of(full(one.group_count, len(one.queries.features[0])), one)
    with transformed(model, [(one, element)]):
        assert gap(output(model, batch), before) > BROKEN


def test_pairs_that_turn_by_different_angles_must_not_be_mixed() -> None:
    """Channels 0 and 4 of Llama turn together, 0 and 1 do not; on GPT-NeoX channels 2 and 3 do not turn at all."""
    for family, first, second, alone in (("llama", 0, 4, True), ("llama", 0, 1, False), ("gpt_neox", 2, 3, True)):
        model, batch, _, channels, before = live(family)
        matrices = torch.eye(8, dtype=torch.float64).repeat(channels[0].group_count, 1, 1)
        matrices[:, first, second], matrices[:, second, first] = 0.7, -0.7
        with transformed(model, [(channels[0], QueryKeyGauge.of(matrices, channels[0]))]):
            changed = gap(output(model, batch), before)
        assert changed < EXACT if alone else changed > BROKEN


def test_a_norm_of_the_layer_sees_the_scale_of_one_head() -> None:
    for family, survives in (("qwen3", True), ("olmo2", False)):
        model, batch, _, channels, before = live(family)
        one = channels[0]
        element = QueryKeyGauge.identity(one)
        element.queries[0] *= 1.5
        with transformed(model, [(one, element)]):
            changed = gap(output(model, batch), before)
        assert changed < EXACT if survives else changed > BROKEN


@dataclass(frozen=True)
class ValuesOnly:
    """A change of basis that the output projection does not take back."""

    matrices: Tensor
    roles: ClassVar[tuple[str, ...]] = ("values",)

    def on(self, weights: HeadWeights) -> HeadWeights:
        return replace(weights, values=weights.values @ self.matrices)


@dataclass(frozen=True)
class QueriesOnly:
    """Queries of the heads in another order, their keys where they were."""

    order: list[int]
    roles: ClassVar[tuple[str, ...]] = ("queries",)

    def on(self, weights: HeadWeights) -> HeadWeights:
        return replace(weights, queries=weights.queries[self.order])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "falcon", "encoder"])
def test_half_a_gauge_is_seen(family: str) -> None:
    model, batch, _, channels, before = live(family)
    one = channels[0]
    for element in (ValuesOnly(full(one.group_count, 8)), QueriesOnly([1, 0, 2, 3])):
        with transformed(model, [(one, element)]):
            assert gap(output(model, batch), before) > BROKEN
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("family", ["mpnet", "bloom", "t5", "gpt_oss", "olmo2"])
def test_heads_that_are_not_alike_must_not_change_places(family: str) -> None:
    model, batch, _, channels, before = live(family)
    one = channels[0]
    assert HeadPermutation.surviving(one).dimension == 0
    groups = torch.arange(one.group_count).roll(1)
    element = HeadPermutation(groups, HeadPermutation.identity(one).within)
    with transformed(model, [(one, element)]):
        assert gap(output(model, batch), before) > BROKEN


def test_sinks_see_a_shift_of_the_value_bias_and_of_the_key_bias() -> None:
    model, batch, _, channels, before = live("gpt_oss")
    one = channels[0]
    assert ValueOutputGauge.random(generator(), one).shifts is None
    shifts = torch.ones(one.group_count, 8, dtype=torch.float64)
    with transformed(model, [(one, replace(ValueOutputGauge.identity(one), shifts=shifts))]):
        assert gap(output(model, batch), before) > BROKEN
    assert "which sink columns make visible" in ValueOutputGauge.surviving(one).surviving
    with_sinks = replace(live("bert")[3][0], sinks=True)  # GPT-OSS itself rotates all of its channels
    assert QueryKeyGauge.random(generator(), with_sinks).shifts is None
    assert QueryKeyGauge.surviving(with_sinks).dimension == 4 * 64


def test_shifts_survive_where_biases_and_rotations_let_them() -> None:
    """Qwen2 rotates all channels: no shift of a key bias. Whisper has none. Phi rotates half of them."""
    for family, value, key in (
        ("bert", True, True),
        ("qwen2", False, False),
        ("phi", True, True),
        ("t5", False, False),
    ):
        one = live(family)[3][0]
        assert (ValueOutputGauge.random(generator(), one).shifts is not None) == value
        assert (QueryKeyGauge.random(generator(), one).shifts is not None) == key
    model, batch, _, channels, before = live("qwen2")
    shifts = torch.ones(channels[0].group_count, 8, dtype=torch.float64)
    with transformed(model, [(channels[0], replace(QueryKeyGauge.identity(channels[0]), shifts=shifts))]):
        assert gap(output(model, batch), before) > BROKEN
    model, batch, _, channels, before = live("phi")
    shifts = torch.zeros(channels[0].group_count, 8, dtype=torch.float64)
    shifts[:, list(channels[0].free)] = 1.0
    with transformed(model, [(channels[0], replace(QueryKeyGauge.identity(channels[0]), shifts=shifts))]):
        assert gap(output(model, batch), before) < EXACT


def test_entropy_scaling_is_an_exact_gauge() -> None:
    for family in ("bert", "llama", "gpt_neox"):
        model, batch, _, channels, before = live(family)
        elements = [(one, QueryKeyGauge.entropy_scaling(3.0, one)) for one in channels]
        with transformed(model, elements):
            assert gap(output(model, batch), before) < EXACT
            assert torch.allclose(
                head_weights(model, channels[0], ("queries",)).queries / 3.0,
                _weights_before(family).queries,
            )


@functools.cache
def _weights_before(family: str) -> HeadWeights:
    model = doubled(FAMILIES[family].build())
    batch = inputs_for(FAMILIES[family])
    return head_weights(model, channels_of(model, proved_anatomy(model, batch), batch)[0], ("queries",))


# Laws -------------------------------------------------------------------------------------------------------------------
def made_up(groups: tuple[int, ...], width: int, seed: int) -> HeadWeights:
    make = functools.partial(torch.randn, generator=generator(seed), dtype=torch.float64)
    heads, count = len(groups), len(set(groups))
    return HeadWeights(
        groups,
        make(heads, 5, width),
        make(heads, width),
        make(count, 5, width),
        make(count, width),
        make(count, 5, width),
        make(count, width),
        make(heads, width, 5),
        make(5),
    )


def same(first: HeadWeights, second: HeadWeights) -> bool:
    pairs = [(getattr(first, n), getattr(second, n)) for n in HeadWeights.__dataclass_fields__ if n != "groups"]
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def element_of(kind: str, groups: tuple[int, ...], width: int, seed: int) -> Any:
    make = functools.partial(torch.randn, generator=generator(seed), dtype=torch.float64)
    heads, count = len(groups), len(set(groups))
    if kind == "heads":
        within = torch.stack([torch.randperm(heads // count, generator=generator(seed + i)) for i in range(count)])
        return HeadPermutation(torch.randperm(count, generator=generator(seed)), within)
    if kind == "value-output":
        return ValueOutputGauge(full(count, width, seed), make(count, width) if seed % 3 else None)
    return QueryKeyGauge(
        full(heads, width, seed), full(count, width, seed + 1), make(count, width) if seed % 3 else None
    )


@given(
    kind=st.sampled_from(list(GROUPS)),
    groups=st.sampled_from([(0, 1, 2), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0), (0, 1, 2, 0, 1, 2)]),
    width=st.integers(1, 4),
    seeds=st.tuples(st.integers(0, 99), st.integers(100, 199), st.integers(200, 299)),
)
@settings(max_examples=60, deadline=None)
def test_the_actions_on_weights_are_groups(
    kind: str, groups: tuple[int, ...], width: int, seeds: tuple[int, int, int]
) -> None:
    weights = made_up(groups, width, 7)
    a, b, c = (element_of(kind, groups, width, seed) for seed in seeds)
    assert same(a.compose(b).on(weights), b.on(a.on(weights)))
    assert same(a.inverse().on(a.on(weights)), weights)
    assert same(a.on(a.inverse().on(weights)), weights)
    assert same(a.compose(a.inverse()).on(weights), weights)
    assert same(a.compose(b).compose(c).on(weights), a.compose(b.compose(c)).on(weights))
    assert not same(a.compose(b).on(weights), weights) or kind == "heads"


def test_composition_is_not_turned_round() -> None:
    weights = made_up((0, 1, 2), 3, 7)
    for kind in GROUPS:
        a, b = (element_of(kind, (0, 1, 2), 3, seed) for seed in (4, 104))
        assert not same(b.compose(a).on(weights), a.compose(b).on(weights))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_acting_twice_on_a_model_is_acting_with_the_product(family: str) -> None:
    model, _, _, channels, _ = live(family)
    one = channels[1]
    for group in GROUPS.values():
        a, b = group.random(generator(1), one), group.random(generator(2), one)
        before = head_weights(model, one)
        with transformed(model, [(one, a)]):
            assert not same_present(head_weights(model, one), before)
            with transformed(model, [(one, b)]):
                nested = head_weights(model, one)
        with transformed(model, [(one, a), (one, b)]):
            listed = head_weights(model, one)
        with transformed(model, [(one, a.compose(b))]):
            product = head_weights(model, one)
        with transformed(model, [(one, a), (one, a.inverse())]):
            assert same_present(head_weights(model, one), before)
        with transformed(model, [(one, group.identity(one))]):
            assert same_present(head_weights(model, one), before)
        assert same_present(nested, product)
        assert same_present(listed, product)


def same_present(first: HeadWeights, second: HeadWeights) -> bool:
    names = [n for n in HeadWeights.__dataclass_fields__ if n != "groups" and getattr(first, n) is not None]
    return all(torch.allclose(getattr(first, n), getattr(second, n), rtol=1e-9, atol=1e-11) for n in names)


@given(seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)), rows=st.integers(1, 4), tokens=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_token_permutations_are_a_group_that_leaves_padding_in_place(
    seeds: tuple[int, int], rows: int, tokens: int
) -> None:
    mask = torch.rand(rows, tokens, generator=generator(1)) > 0.3
    x = torch.randn(rows, tokens, 2, generator=generator(2))
    for kind in (TokenPermutation, KeyPermutation):
        a, b = (kind.random(generator(seed), mask) for seed in seeds)
        assert torch.equal(TokenPermutation(a.compose(b).order).tokens(x), permuted(permuted(x, a.order), b.order))
        assert torch.equal(a.compose(a.inverse()).order, kind.identity(mask).order)
        assert torch.equal(a.inverse().compose(a).order, kind.identity(mask).order)
        assert torch.equal(a.order[~mask], kind.identity(mask).order[~mask])
        for row, real in zip(a.order, mask, strict=True):
            assert sorted(row.tolist()) == list(range(tokens))
            assert real.sum() < 2 or not torch.equal(row, torch.arange(tokens))


def permuted(x: Tensor, order: Tensor) -> Tensor:
    return torch.stack([torch.stack([row[int(i)] for i in places]) for row, places in zip(x, order, strict=True)])


@given(first=st.floats(0.1, 10), second=st.floats(0.1, 10), seeds=st.tuples(st.integers(0, 9), st.integers(10, 19)))
@settings(max_examples=25, deadline=None)
def test_shift_and_scaling_are_groups(first: float, second: float, seeds: tuple[int, int]) -> None:
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    a, b = LogitScaling(first), LogitScaling(second)
    assert torch.allclose(at_softmax(a.compose(b), logits), at_softmax(b, at_softmax(a, logits)))
    assert torch.allclose(at_softmax(a.compose(a.inverse()), logits), logits)
    assert torch.equal(at_softmax(LogitScaling.identity(), logits), logits)
    c, d = (LogitShift.random(generator(s), 3) for s in seeds)
    assert torch.allclose(at_softmax(c.compose(d), logits), at_softmax(d, at_softmax(c, logits)))
    assert torch.allclose(at_softmax(c.compose(c.inverse()), logits), logits)
    assert torch.equal(at_softmax(LogitShift.identity(3), logits), logits)


# Inside the attention call ----------------------------------------------------------------------------------------------
SOFTMAX = Point("attention", 0, "softmax", 0)
PRODUCT = Point("attention", 0, "matmul", 1)
SIMILARITY = Point("attention", 0, "matmul", 0)
FUSED = Point("attention", 0, "scaled_dot_product_attention", 0)
AXES = (Lead("sequence"), Lead("head"))
OWN = AttentionCall(SOFTMAX, PRODUCT, 1, 3, 3, 8, None, weight_operand=0, similarity=SIMILARITY, lead=AXES)
ONE_CALL = AttentionCall(FUSED, FUSED, 2, 3, 3, 8, None, similarity=FUSED, lead=AXES)


def at_softmax(element: Any, logits: Tensor, sinks: int = 0) -> Tensor:
    """What comes to the softmax of logits whose last `sinks` columns belong to no key."""
    handlers = element.handlers(OWN, "attention")
    keys = logits.shape[-1] - sinks
    handlers[SIMILARITY](torch.matmul, (torch.zeros(2, 1), torch.zeros(1, keys)), {})
    came: Tensor = handlers[SOFTMAX](lambda x, dim: x, (logits,), {"dim": -1})
    return came


def numpy_attention(q: Any, k: Any, v: Any, bias: Any, factor: float) -> Any:
    """Softmax of factor x (q k / sqrt(d) + bias) with -inf for forbidden pairs, in NumPy."""
    logits = (q @ k.swapaxes(-1, -2)) / math.sqrt(q.shape[-1]) + bias
    logits = np.where(np.isinf(bias), -np.inf, logits * factor)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("masking", ["none", "causal", "boolean", "additive", "smallest number"])
def test_a_fused_call_is_scaled_and_shifted_behind_its_mask(masking: str) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator(s), dtype=torch.float64) for s in range(3))
    allowed = torch.rand(2, 1, 5, 5, generator=generator(4)) > 0.4
    allowed[..., 0] = True
    bias = torch.randn(2, 3, 5, 5, generator=generator(5), dtype=torch.float64)
    smallest = torch.finfo(torch.float64).min
    options: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": allowed},
        "additive": {"attn_mask": bias.masked_fill(~allowed, -math.inf)},
        "smallest number": {"attn_mask": torch.zeros(2, 1, 5, 5).double().masked_fill(~allowed, smallest)},
    }
    forbidden = {"none": False, "causal": ~torch.ones(5, 5).tril().bool()}.get(masking, ~allowed)
    added = bias if masking == "additive" else torch.zeros(2, 3, 5, 5).double()
    added = added.masked_fill(torch.as_tensor(forbidden), -math.inf).numpy()
    fused = torch.nn.functional.scaled_dot_product_attention
    for element, factor in ((LogitScaling(2.5), 2.5), (LogitScaling(0.4), 0.4), (LogitShift.random(generator()), 1.0)):
        got = element.handlers(ONE_CALL, "attention")[FUSED](fused, (q, k, v), options[masking])
        assert got.isfinite().all()
        np.testing.assert_allclose(got, numpy_attention(*(t.numpy() for t in (q, k, v)), added, factor), atol=1e-12)


def test_a_shift_really_moves_the_logits_of_a_fused_call() -> None:
    q = torch.randn(2, 3, 5, 8)
    shift = LogitShift(torch.tensor([1.0, 2.0]).double())
    seen: dict[str, Any] = {}

    def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.update(options)
        return query

    shift.handlers(ONE_CALL, "attention")[FUSED](fused, (q, q, q), {"is_causal": True, "scale": 0.5})
    expected = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])[:, None].expand(5, 5)
    expected = expected.masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf)
    assert torch.equal(seen["attn_mask"], expected)
    assert (seen["is_causal"], seen["scale"]) == (False, 0.5)


def test_before_a_softmax_masks_and_sinks_are_left_alone() -> None:
    smallest = torch.finfo(torch.float32).min
    logits = torch.tensor([[1.0, -math.inf, smallest, 4.0], [1.0, 2.0, 3.0, 5.0]])
    scaled = at_softmax(LogitScaling(2.0), logits, sinks=1)
    assert torch.equal(scaled, torch.tensor([[2.0, -math.inf, smallest, 4.0], [2.0, 4.0, 6.0, 5.0]]))
    shifted = at_softmax(LogitShift(torch.tensor([1.0, 10.0])), logits, sinks=1)
    assert torch.equal(shifted, torch.tensor([[2.0, -math.inf, smallest, 4.0], [11.0, 12.0, 13.0, 5.0]]))


@pytest.mark.parametrize("axes", [3, 4])
def test_keys_are_permuted_under_the_weights(axes: int) -> None:
    weights = torch.rand(2, 3, 5, 5, generator=generator(1), dtype=torch.float64)
    values = torch.randn(2, 3, 5, 4, generator=generator(2), dtype=torch.float64)
    permutation = KeyPermutation.random(generator(3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    expected = np.zeros((2, 3, 5, 4))
    for b, h, i, j in np.ndindex(2, 3, 5, 5):
        expected[b, h, i] += weights[b, h, i, j].numpy() * values[b, h, permutation.order[b, j]].numpy()
    operands = (weights, values) if axes == 4 else (weights.flatten(0, 1), values.flatten(0, 1))
    got = permutation.handlers(OWN, "attention")[PRODUCT](torch.matmul, operands, {})
    np.testing.assert_allclose(got.reshape(2, 3, 5, 4), expected, atol=1e-12)
    assert not permutation.handlers(OWN, "cross")


def test_keys_that_are_all_alike_to_the_queries_may_change_places() -> None:
    """With W_Q = 0 attention is uniform: the limit in which S_n on the keys is a symmetry."""
    torch.manual_seed(0)
    model = doubled(FAMILIES["bert"].build())
    batch = inputs_for(FAMILIES["bert"])
    anatomy = proved_anatomy(model, batch)
    permutation = KeyPermutation.random(generator(), batch["attention_mask"].bool())
    before = output(model, batch)
    with acting(model, anatomy, permutation):
        assert gap(output(model, batch), before) > BROKEN
    with acting(model, anatomy, KeyPermutation.identity(batch["attention_mask"].bool())):
        assert torch.equal(output(model, batch), before)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    before = output(model, batch)
    with acting(model, anatomy, permutation):
        assert gap(output(model, batch), before) < EXACT


def test_only_the_given_blocks_are_acted_on() -> None:
    model, batch, anatomy, _, before = live("bert")
    with acting(model, anatomy, LogitScaling(3.0), blocks=[]):
        assert torch.equal(output(model, batch), before)
    clouds: list[Tensor] = []
    hook = model.encoder.layer[1].register_forward_hook(
        lambda _m, _a, out: clouds.append(next(tensors_in(out)).clone())
    )
    output(model, batch)
    with acting(model, anatomy, LogitScaling(3.0), blocks=[2]):
        assert gap(output(model, batch), before) > BROKEN
    hook.remove()
    assert torch.equal(clouds[0], clouds[1])
    with pytest.raises(uc.InputError, match="from 0 to 2"), acting(model, anatomy, LogitScaling(3.0), blocks=[3]):
        pass


# Tokens -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_without_positions_and_mask_the_outputs_follow_the_tokens(family: str) -> None:
    model, batch, _, _, _ = live(family)
    batch = {**batch, "attention_mask": batch["attention_mask"].clone()}
    batch["attention_mask"][1, 6:] = 0
    real = batch["attention_mask"].bool()
    permutation = TokenPermutation.random(generator(), real)
    moved = permutation.batch(batch)
    assert torch.equal(moved["input_ids"][1, 6:], batch["input_ids"][1, 6:])
    assert torch.equal(moved["attention_mask"], batch["attention_mask"])
    with uc.without(model, "positions", "mask"):
        plain, after = output(model, batch), output(model, moved)
    assert gap(after[real], permutation.tokens(plain)[real]) < EXACT
    plain, after = output(model, batch), output(model, moved)
    assert gap(after[real], permutation.tokens(plain)[real]) > BROKEN


def test_what_belongs_to_tokens_moves_and_what_belongs_to_places_stays() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    permutation = TokenPermutation.random(generator(), mask)
    numbers = torch.arange(8).view(2, 4)
    batch = {
        "input_ids": numbers,
        "token_type_ids": numbers,
        "position_ids": numbers,
        "decoder_input_ids": numbers,
        "labels": numbers,
        "inputs_embeds": torch.randn(2, 4, 3),
        "return_dict": True,
    }
    moved = permutation.batch(batch)
    for name in ("position_ids", "decoder_input_ids", "labels"):
        assert torch.equal(moved[name], numbers)
    for name in ("input_ids", "token_type_ids", "inputs_embeds"):
        assert torch.equal(moved[name], permuted(batch[name], permutation.order))
    of_decoder = permutation.batch(batch, stack="decoder_")
    assert torch.equal(of_decoder["input_ids"], numbers)
    assert torch.equal(of_decoder["decoder_input_ids"], permuted(numbers, permutation.order))
    assert torch.equal(of_decoder["labels"], permuted(numbers, permutation.order))
    with pytest.raises(uc.InputError, match="pixel_values"):
        permutation.batch({"pixel_values": torch.randn(2, 3, 8, 8)})
    with pytest.raises(uc.InputError, match="may pool"):
        permutation.tokens(torch.randn(2, 8))


# Putting back -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_back_bit_for_bit_in_every_number_format_after_an_exception(dtype: torch.dtype) -> None:
    model = FAMILIES["llama"].build().to(dtype)
    batch = inputs_for(FAMILIES["llama"])
    channels = channels_of(model, proved_anatomy(model, batch), batch)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    before = output(model, batch)
    elements = [e for group in GROUPS.values() for e in drawn(group, channels, generator())]

    def interrupted() -> None:
        with transformed(model, elements):
            assert gap(output(model, batch).float(), before.float()) < 100 * torch.finfo(dtype).eps
            assert {p.dtype for p in model.parameters()} == {dtype}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, batch), before)


def test_what_was_changed_before_a_refusal_is_put_back() -> None:
    model, batch, _, channels, before = live("deberta_v2")
    one = channels[0]
    good = (one, ValueOutputGauge.random(generator(), one))
    bad = (one, QueryKeyGauge(torch.zeros(4, 8, 8).double(), torch.zeros(4, 8, 8).double()))
    with pytest.raises(uc.InputError, match="several learned products"), transformed(model, [good, bad]):
        pass
    assert torch.equal(output(model, batch), before)


def test_a_layer_that_runs_three_times_is_transformed_once() -> None:
    model, batch, _, channels, before = live("albert")
    for group in GROUPS.values():
        elements = drawn(group, channels, generator())
        assert len(elements) == 1
        with transformed(model, elements):
            assert gap(output(model, batch), before) < EXACT


# Elements and what is said of them --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox", "qwen3", "olmo2"])
def test_random_elements_are_well_conditioned_and_no_identity(family: str) -> None:
    one = live(family)[3][0]
    for seed in range(5):
        gauge = QueryKeyGauge.random(generator(seed), one)
        for matrices in (ValueOutputGauge.random(generator(seed), one).matrices, gauge.queries, gauge.keys):
            sigma = torch.linalg.svdvals(matrices)
            assert (sigma[:, 0] / sigma[:, -1]).max() < 3
            assert (matrices - torch.eye(matrices.shape[-1])).norm(dim=(1, 2)).min() > 0.2
    for family_of_heads in ("bert", "llama", "qwen3", "falcon"):
        one = live(family_of_heads)[3][0]
        element = HeadPermutation.random(generator(), one)
        weights = made_up(one.groups, 2, 1)
        assert not torch.equal(element.on(weights).queries, weights.queries)


def test_the_same_seed_draws_the_same() -> None:
    one = live("bert")[3][0]
    first, second = (ValueOutputGauge.random(generator(5), one) for _ in range(2))
    assert torch.equal(first.matrices, second.matrices)
    assert not torch.equal(first.matrices, ValueOutputGauge.random(generator(6), one).matrices)


WORDS = {
    ("bert", "heads"): ("the order of the 4 heads (24 permutations)", 0),
    ("llama", "heads"): ("the order of the 2 key-value heads and the order of the 2 heads that share", 0),
    ("falcon", "heads"): ("the order of the 4 heads that share a key-value head (24 permutations)", 0),
    ("bloom", "heads"): ("a bias, a gain or a sink of its own", 0),
    ("bert", "value-output"): ("and a shift of each channel", 4 * 64 + 4 * 8),
    ("llama", "value-output"): ("8 channels of each of the 2 key-value heads", 2 * 64),
    ("gpt_oss", "value-output"): ("no shift of the value bias", 2 * 64),
    ("bert", "query-key"): ("any change of basis of the 8 channels, in each of the 4 heads", 4 * 64 + 4 * 8),
    ("llama", "query-key"): ("a scale and a turn of each of the 4 pairs", 2 * 8),
    ("gpt_neox", "query-key"): ("6 channels that positions do not rotate and a scale", 4 * (2 + 36) + 4 * 6),
    ("qwen3", "query-key"): ("the scale of each of the 4 heads' queries and of the 2 key-value heads' keys", 6),
    ("olmo2", "query-key"): ("the scale of all queries and that of all keys", 2),
    ("deberta_v2", "query-key"): ("unknown: the queries come from several learned products", None),
}


@pytest.mark.parametrize(("family", "group"), WORDS)
def test_what_survives_is_said_in_words_with_its_dimension(family: str, group: str) -> None:
    words, dimension = WORDS[family, group]
    survives = GROUPS[group].surviving(live(family)[3][0])
    assert words in survives.surviving
    assert survives.dimension == dimension
    assert survives.survives == (group in SURVIVES[family])


def test_elements_of_another_model_are_refused() -> None:
    model, _, _, channels, _ = live("bert")
    other = live("llama")[3][0]
    for group in GROUPS.values():
        with (
            pytest.raises(uc.InputError, match="belongs to another model"),
            transformed(model, [(channels[0], group.random(generator(), other))]),
        ):
            pass
    with pytest.raises(uc.InputError, match="Use drawn"):
        HeadPermutation.random(generator(), live("bloom")[3][0])
    with pytest.raises(uc.InputError, match="value bias and an output bias"):
        replace(ValueOutputGauge.identity(other), shifts=torch.ones(2, 8).double()).on(
            head_weights(live("llama")[0], other)
        )
    with pytest.raises(uc.InputError, match="factor above 0"):
        LogitScaling(0.0)
    with pytest.raises(uc.InputError, match="as many amounts"):
        LogitShift.identity(2).compose(LogitShift.identity(3))
    with pytest.raises(uc.InputError, match="several learned products"):
        head_weights(live("deberta_v2")[0], live("deberta_v2")[3][0])


# Dimensions against the derivative --------------------------------------------------------------------------------------
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 64}
ONE_LAYER: dict[str, Any] = {
    "bert": hf.BertConfig(hidden_size=8, num_attention_heads=2, **SMALL),
    "gpt2": hf.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=64, bos_token_id=1, eos_token_id=2),
    "gpt_neox": hf.GPTNeoXConfig(hidden_size=8, num_attention_heads=2, rotary_pct=0.5, **SMALL),
    "llama": hf.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, **SMALL),
    "qwen3": hf.Qwen3Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4, **SMALL),
    "olmo2": hf.Olmo2Config(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, **SMALL),
}


@pytest.mark.parametrize("group", ["value-output", "query-key"])
@pytest.mark.parametrize("family", ONE_LAYER)
def test_the_dimension_is_the_rank_deficiency_of_the_derivative(family: str, group: str) -> None:
    """All weights of the two roles at once: the directions in which what the attention writes does not change, to first
    order. Without layer norms: behind one the tokens lie in a hyperplane, and every channel has one more such direction."""
    model = hf.AutoModel.from_config(ONE_LAYER[family], attn_implementation="eager")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            model.set_submodule(name, nn.Identity())
    draws = generator()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=draws))
    model = doubled(model)
    tokens = torch.randint(3, 64, (12, 9), generator=draws)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    (one,) = channels_of(model, proved_anatomy(model, batch), batch)
    weights = head_weights(model, one)
    roles = {
        "value-output": ("values", "value_bias", "projection", "output_bias"),
        "query-key": ("queries", "query_bias", "keys", "key_bias"),
    }[group]
    moving = {name: getattr(weights, name) for name in roles if getattr(weights, name) is not None}
    places = {role: getattr(one, role) for role in ("queries", "keys", "values", "projection")}
    named = {n: p.detach() for n, p in model.named_parameters()}

    def function(parts: dict[str, Tensor]) -> Tensor:
        parameters = dict(named)
        for role, rows in places.items():
            bias = {"queries": "query_bias", "keys": "key_bias", "values": "value_bias"}.get(role)
            if role in parts:
                blocks = parts[role] if role == "projection" else parts[role].mT
                whole = parameters[rows.place].movedim(rows.axis, 0)
                whole = whole.index_copy(0, rows.index().flatten(), blocks.flatten(0, 1))
                parameters[rows.place] = whole.movedim(0, rows.axis)
            if bias in parts:
                name = f"{rows.module}.{rows.bias}"
                parameters[name] = parameters[name].index_copy(0, rows.index().flatten(), parts[bias].flatten())
        if "output_bias" in parts:
            parameters[f"{places['projection'].module}.{places['projection'].bias}"] = parts["output_bias"]
        written: list[Tensor] = []  # by the attention, ahead of any norm: one there may hide more
        hook = projection.register_forward_hook(lambda _m, _a, output: written.append(output))
        with float64_kept(model):
            torch.func.functional_call(model, parameters, kwargs=batch)
        hook.remove()
        return written[0]

    model.config.use_cache = False
    projection = model.get_submodule(places["projection"].module)
    assert nullity(function, moving) == GROUPS[group].surviving(one).dimension
