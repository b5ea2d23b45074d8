"""Leading singular values by products against NumPy's decompositions, on every way they can take."""

import doctest
import math
import threading

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


PARTS = WAYS | {"one group at a time": {"KEPT_BYTES": 1}}


def masked(rows, columns):
    """Two sequences of padding anywhere: [batch, query] and [batch, key]."""
    query_mask, key_mask = torch.ones(2, rows, dtype=torch.bool), torch.ones(2, columns, dtype=torch.bool)
    query_mask[0, 3:6] = key_mask[0, ::5] = key_mask[1, -9:] = False
    return query_mask, key_mask


@pytest.mark.parametrize("way", PARTS)
def test_columns_that_are_left_out_take_their_weight_along(monkeypatch, way):
    """Rows then sum to different numbers, so that it shows whether rows are centred, and columns."""
    for name, value in PARTS[way].items():
        monkeypatch.setattr(mixing, name, value)
    q, k = 2 * torch.randn(2, 4, 20, 16), torch.randn(2, 2, 48, 16)
    query_mask, key_mask = masked(20, 48)
    weights = mixing.attention_weights(q, k)
    truth = expected(weights, query_mask, key_mask)
    for found in (
        mixing.leading_spectrum(q, k, query_mask=query_mask, key_mask=key_mask),
        mixing.leading_spectrum_from_weights(weights, query_mask=query_mask, key_mask=key_mask),
    ):
        np.testing.assert_allclose(together(found), truth, rtol=2e-4 if way == "tiled" else 3e-6)


@pytest.mark.parametrize("way", PARTS)
@pytest.mark.parametrize("apart", [(3, 4), (1, 4), (3, 1)], ids=str)
def test_each_head_and_sequence_has_the_pairs_and_biases_of_its_own(monkeypatch, way, apart):
    for name, value in PARTS[way].items():
        monkeypatch.setattr(mixing, name, value)
    monkeypatch.setattr(mixing, "VECTORS", 6)
    q, k = 2 * torch.randn(3, 4, 20, 16), torch.randn(3, 2, 60, 16)
    allowed, bias = torch.rand(*apart, 20, 60) < 0.6, torch.randn(*apart, 20, 60)
    allowed[..., 5] = True
    options = {"allowed": allowed, "bias": bias, "scale": 0.3, "softcap": 2.0}
    weights = mixing.attention_weights(q, k, **options)
    real = torch.ones(3, 20, dtype=torch.bool), torch.ones(3, 60, dtype=torch.bool)
    found = mixing.leading_spectrum(q, k, **options)
    np.testing.assert_allclose(together(found), expected(weights, *real), rtol=2e-4 if way == "tiled" else 3e-6)


@pytest.mark.parametrize("way", ["decomposed", "in memory"])
@pytest.mark.parametrize("small", [1e-2, 3e-4, 3e-5, 1e-6, 1e-8])
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24)], ids=str)
def test_a_small_second_direction_keeps_its_digits(monkeypatch, way, small, shape):
    """Squares of it drown in those of sigma_1. Weights in double precision, sigma_2 a given share of sigma_1."""
    take(monkeypatch, way)
    generator = torch.Generator().manual_seed(shape[0])
    apart = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
    apart -= apart.mean(-1, keepdim=True)  # rows still sum to one
    weights = 1 / shape[1] + small / shape[1] * apart / 8
    rows, columns = (torch.ones(2, size, dtype=torch.bool) for size in shape)
    found = together(mixing.leading_spectrum_from_weights(weights))
    truth = expected(weights, rows, columns)
    assert (truth[..., 1] < small * truth[..., 0]).all()
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    if way == "decomposed":
        np.testing.assert_allclose(found[..., 1], truth[..., 1], rtol=max(1e-9, 1e-14 / small))


@pytest.mark.parametrize("shape", [(20, 33), (33, 20)], ids=str)
def test_only_the_smaller_gram_is_decomposed(monkeypatch, shape):
    seen = []
    monkeypatch.setattr(
        mixing, "eigenvalues", lambda grams: (seen.extend(grams), symmetric_eigenvalues.eigenvalues(grams))[1]
    )
    mixing.leading_spectrum_from_weights(torch.rand(2, 3, *shape))
    assert {gram.shape[-1] for gram in seen} == {20}


def test_an_error_of_a_hundredth_makes_no_figure_and_one_row_no_second():
    one = torch.ones(5, dtype=torch.float64)
    found = krylov.Leading(3 * one, 2 * one, one, torch.tensor([0.0, 0.0099, 0.0101, 0.0, 0.0], dtype=torch.float64))
    rows = torch.tensor([[1, 1, 0]] * 3 + [[1, 0, 0], [1, 1, 1]]).bool()
    columns = torch.tensor([[1, 1]] * 4 + [[0, 1]]).bool()
    first, second, contraction, _ = mixing._usable(found, rows, columns)
    for value, kept in ((first, 3.0), (second, 2.0)):
        assert value.isnan().tolist() == [False, False, True, True, True]
        assert set(value[:2].tolist()) == {kept}
    assert contraction.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        # Of three sequences with four groups of 10 bytes each: (sequences, groups) of every part.
        (1, [(1, 1)] * 12),
        (19, [(1, 1)] * 12),
        (20, [(1, 2)] * 6),
        (39, [(1, 3), (1, 1)] * 3),
        (40, [(1, 4)] * 3),
        (79, [(1, 4)] * 3),
        (80, [(2, 4), (1, 4)]),
        (1000, [(3, 4)]),
    ],
)
def test_as_many_matrices_are_at_work_as_there_is_room_for(monkeypatch, kept, parts):
    monkeypatch.setattr(mixing, "KEPT_BYTES", kept)
    seen = []
    numbers = torch.arange(3 * 4 * 2, dtype=torch.float64).view(3, 4, 2)  # two heads a group

    def found(batch, groups):
        own = numbers[batch, groups]
        seen.append(tuple(own.shape[:2]))
        return krylov.Leading(*(own.flatten() + 100 * place for place in range(4)))

    spectrum = mixing._over_parts(found, 3, 4, 10)
    assert seen == parts
    every = numbers.flatten(1)
    assert torch.equal(spectrum.singular_values, torch.stack([every, every + 100], -1))
    assert torch.equal(spectrum.contraction, every + 200)
    assert torch.equal(spectrum.error, every + 300)


@pytest.mark.parametrize(("direct", "bytes_each"), [(5, 4), (6, 8)])
@pytest.mark.parametrize(("queries", "keys"), [(6, 9), (9, 6)])
def test_a_matrix_takes_four_bytes_a_weight_and_eight_if_it_is_decomposed(
    monkeypatch, direct, bytes_each, queries, keys
):
    """In single precision; all heads of a group are made at once from queries and keys."""
    sizes = []
    monkeypatch.setattr(mixing, "DIRECT", direct)
    monkeypatch.setattr(mixing, "_over_parts", lambda found, *counts, **_: sizes.append(counts))
    mixing.leading_spectrum(torch.randn(2, 6, queries, 3), torch.randn(2, 2, keys, 3))
    mixing.leading_spectrum_from_weights(torch.rand(2, 6, queries, keys))
    assert sizes == [(2, 2, 3 * 54 * bytes_each), (2, 6, 54 * bytes_each)]


def test_heads_whose_weights_do_not_fit_run_side_by_side(monkeypatch):
    """In threads of one thread each, so that every figure is what one thread gives; padding may hold anything."""
    monkeypatch.setattr(mixing, "DIRECT", 5)
    monkeypatch.setattr(mixing, "KEPT_BYTES", 1)
    q, k = torch.randn(2, 4, 24, 8), torch.randn(2, 4, 24, 8)
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, 17:] = False
    q[1, :, 17:] = math.nan
    asked = {"query_mask": real, "key_mask": real, "allowed": real[:, None, None].expand(2, 1, 24, 24)}
    alone = mixing.leading_spectrum(q, k, causal=True, **asked)
    made, threads = mixing._tiled_spectrum, []
    monkeypatch.setattr(
        mixing, "_tiled_spectrum", lambda *a: (threads.append(threading.current_thread().name), made(*a))[1]
    )
    torch.set_num_threads(2)
    together = mixing.leading_spectrum(q, k, causal=True, **asked)
    assert len(threads) == 8
    assert all(name.startswith("uncollapse") for name in threads)
    assert torch.equal(alone.singular_values, together.singular_values)
    assert torch.equal(alone.contraction, together.contraction)
    assert bool(alone.singular_values.isfinite().all())


@pytest.mark.parametrize(("queries", "keys"), [(22, 26), (26, 22)])
def test_up_to_where_matrices_are_decomposed_and_lie_in_memory(monkeypatch, queries, keys):
    """Decomposed up to `DIRECT` rows or keys; beyond it made anew if all heads of a group, in single precision, are too large."""
    asked = []
    for name in ("_decomposed", "_tiled_spectrum"):
        whole = getattr(mixing, name)
        monkeypatch.setattr(mixing, name, lambda *a, name=name, whole=whole: (asked.append(name), whole(*a))[1])
    lanczos = krylov.leading
    monkeypatch.setattr(krylov, "leading", lambda *a, **o: (asked.append("leading"), lanczos(*a, **o))[1])
    q, k = torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8)

    def way(direct, kept):
        asked.clear()
        monkeypatch.setattr(mixing, "DIRECT", direct)
        monkeypatch.setattr(mixing, "KEPT_BYTES", kept)
        mixing.leading_spectrum(q, k)
        return asked[0]

    size = 2 * queries * keys * 4
    assert way(22, 1) == "_decomposed"
    assert way(21, size) == "leading"
    assert way(21, size - 1) == "_tiled_spectrum"
    for direct, first in ((22, "_decomposed"), (21, "leading")):
        asked.clear()
        monkeypatch.setattr(mixing, "DIRECT", direct)
        mixing.leading_spectrum_from_weights(torch.rand(1, 2, queries, keys))
        assert asked[0] == first


def test_a_short_sequence_among_long_ones_is_decomposed(monkeypatch):
    """Where the matrices do not fit: up to `DIRECT` real keys a sequence is as short as any."""
    asked, whole = [], mixing._tiled_spectrum
    monkeypatch.setattr(mixing, "_tiled_spectrum", lambda *a: (asked.append(int(a[2][0].sum())), whole(*a))[1])
    for name, value in (("DIRECT", 20), ("KEPT_BYTES", 1), ("VECTORS", 6)):
        monkeypatch.setattr(mixing, name, value)
    q, k = torch.randn(3, 2, 40, 8), torch.randn(3, 1, 40, 8)
    key_mask = torch.arange(40) < torch.tensor([[20], [21], [40]])
    found = mixing.leading_spectrum(q, k, key_mask=key_mask, allowed=key_mask[:, None, None])
    assert asked == [21, 40]
    weights = mixing.attention_weights(q, k, allowed=key_mask[:, None, None])
    truth = expected(weights, torch.ones(3, 40, dtype=torch.bool), key_mask)
    np.testing.assert_allclose(together(found), truth, rtol=2e-4)


# The products themselves ----------------------------------------------------------------------------------------------


def of_spectrum(sigma, rows, columns, seed=0):
    """A matrix [rows, columns] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(sigma), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return left * torch.tensor(sigma, dtype=torch.float64) @ right.T


def products_of(matrices, rows, columns):
    A = torch.stack(matrices)
    return krylov.Dense(A * rows.unsqueeze(-1) * columns.unsqueeze(-2), rows, columns)


@pytest.mark.parametrize(("vectors", "steps"), [(3, 4), (3, 6), (5, 2), (5, 3), (5, 4), (8, 1)])
def test_no_value_is_farther_below_than_its_error_says(steps, vectors):
    """Three matrices of spectra that fall fast, slowly and not at all at first, one of them padded; NumPy says what is right. Of
    fewer blocks it is not proved."""
    spectra = ([0.5**i for i in range(24)], [0.9**i for i in range(24)], [1.0] * 3 + [0.3] * 21)
    rows, columns = torch.ones(3, 30, dtype=torch.float64), torch.ones(3, 41, dtype=torch.float64)
    rows[1, 24:], columns[1, ::7] = 0, 0
    products = products_of([of_spectrum(s, 30, 41, seed) for seed, s in enumerate(spectra)], rows, columns)
    found = krylov.leading(products, vectors=vectors, steps=steps, tolerance=0.0)
    for place, A in enumerate(products.A.numpy()):
        kept = A[rows[place].bool().numpy()][:, columns[place].bool().numpy()]
        truth = singular_values(kept)
        for value, true in zip(found[:3], truth, strict=True):
            assert value[place] <= true * (1 + 1e-12)
            assert true - value[place] <= found.error[place] * true + 1e-12
    if steps * vectors == 20:
        assert found.error[0] < 1e-6  # and it says no more than it must
        assert found.error[1] < 0.2


def test_products_end_where_all_directions_are_found():
    """Of 9 keys: 8 directions beside the constant one, in blocks of 2. Then nothing is left to err about."""
    A = torch.rand(1, 12, 9, dtype=torch.float64)
    asked = []

    class Counted(krylov.Dense):
        def centred(self, X, mean):
            asked.append(X.shape[-1])
            return super().centred(X, mean)

    rows, columns = torch.ones(1, 12), torch.ones(1, 9)
    found = krylov.leading(Counted(A, rows, columns), vectors=2, steps=50, tolerance=0.0)
    assert asked == [2] * 4
    np.testing.assert_allclose([float(v[0]) for v in found[:3]], singular_values(A[0].numpy()), rtol=1e-12)


@pytest.mark.parametrize(
    ("enough", "steps", "made"),
    [(1, 20, 2), (2, 20, 2), (3, 20, 3), (4, 20, 5), (6, 20, 8), (9, 20, 12), (13, 20, 16), (17, 20, 20), (9, 10, 10)],
)
def test_it_is_seen_after_some_blocks_whether_they_are_enough(monkeypatch, enough, steps, made):
    """At most half as many products again as were needed are made, and as few looks as that takes."""
    looked, whole = [], krylov._Basis.ritz

    def ritz(self):
        found = whole(self)
        looked.append(self.Q.shape[-1] // 2)
        return found._replace(error=torch.full_like(found.error, 0.0 if looked[-1] >= enough else 1.0))

    monkeypatch.setattr(krylov._Basis, "ritz", ritz)
    products = products_of([of_spectrum([0.9**i for i in range(40)], 50, 60)], torch.ones(1, 50), torch.ones(1, 60))
    krylov.leading(products, vectors=2, steps=steps, tolerance=0.0)  # an error at the tolerance is small enough
    assert looked[-1] == made
    assert len(looked) <= 7


@pytest.mark.parametrize(("members", "known"), [(1, True), (5, True), (6, True), (7, False)])
def test_a_cluster_of_six_is_known_together(members, known):
    """Which of the members is which is not known, and need not be: all of them lie close to the next."""
    squares = torch.tensor([[1.0 - 1e-9 * i for i in range(members)] + [0.25] * (9 - members)], dtype=torch.float64)
    residuals = torch.full((1, 30, 6), 1e-4 / 30**0.5, dtype=torch.float64)
    values, errors = krylov._upper(squares, residuals, 2, squares.new_zeros(1))
    torch.testing.assert_close(values, squares[:, :2].sqrt())
    # ||r||^2 = 1e-8 a vector over a gap of 3/4, and half of that for the root
    expected = torch.full((1,), members * 1e-8 / 0.75 / 2 if known else 1e-4 / 2, dtype=torch.float64)
    torch.testing.assert_close(errors[:, 0], expected, rtol=1e-3, atol=0)


def test_the_error_of_a_small_value_is_a_share_of_a_ten_thousandth_of_the_largest():
    squares = torch.tensor([[1.0, 1e-10, 0.0]], dtype=torch.float64)
    residuals = torch.zeros(1, 4, 3, dtype=torch.float64)
    residuals[0, 0, 1] = 1e-11
    least = min(1e-22 / 1e-10, 1e-11)
    off = math.sqrt(1e-10 + least) - 1e-5
    _, errors = krylov._upper(squares, residuals, 2, squares.new_zeros(1))
    assert errors[0, 1].item() == pytest.approx(off / 1e-4, rel=1e-6)
    _, errors = krylov._upper(squares, residuals, 2, torch.tensor([5.0], dtype=torch.float64))
    assert errors[0, 1].item() == pytest.approx(off / 5e-4, rel=1e-6)  # of sigma_1 of another matrix
    squares[0, 1] = 1e-6  # larger than that: a share of itself
    off = math.sqrt(1e-6 + 1e-22 / 1e-6) - 1e-3
    _, errors = krylov._upper(squares, residuals, 2, squares.new_zeros(1))
    assert errors[0, 1].item() == pytest.approx(off / 1e-3, rel=1e-6, abs=1e-15)
    nothing, errors = krylov._upper(squares * 0, residuals * 0, 2, squares.new_zeros(1))
    assert (nothing, errors) == (pytest.approx(0), pytest.approx(0))


def test_directions_of_which_nothing_is_left_are_replaced():
    """A matrix of rank 3, after whose first block no product leads anywhere new."""
    A = of_spectrum([1.0, 0.5, 0.25], 20, 25)
    products = products_of([A, of_spectrum([0.9**i for i in range(15)], 20, 25)], torch.ones(2, 20), torch.ones(2, 25))
    found = krylov.leading(products, vectors=4, steps=5, tolerance=0.0)
    for place, matrix in enumerate(products.A.numpy()):
        np.testing.assert_allclose([float(v[place]) for v in found[:3]], singular_values(matrix), rtol=1e-6)
    assert (found.error < 1e-4).all()


def test_what_a_spectrum_costs_at_most(monkeypatch):
    """In memory 16 products with 16 vectors, 8 of weights that are made anew, and as many again in double precision; up to 128 rows
    or keys, none. So many, if no error is small enough."""
    for name in ("CLOSE", "TILED_CLOSE", "COARSE"):
        monkeypatch.setattr(mixing, name, -1.0)
    asked = []
    for kind in (krylov.Dense, mixing._Tiled):

        def counted(self, X, mean, whole=kind.centred):
            asked.append((X.shape[-1], X.dtype))
            return whole(self, X, mean)

        monkeypatch.setattr(kind, "centred", counted)
    q = torch.randn(1, 1, 300, 8)
    mixing.leading_spectrum(q, q)
    assert asked == [(16, torch.float32)] * 16
    asked.clear()
    monkeypatch.setattr(mixing, "KEPT_BYTES", 1)
    mixing.leading_spectrum(q, q)
    assert asked == [(16, torch.float32)] * 8 + [(16, torch.float64)] * 8
    asked.clear()
    mixing.leading_spectrum(q[:, :, :128], q)
    assert asked == []
    mixing.leading_spectrum(q[:, :, :129], q)
    assert asked


def test_weights_of_24_mebibytes_lie_in_memory(monkeypatch):
    asked = []

    def instead(name):
        def found(*given):
            asked.append(name)
            return krylov.Leading(*torch.zeros(4, 1, dtype=torch.float64))

        return found

    for name in ("_dense_spectrum", "_tiled_spectrum"):
        monkeypatch.setattr(mixing, name, instead(name))
    q, k = torch.zeros(1, 1, 2049, 1), torch.zeros(1, 1, 3072, 1)
    mixing.leading_spectrum(q[:, :, :2048], k)
    mixing.leading_spectrum(q, k)
    assert asked == ["_dense_spectrum", "_tiled_spectrum"]


@pytest.mark.parametrize(
    ("sides", "shared"), [([(16, 50)], True), ([(15, 50), (15, 20)], False), ([(15, 50), (16, 20)], True)]
)
def test_work_is_shared_out_from_two_million_on(monkeypatch, sides, shared):
    """The sum of the cubes of all sides."""
    asked, share = [], symmetric_eigenvalues.shared_out
    monkeypatch.setattr(symmetric_eigenvalues, "shared_out", lambda works: (asked.append(len(works)), share(works))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batches = [torch.eye(side, dtype=torch.float64).expand(count, side, side) for count, side in sides]
    found = symmetric_eigenvalues.eigenvalues(batches)
    assert asked == [2] * shared
    assert [tuple(each.shape) for each in found] == sides
    assert all(bool((each == 1).all()) for each in found)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    symmetric_eigenvalues.eigenvalues(batches)
    assert asked == [2] * shared


def test_ordinary_matrices_take_no_second_look(monkeypatch):
    """By products neither a decomposition, nor by eigenvalues singular values as well."""
    asked = []
    decomposed, svdvals = mixing._decomposed, torch.linalg.svdvals
    monkeypatch.setattr(mixing, "_decomposed", lambda A, *a: (asked.append(len(A)), decomposed(A, *a))[1])
    monkeypatch.setattr(torch.linalg, "svdvals", lambda A: (asked.append(-len(A)), svdvals(A))[1])
    weights = mixing.attention_weights(3 * torch.randn(1, 3, 150, 8), torch.randn(1, 3, 150, 8))
    mixing.leading_spectrum_from_weights(weights)
    assert asked == []
    weights[0, 1] = 1 / 150 + 1e-7 * weights[0, 1]  # one of them has nothing but one direction
    mixing.leading_spectrum_from_weights(weights)
    assert asked == [1, -1]
    asked.clear()
    mixing.leading_spectrum_from_weights(weights[:, :1, :100])
    assert asked == [1]


@pytest.mark.parametrize(("part", "anew"), [(0.9, 1), (1.1, 0)])
@pytest.mark.parametrize("first", [0.05, 20.0])
def test_a_value_below_a_ten_thousandth_of_the_largest_is_decomposed_anew(first, part, anew, monkeypatch):
    asked, whole = [], mixing._decomposed
    monkeypatch.setattr(mixing, "DIRECT", 0)
    monkeypatch.setattr(mixing, "_decomposed", lambda A, *a: (asked.append(len(A)), whole(A, *a))[1])
    A = torch.stack([of_spectrum([first, part * 1e-4 * first], 40, 50), of_spectrum([first, first / 2], 40, 50, 1)])
    found = mixing._dense_spectrum(A, torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 50, dtype=torch.bool))
    assert sum(asked) == anew
    np.testing.assert_allclose(found.second, [part * 1e-4 * first, first / 2], rtol=1e-7)
