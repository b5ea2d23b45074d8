"""Leading singular values by products against NumPy's decompositions, on every way they can take."""

import doctest
import math

import numpy as np
import pytest
import torch

from uncollapse.measures import leading_spectrum as krylov
from uncollapse.measures import mixing, symmetric_eigenvalues

WAYS = {"decomposed": {}, "in memory": {"DIRECT": 0}, "tiled": {"DIRECT": 0, "KEPT_BYTES": 1, "TILE_BYTES": 1 << 12}}


def singular_values(A):
    """sigma_1, sigma_2 of A, sigma_1 of C A C."""
    whole = np.linalg.svd(A, compute_uv=False)
    centred = A - A.mean(0)
    centred = centred - centred.mean(1, keepdims=True)
    return whole[0], whole[1], np.linalg.norm(centred, 2)


def expected(weights, query_mask, key_mask):
    """[batch, head, 3] from float64 weights."""
    found = np.empty((*weights.shape[:2], 3))
    for b, h in np.ndindex(weights.shape[:2]):
        found[b, h] = singular_values(weights[b, h].double().numpy()[query_mask[b].numpy()][:, key_mask[b].numpy()])
    return found


def together(spectrum):
    return np.concatenate([spectrum.singular_values.numpy(), spectrum.contraction[..., None].numpy()], -1)


def take(monkeypatch, way):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(mixing, name, value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("queries", "causal"), [(48, True), (48, False), (20, False)])
def test_every_way_equals_the_decomposition(monkeypatch, way, queries, causal):
    take(monkeypatch, way)
    keys, q, k = 48, 2 * torch.randn(2, 4, queries, 16), torch.randn(2, 2, 48, 16)
    key_mask = torch.ones(2, keys, dtype=torch.bool)
    key_mask[1, -9:] = False
    query_mask = key_mask if queries == keys else torch.ones(2, queries, dtype=torch.bool)
    options = {"allowed": key_mask[:, None, None], "causal": causal, "scale": 0.3}
    found = mixing.leading_spectrum(q, k, query_mask=query_mask, key_mask=key_mask, **options)
    weights = mixing.attention_weights(q, k, **options)
    truth = expected(weights, query_mask, key_mask)
    np.testing.assert_allclose(together(found), truth, rtol=2e-4 if way == "tiled" else 2e-6)
    # said to be no farther away than it is, but for the rounding of single precision
    assert ((truth - together(found)) / truth <= found.error[..., None].numpy() + 2e-6).all()
    assert (together(found) <= truth * (1 + 2e-6)).all()
    again = mixing.leading_spectrum_from_weights(weights, query_mask=query_mask, key_mask=key_mask)
    np.testing.assert_allclose(together(again), truth, rtol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_uniform_rows_have_one_direction(monkeypatch, way):
    take(monkeypatch, way)
    found = mixing.leading_spectrum(torch.zeros(1, 2, 200, 4), torch.randn(1, 2, 200, 4))
    np.testing.assert_allclose(together(found), [[[1, 0, 0]] * 2], atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-6, 1e3, 1e30])
def test_logits_of_any_size(monkeypatch, way, size):
    take(monkeypatch, way)
    q, k, real = size * torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.ones(1, 40, dtype=torch.bool)
    found = mixing.leading_spectrum(q, k)
    truth = expected(mixing.attention_weights(q, k), real, real)
    np.testing.assert_allclose(together(found), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_one_head_that_is_not_finite_leaves_the_others(monkeypatch, way):
    take(monkeypatch, way)
    q, k, real = torch.randn(1, 3, 40, 8), torch.randn(1, 3, 40, 8), torch.ones(1, 40, dtype=torch.bool)
    truth = expected(mixing.attention_weights(q, k), real, real)
    q[0, 1, 5] = math.nan
    found = together(mixing.leading_spectrum(q, k))
    assert np.isnan(found[0, 1]).all()
    np.testing.assert_allclose(found[0, [0, 2]], truth[0, [0, 2]], rtol=2e-4)


def test_heads_that_look_at_a_neighbour_are_right_or_refused(monkeypatch):
    """Their largest singular values lie close together: the hardest case for products."""
    tokens = 600
    places = torch.arange(tokens)
    bias = 9.0 * (places[:, None] - places == 1).float()[None, None]
    q, k, real = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8), torch.ones(1, tokens, dtype=torch.bool)
    truth = expected(mixing.attention_weights(q, k, bias=bias), real, real)
    np.testing.assert_allclose(together(mixing.leading_spectrum(q, k, bias=bias)), truth, rtol=2e-6)
    monkeypatch.setattr(mixing, "KEPT_BYTES", 1)
    tiled = mixing.leading_spectrum(q, k, bias=bias)
    assert (tiled.error > 1e-4).all()  # it says that it is not done
    near = np.abs(together(tiled) / truth - 1) <= tiled.error[..., None].numpy() + 2e-6
    assert (np.isnan(together(tiled)) | near).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-7, 1e-4, 20.0])
def test_heads_of_almost_one_direction_keep_their_figures(monkeypatch, way, size):
    """Rows that are all but uniform, and rows that all look at the first key: what is left of them is small beside sigma_1."""
    take(monkeypatch, way)
    tokens, real = 200, torch.ones(1, 200, dtype=torch.bool)
    bias = size * (torch.arange(tokens) == 0).float().expand(1, 1, tokens, tokens) if size > 1 else None
    q, k = torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8) * min(size, 0.1)
    truth = expected(mixing.attention_weights(q, k, bias=bias), real, real)
    found = mixing.leading_spectrum(q, k, bias=bias)
    assert (found.error < 1e-2).all()
    np.testing.assert_allclose(together(found), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [1, 2, 5, 17, 40])
def test_short_sequences_beside_long_ones(monkeypatch, way, kept):
    """On the right of the batch and on the left, with padding that holds anything."""
    take(monkeypatch, way)
    monkeypatch.setattr(mixing, "DIRECT", 128)
    tokens, mask = 150, torch.ones(3, 150, dtype=torch.bool)
    mask[1, kept:] = mask[2, :-kept] = False
    q, k = torch.randn(3, 4, tokens, 8), torch.randn(3, 2, tokens, 8)
    options = {"allowed": mask[:, None, None], "causal": True}
    truth = expected(mixing.attention_weights(q, k, **options), mask, mask) if kept > 1 else None
    q[~mask[:, None].expand(3, 4, tokens)] = math.nan
    found = mixing.leading_spectrum(q, k, query_mask=mask, key_mask=mask, **options)
    if truth is None:
        assert found.singular_values[1:].isnan().all()
        assert (found.contraction[1:] == 0).all()
    else:
        np.testing.assert_allclose(together(found), truth, rtol=2e-4)


@pytest.mark.parametrize("keys", [1, 2, 5, 16, 17])
def test_many_queries_of_few_keys(keys):
    q, k = torch.randn(1, 2, 150, 8), torch.randn(1, 2, keys, 8)
    real = torch.ones(1, 150, dtype=torch.bool), torch.ones(1, keys, dtype=torch.bool)
    found = mixing.leading_spectrum(q, k)
    if keys == 1:
        assert found.singular_values.isnan().all()
        assert (found.contraction == 0).all()
    else:
        np.testing.assert_allclose(together(found), expected(mixing.attention_weights(q, k), *real), rtol=2e-6)


def test_too_few_rows_have_no_second_direction():
    spectrum = mixing.leading_spectrum(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 5, 4))
    assert spectrum.singular_values.isnan().all()
    assert spectrum.contraction.item() == 0


def test_eigenvalues_are_those_of_lapack_in_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(symmetric_eigenvalues, "LEAST_WORK", 0)
    batches = [torch.randn(count, side, side, dtype=torch.float64) for count, side in ((1, 4), (5, 7), (2, 1))]
    batches = [batch + batch.mT for batch in batches]
    plain = [torch.linalg.eigvalsh(batch) for batch in batches]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = symmetric_eigenvalues.eigenvalues(batches)
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_documented_examples():
    for module in (krylov, symmetric_eigenvalues):
        assert doctest.testmod(module).failed == 0
