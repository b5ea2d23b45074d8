"""Attention measures against row-by-row references, closed forms and the laws they must obey."""

import dataclasses
import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import mixing as reference
from uncollapse.errors import InputError
from uncollapse.measures import mixing

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float64: 1e-12}  # everything else accumulates in float32
MEASURES = ("entropy", "normalized_entropy", "entropy_floor", "max_logit", "susceptibility", "allowed_keys")


def close(found, expected, tolerance):
    found = found.double().numpy() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def queries_and_keys(batch=2, heads=4, groups=2, queries=9, keys=9, width=3, dtype=torch.float64, size=1.5):
    q = (size * torch.randn(batch, heads, queries, width, dtype=torch.float64)).to(dtype)
    k = (size * torch.randn(batch, groups, keys, width, dtype=torch.float64)).to(dtype)
    return q, k


def padding(side, tokens=9):
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if side == "left":
        mask[1, : tokens // 3] = False
    if side == "right":
        mask[1, -tokens // 3 :] = False
    return mask


def allowed_pairs(shape, key_mask=None, causal=False, pairs=None):
    allowed = np.ones(shape, dtype=bool)
    for b, h, i, j in np.ndindex(shape):
        allowed[b, h, i, j] = (
            (key_mask is None or bool(key_mask[b, j]))
            and (not causal or j <= i)
            and (pairs is None or bool(pairs[b, h, i, j]))
        )
    return allowed


def test_documented_examples():
    assert doctest.testmod(mixing).failed == 0


# The weights of a softmax ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_of_uniform_one_hot_and_two_point_rows(dtype):
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0.75, 0.25, 0, 0]], dtype=dtype)
    expected = [math.log(4), 0, math.log(2), math.log(4) - 0.75 * math.log(3)]
    assert mixing.entropy(rows).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(mixing.entropy(rows), expected, TOLERANCE.get(dtype, 1e-6))
    close(mixing.normalized_entropy(rows), [h / math.log(4) for h in expected], TOLERANCE.get(dtype, 1e-6))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_queries_are_nan_and_padded_keys_left_out_whatever_they_hold(side):
    mask = padding(side)
    logits = torch.randn(2, 3, 9, 9, dtype=torch.float64).masked_fill(~mask[:, None, None], -math.inf)
    weights = torch.softmax(logits, -1)
    dirty = weights.masked_fill(~(mask[:, None, None, :] & mask[:, None, :, None]), math.nan)
    found = mixing.entropy(dirty, mask)
    for b, h, i in np.ndindex(2, 3, 9):
        expected = reference.row_entropy(weights[b, h, i][mask[b]].tolist()) if mask[b, i] else math.nan
        close(found[b, h, i], expected, 1e-12)
    close(mixing.normalized_entropy(dirty, mask)[1], found[1] / math.log(6), 1e-12)


def test_normalized_entropy_counts_the_keys_that_a_causal_row_may_see():
    mask = padding("left")
    allowed = torch.tril(torch.ones(9, 9, dtype=torch.bool)) & mask[:, None, None]
    uniform = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
    found = mixing.normalized_entropy(uniform.double(), mask, causal=True)[:, 0]
    expected = np.ones((2, 9))
    expected[0, 0] = expected[1, :4] = math.nan  # one key only, or padding
    close(found, expected, 1e-12)


def test_a_row_with_one_key_has_no_normalized_entropy_whatever_its_weights():
    found = mixing.normalized_entropy(torch.full((3, 3), 1 / 3, dtype=torch.float64), causal=True)
    close(found, [math.nan, math.log(3) / math.log(2), 1], 1e-12)


def test_rows_are_scaled_to_sum_to_one():
    weights = torch.rand(5, 7, dtype=torch.float64)
    close(mixing.entropy(0.3 * weights), mixing.entropy(weights).numpy(), 1e-12)
    assert mixing.entropy(torch.zeros(2, 3)).isnan().all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 12), size=st.floats(0, 30), shift=st.floats(-50, 50))
def test_laws_of_rows(seed, tokens, size, shift):
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(1, 2, tokens, 4, dtype=torch.float64, generator=generator)
    k = torch.randn(1, 1, tokens, 4, dtype=torch.float64, generator=generator)
    rows = mixing.row_statistics(q, k, susceptibility=True)
    assert (rows.entropy >= rows.entropy_floor - 1e-9).all()
    assert (rows.entropy <= math.log(tokens) + 1e-9).all()
    assert (mixing.entropy_floor(q, k) <= rows.entropy_floor + 1e-9).all()
    # the order of the keys does not matter, that of the queries comes back
    order = torch.randperm(tokens, generator=generator)
    for moved in (mixing.row_statistics(q, k[:, :, order], susceptibility=True),):
        close(moved.entropy, rows.entropy.numpy(), 1e-9)
        close(moved.susceptibility, rows.susceptibility.numpy(), 1e-8)
        close(moved.entropy_floor, rows.entropy_floor.numpy(), 1e-8)
    close(mixing.fused_entropy(q[:, :, order], k), rows.entropy[:, :, order].numpy(), 1e-9)
    # a logit that every key gets is seen by nobody but the maximum
    shifted = mixing.row_statistics(
        q, k, bias=torch.full((1, 1, 1, 1), shift, dtype=torch.float64), susceptibility=True
    )
    close(shifted.entropy, rows.entropy.numpy(), 1e-9)
    close(shifted.susceptibility, rows.susceptibility.numpy(), 1e-8)
    close(shifted.max_logit, (rows.max_logit + shift).numpy(), 1e-9)
    # larger logits never raise the entropy
    assert (mixing.fused_entropy(1.1 * q, k) <= rows.entropy + 1e-9).all()


# Queries and keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_figure_against_the_row_by_row_reference(dtype, side, causal):
    q, k = queries_and_keys(dtype=dtype)
    mask = padding(side)
    scores = reference.logits(q.double().numpy(), k.double().numpy())
    expected = reference.figures(scores, allowed_pairs(scores.shape, mask, causal), mask)
    tolerance = TOLERANCE.get(dtype, 1e-5)
    rows = mixing.row_statistics(q, k, key_mask=mask, query_mask=mask, causal=causal, susceptibility=True)
    for name in MEASURES:
        close(getattr(rows, name), expected[name], tolerance)
    assert (rows.sink_mass, rows.route) == (None, "logits")
    close(mixing.fused_entropy(q, k, mask=mask, causal=causal), expected["entropy"], tolerance)
    close(mixing.susceptibility(q, k, mask=mask, causal=causal), expected["susceptibility"], tolerance)
    close(mixing.entropy_floor(q, k, mask=mask, causal=causal), expected["norm_floor"], tolerance)
    assert rows.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cross_attention_with_grouped_queries_and_a_scale(groups):
    q, k = queries_and_keys(groups=groups, queries=5, keys=7)
    mask = padding("right", 7)
    scores = reference.logits(q.numpy(), k.numpy(), scale=0.9)
    expected = reference.figures(scores, allowed_pairs(scores.shape, mask))
    close(mixing.fused_entropy(q, k, mask=mask, scale=0.9), expected["entropy"], 1e-12)
    close(mixing.susceptibility(q, k, mask=mask, scale=0.9), expected["susceptibility"], 1e-12)
    close(mixing.entropy_floor(q, k, mask=mask, scale=0.9), expected["norm_floor"], 1e-12)


@pytest.mark.parametrize("heads_apart", [False, True])
@pytest.mark.parametrize("lowest", ["-inf", "finfo.min"])
def test_biases_pair_masks_softcaps_and_sinks(heads_apart, lowest):
    q, k = queries_and_keys(queries=6, keys=8)
    shape = (2, 4, 6, 8)
    pairs = torch.rand(shape if heads_apart else (2, 1, 6, 8)) < 0.8
    pairs[0, :, 2] = False  # a row that may look nowhere
    bias = torch.randn(1, 4, 6, 8)
    forbidden = torch.rand(1, 4 if heads_apart else 1, 6, 8) < 0.2
    bias = bias.masked_fill(forbidden, -math.inf if lowest == "-inf" else torch.finfo(torch.float32).min)
    sink = torch.randn(4)
    mask = padding("right", 8)
    real = padding("right", 6)
    scores = reference.logits(q.numpy(), k.numpy(), softcap=2.0, bias=bias.double().expand(shape).numpy())
    allowed = allowed_pairs(shape, mask, pairs=(pairs & ~forbidden).expand(shape))
    expected = reference.figures(scores, allowed, real, sink.tolist())
    rows = mixing.row_statistics(
        q,
        k,
        allowed=pairs,
        bias=bias,
        key_mask=mask,
        query_mask=real,
        softcap=2.0,
        sink=sink,
        susceptibility=True,
    )
    for name in (*MEASURES, "sink_mass"):
        close(getattr(rows, name), expected[name], 1e-7)  # bias and sink are float32
    assert rows.entropy[0, :, 2].isnan().all()
    weights = mixing.attention_weights(q, k, allowed=pairs, bias=bias, key_mask=mask, softcap=2.0)
    again = reference.figures(scores, allowed)
    close(mixing.entropy(weights), again["entropy"], 1e-7)
    assert (weights[torch.tensor(~allowed)] == 0).all()


def test_a_causal_mask_over_unequal_lengths_means_what_it_means_to_torch():
    q, k = queries_and_keys(queries=4, keys=7)
    allowed = torch.ones(4, 7, dtype=torch.bool).tril()
    found, expected = mixing.row_statistics(q, k, causal=True), mixing.row_statistics(q, k, allowed=allowed)
    for name in MEASURES[:4]:
        close(getattr(found, name), getattr(expected, name).numpy(), 1e-12)
    q, k = queries_and_keys(queries=7, keys=4)
    close(mixing.row_statistics(q, k, causal=True).allowed_keys[0, 0], [1, 2, 3, 4, 4, 4, 4], 0)


def test_what_was_not_asked_for_is_none():
    rows = mixing.row_statistics(*queries_and_keys(), max_logit=False, floor=False)
    assert rows.max_logit is rows.entropy_floor is rows.susceptibility is rows.sink_mass is None


@pytest.mark.parametrize("causal", [False, True])
def test_the_way_the_logits_are_tiled_changes_nothing(monkeypatch, causal):
    q, k = queries_and_keys(batch=3, queries=11, keys=11)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[2, 4:] = False
    bias = torch.randn(3, 4, 11, 11, dtype=torch.float64)

    def all_figures():
        rows = mixing.row_statistics(q, k, bias=bias, key_mask=mask, causal=causal, susceptibility=True)
        weights = mixing.attention_weights(q, k, bias=bias, key_mask=mask, causal=causal)
        given = mixing.row_statistics_from_weights(weights, bias, key_mask=mask, causal=causal, susceptibility=True)
        return [getattr(r, name).numpy() for r in (rows, given) for name in MEASURES] + [weights.numpy()]

    whole = all_figures()
    # several sequences, several groups of one sequence, several rows of one head, one row
    for logits in (2 * 4 * 121, 2 * 121, 50, 1):
        monkeypatch.setattr(mixing, "TILE_BYTES", 8 * logits)
        monkeypatch.setattr(mixing, "CAUSAL_ROWS", 5)
        for found, expected in zip(all_figures(), whole, strict=True):
            close(found, expected, 1e-12)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_does_not_grow_with_the_square_of_the_tokens():
    tokens = 1536
    q, k = queries_and_keys(1, 4, 2, tokens, tokens, 2, torch.float32)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, -5:] = False
    with LargestTensor() as control:
        mixing.attention_weights(q, k)
    assert control.elements >= tokens**2  # the watch sees what it should
    with LargestTensor() as watch:
        for causal in (False, True):
            mixing.row_statistics(q, k, key_mask=mask, causal=causal, susceptibility=True)
            mixing.fused_entropy(q, k, mask=mask, causal=causal)
            mixing.susceptibility(q, k, mask=mask, causal=causal)
            mixing.entropy_floor(q, k, mask=mask, causal=causal)
    assert watch.elements < tokens**2 / 2
    q, k = queries_and_keys(1, 1, 1, 3000, 3000, 2, torch.float32)
    with LargestTensor() as watch:
        mixing.leading_spectrum(q, k, causal=True)
    assert watch.elements < 3000**2 / 2
    many = torch.randn(16384, 1, 16, 2)  # nor with the pairs of many short sequences
    with LargestTensor() as watch:
        mixing.row_statistics(many, many)
    assert watch.elements < 16384 * 16**2 / 2


def test_padding_may_hold_anything():
    q, k = queries_and_keys()
    mask = padding("right")
    clean = mixing.row_statistics(q, k, key_mask=mask, query_mask=mask, susceptibility=True)
    floors = mixing.entropy_floor(q, k, mask=mask)
    q[1, :, 6:], k[1, :, 6:] = math.nan, math.inf
    dirty = mixing.row_statistics(q, k, key_mask=mask, query_mask=mask, susceptibility=True)
    for name in MEASURES:
        close(getattr(dirty, name), getattr(clean, name).numpy(), 0)
    close(mixing.entropy_floor(q, k, mask=mask), floors.numpy(), 1e-12)


def test_a_row_of_weights_that_are_nan_is_nan_whatever_its_logits_say() -> None:
    """A softmax that overflows by itself: of such a row only the largest logit is known."""
    logits = torch.linspace(-1.0, 1.0, 20).expand(1, 1, 2, 20).clone()
    weights = torch.softmax(logits, -1)
    weights[..., 1, :] = math.nan
    found = mixing.row_statistics_from_weights(weights, logits)
    for name in ("entropy", "entropy_floor", "rest_entropy", "keys_within_reach", "key_share"):
        first, second = getattr(found, name)[0, 0]
        assert math.isfinite(first), name
        assert math.isnan(second), name
    assert found.max_logit is not None
    assert bool((found.max_logit == 1.0).all())


def test_gradients_are_not_tracked_and_autocast_does_not_round():
    q, k = queries_and_keys(dtype=torch.float32, size=4)
    expected = mixing.row_statistics(q, k, susceptibility=True)
    q.requires_grad_()
    k.requires_grad_()
    bias = torch.zeros(9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixing.row_statistics(q, k, bias=bias, sink=bias[0, :4], susceptibility=True)
        floor = mixing.entropy_floor(q, k)
        weights = mixing.attention_weights(q, k)
    given = mixing.row_statistics_from_weights(torch.softmax(bias, -1)[None, None], bias[None, None])
    for tensor in (found.entropy, found.sink_mass, floor, weights, given.entropy, given.max_logit):
        assert not tensor.requires_grad
    for name in MEASURES:
        close(getattr(found, name), getattr(expected, name).numpy(), 0)
    close(floor, mixing.entropy_floor(q, k).numpy(), 0)
    close(mixing.entropy(weights), expected.entropy.numpy(), 1e-5)


def test_large_logits_keep_their_entropy():
    """A common part of all keys makes logits of 1,000; the entropy is that of the differences."""
    q, k = queries_and_keys(dtype=torch.float32)
    common = torch.full((1, 1, 1, 3), 256.0)  # exact in float32 together with the rounded keys
    k = (k * 64).round() / 64
    q = (q * 64).round() / 64
    close(mixing.fused_entropy(q, k + common), mixing.fused_entropy(q, k).numpy(), 1e-3)
    hot = torch.tensor([0.0, -80, -100, -1000]).view(1, 1, 4, 1)  # weights that underflow
    close(mixing.fused_entropy(torch.ones(1, 1, 1, 1), hot, scale=1.0), [[[0.0]]], 1e-30)


def test_susceptibility_is_the_entropy_lost_to_a_logarithmic_step_of_the_logits():
    q, k = queries_and_keys()
    step = 1e-5
    for causal in (False, True):
        up, down = (mixing.fused_entropy(math.exp(t) * q, k, causal=causal) for t in (step, -step))
        close((down - up) / (2 * step), mixing.susceptibility(q, k, causal=causal).numpy(), 1e-8)


def test_susceptibility_vanishes_for_uniform_rows_and_for_ties():
    k = torch.tensor([0.0, 0, 0, -200]).view(1, 1, 4, 1)
    q = torch.tensor([0.0, 1, 2]).view(1, 1, 3, 1)
    assert mixing.susceptibility(q, k, scale=1.0).tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize("keys", [2, 3, 50])
def test_the_floor_is_attained_by_one_key_above_all_others_and_reaches_both_ends(keys):
    q = torch.tensor([0.0, 1, 3, 200], dtype=torch.float64).view(1, 1, 4, 1)
    k = torch.zeros(1, 1, keys, 1, dtype=torch.float64)
    k[0, 0, 1] = 1
    floor = mixing.entropy_floor(q, k)[0, 0]
    close(floor, mixing.fused_entropy(q, k)[0, 0].numpy(), 1e-12)
    close(floor[[0, 3]], [math.log(keys), 0], 1e-12)


def test_the_prefix_moments_of_a_long_causal_row(monkeypatch):
    q, k = queries_and_keys(batch=1, heads=2, groups=1, queries=150, keys=150)
    k[0, 0, 0] *= 100  # the massive first key of trained models
    mask = torch.ones(1, 150, dtype=torch.bool)
    mask[0, :3] = False
    k[0, 0, 3] *= 100
    for i in (3, 63, 64, 127, 128, 149):
        s = (q[0, :, i] @ k[0, 0, 3 : i + 1].T) / math.sqrt(3)
        norms = (s - s.mean(-1, keepdim=True)).norm(dim=-1).tolist()
        expected = [reference.least_entropy(norm, i - 2) for norm in norms]
        close(mixing.entropy_floor(q, k, mask=mask, causal=True)[0, :, i], expected, 1e-9)


# A softmax that the model ran itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_weights_and_logits_tell_the_same_as_queries_and_keys(causal):
    q, k = queries_and_keys()
    mask = padding("left")
    kwargs = {"key_mask": mask, "query_mask": mask, "causal": causal}
    expected = mixing.row_statistics(q, k, **kwargs, susceptibility=True)
    logits = torch.tensor(reference.logits(q.numpy(), k.numpy()))
    weights = mixing.attention_weights(q, k, key_mask=mask, causal=causal)
    found = mixing.row_statistics_from_weights(weights, logits, **kwargs, susceptibility=True)
    assert found.route == "weights"
    for name in MEASURES:
        close(getattr(found, name), getattr(expected, name).numpy(), 1e-10)
    # the logits say which pairs are forbidden, -inf or the lowest number
    allowed = torch.tensor(allowed_pairs(logits.shape, mask, causal))
    for lowest in (-math.inf, torch.finfo(torch.float64).min):
        masked = logits.masked_fill(~allowed, lowest)
        found = mixing.row_statistics_from_weights(torch.softmax(masked, -1), masked, query_mask=mask)
        for name in MEASURES[:4]:
            close(getattr(found, name), getattr(expected, name).numpy(), 1e-10)
    # and the caller may say so
    found = mixing.row_statistics_from_weights(weights, allowed=allowed, query_mask=mask, susceptibility=True)
    close(found.susceptibility, expected.susceptibility.numpy(), 1e-10)
    assert found.entropy_floor is found.max_logit is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_leave_mass_to_a_sink(dtype):
    weights = torch.tensor([[[[0.125, 0.375, 0.0], [0.5, 0.0, 0.0]]]], dtype=dtype)
    found = mixing.row_statistics_from_weights(weights, susceptibility=True)
    close(found.entropy, [[[math.log(4) - 0.75 * math.log(3), 0]]], TOLERANCE.get(dtype, 1e-6))
    close(found.susceptibility, [[[3 / 16 * math.log(3) ** 2, 0]]], TOLERANCE.get(dtype, 1e-6))
    close(found.allowed_keys, [[[3, 3]]], 0)


# What the mixture does to a cloud -------------------------------------------------------------------------------------


def random_weights(queries=6, keys=6, mask=None):
    logits = 2 * torch.randn(2, 3, queries, keys, dtype=torch.float64)
    return torch.softmax(logits if mask is None else logits.masked_fill(~mask[:, None, None], -math.inf), -1)


def test_a_row_without_any_weight_has_no_entropy() -> None:
    weights = torch.tensor([[[[0.0, 0.0], [0.5, 0.5]]]])  # a sink took the first row to the last bit
    found = mixing.row_statistics_from_weights(weights, susceptibility=True)
    for figure in (found.entropy, found.normalized_entropy, found.susceptibility):
        assert figure is not None
        assert figure.isnan().flatten().tolist() == [True, False]
    assert float(found.entropy[0, 0, 1]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_matrix_measures_on_the_real_tokens(side):
    mask = padding(side)
    weights = random_weights(9, 9, mask)
    dirty = weights.masked_fill(~(mask[:, None, None, :] & mask[:, None, :, None]), math.nan)
    for b, h in np.ndindex(2, 3):
        real = weights[b, h][mask[b]][:, mask[b]].numpy()
        sigma = np.linalg.svd(real, compute_uv=False)
        close(mixing.contraction(dirty, mask)[b, h], reference.contraction(real), 1e-12)
        close(mixing.spectral_gap(dirty, mask)[b, h], 1 - sigma[1] / sigma[0], 1e-12)
        close(mixing.dobrushin(dirty, mask)[b, h], reference.dobrushin(real), 1e-12)


def test_matrix_measures_of_cross_attention():
    mask = padding("right", 5)
    weights = random_weights(7, 5, mask)
    for b, h in np.ndindex(2, 3):
        real = weights[b, h][:, mask[b]].numpy()
        close(mixing.contraction(weights, mask)[b, h], reference.contraction(real), 1e-12)
        close(mixing.dobrushin(weights, mask)[b, h], reference.dobrushin(real), 1e-12)
        # for rows that sum to one the second centring changes nothing
        centred = real - real.mean(0)
        close(mixing.contraction(weights, mask)[b, h], np.linalg.norm(centred, 2), 1e-12)
    # for others it leaves out what the mean of the cloud does
    short = weights * torch.rand(2, 3, 7, 1, dtype=torch.float64)
    close(mixing.contraction(short)[0, 0], reference.contraction(short[0, 0].numpy()), 1e-12)


def test_matrix_measures_at_their_extremes():
    identity, uniform = torch.eye(5), torch.full((5, 5), 0.2)
    permutation = identity[torch.randperm(5)]
    causal = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
    for measure, at_identity, at_uniform in (
        (mixing.contraction, 1, 0),
        (mixing.spectral_gap, 0, 1),
        (mixing.dobrushin, 1, 0),
    ):
        assert measure(identity).dtype == torch.float64
        close(measure(identity), at_identity, 1e-7)
        close(measure(permutation), at_identity, 1e-7)
        close(measure(uniform), at_uniform, 1e-7)
    assert mixing.contraction(causal) > 1.1  # a causal mean spreads some clouds
    assert mixing.dobrushin(causal) == pytest.approx(39 / 40)


def test_what_cannot_be_said_is_nan():
    one = torch.zeros(2, 5, dtype=torch.bool)
    one[1, 2] = True
    weights = torch.full((2, 5, 5), 0.2)
    close(mixing.contraction(weights, one), [math.nan, 0], 0)
    close(mixing.spectral_gap(weights, one), [math.nan, math.nan], 0)
    close(mixing.dobrushin(weights, one), [math.nan, 0], 0)
    for shape in ((1, 1), (1, 5), (5, 1)):  # of one query, or one key, there is no second singular value
        close(mixing.spectral_gap(torch.full(shape, 1 / shape[1])), math.nan, 0)
    broken = random_weights()
    expected = mixing.contraction(broken)
    broken[0, 1, 2, 3] = math.nan
    expected[0, 1] = math.nan
    close(mixing.contraction(broken), expected.numpy(), 1e-12)
    assert mixing.spectral_gap(broken).isnan().sum() == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 9), size=st.floats(0, 10))
def test_contraction_and_dobrushin_bound_what_they_promise(seed, tokens, size):
    generator = torch.Generator().manual_seed(seed)
    A = torch.softmax(size * torch.randn(tokens, tokens, dtype=torch.float64, generator=generator), -1)
    X = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    spread = [(Y - Y.mean(0)).norm() for Y in (X, A @ X)]
    assert spread[1] <= mixing.contraction(A) * spread[0] + 1e-12
    for p in (1, 2, math.inf):
        diameter = [torch.cdist(Y, Y, p=p).max() for Y in (X, A @ X)]
        assert diameter[1] <= mixing.dobrushin(A) * diameter[0] + 1e-12
    rows, columns = torch.randperm(tokens, generator=generator), torch.randperm(tokens, generator=generator)
    for measure in (mixing.contraction, mixing.spectral_gap, mixing.dobrushin):
        close(measure(A[rows][:, columns]), measure(A).numpy(), 1e-9)
    close(mixing.spectral_gap(3 * A), mixing.spectral_gap(A).numpy(), 1e-12)


# Input that cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda q, k: mixing.entropy(torch.ones(3)),
            r"entropy: expected .*weights\[..., query, key\], got float32\[3\]",
        ),
        (
            lambda q, k: mixing.entropy(torch.ones(3, 3).long()),
            r"entropy: expected floating-point .*, got int64\[3, 3\]",
        ),
        (
            lambda q, k: mixing.contraction(torch.ones(2, 3, 3), torch.ones(2, 3)),
            r"contraction: expected boolean mask.* token = 3 .*got float32\[2, 3\]\. .*mask\.bool\(\)",
        ),
        (
            lambda q, k: mixing.entropy(torch.ones(2, 3, 3), torch.ones(3, 3, dtype=torch.bool)),
            r"entropy: expected boolean mask.*leading axes among the first of \[2\], got bool\[3, 3\]",
        ),
        (
            lambda q, k: mixing.normalized_entropy(torch.ones(2, 3), causal=True),
            "normalized_entropy: expected as many queries as keys .*got 2 queries and 3 keys",
        ),
        (lambda q, k: mixing.fused_entropy(q[0], k), r"fused_entropy: expected .*got q float64\[4, 9, 3\]"),
        (lambda q, k: mixing.susceptibility(q[:, :3], k), r"susceptibility: .*head a multiple of group"),
        (lambda q, k: mixing.entropy_floor(q[..., :2], k), r"entropy_floor: .*got q float64\[2, 4, 9, 2\] and k"),
        (lambda q, k: mixing.entropy_floor(q[:, :, :4], k, causal=True), "entropy_floor: .*got 4 queries and 9 keys"),
        (
            lambda q, k: mixing.fused_entropy(q, k, mask=torch.ones(2, 9)),
            r"fused_entropy: expected boolean key_mask\[batch, token\] = \[2, 9\], got float32\[2, 9\]",
        ),
        (
            lambda q, k: mixing.row_statistics(q, k, allowed=torch.zeros(9, 9)),
            r"row_statistics: expected boolean allowed, broadcastable to .*, got float32\[9, 9\]\. .*bias",
        ),
        (
            lambda q, k: mixing.row_statistics(q, k, bias=torch.zeros(2, 2, 9, 9)),
            r"row_statistics: expected floating-point bias, .*got float32\[2, 2, 9, 9\]",
        ),
        (
            lambda q, k: mixing.row_statistics(q, k, sink=torch.zeros(2)),
            r"row_statistics: expected sink\[head\] with head = 4",
        ),
        (
            lambda q, k: mixing.row_statistics_from_weights(torch.zeros(2, 4, 9, 9), torch.zeros(2, 4, 9, 10)),
            r"row_statistics_from_weights: .*got float32\[2, 4, 9, 9\] and float32\[2, 4, 9, 10\]",
        ),
        (
            lambda q, k: mixing.row_statistics_from_weights(torch.zeros(9, 9)),
            "row_statistics_from_weights: .*no logits",
        ),
    ],
)
def test_unusable_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(*queries_and_keys())


Q_K = {"q": torch.zeros(2, 4, 9, 3), "k": torch.zeros(2, 2, 7, 3)}
WEIGHTS = {"weights": torch.full((2, 4, 9, 7), 1 / 7)}
ONE_WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "q of three axes": ({**Q_K, "q": torch.zeros(4, 9, 3)}, "a multiple of group"),
    "k of three axes": ({**Q_K, "k": torch.zeros(2, 7, 3)}, "a multiple of group"),
    "both of five": ({"q": torch.zeros(1, 2, 4, 9, 3), "k": torch.zeros(1, 2, 2, 7, 3)}, "a multiple of group"),
    "q of integers": ({**Q_K, "q": Q_K["q"].long()}, "a multiple of group"),
    "k of integers": ({**Q_K, "k": Q_K["k"].long()}, "a multiple of group"),
    "other batches": ({**Q_K, "k": torch.zeros(1, 2, 7, 3)}, "a multiple of group"),
    "other widths": ({**Q_K, "k": torch.zeros(2, 2, 7, 1)}, "a multiple of group"),
    "no queries": ({**Q_K, "q": torch.zeros(2, 4, 0, 3)}, "a multiple of group"),
    "no keys": ({**Q_K, "k": torch.zeros(2, 2, 0, 3)}, "a multiple of group"),
    "fewer heads than groups": ({**Q_K, "q": torch.zeros(2, 1, 9, 3)}, "a multiple of group"),
    "a mask of five axes": ({**Q_K, "allowed": torch.ones(1, 1, 1, 9, 7, dtype=torch.bool)}, "boolean allowed"),
    "of other sequences": ({**Q_K, "allowed": torch.ones(3, 1, 1, 1, dtype=torch.bool)}, "boolean allowed"),
    "of groups": ({**Q_K, "allowed": torch.ones(2, 1, 1, dtype=torch.bool)}, "boolean allowed"),
    "of other queries": ({**Q_K, "allowed": torch.ones(8, 1, dtype=torch.bool)}, "boolean allowed"),
    "of other keys": ({**Q_K, "allowed": torch.ones(9, dtype=torch.bool)}, "boolean allowed"),
    "a bias of integers": ({**Q_K, "bias": torch.zeros(9, 7, dtype=torch.long)}, "floating-point bias"),
    "a boolean bias": ({**Q_K, "bias": torch.ones(9, 7, dtype=torch.bool)}, "floating-point bias"),
    "keys marked by numbers": ({**Q_K, "key_mask": torch.ones(2, 7)}, "boolean key_mask"),
    "keys of one sequence": ({**Q_K, "key_mask": torch.ones(7, dtype=torch.bool)}, "boolean key_mask"),
    "queries for keys": ({**Q_K, "key_mask": torch.ones(2, 9, dtype=torch.bool)}, "boolean key_mask"),
    "keys for queries": ({**Q_K, "query_mask": torch.ones(2, 7, dtype=torch.bool)}, "boolean query_mask"),
    "weights of three axes": ({"weights": torch.ones(4, 9, 7)}, "floating-point weights"),
    "weights of five": ({"weights": torch.ones(1, 2, 4, 9, 7)}, "floating-point weights"),
    "weights of integers": ({"weights": torch.ones(2, 4, 9, 7, dtype=torch.long)}, "floating-point weights"),
    "no weights": ({"weights": torch.ones(2, 4, 9, 0)}, "floating-point weights"),
    "other logits": ({**WEIGHTS, "logits": torch.zeros(2, 4, 9, 8)}, "floating-point weights"),
    "logits of integers": ({**WEIGHTS, "logits": torch.zeros(2, 4, 9, 7, dtype=torch.long)}, "floating-point weights"),
    "weights, keys of one sequence": ({**WEIGHTS, "key_mask": torch.ones(7, dtype=torch.bool)}, "boolean key_mask"),
    "weights, keys for queries": ({**WEIGHTS, "query_mask": torch.ones(2, 7, dtype=torch.bool)}, "boolean query_mask"),
}


@pytest.mark.parametrize("case", ONE_WRONG)
def test_each_single_thing_that_does_not_fit_is_refused_by_its_name(case):
    tensors, message = ONE_WRONG[case]
    calls = [mixing.row_statistics_from_weights] if "weights" in tensors else [mixing.row_statistics]
    if not {"logits", "allowed", "bias"} & tensors.keys():
        calls.append(mixing.leading_spectrum_from_weights if "weights" in tensors else mixing.leading_spectrum)
    for call in calls:
        with pytest.raises(InputError, match=f"{call.__name__}: expected .*{message}"):
            call(**tensors)


MATRIX_MEASURES = (mixing.entropy, mixing.contraction, mixing.spectral_gap, mixing.dobrushin)


@pytest.mark.parametrize("measure", MATRIX_MEASURES)
@pytest.mark.parametrize(
    ("weights", "mask"),
    [
        (torch.ones(3), None),
        (torch.ones(3, 4, dtype=torch.long), None),
        (torch.ones(2, 0, 4), None),
        (torch.ones(2, 4, 0), None),
        (torch.ones(2, 3, 4), torch.ones(2, 4)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)),
        (torch.ones(2, 3, 4), torch.ones(3, 4, dtype=torch.bool)),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)),
    ],
    ids=str,
)
def test_matrix_measures_refuse_each_single_thing_that_does_not_fit(measure, weights, mask):
    with pytest.raises(InputError, match=rf"{measure.__name__}: expected (floating-point weights|boolean mask)\["):
        measure(weights, mask)


@pytest.mark.parametrize("measure", MATRIX_MEASURES)
def test_a_mask_stands_for_the_first_axes_of_the_weights_or_for_all(measure):
    """One mask for every matrix, one a sequence, one a head."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 5, 5, generator=generator, dtype=torch.float64).softmax(-1)
    mask = torch.rand(2, 3, 5, generator=generator) > 0.3
    for one in (mask, mask[:, 0], mask[0, 0]):
        found = measure(weights, one)
        for b, h in itertools.product(range(2), range(3)):
            own = one[(b, h)[: one.ndim - 1]]
            np.testing.assert_allclose(found[b, h], measure(weights[b, h], own), rtol=1e-12)


# What findings read: the row without its strongest key, and the share of the keys ------------------------------------------


def rest_and_share(logits: np.ndarray) -> tuple[float, float]:
    """One row's figures from its allowed logits, in the order of the definitions."""

    def entropy(values: np.ndarray) -> float:
        weights = np.exp(values - values.max())
        weights /= weights.sum()
        return -float(sum(a * math.log(a) for a in weights if a > 0))

    T = len(logits)
    if T < mixing.FEW_KEYS:
        return math.nan, math.nan
    rest = entropy(np.delete(logits, logits.argmax())) / math.log(T - 1)
    share = (math.exp(entropy(logits)) - 1) / (T - 1)
    return rest if T >= mixing.FEW_RIVALS else math.nan, share


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 25.0])
@pytest.mark.parametrize("route", ["logits", "weights"])
def test_rest_entropy_and_key_share_are_those_of_numpy(scale: float, route: str) -> None:
    generator = torch.Generator().manual_seed(int(scale * 10))
    q, k = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(2))
    q = q * scale
    logits = q.double() @ k.double().mT / 4
    if route == "logits":
        rows = mixing.row_statistics(q, k, causal=True)
    else:
        masked = logits.float().masked_fill(torch.ones(40, 40).triu(1).bool(), torch.finfo(torch.float32).min)
        rows = mixing.row_statistics_from_weights(masked.softmax(-1), masked)
    for index in itertools.product(range(2), range(3), range(40)):
        rest, share = rest_and_share(logits[index][: index[2] + 1].numpy())
        # From weights the smallest are lost where single precision ends; the logits keep more digits.
        assert rows.rest_entropy[index].item() == pytest.approx(rest, abs=2e-4, nan_ok=True)
        assert rows.key_share[index].item() == pytest.approx(share, abs=2e-5, nan_ok=True)


@pytest.mark.parametrize("scale", [1.0, 25.0, 200.0])
@pytest.mark.parametrize("route", ["logits", "weights"])
def test_keys_within_reach_are_counted_from_the_strongest_of_the_others(scale: float, route: str) -> None:
    q, k = (torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    logits = (q * scale).double() @ k.double().mT / 4
    if route == "logits":
        rows = mixing.row_statistics(q * scale, k, causal=True)
    else:
        masked = logits.float().masked_fill(torch.ones(24, 24).triu(1).bool(), torch.finfo(torch.float32).min)
        rows = mixing.row_statistics_from_weights(masked.softmax(-1), masked)
    for head, query in itertools.product(range(2), range(24)):
        others = sorted(logits[0, head, query, : query + 1].tolist())[:-1]
        expected = sum(o > others[-1] - mixing.UNDERFLOW for o in others) / len(others) if query >= 15 else math.nan
        assert rows.keys_within_reach[0, head, query].item() == pytest.approx(expected, nan_ok=True)


def test_a_key_out_of_reach_counts_where_the_strongest_has_rivals() -> None:
    k = torch.tensor([0.0, -1.0, -2.0, *[-50.0] * 15, -100.0, -300.0])
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1), k.view(1, 1, -1, 1), scale=1.0)
    assert rows.keys_within_reach.item() == pytest.approx(17 / 19)
    others = torch.softmax(k[1:].double(), -1)
    assert rows.rest_entropy.item() == pytest.approx(float(torch.special.entr(others).sum()) / math.log(19), abs=1e-6)


def test_weights_that_underflowed_do_not_say_what_is_within_reach() -> None:
    """The logits do: the others are spread, however far they are below the strongest."""
    logits = torch.cat([torch.tensor([200.0]), torch.linspace(0, 1, 20)]).view(1, 1, 1, 21)
    weights = logits.softmax(-1)
    assert weights[..., 1:].sum() == 0
    assert mixing.row_statistics_from_weights(weights).keys_within_reach.isnan().all()
    known = mixing.row_statistics_from_weights(weights, logits)
    assert known.keys_within_reach.item() == 1
    assert known.rest_entropy.item() == pytest.approx(0.97, abs=0.03)


def test_no_floor_is_above_the_entropy_of_weights_that_lost_their_digits_before_they_were_scaled_up_again() -> None:
    """A mask behind the softmax, renormalised: what it leaves may have been the last bit beside the forbidden key, or nothing."""
    logits = torch.tensor([0.0, -103.9, -104.05]).view(1, 1, 1, 3)
    left = logits.softmax(-1) * torch.tensor([0.0, 1.0, 1.0])
    weights = left / left.sum(-1, keepdim=True)
    assert weights.flatten().tolist() == [0, 1, 0]
    rows = mixing.row_statistics_from_weights(
        weights, logits, allowed=torch.tensor([False, True, True]).view(1, 1, 1, 3)
    )
    assert rows.entropy.item() == 0
    assert rows.entropy_floor.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.1, 3.0, 30.0, 60.0])
def test_a_floor_that_is_attained_is_no_rounding_above_the_entropy(gap: float, dtype: torch.dtype) -> None:
    """One key apart from others that are equal: in exact numbers both are one."""
    k = torch.zeros(1, 1, 2000, 1, dtype=dtype)
    k[0, 0, 0] = gap
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1, dtype=dtype), k, scale=1.0)
    assert rows.entropy_floor.item() <= rows.entropy.item()
    expected = math.log1p(1999 * math.exp(-gap)) + gap * 1999 * math.exp(-gap) / (1 + 1999 * math.exp(-gap))
    assert rows.entropy_floor.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_a_sink_takes_the_entropy_and_leaves_the_rest() -> None:
    """Any strength that single precision can still look behind."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 30, 8)
    plain = mixing.row_statistics(q, k[..., 1:, :])
    for strength in (0.0, 20.0, 60.0):
        bias = torch.zeros(1, 1, 1, 30)
        bias[..., 0] = 30 + strength
        rows = mixing.row_statistics(q, k, bias=bias)
        assert rows.entropy.item() < 1e-6
        expected = plain.entropy.item() / math.log(29)
        assert rows.rest_entropy.item() == pytest.approx(expected, abs=1e-4)


def test_nothing_left_beside_the_strongest_is_a_rest_of_zero_and_nan_stays_nan() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.linspace(0, 3000, 20).view(1, 1, 20, 1)
    assert mixing.row_statistics(q, k, scale=1.0).rest_entropy.item() == 0
    k[..., 3, 0] = math.nan
    assert mixing.row_statistics(q, k, scale=1.0).rest_entropy.isnan().all()


@pytest.mark.parametrize("n", [8, 64, 512])
def test_the_share_of_keys_that_random_logits_use_does_not_depend_on_their_number(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weights = (torch.randn(1, 1, 20_000 // n, n, generator=generator) * 0.4).softmax(-1)
    share = mixing.row_statistics_from_weights(weights).key_share.mean().item()
    assert share == pytest.approx(1 - 0.16 / 2, abs=0.008)


def test_padded_keys_change_neither_the_rest_nor_the_share() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (3 * torch.randn(2, 2, 24, 8, generator=generator) for _ in range(2))
    wide_q, wide_k = (torch.cat([t, 50 * torch.ones(2, 2, 5, 8)], 2) for t in (q, k))
    real = (torch.arange(29) < 24).expand(2, 29)
    plain = mixing.row_statistics(q, k)
    padded = mixing.row_statistics(wide_q, wide_k, key_mask=real, query_mask=real)
    for name in ("rest_entropy", "key_share"):
        torch.testing.assert_close(getattr(padded, name)[..., :24], getattr(plain, name))
        assert getattr(padded, name)[..., 24:].isnan().all()


def test_what_was_found_cannot_be_changed() -> None:
    own = [each for each in vars(mixing).values() if getattr(each, "__module__", "") == mixing.__name__]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert kept
    assert all(each.__dataclass_params__.frozen for each in kept)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_half_of_the_lowest_number_is_where_forbidden_begins(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    given = torch.tensor([0.0, 0.0, 0.45 * lowest, 0.5 * lowest, 0.55 * lowest], dtype=dtype).view(1, 1, 1, 5)
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    assert mixing.row_statistics(q, torch.zeros(1, 1, 5, 1, dtype=dtype), bias=given).allowed_keys.item() == 3
    weights = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0], dtype=dtype).view(1, 1, 1, 5)
    assert mixing.row_statistics_from_weights(weights, given).allowed_keys.item() == 3


@pytest.mark.parametrize("keys", [2, 3, 4, 15, 16])
@pytest.mark.parametrize("route", ["logits", "weights"])
def test_from_how_many_keys_on_a_row_has_a_share_and_a_rest(keys: int, route: str) -> None:
    """The share from 4 keys on, the rest and the reach from 16."""
    k = torch.linspace(0, 1, keys).view(1, 1, keys, 1)
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1), k, scale=1.0)
    if route == "weights":
        rows = mixing.row_statistics_from_weights(k.mT.softmax(-1))
    assert rows.key_share.isnan().item() == (keys < 4)
    assert rows.rest_entropy.isnan().item() == rows.keys_within_reach.isnan().item() == (keys < 16)


def test_single_precision_reaches_88_below_the_strongest_of_the_others() -> None:
    k = torch.tensor([50.0, *[0.0] * 14, -87.9, -88.1]).view(1, 1, 17, 1)
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1), k, scale=1.0)
    assert rows.keys_within_reach.item() == pytest.approx(15 / 16)
    plain = torch.tensor([0.0, *[0.0] * 14, -87.9, -88.1]).view(1, 1, 17, 1)
    assert mixing.row_statistics(torch.ones(1, 1, 1, 1), plain, scale=1.0).keys_within_reach.item() == pytest.approx(
        15 / 16
    )


@pytest.mark.parametrize("left", [0.5, 0.2, 1e-2, 1e-4, 2e-6, 5e-7, 1e-9])
def test_the_rest_keeps_its_digits_however_little_is_left_to_it(left: float) -> None:
    """The others have weights like 1 to 19 among them, and together this share of the row."""
    others = np.arange(1, 20) / np.arange(1, 20).sum()
    expected = -float((others * np.log(others)).sum()) / math.log(19)
    logits = torch.tensor([math.log(1 - left), *np.log(others * left)]).float().view(1, 1, 20, 1)
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1), logits, scale=1.0)
    assert rows.rest_entropy.item() == pytest.approx(expected, rel=2e-5)
    rows = mixing.row_statistics_from_weights(logits.mT.softmax(-1))
    assert rows.rest_entropy.item() == pytest.approx(expected, rel=2e-5)


def test_no_entropy_and_no_variance_is_below_zero() -> None:
    q, k = (torch.randn(2, 2, 64, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for size in (0.0, 1e-4, 1.0, 30.0, 300.0):
        rows = mixing.row_statistics(size * q, k, causal=True, susceptibility=True)
        for figure in (
            rows.entropy,
            rows.entropy_floor,
            rows.susceptibility,
            mixing.entropy_floor(size * q, k, causal=True),
        ):
            assert figure is not None
            assert bool((figure >= 0).all())
        assert bool((mixing.entropy(mixing.attention_weights(size * q, k, causal=True)) >= 0).all())


def test_the_length_of_dispersion_is_finite_for_every_range_and_weight() -> None:
    assert mixing.dispersion_length(0.0) == 2
    assert mixing.dispersion_length(5.0, weight=1.0) == 1
    assert mixing.dispersion_length(690.0) == pytest.approx(1 + math.exp(690))
    assert mixing.dispersion_length(699.9) < mixing.dispersion_length(700.0) == mixing.dispersion_length(1e6)
    assert math.isfinite(mixing.dispersion_length(1e6))
    for logit_range, weight in ((-1e-9, 0.5), (math.inf, 0.5), (1.0, 0.0), (1.0, 1.0000001), (math.nan, 0.5)):
        with pytest.raises(InputError, match="dispersion_length"):
            mixing.dispersion_length(logit_range, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e20, 1e36, 1e38])
@pytest.mark.parametrize("causal", [False, True])
def test_one_key_far_below_all_others_leaves_their_figures(dtype: torch.dtype, size: float, causal: bool) -> None:
    """As if it were forbidden; what is counted among all keys aside. Logits of nothing but ordinary numbers say what is right."""
    q, k = torch.randn(1, 2, 24, 8, dtype=dtype), torch.randn(1, 2, 24, 8, dtype=dtype)
    q[..., 7], k[..., 7] = 1, 0
    seen = torch.ones(24, dtype=torch.bool)
    seen[3] = False
    options = {"causal": causal, "scale": 1.0, "susceptibility": True}
    expected = mixing.row_statistics(q, k, allowed=seen.view(1, 1, 1, -1), **options)
    k[:, :, 3, 7] = -size
    found = mixing.row_statistics(q, k, **options)
    for name in ("entropy", "max_logit", "susceptibility"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name).double(), rtol=1e-5, atol=1e-5
        )
    assert (found.entropy_floor <= found.entropy + 1e-6).all()
    assert not found.rest_entropy[..., 16:].isnan().any()
    weights = mixing.attention_weights(q, k, causal=causal, scale=1.0)
    assert (weights[..., 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e3, 1e17, 1e18, 1e19, 1e30])
def test_the_floor_stays_below_the_entropy_where_squares_of_logits_leave_the_range(
    dtype: torch.dtype, size: float
) -> None:
    """Three keys alike, and 21 far below: both are log 3."""
    bias = torch.full((1, 1, 1, 24), -size, dtype=dtype)
    bias[..., :3] = 0
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 24, 1, dtype=dtype), bias=bias)
    assert rows.entropy.item() == pytest.approx(math.log(3), rel=1e-6)
    assert rows.entropy_floor.item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize(("exponent", "expected"), [(239, 0), (240, 2), (250, 22)])
def test_logits_are_divided_by_what_brings_them_to_480_binary_digits(exponent: int, expected: int) -> None:
    """|q| |k| d |scale| below 2^480 stays; beyond it the power of two by which it is exceeded is taken away."""
    q = torch.full((1, 1, 2, 4), 2.0**exponent, dtype=torch.float64)
    k = torch.full((1, 1, 3, 4), -(2.0**exponent), dtype=torch.float64)
    k[0, 0, 2] = 2.0 ** (exponent + 7)  # masked
    mask = torch.tensor([[True, True, False]])
    assert mixing._shrinking(q, k, 1.0, mask, None) == expected
    assert mixing._shrinking(q, k, 0.25, mask, None) == max(0, 2 * exponent - 480)
    assert mixing._shrinking(q, k, -1.0, mask, None) == expected
    assert mixing._shrinking(q, k, 1.0, None, None) == max(0, 2 * exponent + 7 + 2 - 480)
    assert mixing._shrinking(q, k, 1.0, mask, 30.0) == 0  # a soft cap bounds them
    assert mixing._shrinking(q * 0, k, 1.0, mask, None) == 0
    # A side or a scale of nothing but zeros leaves the size to the others.
    far = q * 2.0**300
    assert mixing._shrinking(far, k * 0, 1.0, mask, None) == mixing._shrinking(far, far * 0, 1.0, None, None)
    assert mixing._shrinking(far, k * 0, 1.0, mask, None) == max(0, exponent + 300 + 2 - 480)
    assert mixing._shrinking(far, k, 0.0, mask, None) == max(0, 2 * exponent + 300 + 2 - 480)


@pytest.mark.parametrize(
    ("numbers", "causal", "rows", "groups", "batches"),
    [
        # Of 3 sequences, 2 groups of 2 heads, 6 queries and 5 keys: a row of all heads of a group has 10 numbers.
        (10, False, 1, 1, 1),
        (29, False, 2, 1, 1),
        (30, False, 3, 1, 1),
        (60, False, 6, 1, 1),
        (119, False, 6, 1, 1),
        (120, False, 6, 2, 1),
        (239, False, 6, 2, 1),
        (240, False, 6, 2, 2),
        (10**9, False, 6, 2, 3),
        (1, False, 1, 1, 1),
    ],
)
def test_a_tile_is_as_large_as_the_budget_allows(
    numbers: int, causal: bool, rows: int, groups: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys of a row; then rows, then groups, then sequences, as many as fit."""
    monkeypatch.setattr(mixing, "TILE_BYTES", 4 * numbers)
    monkeypatch.setattr(mixing, "LEAST_ROWS", 1)  # else a tile may be larger
    q, k = torch.randn(3, 4, 6, 8), torch.randn(3, 2, 5, 8)
    scores = mixing._scores("test", q, k, None, None, None, None, causal, None, None)
    seen = [(tile, S.shape) for tile, S, *_ in mixing._tiles(scores)]
    assert max(shape[0] for _, shape in seen) == batches
    assert max(shape[1] for _, shape in seen) == groups
    assert {shape[2] for _, shape in seen} == {2}
    assert max(shape[3] for _, shape in seen) == rows
    covered = torch.zeros(3, 2, 2, 6, 5)
    for tile, _ in seen:
        covered[tile] += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_at_the_end_of_all_sequences_of_a_tile_is_not_computed(shared: bool, causal: bool) -> None:
    lengths = torch.tensor([40, 17, 3, 21])
    q, k = queries_and_keys(4, 2, 2, 40, 40, dtype=torch.float32)
    real = torch.arange(40) < lengths[:, None]
    pairs = real[:, None, None].expand(4, 1, 40, 40)
    pairs = pairs if shared else pairs.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixing, "TILE_BYTES", 4 * 2 * 40 * 40)  # one sequence
        patched.setattr(mixing, "LEAST_ROWS", 1)
        patched.setattr(mixing, "LANES", 8)
        scores = mixing._scores("test", q, k, pairs, None, None, real, causal, None, None)
        ends = [(tile[3].stop, tile[4].stop) for tile, *_ in mixing._tiles(scores)]
        assert ends == [(40, 40), (17, 17 if causal else 24), (3, 3 if causal else 8), (21, 21 if causal else 24)]
        found = mixing.row_statistics(q, k, allowed=pairs, query_mask=real, causal=causal)
    for i, n in enumerate(lengths.tolist()):
        alone = mixing.row_statistics(q[i : i + 1, :, :n], k[i : i + 1, :, :n], causal=causal)
        for name in ("entropy", "entropy_floor", "max_logit", "key_share", "rest_entropy", "keys_within_reach"):
            together = getattr(found, name)[i]
            np.testing.assert_allclose(together[:, :n], getattr(alone, name)[0], rtol=1e-5, atol=1e-6)
            assert bool(together[:, n:].isnan().all())


def test_what_somebody_may_look_at_is_in_a_tile_wherever_it_stands() -> None:
    q, k = queries_and_keys(2, 2, 2, 20, 20)
    pairs = torch.zeros(2, 2, 20, 20, dtype=torch.bool)
    pairs[..., 0] = pairs[1, 1, 4, 19] = True  # the last key, to one row of one head
    scores = mixing._scores("test", q, k, pairs, None, None, None, False, None, None)
    assert scores.ends == ([20, 20], [1, 20])
    allowed = pairs.numpy()
    logits = np.where(allowed, (q @ k.mT).numpy() * 3**-0.5, -np.inf)
    close(mixing.row_statistics(q, k, allowed=pairs).max_logit, logits.max(-1), 1e-12)


def test_a_causal_tile_ends_at_its_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "CAUSAL_ROWS", 4)
    q, k = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    scores = mixing._scores("test", q, k, None, None, None, None, True, None, None)
    assert [(tile[3], tile[4]) for tile, *_ in mixing._tiles(scores)] == [
        (slice(0, 4), slice(0, 4)),
        (slice(4, 6), slice(0, 6)),
    ]
    for tile, S, _, keep in mixing._tiles(scores):
        assert keep is not None
        allowed = torch.arange(tile[4].stop) <= torch.arange(tile[3].start, tile[3].stop)[:, None]
        found = torch.ones(S.shape)
        found[..., keep.start :] = keep.kept
        assert torch.equal(found[0, 0, 0].bool(), allowed)
        assert keep.counts.expand(S.shape[:-1])[0, 0, 0].tolist() == allowed.sum(-1).tolist()


# Ranges, formats and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_q", "size_k", "scale", "precise"),
    [
        (1.0, 1.0, 1.0, False),
        (2.0**39, 1.0, 1.0, False),
        (2.0**40, 1.0, 1.0, True),
        (1.0, 2.0**39, 1.0, False),
        (1.0, 2.0**40, 1.0, True),
        (1.0, 2.0**-40, 1.0, True),
        (1.0, 1.0, 999_999.0, False),
        (1.0, 1.0, 1_000_000.0, True),
        (1.0, 1.0, -1_000_000.0, True),
    ],
)
def test_logits_out_of_the_ordinary_are_computed_in_double_precision(size_q, size_k, scale, precise):
    """Either from 2^40 or 2^-40 on, or a scale of a million. The format of the figures tells."""
    q, k = torch.full((1, 1, 2, 4), size_q), torch.full((1, 1, 3, 4), size_k)
    for rows in (mixing.row_statistics(q, k, scale=scale), mixing.row_statistics(q, -k, scale=scale)):
        assert rows.entropy.dtype == (torch.float64 if precise else torch.float32)
        assert rows.entropy.tolist() == [[[pytest.approx(math.log(3), rel=1e-6)] * 2]]
        assert abs(rows.max_logit[0, 0, 0].item()) == pytest.approx(4 * size_q * size_k * abs(scale), rel=1e-6)


def test_figures_of_divided_logits_are_those_of_the_logits():
    """One row of logits around 2^500, whose squares leave the range, and one of 2^-20 (1, 2, 3): all but uniform, any digits."""
    q = torch.tensor([2.0**250, 2.0**-270], dtype=torch.float64).view(1, 1, 2, 1)
    k = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1) * 2.0**250
    assert mixing._shrinking(q, k, 1.0, None, None) > 20
    rows = mixing.row_statistics(q, k, scale=1.0, susceptibility=True)
    assert rows.max_logit.flatten().tolist() == [3 * 2.0**500, 3 * 2.0**-20]
    assert rows.entropy.flatten().tolist() == pytest.approx([0, math.log(3)], abs=1e-6)
    assert rows.susceptibility[0, 0].tolist() == [0, pytest.approx(2 / 3 * 2.0**-40, rel=1e-4)]
    weights = mixing.attention_weights(q, k, scale=1.0)
    assert weights[0, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("exponents", [(-500, 300, 0, 7), (-1040, 1000, 3, -3)], ids=str)
def test_rows_of_any_size_have_the_entropy_of_their_shares(exponents):
    """Each row has a size of its own; so have the matrices of a batch, of which contraction is the one figure that has a unit."""
    shares = torch.rand(3, 4, 5, dtype=torch.float64)
    sizes = torch.tensor([2.0**e for e in exponents], dtype=torch.float64)
    expected = mixing.entropy(shares)
    close(mixing.entropy(shares * sizes[:, None]), expected, 1e-6 if min(exponents) < -1000 else 1e-12)
    plain = mixing.contraction(shares)
    for exponent in (-900, -3, 5, 900):
        close(mixing.contraction(shares * 2.0**exponent) / 2.0**exponent, plain, 1e-12)
        close(mixing.spectral_gap(shares * 2.0**exponent), mixing.spectral_gap(shares), 1e-12)
    factors = torch.tensor([2.0**-600, 1.0, 2.0**600], dtype=torch.float64)
    close(mixing.contraction(shares * factors[:, None, None]) / factors, plain, 1e-12)


def sizes_of_tiles(q, k, causal=False):
    """How many rows of how many keys the tiles of a call have."""
    scores = mixing._scores("test", q, k, None, None, None, None, causal, None, None)
    return [tuple(S.shape[3:]) for _, S, *_ in mixing._tiles(scores)]


def test_a_tile_has_two_mebibytes_and_of_long_rows_64_up_to_eight():
    """Numbers of single precision, one head: 4 bytes each."""

    def rows(queries, keys):
        return [r for r, _ in sizes_of_tiles(torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1))]

    assert rows(513, 1 << 10) == [512, 1]  # 2 MiB
    assert rows(131, 1 << 14) == [64, 64, 3]  # 4 MiB: 64 rows
    assert rows(40, 1 << 16) == [32, 8]  # 8 MiB are fewer
    assert sizes_of_tiles(torch.zeros(1, 1, 300, 1), torch.zeros(1, 1, 300, 1), causal=True) == [
        (128, 128),
        (128, 256),
        (44, 300),
    ]
    # Heads that share keys share a tile; they and their rows come off the same budget.
    shared = sizes_of_tiles(torch.zeros(1, 4, 600, 1), torch.zeros(1, 1, 1 << 9, 1))
    assert shared == [(256, 512), (256, 512), (88, 512)]


def test_an_accelerators_tile_has_64_mebibytes():
    """On a device without memory, where a tile is only its shape."""

    def nothing(tile, S):
        return None

    scores = mixing._Scores(
        (1, 1, 1, 4097, 1 << 12), torch.float32, torch.device("meta"), nothing, None, None, causal=False
    )
    assert [tuple(S.shape[3:]) for _, S, *_ in mixing._tiles(scores)] == [(4096, 1 << 12), (1, 1 << 12)]


@pytest.mark.parametrize("keys", [15, 16, 17])
def test_a_row_of_sixteen_keys_has_a_rest_however_sharp_it_is(keys):
    """Others of weights 1, 2, ... among them, 60 below the strongest: nothing of them is left in single precision."""
    others = np.arange(1, keys) / np.arange(1, keys).sum()
    logits = torch.tensor([60.0, *np.log(others)]).float().view(1, 1, keys, 1)
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1), logits, scale=1.0)
    entropy = -float((others * np.log(others)).sum()) / math.log(keys - 1)
    assert rows.rest_entropy.item() == pytest.approx(entropy if keys >= 16 else math.nan, rel=1e-5, nan_ok=True)
    assert rows.keys_within_reach.item() == pytest.approx(1.0 if keys >= 16 else math.nan, nan_ok=True)


def test_a_causal_call_forbids_beside_other_pairs_too():
    """Rows over several tiles whose pairs are given, soft and sharp: against one row at a time."""
    tokens = 40
    q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
    allowed = torch.rand(2, 1, tokens, tokens) < 0.8
    allowed |= torch.eye(tokens, dtype=torch.bool)
    for size in (1.0, 40.0):
        whole = mixing.row_statistics(size * q, k, allowed=allowed, causal=True, susceptibility=True)
        for i in (0, 3, 17, 39):
            seen = allowed[:, :, i : i + 1, : i + 1]
            row = mixing.row_statistics(size * q[:, :, i : i + 1], k[:, :, : i + 1], allowed=seen, susceptibility=True)
            for name in ("entropy", "rest_entropy", "keys_within_reach", "key_share", "max_logit", "susceptibility"):
                torch.testing.assert_close(
                    getattr(whole, name)[:, :, i], getattr(row, name)[:, :, 0], rtol=1e-4, atol=1e-5, equal_nan=True
                )


@pytest.mark.parametrize("numbers", [1, 24, 47, 48, 80, 95, 96, 200, 383, 384, 575, 576, 1151, 1152, 10**6])
@pytest.mark.parametrize("queries", [24, 17])
def test_a_causal_tile_has_as_many_rows_as_fit(numbers, queries, monkeypatch):
    """Of 3 sequences, 2 groups of 2 heads and 24 keys: up to 8 rows, counted with the keys that the last of 8 would see. Then as
    many groups as have room at the largest tile, then sequences."""
    monkeypatch.setattr(mixing, "TILE_BYTES", 4 * numbers)
    monkeypatch.setattr(mixing, "LEAST_ROWS", 1)
    monkeypatch.setattr(mixing, "CAUSAL_ROWS", 8)
    row = 2 * 24
    budget = max(numbers, min(row, 4 * numbers))  # one row may be larger, up to four times
    q, k = torch.randn(3, 4, queries, 8), torch.randn(3, 2, 24, 8)
    scores = mixing._scores("test", q, k, None, None, None, None, True, None, None)
    seen = [(tile, tuple(S.shape)) for tile, S, *_ in mixing._tiles(scores)]
    starts = sorted({tile[3].start for tile, _ in seen})
    start, expected = 0, []
    while start < queries:
        expected.append(start)
        start += min(8, max(1, budget // (2 * min(start + 8, 24))))
    assert starts == expected
    assert {tile[4].stop - tile[3].stop for tile, _ in seen} == {0}  # keys end with the last row
    largest = max(shape[2] * shape[3] * shape[4] for _, shape in seen)
    groups = min(2, max(1, budget // largest))
    assert max(shape[1] for _, shape in seen) == groups
    assert max(shape[0] for _, shape in seen) == min(3, max(1, budget // (largest * 2)))
    covered = torch.zeros(3, 2, 2, queries, 24)
    for tile, _ in seen:
        covered[tile] += 1
    for i in range(queries):
        (end,) = {tile[3].stop for tile, _ in seen if tile[3].start <= i < tile[3].stop}
        assert bool((covered[..., i, :end] == 1).all())
        assert not covered[..., i, end:].any()


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """Neither the floors nor the variance, each of which reads all logits once more."""
    asked, whole = [], mixing._measure
    monkeypatch.setattr(mixing, "_measure", lambda scores, *what: (asked.append(what), whole(scores, *what))[1])
    q, k = queries_and_keys()
    weights = mixing.attention_weights(q, k)
    mixing.fused_entropy(q, k)
    mixing.susceptibility(q, k)
    mixing.row_statistics(q, k)
    mixing.row_statistics(q, k, floor=False, susceptibility=True)
    mixing.row_statistics_from_weights(weights)
    mixing.row_statistics_from_weights(weights, weights.log(), susceptibility=True)
    mixing.row_statistics_from_weights(weights, weights.log(), floor=False)
    floor, variance = (True, False), (False, True)
    assert asked == [(False, False), variance, floor, variance, (False, False), variance, floor, *[(False, False)] * 2]


def test_only_rows_out_of_the_ordinary_are_looked_at_by_themselves(monkeypatch):
    """With a key more than 88 below the strongest, or where others have a millionth of the row or less; from 16 keys on."""
    asked, whole = [], mixing._beside_strongest
    monkeypatch.setattr(mixing, "_beside_strongest", lambda S, f: (asked.append(len(S)), whole(S, f))[1])
    logits = torch.randn(5, 24)
    logits[:, 0] = 0
    one = torch.ones(1, 1, 1, 1)

    def rows(changed):
        asked.clear()
        mixing.row_statistics(one.expand(5, 1, 1, 1), changed.view(5, 1, -1, 1), scale=1.0)
        return sum(asked)

    assert rows(logits) == 0
    largest = logits.amax(-1)
    for below, count in ((87.5, 0), (88.5, 2)):
        changed = logits.clone()
        changed[[1, 3], 0] = largest[[1, 3]] - below
        assert rows(changed) == count
        assert rows(changed[:, :15]) == 0
    for share, count in ((1.5e-6, 0), (0.7e-6, 2)):
        changed = torch.zeros(5, 24)
        changed[[0, 2], 0] = math.log(23 / share)
        assert rows(changed) == count


def test_no_rest_entropy_is_below_zero():
    """Two keys far above all others: one of them is all that is left, up to rounding."""
    logits = torch.full((200, 24), -85.0)
    logits[:, :2] = 0.01 * torch.randn(200, 2)
    rest = mixing.row_statistics(torch.ones(200, 1, 1, 1), logits.view(200, 1, 24, 1), scale=1.0).rest_entropy
    assert ((rest >= 0) & (rest < 1e-6)).all()
    rest = mixing.row_statistics(torch.ones(200, 1, 1, 1), 2 * logits.view(200, 1, 24, 1), scale=1.0).rest_entropy
    assert ((rest >= 0) & (rest < 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_entropy_and_no_floor_has_a_minus_sign(dtype):
    """Not even that of -0.0, which is printed as one."""
    q = torch.tensor([0.0, 1e-6, 1.0, 90.0, 3e4], dtype=dtype).view(1, 1, 5, 1)
    for keys in ([1.0], [0.0, 1.0], [1.0] * 20, [1.0, 1.0, -1.0], [0.0] * 30 + [1.0]):
        k = torch.tensor(keys, dtype=dtype).view(1, 1, -1, 1)
        for size in (1.0, -1.0):
            logits = size * q @ k.mT
            weights = logits.softmax(-1)
            seen = mixing.row_statistics(q, size * k, scale=1.0, susceptibility=True)
            given = mixing.row_statistics_from_weights(weights, logits, susceptibility=True)
            for rows in (seen, given, mixing.row_statistics_from_weights(weights)):
                for field in dataclasses.fields(rows):
                    figure = getattr(rows, field.name)
                    if isinstance(figure, torch.Tensor) and field.name != "max_logit":
                        assert not (figure.signbit() & ~figure.isnan()).any(), field.name
            for figure in (mixing.entropy(weights), mixing.entropy_floor(q, size * k, scale=1.0)):
                assert not figure.signbit().any()


@pytest.mark.parametrize(("peak", "left"), [(0.7, 0.3), (0.75, 0.25), (0.7501, 0.7499), (0.9, 0.6)])
def test_up_to_three_quarters_the_others_are_what_the_strongest_leaves_of_one(peak, left):
    """Beyond that, what the others add up to. Weights that sum to 3/2 tell one from the other."""
    P = torch.tensor([[peak, 1.5 - peak, 0.0]], dtype=torch.float64)
    assert mixing._others(P, P[:, 0]).item() == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize(("depth", "known"), [(-619.0, True), (-621.0, False)])
def test_weights_tell_what_is_out_of_reach_where_88_below_the_strongest_other_is_no_underflow(depth, known):
    """Double precision ends at exp(-708); a weight of 0 beside others around exp(depth) may be nearer than 88 to them."""
    logits = torch.tensor([0.0, *[depth] * 15, -800.0], dtype=torch.float64).view(1, 1, 1, 17)
    weights = logits.softmax(-1)
    assert (weights == 0).sum() == 1
    share = mixing.row_statistics_from_weights(weights).keys_within_reach.item()
    assert share == pytest.approx(15 / 16 if known else math.nan, nan_ok=True)


@pytest.mark.parametrize("held", [math.nan, math.inf, 1e30, -3.0])
def test_a_masked_key_is_as_good_as_none_in_every_route(held):
    """Whatever it holds, also where the logits are out of the ordinary and where one row has a bias."""
    q, k = queries_and_keys(1, 2, 1, 5, 6, dtype=torch.float32)
    mask = torch.tensor([[True, True, False, True, True, False]])
    for scale in (1.0, 2e6):
        expected = mixing.row_statistics(q, k[:, :, mask[0]], scale=scale, susceptibility=True)
        dirty = k.clone()
        dirty[:, :, ~mask[0]] = held
        found = mixing.row_statistics(q, dirty, key_mask=mask, scale=scale, susceptibility=True)
        for name in ("entropy", "entropy_floor", "max_logit", "susceptibility", "allowed_keys"):
            close(getattr(found, name), getattr(expected, name).double().numpy(), 2e-5)


@pytest.mark.parametrize("far", [1e3, 1e36, 1e40, 1e100])
def test_what_is_left_of_a_row_does_not_depend_on_how_far_below_it_lies(far):
    """Twenty others that are all alike: as spread as can be, and all within reach of each other."""
    k = torch.full((1, 1, 21, 1), -far, dtype=torch.float64)
    k[0, 0, 7] = 0
    rows = mixing.row_statistics(torch.ones(1, 1, 1, 1, dtype=torch.float64), k, scale=1.0)
    assert (rows.entropy.item(), rows.max_logit.item()) == (0, 0)
    assert rows.rest_entropy.item() == pytest.approx(1)
    assert rows.keys_within_reach.item() == 1
