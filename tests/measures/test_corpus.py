"""The cloud of a corpus: against NumPy to 1e-10, the laws of the measures, and merging."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import corpus as reference
from uncollapse.errors import InputError
from uncollapse.measures import corpus
from uncollapse.measures.corpus import CorpusMeasures, compared, corpus_measures
from uncollapse.measures.running import WIDEST, RunningCloud
from uncollapse.measures.student import quantile_95

EPS = 2.0**-52
seeds = st.integers(0, 2**31)


def points(n: int, width: int, seed: int, *, mean: float = 1.0, decay: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, width + 1).double() ** -decay
    return x + mean * torch.randn(width, generator=generator, dtype=torch.float64)


def keys(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud_of(x: Tensor, seed: int = 0) -> RunningCloud:
    return RunningCloud.of(x, keys(len(x), seed))


def measures_of(x: Tensor, eps: float = EPS) -> CorpusMeasures:
    (found,) = corpus_measures([cloud_of(x)], [eps])
    return found


def expected_of(x: np.ndarray, eps: float = EPS) -> dict[str, float]:
    whole, centred = reference.whole(x, eps), reference.centred(x, eps)
    found = {
        "points": len(x),
        "attainable_rank": min(x.shape),
        "attainable_centred_rank": min(len(x) - 1, x.shape[1]),
        "effective_rank": reference.effective_rank(whole),
        "centred_effective_rank": reference.effective_rank(centred),
        "participation_ratio": reference.participation_ratio(x),
        "stable_rank": reference.stable_rank(x),
        "k90": reference.directions_holding(x, 0.9),
        "k95": reference.directions_holding(x, 0.95),
        "top_share": reference.top_share(x, 1),
        "top_ten_share": reference.top_share(x, 10),
        "isoscore": reference.isoscore(x),
        "mean_cosine": reference.mean_cosine(x),
        "mean_share": reference.mean_share(x),
    }
    if len(centred) >= 13:
        alpha, half = reference.alpha(centred)
        half *= quantile_95(min(100, len(centred)) - 3 - 2)
        found |= {"alpha": alpha, "alpha_low": alpha - half, "alpha_high": alpha + half}
    return found


SIZES = [(5, 40), (40, 40), (41, 40), (64, 24), (12, 3), (200, 20)]


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_every_figure_is_that_of_numpy(n: int, width: int) -> None:
    x = points(n, width, n + width)
    found = vars(measures_of(x))
    for name, value in expected_of(x.numpy()).items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name


def test_beyond_the_kept_points_the_second_moment_gives_the_same() -> None:
    """In parts, of which the first is kept as points, and of a cloud whose mean is ten thousand times its spread."""
    for mean in (1.0, 1e4):
        x = points(WIDEST + 300, 24, 1, mean=mean)
        drawn = keys(len(x))
        cloud = RunningCloud.of(x[:7], drawn[:7])
        for start, end in ((7, 900), (900, 1100), (1100, len(x))):
            cloud = cloud.add(x[start:end], drawn[start:end])
        assert cloud.scatter is not None
        centred = x.numpy() - x.numpy().mean(axis=0)
        assert np.abs(cloud.scatter.numpy() / (centred.T @ centred) - 1).max() < 1e-8
        (found,) = corpus_measures([cloud], [EPS])
        (dense,) = running_spectra(x)
        for name, value in vars(dense).items():
            tolerance = 1e-10 if mean == 1.0 else 1e-6
            close = None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
            assert vars(found)[name] == close, name


def running_spectra(x: Tensor) -> list[CorpusMeasures]:
    """From the points themselves, however many they are."""
    whole = RunningCloud(
        len(x), len(x), x.mean(0), torch.nn.functional.normalize(x, dim=-1).sum(0), x, keys(len(x)), None
    )
    return corpus_measures([whole], [EPS])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=5), st.integers(2, 9), seeds)
def test_any_split_of_the_corpus_gives_the_cloud_of_the_whole(sizes: list[int], width: int, seed: int) -> None:
    x, drawn = points(sum(sizes) + 1, width, seed), keys(sum(sizes) + 1, seed)
    whole = RunningCloud.of(x, drawn)
    cuts = np.cumsum([0, *sizes, 1])
    parts = [RunningCloud.of(x[a:b], drawn[a:b]) for a, b in itertools.pairwise(cuts.tolist())]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert (merged.count, merged.pointing) == (whole.count, whole.pointing)
    assert torch.allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(merged.unit, whole.unit, rtol=1e-12, atol=1e-9)
    order, other = merged.keys.argsort(), whole.keys.argsort()
    assert torch.equal(merged.keys[order], whole.keys[other])
    assert torch.equal(merged.points[order], whole.points[other])
    assert (merged.scatter is None) == (whole.scatter is None)
    if whole.scatter is not None:
        assert merged.scatter is not None
        assert torch.allclose(merged.scatter, whole.scatter, rtol=1e-11, atol=1e-9)


def test_a_wide_cloud_keeps_a_uniform_sample_and_says_so() -> None:
    x, drawn = points(3 * WIDEST, WIDEST + 8, 0), keys(3 * WIDEST)
    cloud = RunningCloud.of(x[: 2 * WIDEST], drawn[: 2 * WIDEST]).add(x[2 * WIDEST :], drawn[2 * WIDEST :])
    assert cloud.scatter is None
    kept = drawn.argsort()[:WIDEST].sort().values
    assert torch.equal(cloud.points, x[kept])
    assert torch.allclose(cloud.mean, x.mean(0), atol=1e-12)
    (found,) = corpus._measures([cloud], corpus.Spectrum(torch.ones(1, 4).double(), torch.ones(1, 4).double()))
    assert (found.points, found.sampled) == (3 * WIDEST, WIDEST)
    assert (found.attainable_rank, found.attainable_centred_rank) == (WIDEST, WIDEST - 1)


def test_points_that_are_not_finite_are_left_out() -> None:
    x = points(30, 8, 0)
    broken = x.clone()
    broken[3, 2], broken[17, 0] = math.nan, math.inf
    kept = torch.tensor([i for i in range(30) if i not in (3, 17)])
    assert vars(measures_of(broken)) == vars(measures_of(x[kept]))


def test_equal_points_have_no_direction_but_that_of_their_rounding() -> None:
    """In single precision: what is left of the differences is noise, which has every direction there is."""
    one = points(1, 48, 3).float()
    noisy = one * (1 + 2.0**-25 * torch.randn(40, 48, generator=torch.Generator().manual_seed(0)))
    for x in (one.expand(40, -1).clone(), noisy.float()):
        found = measures_of(x, torch.finfo(torch.float32).eps)
        assert found.centred_effective_rank == 0
        assert found.effective_rank == pytest.approx(1.0, abs=1e-9)
        assert (found.participation_ratio, found.alpha, found.k90, found.isoscore) == (None,) * 4
        assert found.mean_cosine is not None
        assert 1 - 1e-6 < found.mean_cosine <= 1
    apart = measures_of((noisy + 1e-3 * points(40, 48, 4)).float(), torch.finfo(torch.float32).eps)
    assert apart.centred_effective_rank is not None
    assert apart.centred_effective_rank > 10


def test_what_a_gram_matrix_would_lose_is_seen() -> None:
    x = torch.diag(torch.tensor([1.0, 1e-3, 1e-9, 1e-11], dtype=torch.float64))
    found = measures_of(x)
    assert found.effective_rank == pytest.approx(reference.effective_rank(reference.whole(x.numpy(), EPS)), rel=1e-12)
    assert len(reference.whole(x.numpy(), EPS)) == 4


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_points_have_no_figures(n: int) -> None:
    found = vars(measures_of(points(n, 6, 0)))
    assert found.pop("points") == n
    assert (found.pop("attainable_rank"), found.pop("attainable_centred_rank")) == (n, 0)
    if n:
        assert found.pop("effective_rank") == pytest.approx(1.0)
        assert found.pop("mean_share") == pytest.approx(1.0)
    assert set(found.values()) == {None}
    ((whole, centred),) = corpus.spectra([cloud_of(points(n, 6, 0))], [EPS])
    assert (whole.shape, centred.tolist()) == ((n,), [0.0] * n)  # one singular value a point


# Laws -----------------------------------------------------------------------------------------------------------------


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(points(width, width, seed, decay=0.0))[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(2, 12), seeds)
def test_no_figure_depends_on_order_rotation_or_scale(n: int, width: int, seed: int) -> None:
    x = points(n, width, seed)
    changed = 37.0 * x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] @ rotation(width, seed)
    one, other = vars(measures_of(x)), vars(measures_of(changed))
    for name, value in one.items():
        assert other[name] == (None if value is None else pytest.approx(value, rel=1e-8, abs=1e-8)), name


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(2, 12), seeds)
def test_a_translation_changes_what_the_common_mean_enters_and_nothing_else(n: int, width: int, seed: int) -> None:
    x = points(n, width, seed)
    one, other = vars(measures_of(x)), vars(measures_of(x + 3.0))
    for name in set(one) - {"effective_rank", "mean_cosine", "mean_share"}:
        assert other[name] == (None if one[name] is None else pytest.approx(one[name], rel=1e-8, abs=1e-8)), name


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.floats(0, 3), seeds)
def test_the_figures_lie_within_their_bounds_and_in_their_order(n: int, width: int, decay: float, seed: int) -> None:
    found = measures_of(points(n, width, seed, decay=decay))
    most = found.attainable_centred_rank
    assert found.stable_rank is not None
    assert found.participation_ratio is not None
    assert found.centred_effective_rank is not None
    assert found.effective_rank is not None
    assert found.k90 is not None
    assert found.k95 is not None
    # The Rényi entropies of order infinity, 2 and 1/2 of the variances: the last one bounds that of the singular values.
    assert 1 - 1e-9 <= found.stable_rank <= found.participation_ratio + 1e-9 <= found.centred_effective_rank + 2e-9
    assert found.centred_effective_rank <= most + 1e-9
    assert 1 - 1e-9 <= found.effective_rank <= found.attainable_rank + 1e-9
    assert 1 <= found.k90 <= found.k95 <= most
    assert found.isoscore == pytest.approx((found.participation_ratio - 1) / (width - 1), abs=1e-12)
    assert found.top_share == pytest.approx(1 / found.stable_rank)
    assert -1 / (n - 1) - 1e-9 <= (found.mean_cosine or 0) <= 1 + 1e-9


def test_the_closed_forms() -> None:
    cross = torch.cat([torch.eye(16), -torch.eye(16)]).double()
    found = measures_of(cross)
    for name in ("effective_rank", "centred_effective_rank", "participation_ratio", "stable_rank"):
        assert vars(found)[name] == pytest.approx(16.0), name
    assert (found.k90, found.k95, found.isoscore) == (15, 16, pytest.approx(1.0))
    assert found.mean_cosine == pytest.approx(-1 / 31)
    assert found.alpha == pytest.approx(0.0, abs=1e-9)
    line = torch.linspace(-1, 1, 9).double()[:, None] * torch.ones(5).double()
    found = measures_of(line)
    assert (found.k90, found.isoscore, found.top_share) == (1, pytest.approx(0.0, abs=1e-12), pytest.approx(1.0))
    alone = measures_of(line[:, :1])  # one direction is neither used evenly nor unevenly
    assert (alone.isoscore, alone.participation_ratio) == (None, pytest.approx(1.0))
    values = torch.arange(1, 90).double() ** -0.6
    assert corpus.power_law(values).slope == pytest.approx(1.2)
    assert corpus.power_law(values[:12]).slope is None


# Two clouds ------------------------------------------------------------------------------------------------------------

BETWEEN: dict[str, Callable[..., float]] = {
    "novelty": reference.novelty,
    "cka": reference.cka,
    "unbiased_cka": reference.unbiased_cka,
    "cosine": reference.cosine,
}


@pytest.mark.parametrize(("n", "width"), [(9, 40), (40, 40), (60, 24)])
def test_what_lies_between_two_clouds_is_what_numpy_says(n: int, width: int) -> None:
    x = points(n, width, 1)
    y = x @ rotation(width, 2) * 0.3 + points(n, width, 3)
    z = points(n, width, 4)
    pairs = [(x, y), (y, z), (x, 2 * x)]
    found = compared([cloud_of(a) for a, _ in pairs], [cloud_of(b) for _, b in pairs])
    for (before, after), one in zip(pairs, found, strict=True):
        for name, by_hand in BETWEEN.items():
            assert vars(one)[name] == pytest.approx(by_hand(before.numpy(), after.numpy()), rel=1e-10, abs=1e-10), name


def test_clouds_of_other_points_are_not_compared() -> None:
    x = points(20, 6, 0)
    nothing = corpus.Comparison(None, None, None, None)
    (other,) = compared([cloud_of(x, 0)], [cloud_of(x, 1)])
    (fewer,) = compared([cloud_of(x)], [cloud_of(x[:19])])
    assert (other, fewer) == (nothing, nothing)
    for few in (0, 1):  # one point is no cloud, and has no block to pass for all others
        (alone,) = compared([cloud_of(x[:few])], [cloud_of(2 * x[:few])])
        assert alone == nothing
    (wider,) = compared([cloud_of(x)], [cloud_of(torch.cat([x, x], -1))])
    assert (wider.novelty, wider.cosine) == (None, None)
    assert wider.cka == pytest.approx(1.0)
    (constant,) = compared([cloud_of(x)], [cloud_of(torch.ones(20, 6))])
    assert (constant.novelty, constant.cka) == (None, None)


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 30), st.integers(2, 30), seeds)
def test_the_comparisons_know_what_leaves_a_cloud_alike(n: int, width: int, seed: int) -> None:
    x, y = points(n, width, seed), points(n, width, seed + 1)
    turned = 5 * x @ rotation(width, seed) + 2
    for unbiased in (False, True):
        assert corpus.linear_cka(x, turned, unbiased=unbiased).item() == pytest.approx(1.0, abs=1e-8)
        straight, back = (corpus.linear_cka(*pair, unbiased=unbiased).item() for pair in ((x, y), (y, x)))
        assert straight == pytest.approx(back, abs=1e-8, nan_ok=True)
    assert corpus.subspace_novelty(x, 3 * x + 1).item() <= 0.1 + 1e-9
    assert 0 <= corpus.subspace_novelty(x, y).item() <= 1


def test_only_the_unbiased_one_tells_few_independent_points_apart() -> None:
    x, y = points(20, 400, 0, decay=0.0), points(20, 400, 1, decay=0.0)
    assert corpus.linear_cka(x, y).item() > 0.8
    assert abs(corpus.linear_cka(x, y, unbiased=True).item()) < 0.1


def test_refusals_name_both_shapes() -> None:
    with pytest.raises(InputError, match=r"subspace_novelty: expected two clouds .* got \(3, 4\) and \(3, 5\)"):
        corpus.subspace_novelty(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(InputError, match=r"linear_cka: expected two clouds"):
        corpus.linear_cka(torch.ones(3, 4), torch.ones(2, 4))


def test_the_examples_in_the_docstrings() -> None:
    outcome = doctest.testmod(corpus, extraglobs={"torch": torch})
    assert outcome.failed == 0
    assert outcome.attempted >= 9


def test_memory_is_bounded() -> None:
    cloud = cloud_of(points(8 * WIDEST, 16, 0).float())
    assert cloud.points.untyped_storage().nbytes() == WIDEST * 16 * 4


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (20, 20)])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
def test_singular_values_are_those_of_a_decomposition_however_large_the_mean(
    shape: tuple[int, int], offset: float
) -> None:
    """Against NumPy's decomposition of the points themselves: the Gram matrix of the cloud comes from that of the centred one."""
    x = points(*shape, 5) + offset * points(1, shape[1], 6)
    (found,) = corpus.spectra([cloud_of(x)], [0.0])
    for values, dense in ((found.whole, x.numpy()), (found.centred, x.numpy() - x.numpy().mean(axis=0))):
        expected = np.linalg.svd(dense, compute_uv=False)
        expected = expected[expected > 1e-9 * expected[0]]
        # A Gram matrix is known to eps sigma_1^2, and so the square of every singular value.
        error = np.maximum(1e-10, 10 * EPS * (expected[0] / expected) ** 2)
        np.testing.assert_array_less(np.abs(values.numpy()[: len(expected)] / expected - 1), error)


def beyond(x: Tensor) -> RunningCloud:
    """The cloud of `x` that keeps one point and the second moment: what is known of more points than are kept."""
    centred = x - x.mean(0)
    return RunningCloud(
        len(x), len(x), x.mean(0), torch.nn.functional.normalize(x, dim=-1).sum(0), x[:1], keys(1), centred.mT @ centred
    )


@pytest.mark.parametrize(("part", "count"), [(1.2, 2), (0.8, 1)])
def test_a_second_moment_resolves_what_float64_and_the_format_resolve(part: float, count: int) -> None:
    """Directions below sqrt(d eps) of the largest are lost in a second moment; so is what the format rounds."""
    n, d = 64, 4
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).repeat(n // 4, 1)
    x = torch.zeros(n, d, dtype=torch.float64)
    x[:, 0], x[:, 1] = signs[:, 0], signs[:, 1] * part * math.sqrt(d * EPS)
    (fine,) = corpus.spectra([beyond(x)], [0.0])
    assert int((fine.centred > 0).sum()) == int((fine.whole > 0).sum()) == count
    eps = 1e-3
    x[:, 1] = signs[:, 1]
    x[:, 0] = signs[:, 0] * (1 / eps) * (n**-0.5 + d**-0.5) ** -1 / part
    size = float(x.norm())
    floor = eps * size * (n**-0.5 + d**-0.5)
    x[:, 1] = signs[:, 1] * part * floor / math.sqrt(n)
    (coarse,) = corpus.spectra([beyond(x)], [eps])
    assert int((coarse.centred > 0).sum()) == count


@pytest.mark.parametrize(("part", "spread"), [(1.2, True), (0.8, False)])
def test_points_that_differ_by_less_than_their_rounding_have_no_spread_in_a_second_moment(
    part: float, spread: bool
) -> None:
    n, d, eps = 64, 4, 1e-3
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
    x = torch.ones(n, d, dtype=torch.float64)
    floor = eps * float(x.norm()) * (n**-0.5 + d**-0.5)
    x[:, 1] += signs * part * floor / math.sqrt(n)
    (found,) = corpus.spectra([beyond(x)], [eps])
    assert bool((found.centred > 0).any()) is spread
    assert int((found.whole > 0).sum()) >= 1


def test_the_clouds_of_one_call_hold_no_more_numbers_than_are_decomposed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures are the same however many clouds go together, and none is left out."""
    clouds = [cloud_of(points(6, 4, seed), seed) for seed in range(7)]
    together = corpus_measures(clouds, [EPS] * 7)
    beside = compared(clouds[:-1], clouds[1:])
    for numbers, sizes in ((24, [1] * 7), (50, [2, 2, 2, 1]), (47, [1] * 7), (10, [1] * 7), (24 * 7, [7])):
        monkeypatch.setattr(corpus, "_AT_ONCE", numbers)
        assert [len(places) for places in corpus._alike(clouds)] == sizes
        assert [vars(each) for each in corpus_measures(clouds, [EPS] * 7)] == [pytest.approx(vars(e)) for e in together]
        assert [vars(each) for each in compared(clouds[:-1], clouds[1:])] == [pytest.approx(vars(e)) for e in beside]
    single = [RunningCloud.of(torch.ones(1, 1), keys(1)) for _ in range(8)]
    monkeypatch.setattr(corpus, "_AT_ONCE", 8)
    assert [len(places) for places in corpus._alike(single)] == [8]


def test_a_power_law_takes_the_fourth_to_the_hundredth_variance_and_ten_at_least() -> None:
    values = torch.arange(1, 131).double() ** -0.75
    disturbed = values.clone()
    disturbed[[0, 1, 2, *range(100, 130)]] *= 0.37
    assert corpus.power_law(disturbed) == corpus.power_law(values)
    for place in (3, 99):
        changed = values.clone()
        changed[place] *= 0.99
        assert corpus.power_law(changed).slope != pytest.approx(corpus.power_law(values).slope, rel=1e-9)
    assert corpus.power_law(values[:12]).slope is None
    slope = corpus.power_law(values[:13]).slope
    assert slope == pytest.approx(1.5)


def test_where_nothing_varies_one_direction_holds_all() -> None:
    assert corpus.directions_holding(torch.zeros(2, 3), 0.9).tolist() == [1, 1]


def test_a_share_is_reached_where_only_rounding_is_missing() -> None:
    tenth = torch.full((10,), math.sqrt(0.1), dtype=torch.float64)
    assert corpus.directions_holding(tenth, 0.9).item() == 9
    assert corpus.directions_holding(tenth, 0.9 + 1e-9).item() == 10
    assert corpus.directions_holding(tenth, 0.9 - 1e-9).item() == 9


def test_novelty_counts_outside_of_the_directions_that_hold_nine_tenths() -> None:
    """Three directions with 0.5, 0.39 and 0.11 of the variance: the third is needed for 0.9. With 0.5, 0.4 and 0.1 it is not."""
    corners = torch.tensor([[a, b, c] for a in (1.0, -1.0) for b in (1.0, -1.0) for c in (1.0, -1.0)]).double()
    only_third = corners * torch.tensor([0.0, 0.0, 1.0])
    for shares, novelty in (((0.5, 0.39, 0.11), 0.0), ((0.5, 0.41, 0.09), 1.0)):
        before = corners * torch.tensor(shares).double().sqrt()
        assert corpus.subspace_novelty(before, only_third.double()).item() == pytest.approx(novelty, abs=1e-12)
        wide = torch.cat([before, torch.zeros(8, 9).double()], 1)  # fewer points than dimensions
        third = torch.cat([only_third.double(), torch.zeros(8, 9).double()], 1)
        assert corpus.subspace_novelty(wide, third).item() == pytest.approx(novelty, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 63, 300, 1000])
def test_equal_directions_hold_what_their_number_says(n: int) -> None:
    """k of n hold k/n, whatever order the sum was taken in; and a billionth more takes one more."""
    values = torch.full((n,), math.sqrt(1 / n), dtype=torch.float64)
    for k in {1, n // 3 or 1, n // 2 or 1, n - 1 or 1, n}:
        assert corpus.directions_holding(values, k / n).item() == k
        assert corpus.directions_holding(values * 1e-3, k / n - 1e-9).item() == k
        if k < n:
            assert corpus.directions_holding(values, k / n + 1e-9).item() == k + 1
    rows = torch.stack([values, values * torch.arange(n, 0, -1)])
    assert corpus.directions_holding(rows, 0.5).shape == (2,)


def test_two_clouds_of_a_quarter_of_a_million_numbers_are_decomposed_together() -> None:
    """2^19 at once; a cloud with a second moment goes alone."""
    wide = RunningCloud(
        512, 512, torch.zeros(512), torch.zeros(512), torch.empty(512, 512, device="meta"), torch.zeros(512)
    )
    assert list(corpus._alike([wide] * 5)) == [[0, 1], [2, 3], [4]]
    longer = RunningCloud(
        513, 513, torch.zeros(512), torch.zeros(512), torch.empty(513, 512, device="meta"), torch.zeros(513)
    )
    assert list(corpus._alike([longer] * 2)) == [[0], [1]]
    moments = beyond(points(9, 4, 0))
    assert list(corpus._alike([moments, moments])) == [[0], [1]]


def test_pairs_are_compared_as_many_at_once_as_their_numbers_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair of 6 points has 6 (4 + 3) = 42 numbers."""
    before = [cloud_of(points(6, 4, seed), 0) for seed in range(5)]
    after = [cloud_of(points(6, 3, seed + 9), 0) for seed in range(5)]
    seen: list[int] = []
    whole = corpus._ckas
    monkeypatch.setattr(corpus, "_ckas", lambda x, *others: (seen.append(len(x)), whole(x, *others))[1])
    for numbers, sizes in ((1, [1] * 5), (83, [1] * 5), (84, [2, 2, 1]), (125, [2, 2, 1]), (126, [3, 2]), (10**6, [5])):
        monkeypatch.setattr(corpus, "_AT_ONCE", numbers)
        seen.clear()
        found = compared(before, after)
        assert seen == sizes
        for place, each in enumerate(found):
            assert each.novelty is each.cosine is None  # of other widths
            one = corpus.linear_cka(before[place].points, after[place].points).item()
            assert each.cka == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 6, 9), (2, 3, 9, 4)], ids=str)
def test_batches_are_compared_pair_by_pair(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    y = x + 0.3 * y
    for function in (
        corpus.subspace_novelty,
        corpus.linear_cka,
        lambda a, b: corpus.linear_cka(a, b, unbiased=True),
    ):
        found = function(x, y)
        assert found.shape == (2, 3)
        for place in itertools.product(range(2), range(3)):
            assert found[place].item() == pytest.approx(function(x[place], y[place]).item(), rel=1e-9)


@pytest.mark.parametrize("n", [3, 4, 5, 9])
def test_the_unbiased_alignment_is_the_estimator_of_its_source(n: int) -> None:
    """HSIC_1 of Song et al., equation 5, from kernels without their diagonals; undefined for fewer than four points."""
    x, y = (torch.randn(n, 6, dtype=torch.float64).numpy() for _ in range(2))

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        total = (
            np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        )
        return float(total / (n * (n - 3)))

    found = corpus.linear_cka(torch.tensor(x), torch.tensor(y), unbiased=True).item()
    if n < 4:
        assert math.isnan(found)
        return
    k, m = x @ x.T, y @ y.T
    within = hsic(k, k) * hsic(m, m)
    assert found == pytest.approx(hsic(k, m) / math.sqrt(within) if within > 0 else math.nan, rel=1e-9, nan_ok=True)
    tall = corpus.linear_cka(torch.tensor(x[:, :2]), torch.tensor(y[:, :2]), unbiased=True).item()
    k, m = x[:, :2] @ x[:, :2].T, y[:, :2] @ y[:, :2].T
    within = hsic(k, k) * hsic(m, m)
    assert tall == pytest.approx(hsic(k, m) / math.sqrt(within) if within > 0 else math.nan, rel=1e-9, nan_ok=True)


def test_healthy_clouds_are_decomposed_once_by_their_smaller_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of which a Gram matrix would lose a direction, below a millionth of the largest, by themselves as well."""
    asked: list[tuple[str, int]] = []
    for name in ("eigvalsh", "svdvals"):
        whole = getattr(torch.linalg, name)

        def counted(x: Tensor, name: str = name, whole: Callable[[Tensor], Tensor] = whole) -> Tensor:
            asked.append((name, len(x) * 1000 + min(x.shape[-2:])))
            return whole(x)

        monkeypatch.setattr(torch.linalg, name, counted)
    for n, width in ((5, 9), (9, 5)):
        asked.clear()
        corpus.spectra([cloud_of(points(n, width, seed)) for seed in range(3)], [EPS] * 3)
        assert asked == [("eigvalsh", 3005), ("eigvalsh", 3005)]
    for part, times in ((1.5e-6, 0), (0.7e-6, 2)):
        asked.clear()
        steep = torch.linalg.qr(points(9, 5, 0)).Q * torch.tensor([1.0, 0.5, 0.4, 0.3, part]).double()
        steep = torch.cat([steep, -steep])  # no mean
        found = corpus.spectra([cloud_of(points(18, 5, 1)), cloud_of(steep)], [EPS] * 2)
        assert [each for each in asked if each[0] == "svdvals"] == [("svdvals", 1005)] * times
        expected = np.linalg.svd(steep.numpy(), compute_uv=False)
        np.testing.assert_allclose(found[1].whole.numpy(), expected, rtol=1e-9 if times else 1e-3)
        np.testing.assert_allclose(found[1].centred.numpy(), expected, rtol=1e-9 if times else 1e-3)


def test_what_lies_below_the_rounding_of_the_format_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: (asked.append(len(x)), whole(x))[1])
    steep = torch.linalg.qr(points(9, 5, 0)).Q * torch.tensor([1.0, 0.5, 0.4, 0.3, 1e-9]).double()
    corpus.spectra([cloud_of(steep)], [2.0**-8])
    assert not asked
    corpus.spectra([cloud_of(steep)], [EPS])
    assert asked


def test_means_of_directions_never_exceed_one() -> None:
    """Sizes of single precision, points that all point one way."""
    x = torch.rand(300, 1) * torch.randn(1, 7)
    assert corpus.mean_cosine(cloud_of(x)) <= 1
    assert corpus.mean_cosine(cloud_of(x[:2])) == pytest.approx(1, abs=1e-6)
    assert math.isnan(corpus.mean_cosine(cloud_of(x[:1])))
    one = torch.cat([x[:1], torch.zeros(3, 7)])
    assert math.isnan(corpus.mean_cosine(cloud_of(one)))


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize(("part", "count"), [(1.4, 2), (0.7, 1)])
@pytest.mark.parametrize("shape", [(64, 6), (8, 64)], ids=str)
def test_points_of_an_exact_format_have_the_rounding_of_float64(
    scale: float, part: float, count: int, shape: tuple[int, int]
) -> None:
    """max(n, d) eps sigma_1, 64 roundings of the largest singular value, whatever its size."""
    n, width = shape
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).repeat(n // 4, 1)
    x = torch.zeros(n, width, dtype=torch.float64)
    x[:, 0], x[:, 1] = signs[:, 0], signs[:, 1] * part * 64 * EPS
    (found,) = corpus.spectra([cloud_of(x * scale)], [0.0])
    assert int((found.whole > 0).sum()) == int((found.centred > 0).sum()) == count
    assert found.whole[0].item() == pytest.approx(scale * n**0.5)


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize(("part", "spread"), [(1.2, True), (0.8, False)])
def test_points_that_differ_by_less_than_their_rounding_have_one_direction(
    scale: float, part: float, spread: bool
) -> None:
    n, d, eps = 64, 4, 1e-3
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)
    x = torch.ones(n, d, dtype=torch.float64)
    x[:, 1] += signs * part * eps * float(x.norm()) * (n**-0.5 + d**-0.5) / math.sqrt(n)
    (found,) = corpus.spectra([cloud_of(x * scale)], [eps])
    assert bool((found.centred > 0).any()) is spread
    assert found.whole[0].item() == pytest.approx(float((x * scale).norm()), rel=1e-3)
    assert int((found.whole > 0).sum()) == 1 + spread


@pytest.mark.parametrize(("within", "without"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)])
def test_a_cosine_needs_two_lengths(within: float, without: float) -> None:
    """Estimates without bias may be 0 or negative: then there is no cosine, and it is not infinite."""
    assert corpus._cosine(torch.tensor(0.5), torch.tensor(within), torch.tensor(without)).isnan()
    for one, other in ((0.25, 4.0), (4.0, 0.25), (1e-6, 1e6)):
        assert corpus._cosine(torch.tensor(0.5), torch.tensor(one), torch.tensor(other)).item() == pytest.approx(0.5)


def test_each_cloud_has_the_rounding_of_its_own_format() -> None:
    x = torch.linalg.qr(points(9, 5, 0)).Q * torch.tensor([1.0, 0.5, 0.1, 0.05, 0.04]).double()
    x = torch.cat([x, -x])
    formats = [EPS, 2.0**-8, 2.0**-4]
    together = corpus.spectra([cloud_of(x), cloud_of(2 * x), cloud_of(x)], formats)
    for place, (scale, eps) in enumerate(zip((1, 2, 1), formats, strict=True)):
        values = scale * np.linalg.svd(x.numpy(), compute_uv=False)
        cut = eps * np.linalg.norm(values) * (18**-0.5 + 5**-0.5)
        expected = np.where(values > cut, values, 0)
        np.testing.assert_allclose(together[place].whole.numpy(), expected, rtol=1e-9)
        np.testing.assert_allclose(together[place].centred.numpy(), expected, rtol=1e-9)
    assert [int((each.whole > 0).sum()) for each in together] == [5, 5, 4]


def test_no_share_is_below_zero() -> None:
    """Where nothing but rounding is left of it: points about the origin, and clouds with nothing new."""
    for seed in range(30):
        x = points(7, 5, seed, mean=0.0)
        share = measures_of(torch.cat([x, -x])).mean_share
        assert share is not None
        assert 0 <= share < 1e-12
        line = torch.outer(x[:, 0], x[0])
        for cloud in (line, torch.cat([line, line], 1)):  # more points than dimensions, and fewer
            assert 0 <= corpus.subspace_novelty(cloud, 3 * cloud + 1).item() < 1e-12


def test_at_the_resolution_of_a_second_moment_itself_nothing_is_resolved() -> None:
    """sqrt(4 eps) = 2^-25 of the largest; numbers without rounding."""
    nothing = torch.zeros(4, dtype=torch.float64)
    for square, count in ((2.0**-50, 1), (2.0**-48, 2)):
        scatter = torch.diag(torch.tensor([1.0, square, 0.0, 0.0], dtype=torch.float64))
        cloud = RunningCloud(4, 4, nothing, nothing, torch.zeros(0, 4), torch.zeros(0), scatter)
        ((whole, centred),) = corpus.spectra([cloud], [0.0])
        assert int((whole > 0).sum()) == int((centred > 0).sum()) == count


def test_a_point_at_the_mean_adds_no_direction() -> None:
    """Its row of the Gram matrix is 0, and so is an eigenvalue, exactly: nothing is divided by it."""
    line = torch.zeros(3, 5)
    line[0, 0], line[1, 0] = 1, -1
    assert corpus.subspace_novelty(line, 2 * line).item() == pytest.approx(0, abs=1e-12)
    assert corpus.subspace_novelty(line, line.roll(1, -1)).item() == pytest.approx(1)


def test_batches_of_other_points_are_refused() -> None:
    x = torch.randn(2, 6, 4)
    for other in (torch.randn(2, 5, 4), torch.randn(3, 6, 4)):
        with pytest.raises(InputError, match="same axes"):
            corpus.linear_cka(x, other)
    assert corpus.linear_cka(x, torch.randn(2, 6, 3)).shape == (2,)
