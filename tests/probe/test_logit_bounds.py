"""A bound of the logits is a bound on any text, or there is none."""

import importlib

import pytest
import torch
import transformers

import uncollapse as uc
from uncollapse.errors import InputError
from uncollapse.measures import mixing

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def heads_of(model):
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    return uc.diagnose(model.eval(), batches=[{"input_ids": ids}]).record.attention


def test_a_soft_cap_bounds_the_logits():
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=3.0, attn_implementation="eager")
    for head in heads_of(transformers.Gemma2Model(config)):
        assert head.logit_range_bound == pytest.approx(6, rel=0.01)
        assert head.disperses_beyond == pytest.approx(mixing.dispersion_length(head.logit_range_bound))
        assert "soft cap of 3" in head.bounded_by
        assert head.bound_part == "soft cap"


def test_a_norm_on_queries_and_keys_bounds_them_by_its_gains():
    torch.manual_seed(0)
    model = transformers.Qwen3Model(transformers.Qwen3Config(**SIZES)).double()
    gains = torch.tensor([0.5, -2.0, 1, 1, 1, 1, 0.1, 1]).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_norm.weight.copy_(gains)
    for head in heads_of(model):
        # |q| <= sqrt(8) 2, |k| <= sqrt(8), the scale 1/sqrt(8)
        assert head.logit_range_bound == pytest.approx(2 * 2 * 8**0.5, rel=0.01)
        assert "keep their norm" in head.bounded_by
        assert head.bound_part == "query-key norm"
        assert head.max_logit.max <= head.logit_range_bound / 2


def beside(monkeypatch, name, extra):
    """The eager attention of a family of models with `extra(logits)` behind its soft cap."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def attention(self, query, key, value, attention_mask, scaling, softcap=None, **_):
        key, value = (module.repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        logits = torch.matmul(query, key.mT) * scaling
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        weights = torch.softmax(extra(logits) + attention_mask, -1).to(value.dtype)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(module, "eager_attention_forward", attention)


def by_distance(logits):
    """The gentlest slope of ALiBi: nothing to speak of on eight tokens, eight on two thousand."""
    place = torch.arange(logits.shape[-1], dtype=logits.dtype)
    return logits - 2.0**-8 * (place[:, None] - place).abs()


@pytest.mark.parametrize("extra", [by_distance, lambda logits: logits])
def test_a_bias_behind_the_soft_cap_that_grows_with_the_distance_leaves_no_bound(monkeypatch, extra):
    torch.manual_seed(0)
    beside(monkeypatch, "gemma2", extra)
    config = transformers.Gemma2Config(**SIZES, attn_logit_softcapping=100.0, attn_implementation="eager")
    for head in heads_of(transformers.Gemma2Model(config)):
        assert (head.logit_range_bound is None) == (extra is by_distance)


@pytest.mark.parametrize("extra", [by_distance, lambda logits: logits])
def test_so_does_one_behind_the_norms(monkeypatch, extra):
    torch.manual_seed(0)
    beside(monkeypatch, "qwen3", extra)
    model = transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, attn_implementation="eager"))
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_norm.weight.fill_(8.0)
            layer.self_attn.k_norm.weight.fill_(8.0)
    for head in heads_of(model):
        assert (head.logit_range_bound is None) == (extra is by_distance)


def test_a_fused_call_with_a_small_bias_gets_no_bound(monkeypatch):
    torch.manual_seed(0)

    def attention(self, query, key, value, attention_mask, scaling, **_):
        rows = query.shape[-2]
        bias = by_distance(torch.zeros(rows, rows)).masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, bias, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2).contiguous(), None

    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.eager_attention_forward", attention)
    model = transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, attn_implementation="eager"))
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_norm.weight.fill_(8.0)
            layer.self_attn.k_norm.weight.fill_(8.0)
    assert {head.logit_range_bound for head in heads_of(model)} == {None}


def test_a_model_that_refuses_enlarged_logits_is_diagnosed_all_the_same(monkeypatch):
    def careful(logits):
        assert float(logits.abs().max()) < 1e6, "exploded"
        return logits

    torch.manual_seed(0)
    beside(monkeypatch, "qwen3", careful)
    for head in heads_of(transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, attn_implementation="eager"))):
        assert head.logit_range_bound is None
        assert head.bounded_by == "not shown: AssertionError"


def test_what_is_not_bounded_gets_no_bound():
    torch.manual_seed(0)
    for head in heads_of(transformers.LlamaModel(transformers.LlamaConfig(**SIZES))):
        assert (head.logit_range_bound, head.disperses_beyond, head.bound_part) == (None, None, None)
        assert "not bounded as far as was shown" in head.bounded_by


def test_beyond_the_length_no_key_has_more_than_half():
    for delta in (0.0, 1.0, 4.0):
        n = int(mixing.dispersion_length(delta)) + 1
        logits = torch.zeros(n, dtype=torch.float64)
        logits[0] = delta
        assert logits.softmax(0)[0] <= 0.5
        assert logits[: max(1, n - 2)].softmax(0)[0] > 0.5 or delta == 0
    with pytest.raises(InputError, match="dispersion_length: expected a finite"):
        mixing.dispersion_length(-1.0)
