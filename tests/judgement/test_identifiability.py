"""Head records: from the weights of whatever projection the model has, and honest where they cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.projections import PROJECTIONS, hooked, projections, weight_of
from tests.helpers.tiny_models import FAMILIES as SMALL
from tests.helpers.tiny_models import text_batch
from tests.reference import identifiability as reference
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.gates.projection import PositionGatedProjection
from uncollapse.judgement import identifiability
from uncollapse.measures import heads
from uncollapse.measures.running import Running
from uncollapse.probe.passes import capture
from uncollapse.records.diagnosis import HeadsRecord

COUNTS = ("width", "output_projection_rank", "kernel_dimension", "contribution_ambiguity")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt", "t5", "deepseek_v3"])
def test_projection_figures_are_those_of_the_weights(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    found = uc.diagnose(model, batches=[inputs_for(family)])
    mixed = family.heads * family.head_width
    assert found.record.heads
    for record in found.record.heads:
        assert (record.heads, record.head_width, record.width) == (family.heads, family.head_width, 32)
        assert record.kernel_dimension == max(0, mixed - 32)  # random weights have the rank their shape allows
        assert record.output_projection_rank == min(mixed, 32)
        bias = name in {"gpt2", "opt"}
        groups = family.key_value_heads
        assert record.gauge_dimension == groups * family.head_width**2 + (groups * family.head_width if bias else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_figure_is_that_of_a_head_by_head_reference(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), inputs_for(family)
    if "attention_mask" in batch and name != "deberta_v2":
        batch["attention_mask"][0, 6:] = 0
    records = uc.diagnose(model, batches=[batch]).record.heads
    runs = hooked(model, projections(model, PROJECTIONS[name]), batch)
    assert len(records) == len(runs)
    for record, (module, read, _) in zip(records, runs, strict=True):
        expected = reference.figures(weight_of(module), family.heads, eps=torch.finfo(torch.float32).eps)
        assert {key: getattr(record, key) for key in COUNTS} == {key: expected[key] for key in COUNTS}
        np.testing.assert_allclose(record.write_space_overlap, expected["write_space_overlap"], atol=1e-9)
        assert record.smallest_principal_angle is not None
        angles = np.array(record.smallest_principal_angle, dtype=float)
        np.testing.assert_allclose(np.cos(angles), expected["cosine_of_smallest_angle"], atol=1e-9)
        close(record.condition_number, expected["condition_number"])
        close(record.absolute_noise_gain, expected["absolute_noise_gain"])
        assert record.head_noise_gain is not None
        for found, gain in zip(record.head_noise_gain, expected["head_noise_gain"], strict=True):
            close(found, gain)
        mask = masked(batch, record, read)
        shares = reference.energy_shares(read, weight_of(module), family.heads, mask)
        assert record.energy_share is not None
        got = [s.mean for s in record.energy_share if s is not None]
        np.testing.assert_allclose(got, shares.mean(0), rtol=1e-4)
        lengths = read.shape[1] if mask is None else mask.sum(1).double().mean().item()
        assert record.tokens == round(lengths)


def masked(batch: dict[str, Any], record: HeadsRecord, read: Tensor) -> Tensor | None:
    mask = batch.get("decoder_attention_mask" if record.stack == "decoder" else "attention_mask")
    return mask if mask is not None and mask.shape == read.shape[:2] else None


def close(found: float | None, expected: float | None) -> None:
    if found is None or expected is None:
        assert found is expected
    else:
        assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_what_stays_open_for_who_sees_the_output_alone(name: str) -> None:
    family = FAMILIES[name]
    expected = reference.fibre_of_the_product(5, family.heads * family.head_width, 32)
    for record in uc.diagnose(family.build(), batches=[inputs_for(family, tokens=5)]).record.heads:
        assert (record.tokens, record.factorization_ambiguity) == (5, expected)


# The model's own gauge ------------------------------------------------------------------------------------------------

# How each family keeps the values and the output projection of a block: (weights [in, out] of the values, W_O [mixed, width],
# value bias, output bias), as views of the live parameters.
Views = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _bert(model: nn.Module, block: int) -> Views:
    layer = model.encoder.layer[block].attention
    value, dense = layer.self.value, layer.output.dense
    return value.weight.T, dense.weight.T, value.bias, dense.bias


def _gpt2(model: nn.Module, block: int) -> Views:
    attention = model.h[block].attn
    width = attention.c_proj.weight.shape[0]
    joint, bias = attention.c_attn.weight, attention.c_attn.bias
    return joint[:, 2 * width :], attention.c_proj.weight, bias[2 * width :], attention.c_proj.bias


def _llama(model: nn.Module, block: int) -> Views:
    attention = model.layers[block].self_attn
    return attention.v_proj.weight.T, attention.o_proj.weight.T, None, None


def _albert(model: nn.Module, block: int) -> Views:
    layer = model.encoder.albert_layer_groups[0].albert_layers[0].attention
    return layer.value.weight.T, layer.dense.weight.T, layer.value.bias, layer.dense.bias


VIEWS: dict[str, tuple[Callable[[nn.Module, int], Views], int]] = {
    "bert": (_bert, 3),
    "gpt2": (_gpt2, 3),
    "llama": (_llama, 3),
    "gemma3": (_llama, 3),
    "albert": (_albert, 1),
}


def in_another_basis(name: str, model: nn.Module) -> None:
    """W_V,g -> W_V,g M_g and W_h -> M_g^-1 W_h in every block, then b_V -> b_V + delta with b_O making up for it."""
    family = FAMILIES[name]
    view, blocks = VIEWS[name]
    size, shared = family.head_width, family.heads // family.key_value_heads
    with torch.no_grad():
        for block in range(blocks):
            W_V, W_O, b_V, b_O = view(model, block)
            for g in range(family.key_value_heads):
                M = torch.randn(size, size, dtype=torch.float64) + 3 * torch.eye(size, dtype=torch.float64)
                delta = torch.randn(size, dtype=torch.float64)
                cut = slice(g * size, (g + 1) * size)
                W_V[:, cut] = W_V[:, cut] @ M
                for h in range(g * shared, (g + 1) * shared):
                    own = slice(h * size, (h + 1) * size)
                    W_O[own] = torch.linalg.solve(M, W_O[own])
                    if b_O is not None:
                        b_O -= delta @ W_O[own]
                if b_V is not None:
                    b_V[cut] = b_V[cut] @ M + delta


def naive(name: str, model: nn.Module) -> list[float]:
    """What is often reported, and is no property of the function: condition of W_O, norms of the heads' rows."""
    view, blocks = VIEWS[name]
    figures = []
    for block in range(blocks):
        W_O = view(model, block)[1].detach().numpy()
        figures += [np.linalg.cond(W_O), *(np.linalg.norm(W) for W in np.split(W_O, FAMILIES[name].heads))]
    return figures


@pytest.mark.parametrize("name", VIEWS)
def test_the_models_own_gauge_moves_no_figure(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build().double(), inputs_for(family)
    output = uc.identify(model, batches=[batch])
    plain = model(**batch).last_hidden_state.detach()
    before = naive(name, model)
    in_another_basis(name, model)
    torch.testing.assert_close(model(**batch).last_hidden_state.detach(), plain, rtol=1e-4, atol=1e-5)
    moved = uc.identify(model, batches=[batch])
    for one, other in zip(output.heads, moved.heads, strict=True):
        for key in (
            "kernel_dimension",
            "contribution_ambiguity",
            "gauge_dimension",
            "output_projection_rank",
            "verdict",
        ):
            assert getattr(one, key) == getattr(other, key)
        assert one.head_verdict == other.head_verdict
        for key in ("condition_number", "write_space_overlap", "smallest_principal_angle", "head_noise_gain"):
            np.testing.assert_allclose(as_floats(other, key), as_floats(one, key), rtol=1e-9, atol=1e-9)
        for a, b in zip(one.energy_share or [], other.energy_share or [], strict=True):
            assert a is not None
            assert b is not None
            assert (b.mean, b.min, b.max) == pytest.approx((a.mean, a.min, a.max), rel=1e-9)
    changes = np.array([abs(b / a - 1) for a, b in zip(before, naive(name, model), strict=True)])
    assert (changes > 0.05).mean() > 0.9  # the naive ones move


def as_floats(record: HeadsRecord, key: str) -> np.ndarray:
    return np.array(getattr(record, key), dtype=float)  # None becomes NaN, equal to itself here


def test_heads_of_a_diagnosis_do_not_move_either() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build().double(), inputs_for(family)
    before = uc.diagnose(model, batches=[batch]).record.heads
    in_another_basis("gpt2", model)
    for one, other in zip(before, uc.diagnose(model, batches=[batch]).record.heads, strict=True):
        np.testing.assert_allclose(as_floats(other, "head_noise_gain"), as_floats(one, "head_noise_gain"), rtol=1e-9)
        assert one.energy_share is not None
        assert other.energy_share is not None
        shares = [[s.mean for s in r.energy_share if s is not None] for r in (one, other) if r.energy_share]
        np.testing.assert_allclose(shares[1], shares[0], rtol=1e-9)


def test_a_change_that_is_no_gauge_moves_the_figures() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build().double(), inputs_for(family)
    before = uc.identify(model, batches=[batch]).heads[0]
    with torch.no_grad():  # one head's rows in another basis of the *stream*
        model.h[0].attn.c_proj.weight[:8] = model.h[0].attn.c_proj.weight[:8] @ torch.randn(32, 32).double()
    after = uc.identify(model, batches=[batch]).heads[0]
    assert before.condition_number != pytest.approx(after.condition_number, rel=1e-2)
    assert before.energy_share[0].mean != pytest.approx(after.energy_share[0].mean, rel=1e-2)  # type: ignore[index, union-attr]


def test_a_value_bias_is_seen_where_a_sink_takes_weight() -> None:
    """GPT-OSS has value and output biases, but its rows of weights do not sum to one: no bias can move unseen there."""
    family = FAMILIES["gpt_oss"]
    model, batch = family.build(), inputs_for(family)
    attention = model.layers[0].self_attn
    assert attention.v_proj.bias is not None
    assert attention.o_proj.bias is not None
    for record in uc.diagnose(model, batches=[batch]).record.heads:
        assert record.gauge_dimension == family.key_value_heads * family.head_width**2
    plain = model(**batch).last_hidden_state
    with torch.no_grad():
        delta = torch.randn(family.key_value_heads * family.head_width)
        attention.v_proj.bias += delta
        per_head = delta.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten()
        attention.o_proj.bias -= attention.o_proj.weight @ per_head
    assert (model(**batch).last_hidden_state - plain).abs().max() > 0.01


def test_a_gate_before_the_projection_leaves_no_known_gauge() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build(), inputs_for(family)
    attention = model.h[1].attn
    attention.c_proj = PositionGatedProjection(attention.c_proj, 4, position_width=8, perturbation=1.0)
    records = uc.diagnose(model, batches=[batch]).record.heads
    assert [r.gauge_dimension for r in records] == [288, None, 288]
    assert records[1].unavailable == {
        "gauge_dimension": "something acts between the attention and its output projection"
    }
    inner = projections(model, "attn.c_proj")[1].projection
    ((_, read, _),) = hooked(model, [inner], batch)
    shares = reference.energy_shares(read, weight_of(inner), 4)
    got = [s.mean for s in records[1].energy_share or [] if s is not None]
    np.testing.assert_allclose(got, shares.mean(0), rtol=1e-5)


# Heads that went wrong --------------------------------------------------------------------------------------------------


def test_copies_are_not_attributable_and_the_other_heads_are() -> None:
    model = SMALL["gpt2"].build().eval()
    weight = model.h[1].attn.c_proj.weight
    with torch.no_grad():
        weight[8:16] = torch.randn(8, 8) @ weight[:8]  # head 1 writes where head 0 does
    record = uc.diagnose(model, batches=[text_batch()]).record.heads[1]
    assert record.verdict == "not attributable (kernel 8)"
    assert record.contribution_ambiguity == 8
    assert record.head_noise_gain is not None
    assert [gain is None for gain in record.head_noise_gain] == [True, True, False, False]
    assert record.unavailable["head_noise_gain"] == "infinite: other heads can write part of what this head writes"
    assert record.head_verdict is not None
    assert [v.split(" (")[0] for v in record.head_verdict[:2]] == ["not attributable"] * 2
    assert all(v.startswith("attributable") for v in record.head_verdict[2:])
    assert record.smallest_principal_angle is not None
    assert record.smallest_principal_angle[0][1] == pytest.approx(0, abs=1e-6)
    assert record.write_space_overlap is not None
    assert record.write_space_overlap[0][1] == pytest.approx(1, abs=1e-6)


def test_a_silent_head_hides_its_output_but_no_contribution() -> None:
    model = SMALL["gpt2"].build().eval()
    with torch.no_grad():
        model.h[0].attn.c_proj.weight[16:24] = 0
    record = uc.diagnose(model, batches=[text_batch()]).record.heads[0]
    assert (record.kernel_dimension, record.contribution_ambiguity) == (8, 0)
    assert record.head_noise_gain is not None
    assert record.head_noise_gain[2] == 0
    assert None not in record.head_noise_gain
    assert record.smallest_principal_angle is not None
    assert [row[2] for row in record.smallest_principal_angle] == [None] * 4
    assert record.unavailable == {"smallest_principal_angle": "a head writes nothing"}
    assert record.energy_share is not None
    assert record.energy_share[2] is not None
    assert record.energy_share[2].mean == 0


def test_nan_in_an_output_projection_is_said_and_the_other_blocks_are_read() -> None:
    model = SMALL["gpt2"].build().eval()
    with torch.no_grad():
        model.h[1].attn.c_proj.weight[0, 0] = math.nan
    found = uc.diagnose(model, batches=[text_batch()])
    bad = found.record.heads[1]
    assert bad.kernel_dimension is None
    assert bad.unavailable["kernel_dimension"] == "NaN or infinity in the output projection"
    missing = {key for key, value in vars(bad).items() if value is None} - {"stack"}
    assert missing == set(bad.unavailable)
    assert found.record.heads[0].kernel_dimension == 0
    assert [f.code for f in found.findings if f.severity == "critical"] == ["NUMERICS-NOT-FINITE"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_missing_figure_has_its_reason(name: str) -> None:
    family = FAMILIES[name]
    for record in uc.diagnose(family.build(), batches=[inputs_for(family)]).record.heads:
        missing = {key for key, value in vars(record).items() if value is None} - {"stack"}
        assert missing <= set(record.unavailable)


def test_a_projection_that_did_not_run_says_so_in_every_figure() -> None:
    """Of each figure the reason that was noted, or that the projection did not run."""
    model = SMALL["gpt2"].build()
    statistics = capture(model, [text_batch()], proved_anatomy(model, text_batch()), watch={"projections"}).attention[0]
    empty = replace(statistics, matrix=None, figures=None, energy=Running.empty(4), reasons={})
    (record,) = identifiability.heads_records([empty])
    never = "the output projection did not run"
    named = [*identifiability.FROM_WEIGHTS, "gauge_dimension", "energy_share", "tokens", "factorization_ambiguity"]
    assert record.unavailable == dict.fromkeys(named, never)
    assert (record.width, record.tokens, record.energy_share) == (0, None, None)
    assert record.ambiguous_degrees_of_freedom == (record.heads - 1) * record.head_width
    (told,) = identifiability.heads_records([replace(empty, reasons={"matrix": "it is sparse", "energy_share": "why"})])
    assert told.unavailable["verdict"] == "it is sparse"
    assert told.unavailable["tokens"] == "why"
    (read,) = identifiability.heads_records([replace(empty, matrix=statistics.matrix)])
    assert read.verdict is not None
    assert statistics.matrix is not None
    (broken,) = identifiability.heads_records([replace(empty, matrix=statistics.matrix[:, :24] * math.nan)])
    assert (broken.width, broken.kernel_dimension) == (24, None)  # the width of what it writes is known all the same
    assert read.unavailable["energy_share"] == never
    assert read.factorization_ambiguity is None


@pytest.mark.parametrize(
    ("sums", "sinks", "counted"),
    [
        ((1.0, 1.0), False, True),
        ((0.9901, 1.0099), False, True),
        ((0.9899, 1.0), False, False),
        ((1.0, 1.0101), False, False),
        ((math.inf, -math.inf), False, True),  # no row was seen
        ((1.0, 1.0), True, False),
    ],
)
def test_a_value_bias_is_free_where_rows_sum_to_one_within_a_hundredth(
    sums: tuple[float, float], sinks: bool, counted: bool
) -> None:
    model = SMALL["gpt2"].build()
    statistics = capture(model, [text_batch()], proved_anatomy(model, text_batch()), watch={"projections"}).attention[0]
    call = statistics.call
    assert call.value_bias
    (record,) = identifiability.heads_records([replace(statistics, row_sums=sums, sinks=sinks)])
    with_bias = heads.gauge_dimension(call.key_value_heads, call.head_width, value_bias=counted, output_bias=True)
    assert record.gauge_dimension == with_bias
