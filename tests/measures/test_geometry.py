"""Token clouds: against NumPy and exact fractions, the laws of the measures, and both routes to them."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import geometry as reference
from uncollapse.errors import InputError
from uncollapse.measures import geometry
from uncollapse.measures.geometry import CloudMeasures, WithoutMassiveTokens, cloud_measures
from uncollapse.measures.gram import column_gram

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RANKS = ["rank", "affine_rank", "attainable_rank", "attainable_affine_rank"]
SENSITIVE = ["effective_rank", "stable_rank", "participation_ratio", "consensus_distance", "token_similarity"]
MEASURES = [*RANKS, "rank_gap", *SENSITIVE]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
seeds = st.integers(0, 2**31)


def single(name: str, x: Tensor, mask: Tensor | None = None, precision: torch.dtype | None = None) -> Tensor:
    """The measure from its own function: singular values, no Gram."""
    if name == "attainable_affine_rank":
        return geometry.attainable_rank(x, mask, affine=True)
    if name in ("rank", "affine_rank", "rank_gap"):
        return getattr(geometry, name)(x, mask, precision=precision)
    return getattr(geometry, name)(x, mask)


def all_single(x: Tensor, mask: Tensor | None = None, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: single(name, x, mask, precision).double() for name in MEASURES}


def all_fast(x: Tensor, mask: Tensor | None = None, precision: torch.dtype | None = None) -> dict[str, Tensor]:
    measures = cloud_measures(x, mask, precision=precision)
    return {name: getattr(measures, name) for name in MEASURES}


both_routes = pytest.mark.parametrize("measured", [all_single, all_fast], ids=["singular values", "Gram"])


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-9) -> None:
    for name in MEASURES:
        if name == "rank_gap":  # below the cut lies rounding, which two routes need not share
            clear = torch.as_tensor(other[name]).isfinite() & (torch.as_tensor(other[name]) < 1e6)
            one_gap, other_gap = (torch.as_tensor(part[name])[clear] for part in (one, other))
            torch.testing.assert_close(one_gap, other_gap, rtol=1e-6, atol=0, equal_nan=True)
            continue
        torch.testing.assert_close(
            torch.as_tensor(one[name]),
            torch.as_tensor(other[name]),
            rtol=tolerance,
            atol=1e-16 if name == "consensus_distance" else 1e-13,
            equal_nan=True,
            check_dtype=False,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def orthogonal(d: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q


def cloud(kind: str, n: int, d: int, dtype: torch.dtype) -> Tensor:
    """Clouds as they come, and as they collapse."""
    generator = torch.Generator().manual_seed(n * 1000 + d)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    token = torch.randn(d, dtype=torch.float64, generator=generator)
    r = min(n, d) // 3
    made = {
        "healthy": noise + 0.5 * token,
        "rank-deficient": noise[:, :r] @ torch.randn(r, d, dtype=torch.float64, generator=generator),
        "repeated tokens": noise[torch.randint(n // 2, (n,), generator=generator)],
        "flat off the origin": torch.cat([noise[:, :r], torch.ones(n, 1), torch.zeros(n, d - r - 1)], 1),
        "consensus": token + 1e-12 * noise,
        "near consensus": token + 1e-3 * noise,
        "one direction": torch.outer(noise[:, 0].abs() + 0.1, token),
        "massive token": noise * torch.ones(n, 1).index_fill(0, torch.tensor([1]), 1000.0),
        "decaying": noise * 0.5 ** torch.arange(d, dtype=torch.float64),
    }[kind]
    return made.to(dtype)


KINDS = [
    "healthy",
    "rank-deficient",
    "repeated tokens",
    "flat off the origin",
    "consensus",
    "near consensus",
    "one direction",
    "massive token",
    "decaying",
]
SHAPES = [(6, 20), (20, 6), (12, 12), (13, 12), (40, 64)]


@both_routes
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_equals_its_definition_written_out(
    measured: Callable[..., dict[str, Tensor]], dtype: torch.dtype, kind: str
) -> None:
    for n, d in SHAPES:
        x = cloud(kind, n, d, dtype)
        eps = torch.finfo(dtype).eps
        expected = {name: float(getattr(reference, name)(x.double().numpy(), eps)) for name in MEASURES}
        assert_same(measured(x), {name: torch.tensor(value).double() for name, value in expected.items()}, 1e-7)


@pytest.mark.parametrize("kind", ["healthy", "near consensus", "decaying"])
def test_wide_grams_are_put_together_from_parts(kind: str) -> None:
    for n, d in [(230, 205), (205, 230), (204, 204)]:
        x = cloud(kind, n, d, torch.float32)
        assert_same(all_fast(x[None], None), all_single(x[None], None), 1e-7)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_both_routes_agree_on_a_padded_batch(dtype: torch.dtype, kind: str) -> None:
    for n, d in SHAPES:
        x = torch.stack([cloud(kind, n, d, dtype), cloud("healthy", n, d, dtype), cloud(kind, n, d, dtype).flip(0)])
        mask = torch.ones(3, n, dtype=torch.bool)
        mask[0, n - 2 :] = False
        mask[2, :2] = False
        assert_same(all_fast(x, mask), all_single(x, mask), 1e-7)


@pytest.mark.parametrize("step", [3, 32])
def test_grouping_unequal_lengths_as_on_an_accelerator_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    x = torch.randn(8, 14, 20)
    mask = torch.arange(14) < torch.tensor([3, 5, 0, 14, 9, 9, 1, 2]).unsqueeze(-1)
    x[~mask] = math.nan
    alone = all_fast(x, mask)
    calls = Calls(monkeypatch)
    monkeypatch.setattr(geometry, "_length_step", lambda device: step)
    assert_same(all_fast(x, mask), alone)
    assert calls.times["eigvalsh"] == {3: 6, 32: 3}[step]


@both_routes
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_ranks_and_energies_of_integer_matrices_are_exact(
    measured: Callable[..., dict[str, Tensor]], n: int, d: int, data: st.DataObject
) -> None:
    entries = st.lists(st.integers(-3, 3), min_size=d, max_size=d)
    rows = data.draw(st.lists(entries, min_size=n, max_size=n))
    exact = [[Fraction(entry) for entry in row] for row in rows]
    for dtype in (torch.float32, torch.float64):
        values = measured(torch.tensor(rows, dtype=dtype))
        assert values["rank"] == reference.exact_rank(exact)
        assert values["affine_rank"] == reference.exact_affine_rank(exact)
        if any(map(any, rows)):
            assert values["participation_ratio"] == pytest.approx(float(reference.exact_participation_ratio(exact)))
            if n > 1:
                distance = float(reference.exact_squared_consensus_distance(exact))
                assert values["consensus_distance"] ** 2 == pytest.approx(distance, rel=1e-9, abs=1e-30)


# Laws


@both_routes
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 9), seeds)
def test_the_ranks_come_in_their_order(
    measured: Callable[..., dict[str, Tensor]], n: int, d: int, r: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    r = max(1, min(r, n, d))
    x = torch.randn(n, r, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(r, d, dtype=torch.float64, generator=generator)
    values = measured(x)
    chain = [
        1.0,
        values["stable_rank"].item(),
        values["participation_ratio"].item(),
        reference.energy_entropy_rank(x.numpy()),
        values["effective_rank"].item(),
        values["rank"].item(),
        values["attainable_rank"].item(),
    ]
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(chain)), chain
    assert values["rank"] - values["affine_rank"] in (0, 1)
    assert values["affine_rank"] <= values["attainable_affine_rank"]
    assert 0 <= values["consensus_distance"] <= 1 + 1e-12
    assert -1 / (n - 1) - 1e-12 <= values["token_similarity"] <= 1 + 1e-12


@both_routes
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(-12, 12), seeds)
def test_permutation_rotation_and_scale_change_nothing(
    measured: Callable[..., dict[str, Tensor]], n: int, d: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    moved = 10.0**exponent * x[torch.randperm(n, generator=generator)] @ orthogonal(d, generator)
    assert_same(measured(moved), measured(x), 1e-8)


@both_routes
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(2, 12), st.integers(1, 6), st.sampled_from([math.nan, math.inf, 7.0]), seeds)
def test_padding_changes_nothing_wherever_it_is_and_whatever_it_holds(
    measured: Callable[..., dict[str, Tensor]], n: int, d: int, pads: int, held: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, d, generator=generator)
    scattered = torch.randperm(n + pads, generator=generator)[:n].sort().values
    places = torch.stack([torch.arange(n), torch.arange(pads, n + pads), scattered])  # right, left, anywhere
    x = torch.full((3, n + pads, d), held)
    mask = torch.zeros(3, n + pads, dtype=torch.bool)
    for row, place in enumerate(places):
        x[row, place] = tokens
        mask[row, place] = True
    alone = {name: value.expand(3) for name, value in measured(tokens).items()}
    assert_same(measured(x, mask), alone)
    assert cloud_measures(x, mask).tokens.tolist() == [n, n, n]
    assert geometry.rank_tolerance(x, mask).tolist() == pytest.approx([geometry.rank_tolerance(tokens).item()] * 3)


@both_routes
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), seeds)
def test_for_equal_norms_similarity_and_consensus_say_the_same(
    measured: Callable[..., dict[str, Tensor]], n: int, d: int, seed: int
) -> None:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1
    values = measured(x / x.norm(dim=-1, keepdim=True))
    expected = 1 - n / (n - 1) * values["consensus_distance"].item() ** 2
    assert values["token_similarity"].item() == pytest.approx(expected, abs=1e-12)


@both_routes
def test_similarity_ignores_the_length_of_a_token_and_tokens_without_direction(
    measured: Callable[..., dict[str, Tensor]],
) -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    lengths = torch.tensor([1.0, 1e-3, 40.0, 2.0, 7.0]).unsqueeze(-1)
    expected = measured(x)["token_similarity"].item()
    assert measured(x * lengths)["token_similarity"].item() == pytest.approx(expected, abs=1e-12)
    with_zeros = torch.cat([x, torch.zeros(3, 8)])
    assert measured(with_zeros)["token_similarity"].item() == pytest.approx(expected, abs=1e-12)


# Closed forms

N, D = 6, 9
COMMON = 2 * torch.ones(D)
CLOSED_FORMS = {
    "orthonormal": (torch.eye(N, D), [6, 5, 6, 6, 6, math.sqrt(5 / 6), 0]),
    "consensus": (COMMON.expand(N, D), [1, 0, 1, 1, 1, 0, 1]),
    "one direction": (torch.outer(torch.tensor([1.0, 1, 1, -1, -1, -1]), COMMON), [1, 1, 1, 1, 1, 1, -1 / 5]),
    "two orthogonal directions": (torch.eye(2, D).repeat(3, 1), [2, 1, 2, 2, 2, math.sqrt(1 / 2), 2 / 5]),
    "two energies": (
        torch.diag(torch.tensor([2.0, 1.0])),
        [2, 1, 27 ** (1 / 3) / 4 ** (1 / 3), 1.25, 25 / 17, None, 0],
    ),
}


@both_routes
@dtypes
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(measured: Callable[..., dict[str, Tensor]], dtype: torch.dtype, name: str) -> None:
    x, expected = CLOSED_FORMS[name]
    values = measured(x.to(dtype))
    for measure, value in zip(["rank", "affine_rank", *SENSITIVE], expected, strict=True):
        if value is not None:
            assert values[measure].item() == pytest.approx(value, abs=1e-12), measure


def test_many_more_tokens_than_width_span_it_affinely() -> None:
    x = torch.randn(3, 50, 7)
    assert cloud_measures(x).affine_rank.tolist() == [7, 7, 7]
    on_a_plane = x.clone()
    on_a_plane[1, :, 3] = 5.0
    assert cloud_measures(on_a_plane).affine_rank.tolist() == [7, 6, 7]
    assert cloud_measures(on_a_plane).rank.tolist() == [7, 7, 7]


# Tolerance


@both_routes
@dtypes
def test_rounding_noise_at_consensus_is_no_direction(
    measured: Callable[..., dict[str, Tensor]], dtype: torch.dtype
) -> None:
    eps = torch.finfo(dtype).eps
    token = torch.randn(64, dtype=torch.float64)
    x = (token * (1 + eps * (torch.rand(128, 64, dtype=torch.float64) - 0.5))).to(dtype)
    assert np.linalg.matrix_rank(reference.centred(x.double().numpy())) > 60  # the noise is there, and of full rank
    values = measured(x)
    assert (values["rank"].item(), values["affine_rank"].item()) == (1, 0)
    x[0, 0] += 400 * eps * x.double().norm()  # and a direction well above it is seen
    values = measured(x)
    assert values["affine_rank"] == 1


@both_routes
def test_precision_is_that_of_the_model_not_of_the_tensor(measured: Callable[..., dict[str, Tensor]]) -> None:
    token = torch.randn(64)
    rounded = (token * (1 + 0.01 * torch.rand(32, 64))).bfloat16().float()
    assert measured(rounded)["affine_rank"] == 31
    assert measured(rounded, precision=torch.bfloat16)["affine_rank"] == 0


@both_routes
def test_a_healthy_bfloat16_cloud_keeps_its_rank(measured: Callable[..., dict[str, Tensor]]) -> None:
    values = measured(torch.randn(60, 384).bfloat16())
    assert (values["rank"].item(), values["affine_rank"].item()) == (60, 59)


@dtypes
def test_rank_tolerance_is_its_formula(dtype: torch.dtype) -> None:
    for n, d in SHAPES:
        x = cloud("healthy", n, d, dtype)
        expected = reference.rank_tolerance(x.double().numpy(), torch.finfo(dtype).eps)
        assert geometry.rank_tolerance(x).item() == pytest.approx(expected, rel=1e-12)


@both_routes
def test_rank_gap_at_the_cut(measured: Callable[..., dict[str, Tensor]]) -> None:
    x = torch.diag(torch.tensor([4.0, 2.0, 1e-9, 5e-10], dtype=torch.float64))
    assert measured(x, precision=torch.float32)["rank_gap"].item() == pytest.approx(2e9)
    assert measured(x, precision=torch.float64)["rank_gap"].item() == math.inf


@both_routes
@pytest.mark.parametrize("n", [3, 128])
@pytest.mark.parametrize("distance", [1e-5, 1e-7, 1e-12, 1e-15])
def test_a_deep_consensus_is_measured_to_nine_digits(
    measured: Callable[..., dict[str, Tensor]], n: int, distance: float
) -> None:
    x = torch.randn(8, dtype=torch.float64) + distance * torch.randn(n, 8, dtype=torch.float64)
    rows = [[Fraction(entry) for entry in row] for row in x.tolist()]
    expected = math.sqrt(reference.exact_squared_consensus_distance(rows))
    assert 0.1 * distance < expected < 10 * distance
    assert measured(x)["consensus_distance"].item() == pytest.approx(expected, rel=1e-9, abs=0)
    gram = (x @ x.T).numpy()
    naive = 1 - gram.sum() / (n * np.trace(gram))
    assert abs(naive - expected**2) > 1e-8 * expected**2  # the difference of sums, which this must not be


# The workhorse


class Calls:
    """How often LAPACK was asked, and for how many matrices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = {"eigvalsh": 0, "svdvals": 0}
        self.matrices = dict(self.times)
        for name in self.matrices:
            monkeypatch.setattr(torch.linalg, name, self.counted(name, getattr(torch.linalg, name)))

    def counted(self, name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(matrix: Tensor) -> Tensor:
            self.times[name] += 1
            self.matrices[name] += matrix.shape[:-2].numel()
            return function(matrix)

        return call


@pytest.mark.parametrize("shape", [(5, 20, 48), (5, 48, 20)])
def test_healthy_clouds_cost_one_decomposition_each(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    x = torch.randn(shape)
    calls = Calls(monkeypatch)
    measures = cloud_measures(x)
    assert calls.matrices == {"eigvalsh": 5, "svdvals": 0}
    for name in SENSITIVE:
        assert torch.equal(getattr(measures, name), getattr(measures.without_massive, name))
    assert measures.without_massive.tokens_left_out.tolist() == [0] * 5


def test_only_the_sequences_the_gram_cannot_see_are_decomposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 20, 48, dtype=torch.float64)
    x[2] = cloud("consensus", 20, 48, torch.float64)
    x[3, 1] = x[3, 0]
    calls = Calls(monkeypatch)
    measures = cloud_measures(x)
    assert measures.rank.tolist() == [20, 20, 20, 19, 20]  # 1e-12 is far above float64's rounding
    assert measures.affine_rank.tolist() == [19, 19, 19, 18, 19]
    assert calls.matrices == {"eigvalsh": 6, "svdvals": 3}  # X of both; CX only where the rank of X leaves it open


def test_a_low_precision_rank_costs_a_second_spectrum_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 48) * 0.6 ** torch.arange(20).unsqueeze(-1)  # to 6e-5: below bfloat16 only
    calls = Calls(monkeypatch)
    assert 5 < cloud_measures(x, precision=torch.bfloat16, massive_tokens=0).affine_rank < 18
    assert calls.matrices == {"eigvalsh": 2, "svdvals": 0}


@pytest.mark.parametrize("side", [-1, 1])
def test_a_singular_value_at_the_tolerance_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    x = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    for _ in range(5):
        x[1, 1] = geometry.rank_tolerance(x, precision=torch.bfloat16) * (1 + side * 1e-12)
    calls = Calls(monkeypatch)
    assert cloud_measures(x, precision=torch.bfloat16).rank == {-1: 1, 1: 2}[side]
    assert calls.matrices["svdvals"] >= 1


def test_one_massive_token_hides_the_others_and_is_left_out() -> None:
    x = torch.randn(64, 128, dtype=torch.float64)
    x[5] *= 1000
    measures = cloud_measures(x)
    rest = torch.cat([x[:5], x[6:]])
    assert measures.rank == 64
    assert measures.stable_rank.item() == pytest.approx(1.0, abs=1e-3)
    assert measures.consensus_distance.item() == pytest.approx(math.sqrt(1 - 1 / 64), abs=1e-3)
    assert measures.without_massive.tokens_left_out == 1
    assert measures.without_massive.stable_rank > 15
    for name in SENSITIVE:
        expected = getattr(reference, name)(rest.numpy(), 0.0)
        assert getattr(measures.without_massive, name).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(4, 12, 30), (4, 30, 12)])
def test_massive_tokens_are_left_out_of_their_own_sequence_only(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    x[1, 0] *= 500
    x[3, :2] *= 300
    x[3, -1] = math.nan
    mask = torch.ones(shape[:2], dtype=torch.bool)
    mask[3, -1] = False
    measures = cloud_measures(x, mask).without_massive
    assert measures.tokens_left_out.tolist() == [0, 1, 0, 2]
    kept = mask.clone()
    kept[1, 0] = kept[3, :2] = False
    for name in SENSITIVE:
        torch.testing.assert_close(getattr(measures, name), single(name, x, kept), rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), seeds)
def test_a_number_of_tokens_to_leave_out_takes_the_largest(count: int, seed: int) -> None:
    x = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([True] * 6 + [False])
    measures = cloud_measures(x, mask, massive_tokens=count).without_massive
    assert measures.tokens_left_out == min(count, 6)
    by_norm = sorted(range(6), key=lambda i: -x[i].norm().item())
    rest = x[by_norm[count:]] if count < 6 else x[:1] * 0
    for name in SENSITIVE:
        torch.testing.assert_close(
            getattr(measures, name), single(name, rest).double(), rtol=1e-9, atol=1e-12, equal_nan=True
        )


def test_the_rule_for_massive_tokens_is_ten_times_the_lower_median() -> None:
    lengths = torch.tensor([[1.0, 1.0, 2.0, 9.9], [1.0, 1.0, 2.0, 10.1], [1.0, 3.0, 11.0, 40.0], [0.0, 0.0, 0.0, 1.0]])
    expected = [0, 1, 1, 0]
    x = lengths.unsqueeze(-1) * torch.eye(4)
    assert cloud_measures(x).without_massive.tokens_left_out.tolist() == expected
    padded = torch.nn.functional.pad(x, (0, 0, 0, 5), value=1e4)
    assert (
        cloud_measures(padded, torch.arange(9).lt(4).expand(4, 9)).without_massive.tokens_left_out.tolist() == expected
    )


def test_leading_axes_and_padding_come_back_in_place() -> None:
    x = torch.randn(2, 3, 9, 5, 40)
    mask = torch.rand(2, 3, 9, 5) > 0.3
    measures = cloud_measures(x, mask)
    for i, j, k in np.ndindex(2, 3, 9):
        tokens = x[i, j, k][mask[i, j, k]]
        assert measures.tokens[i, j, k] == len(tokens)
        if len(tokens) > 1:
            expected = reference.effective_rank(tokens.double().numpy(), 0.0)
            assert measures.effective_rank[i, j, k].item() == pytest.approx(expected, rel=1e-9)


def test_results_are_float64_and_ranks_of_the_single_measures_integers() -> None:
    x = torch.randn(2, 4, 6, requires_grad=True)
    measures = cloud_measures(x)
    fields = dataclasses.asdict(measures)
    fields |= fields.pop("without_massive")
    assert all(value.dtype == torch.float64 and value.shape == (2,) for value in fields.values())
    assert not any(value.requires_grad for value in fields.values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        measures.rank = x  # type: ignore[misc]
    for name in ("rank", "affine_rank", "attainable_rank"):
        assert single(name, x).dtype == torch.int64
    assert all(single(name, x.bfloat16()).dtype == torch.float64 for name in SENSITIVE)


def test_no_sequences_at_all() -> None:
    x, mask = torch.zeros(0, 4, 6), torch.ones(0, 4, dtype=torch.bool)
    for measures in (cloud_measures(x), cloud_measures(x, mask), cloud_measures(x.mT)):
        assert measures.rank.shape == measures.without_massive.stable_rank.shape == (0,)
    assert all(single(name, x, mask).shape == (0,) for name in MEASURES)


@both_routes
@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_the_ends_of_float32_neither_overflow_nor_vanish(
    measured: Callable[..., dict[str, Tensor]], size: float
) -> None:
    x = torch.rand(6, 10) + 0.5 * torch.eye(6, 10)
    assert_same(measured(x * size), measured(x), 1e-5)


# Where there is nothing to say

NAN = math.nan


@both_routes
def test_zero_single_masked_and_constant_clouds(measured: Callable[..., dict[str, Tensor]]) -> None:
    x = torch.randn(4, 5, 8)
    x[0] = 0
    x[3] = x[3, :1]
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 1:] = False
    mask[2] = False
    for shaped in (x, torch.nn.functional.pad(x, (0, 0, 0, 7))):
        padded = torch.nn.functional.pad(mask, (0, shaped.shape[1] - 5))
        values = {name: value.tolist() for name, value in measured(shaped, padded).items()}
        assert values["rank"] == [0, 1, 0, 1]
        assert values["affine_rank"] == [0, 0, 0, 0]
        assert values["attainable_rank"] == [5, 1, 0, 5]
        assert values["attainable_affine_rank"] == [4, 0, 0, 4]
        for name in ("effective_rank", "stable_rank", "participation_ratio"):
            assert values[name] == pytest.approx([NAN, 1, NAN, 1], nan_ok=True, abs=1e-6)
        assert values["consensus_distance"] == pytest.approx([NAN, NAN, NAN, 0], nan_ok=True, abs=1e-30)
        assert values["token_similarity"] == pytest.approx([NAN, NAN, NAN, 1], nan_ok=True)
        assert values["rank_gap"][1] == math.inf
        assert math.isnan(values["rank_gap"][0])
        assert math.isnan(values["rank_gap"][2])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 4, 10), (3, 10, 4)])
@pytest.mark.parametrize("massive_tokens", [None, 1])
def test_a_broken_token_makes_its_sequence_nan_and_no_other(
    broken: float, shape: tuple[int, int, int], massive_tokens: int | None
) -> None:
    x = torch.randn(shape)
    sound = cloud_measures(x, massive_tokens=massive_tokens)
    x[1, 2, 3] = broken
    measures = cloud_measures(x, massive_tokens=massive_tokens)
    for field in dataclasses.fields(CloudMeasures):
        if field.name in ("tokens", "without_massive"):
            continue
        value, before = getattr(measures, field.name), getattr(sound, field.name)
        assert value[1].isnan(), field.name
        assert torch.equal(value[[0, 2]], before[[0, 2]]), field.name
    for field in dataclasses.fields(WithoutMassiveTokens):
        value, before = getattr(measures.without_massive, field.name), getattr(sound.without_massive, field.name)
        assert value[1].isnan(), field.name
        assert torch.equal(value[[0, 2]], before[[0, 2]]), field.name
    assert measures.tokens.tolist() == [shape[1]] * 3
    for name in [*SENSITIVE, "rank_gap"]:
        assert single(name, x).isnan().tolist() == [False, True, False], name
    assert geometry.rank_tolerance(x).isnan().tolist() == [False, True, False]


# Spans


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(6, 12), seeds)
def test_out_of_span_energy_is_what_least_squares_leaves(n: int, m: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, d, dtype=torch.float64, generator=generator)
    embeddings = torch.cat([embeddings, embeddings[:1] * 2])  # a repeated direction
    update = torch.randn(m, d, dtype=torch.float64, generator=generator)
    energy = geometry.out_of_span_energy(update, embeddings)
    assert energy.item() == pytest.approx(reference.out_of_span_energy(update.numpy(), embeddings.numpy()), abs=1e-12)
    null = geometry.null_out_of_span_energy(update.T @ update, embeddings)
    assert null.item() == pytest.approx(energy.item(), abs=1e-12)
    inside = geometry.null_out_of_span_energy(embeddings.T @ embeddings, embeddings)
    assert 0 <= inside.item() < 1e-12
    isotropic = geometry.null_out_of_span_energy(torch.eye(d), embeddings)
    assert isotropic.item() == pytest.approx(1 - n / d)


def test_spans_are_masked_batched_and_may_be_given() -> None:
    x, update = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 2 + [True] * 3])
    x[~mask] = math.nan
    update[~mask] = math.nan
    energy = geometry.out_of_span_energy(update, x, mask)
    for i in range(3):
        expected = reference.out_of_span_energy(update[i, mask[i]].double().numpy(), x[i, mask[i]].double().numpy())
        assert energy[i].item() == pytest.approx(expected, rel=1e-9)
    basis = geometry.row_space(x, mask)
    assert (basis.norm(dim=-1) > 0.5).sum(-1).tolist() == [5, 3, 3]
    torch.testing.assert_close(geometry.out_of_span_energy(update, mask=mask, basis=basis), energy)
    moment = torch.eye(16)
    expected = geometry.null_out_of_span_energy(moment, x, mask)
    assert expected.tolist() == pytest.approx([1 - 5 / 16, 1 - 3 / 16, 1 - 3 / 16])
    torch.testing.assert_close(geometry.null_out_of_span_energy(moment, basis=basis), expected)
    assert geometry.out_of_span_energy(update, x[:, :2], mask, mask[:, :2]).shape == (3,)


def test_attention_stays_in_the_span_only_if_its_weights_keep_it() -> None:
    x = torch.randn(6, 20, dtype=torch.float64)
    pattern = torch.randn(6, 6, dtype=torch.float64).softmax(-1)
    assert geometry.out_of_span_energy(3 * pattern @ x, x).item() < 1e-25
    assert geometry.out_of_span_energy(pattern @ x @ torch.randn(20, 20, dtype=torch.float64), x).item() > 0.3


def test_no_out_of_span_energy_where_nothing_can_lie_outside() -> None:
    x = torch.randn(2, 9, 8)
    x[1, :, 0] = 0  # spans seven of eight dimensions
    update = torch.randn(2, 9, 8)
    assert geometry.out_of_span_energy(update, x).isnan().tolist() == [True, False]
    assert geometry.null_out_of_span_energy(torch.eye(8), x).isnan().tolist() == [True, False]
    assert geometry.out_of_span_energy(update * 0, x).isnan().all()
    assert geometry.out_of_span_energy(update.index_fill(0, torch.tensor([1]), NAN), x).isnan().all()


# Innovation


def test_innovation_is_the_held_out_residual_of_least_squares() -> None:
    x = torch.randn(200, 6, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(6, 3, dtype=torch.float64)) + 5
    drawn = torch.randperm(200, generator=torch.Generator().manual_seed(4)).tolist()
    expected = reference.nonlinear_innovation(x.numpy(), y.numpy(), drawn[:50], drawn[50:])
    assert 0.05 < expected < 0.9
    assert geometry.nonlinear_innovation(x, y, seed=4).item() == pytest.approx(expected, rel=1e-9)
    assert geometry.nonlinear_innovation(x, y, seed=5).item() != pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), seeds)
def test_an_affine_map_has_no_innovation_even_from_a_degenerate_input(d: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, d, generator=generator)
    x = torch.cat([x, x.sum(-1, keepdim=True), torch.ones(80, 1)], -1)  # dependent features, as after a norm layer
    y = x.double() @ torch.randn(d + 2, width, dtype=torch.float64, generator=generator) + 3
    assert geometry.nonlinear_innovation(x, y).item() < 1e-9
    noise = torch.randn(80, width, dtype=torch.float64, generator=generator)
    assert geometry.nonlinear_innovation(x, noise).item() > 0.5


def test_attention_with_its_patterns_frozen_is_affine_and_an_mlp_is_not() -> None:
    heads, n, d = 2, 40, 6
    x = torch.randn(5, n, d, dtype=torch.float64)
    patterns = torch.randn(5, heads, n, n, dtype=torch.float64).softmax(-1)
    mixed = (patterns @ x.unsqueeze(1)).transpose(1, 2).flatten(-2)  # [A_1 X, A_2 X], all tokens pooled
    output = mixed @ torch.randn(heads * d, d, dtype=torch.float64) + torch.randn(d, dtype=torch.float64)
    regressors, outputs = mixed.flatten(0, 1), output.flatten(0, 1)
    assert geometry.nonlinear_innovation(regressors, outputs).item() < 1e-20
    hidden = torch.relu(x.flatten(0, 1) @ torch.randn(d, 4 * d, dtype=torch.float64))
    mlp = hidden @ torch.randn(4 * d, d, dtype=torch.float64)
    assert geometry.nonlinear_innovation(x.flatten(0, 1), mlp).item() > 0.1


def test_innovation_is_masked_and_batched() -> None:
    x, mask = torch.randn(2, 60, 4), torch.ones(2, 60, dtype=torch.bool)
    y = x.square()
    x[1, :20] = math.nan
    mask[1, :20] = False
    values = geometry.nonlinear_innovation(x, y, mask)
    assert values.shape == (2,)
    assert values[1].item() == pytest.approx(geometry.nonlinear_innovation(x[1, 20:], y[1, 20:]).item())
    x[0, 0, 0] = math.inf
    assert geometry.nonlinear_innovation(x, y, mask).isnan().tolist() == [True, False]
    assert geometry.nonlinear_innovation(x[1, 20:], torch.rand(20, dtype=torch.float64).expand(40, 20)).isnan()


# Errors

CLOUD = torch.randn(2, 3, 8)
ERRORS = {
    "token ids": (
        lambda: geometry.rank(torch.ones(2, 3, dtype=torch.long)),
        r"^rank: .*\(\*batch, token, width\).*int64",
    ),
    "one vector": (
        lambda: geometry.effective_rank(torch.ones(3)),
        r"^effective_rank: .*\(\*batch, token, width\).*\(3,\)",
    ),
    "no width": (lambda: cloud_measures(torch.ones(3, 0)), r"^cloud_measures: .*\(3, 0\)"),
    "0/1 mask": (
        lambda: cloud_measures(CLOUD, torch.ones(2, 3)),
        r"True = real token, got torch.float32\..*\.bool\(\)",
    ),
    "other mask": (lambda: geometry.stable_rank(CLOUD, torch.ones(2, 4).bool()), r"\(2, 3\), got shape \(2, 4\)"),
    "int precision": (lambda: geometry.rank(CLOUD, precision=torch.int8), r"precision, got torch.int8"),
    "left out < 0": (lambda: cloud_measures(CLOUD, massive_tokens=-1), r"at least 0, got -1"),
    "broken rank": (lambda: geometry.rank(CLOUD / torch.tensor([[[1.0]], [[0.0]]])), r"^rank: .*batch index \(1,\)"),
    "broken one": (lambda: geometry.affine_rank(CLOUD[0] / 0), r"^affine_rank: .*in the sequence\. "),
    "few tokens": (lambda: geometry.nonlinear_innovation(CLOUD, CLOUD), r"at least 12 real tokens .*width 8, got 3"),
    "other tokens": (lambda: geometry.nonlinear_innovation(CLOUD, CLOUD[:, :2]), r"\(2, 3\) and \(2, 2\)"),
    "no span": (lambda: geometry.out_of_span_energy(CLOUD), r"embeddings or basis, got neither"),
    "two spans": (lambda: geometry.out_of_span_energy(CLOUD, CLOUD, basis=CLOUD), r"got both"),
    "other width": (lambda: geometry.out_of_span_energy(CLOUD, CLOUD[..., :5]), r"\(2, 3, 5\) against \(2, 3, 8\)"),
    "other batch": (lambda: geometry.out_of_span_energy(CLOUD, torch.randn(4, 3, 8)), r"\(4, 3, 8\) against"),
    "broken span": (
        lambda: geometry.out_of_span_energy(CLOUD, CLOUD / 0),
        r"^out_of_span_energy: .*batch index \(0,\)",
    ),
    "no moment": (lambda: geometry.null_out_of_span_energy(CLOUD, CLOUD), r"updates\.mT @ updates"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_expected_what_came_and_what_to_do(case: str) -> None:
    call, pattern = ERRORS[case]
    with pytest.raises(InputError, match=pattern) as caught:
        call()
    assert str(caught.value).count(". ") >= 2


def test_enough_tokens_is_the_number_the_error_names() -> None:
    x = torch.randn(12, 8, dtype=torch.float64)
    assert geometry.nonlinear_innovation(x, x).item() < 1e-20
    with pytest.raises(InputError):
        geometry.nonlinear_innovation(x[:11], x[:11])


def test_layer_norm_moves_distances_that_a_common_mean_hid() -> None:
    x = 1000 + torch.randn(64, 256, dtype=torch.float64)
    assert geometry.consensus_distance(x).item() == pytest.approx(1e-3, rel=0.1)
    normalised = torch.nn.functional.layer_norm(x, (256,))
    assert geometry.consensus_distance(normalised).item() > 0.9


def test_the_examples_in_the_docstrings() -> None:
    outcome = doctest.testmod(geometry, extraglobs={"torch": torch})
    assert outcome.attempted > 15
    assert outcome.failed == 0


# What a reader behind a norm sees, and what a block hands on -------------------------------------------------------------


def directions(x: np.ndarray, centred: bool) -> np.ndarray:
    rows = [row - row.mean() if centred else row for row in x.astype(np.float64)]
    return np.array([row / math.sqrt(float(row @ row)) for row in rows])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_consensus_after_norm_is_the_consensus_of_the_directions(centred: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1)) + 2).to(dtype)
    mask = torch.arange(9) < torch.tensor([[9], [5], [2]])
    found = geometry.consensus_after_norm(x.masked_fill(~mask[..., None], math.nan), mask, centred=centred)
    for i, n in enumerate((9, 5, 2)):
        unit = directions(x[i, :n].double().numpy(), centred)
        cosines = unit @ unit.T
        assert found[i].item() == pytest.approx(math.sqrt(1 - cosines.mean()), abs=1e-12)


def test_consensus_after_norm_sees_neither_sizes_nor_a_common_level() -> None:
    x = torch.randn(12, 32, dtype=torch.float64)
    plain = geometry.consensus_after_norm(x)
    sizes = 10 ** torch.linspace(-3, 3, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(geometry.consensus_after_norm(x * sizes + 1000), plain, rtol=1e-6, atol=0)
    assert geometry.consensus_after_norm(x + 1000, centred=False) < 0.01
    assert geometry.consensus_distance(x + 1000) < 0.01


def test_consensus_after_norm_is_that_of_torchs_own_norm() -> None:
    x = torch.randn(7, 64, dtype=torch.float64) + torch.randn(64)
    normed = torch.nn.functional.layer_norm(x, (64,), eps=0)
    torch.testing.assert_close(geometry.consensus_after_norm(x), geometry.consensus_distance(normed))


def test_consensus_after_norm_says_nan_where_nothing_can_be_said() -> None:
    assert geometry.consensus_after_norm(torch.randn(1, 4)).isnan()
    assert geometry.consensus_after_norm(torch.zeros(3, 4)).isnan()
    x = torch.randn(2, 3, 4)
    x[0, 1, 2] = math.inf
    assert geometry.consensus_after_norm(x).isnan().tolist() == [True, False]


@pytest.mark.parametrize("is_normalized", [True, False])
def test_stream_carried_is_the_median_share_of_the_tokens(is_normalized: bool) -> None:
    x, y = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    found = geometry.stream_carried(x, y.masked_fill(~mask[..., None], math.nan), mask, is_normalized=is_normalized)
    for i, n in enumerate((9, 5)):
        shares = []
        for a, b in zip(x[i, :n].numpy(), y[i, :n].numpy(), strict=True):
            size = math.sqrt(float(a @ a) * float(b @ b)) if is_normalized else float(a @ a)
            shares.append(float(a @ b) / size)
        assert found[i].item() == pytest.approx(float(np.median(shares)))  # odd numbers of tokens


def test_stream_carried_is_the_factor_of_the_residual_whatever_one_massive_token_does() -> None:
    x = torch.randn(1, 31, 512, dtype=torch.float64)
    y = 0.3 * x + torch.randn(1, 31, 512, dtype=torch.float64)
    y[:, 4] += 1e4
    assert geometry.stream_carried(x, y).item() == pytest.approx(0.3, abs=0.03)
    x[0, 0, 0] = math.nan
    assert geometry.stream_carried(x, y).isnan()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("level", [0.0, 30.0, 1e5])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-8])
def test_consensus_after_norm_of_the_gram_is_that_of_the_cloud(spread: float, level: float, centred: bool) -> None:
    """Also where differences of the Gram keep no digit: a common level, or tokens that are nearly one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 24, generator=generator) + spread * torch.randn(3, 9, 24, generator=generator) + level
    x[1, 4] = 1e4 * x[1, 3]
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :2] = mask[2, 5:] = False
    x[~mask] = math.nan
    found = cloud_measures(x, mask, read_centred=centred).consensus_after_norm
    expected = geometry.consensus_after_norm(x, mask, centred=centred)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("centred", [False, True])
def test_the_distance_after_a_norm_has_no_unit_even_where_squares_differ_by_more_than_the_range(centred):
    """Each token may have a size of its own: a norm takes it away."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1e-100, 1e-50, 1.0, 1e50, 1e100], dtype=torch.float64)
    plain = geometry.consensus_after_norm(x, centred=centred)
    assert torch.allclose(geometry.consensus_after_norm(x * sizes[:, None], centred=centred), plain, rtol=1e-12)


def test_what_was_found_cannot_be_changed() -> None:
    own = [each for each in vars(geometry).values() if getattr(each, "__module__", "") == geometry.__name__]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert kept
    assert all(each.__dataclass_params__.frozen for each in kept)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(9, 20), (20, 20), (40, 20), (1, 5), (5, 1)])
def test_ranks_alone_are_those_of_all_measures(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Full and deficient clouds, a flat off the origin, nothing real, what is not finite, and numbers out of range."""
    clouds = torch.randn(8, tokens, width, dtype=torch.float64)
    clouds[1] = torch.randn(tokens, 1, dtype=torch.float64) * clouds[1, 0]
    clouds[2] -= clouds[2].mean(0)
    clouds[3] = clouds[3, :1] + 1e-3 * clouds[3]
    clouds[4, :, 0] = 1
    clouds[5, 0] = math.nan
    mask = torch.ones(8, tokens, dtype=torch.bool)
    mask[6] = False
    mask[7, : tokens // 2] = False
    for size in (1.0, 1e-200, 1e200) if dtype == torch.float64 else (1.0,):
        x = (clouds * size).to(dtype)
        found, whole = geometry.cloud_ranks(x, mask), geometry.cloud_measures(x, mask)
        for ours, theirs in zip(found, (whole.rank, whole.affine_rank), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_leaving_out_a_massive_token_keeps_all_others_where_their_gram_is_not_enough(place: int, width: int) -> None:
    """Equal tokens leave no digits in a Gram matrix, so the cloud itself is decomposed."""
    others = torch.randn(2, width, dtype=torch.float64)[[0, 0, 0, 0, 0, 0, 1]]
    massive = 300 * torch.randn(1, width, dtype=torch.float64)
    found = geometry.cloud_measures(torch.cat([others[:place], massive, others[place:]])).without_massive
    alone = geometry.cloud_measures(others)
    assert found.tokens_left_out == 1
    for name in ("effective_rank", "stable_rank", "participation_ratio", "consensus_distance", "token_similarity"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))


# All axes of different sizes, all ways, and thresholds at themselves


SINGLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{name: lambda x, y, m, name=name: single(name, x, m).double() for name in MEASURES},
    "rank_tolerance": lambda x, y, m: geometry.rank_tolerance(x, m),
    "after norm": lambda x, y, m: geometry.consensus_after_norm(x, m),
    "after RMSNorm": lambda x, y, m: geometry.consensus_after_norm(x, m, centred=False),
    "carried": lambda x, y, m: geometry.stream_carried(x, y, m),
    "carried through a norm": lambda x, y, m: geometry.stream_carried(x, y, m, is_normalized=True),
    "out of span": lambda x, y, m: geometry.out_of_span_energy(x, y, m),
    "out of a basis": lambda x, y, m: geometry.out_of_span_energy(x, mask=m, basis=geometry.row_space(y, m)),
    "null of it": lambda x, y, m: geometry.null_out_of_span_energy(x.mT @ x, y, m),
}


@pytest.mark.parametrize("name", [*MEASURES, "rank_tolerance", "after norm", "carried", "out of span"])
@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0, 4), (3, 0)], ids=str)
def test_no_token_and_no_feature_make_no_cloud(name: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    with pytest.raises(InputError, match=r"expected a floating-point tensor with axes \(\*batch, token, width\)"):
        SINGLE[name](x, x, torch.ones(shape[:-1], dtype=torch.bool) if len(shape) > 1 else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 2, 4, 9), (2, 3, 7, 5)], ids=str)
def test_each_sequence_is_measured_by_itself_whatever_its_size(name: str, shape: tuple[int, ...]) -> None:
    """Two leading axes, all axes of different sizes, padding anywhere, and a power of two of its own for each sequence."""
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    y[..., 3:, :] = 0
    mask = torch.rand(shape[:-1]) < 0.8
    mask[..., :3] = True
    exponents = torch.tensor([0, 3, -7, 300, -300, 1])[: shape[0] * shape[1]].view(shape[:2])
    sized, other = (part * 2.0 ** exponents.double()[..., None, None] for part in (x, y.roll(1, 0)))
    found = SINGLE[name](sized, other, mask)
    assert found.shape == shape[:2]
    for place in itertools.product(*map(range, shape[:2])):
        one = SINGLE[name](sized[place], other[place], mask[place])
        torch.testing.assert_close(found[place], one, rtol=1e-9, atol=0, equal_nan=True)
        bare = SINGLE[name](x[place], y.roll(1, 0)[place], mask[place])
        if name == "rank_tolerance":
            bare = bare * 2.0 ** float(exponents[place])
        torch.testing.assert_close(one, bare, rtol=1e-9, atol=0, equal_nan=True)


def test_a_refusal_names_the_place_of_the_broken_sequence() -> None:
    x = torch.randn(2, 3, 5, 4)
    x[1, 2, 4, 0] = math.inf
    for function in (geometry.rank, geometry.affine_rank, geometry.row_space):
        with pytest.raises(InputError, match=r"at batch index \(1, 2\)\."):
            function(x)
    with pytest.raises(InputError, match=r"in the sequence\. "):
        geometry.rank(x[1, 2])


@pytest.mark.parametrize("width", [4, 3])
def test_ten_times_the_median_is_not_massive_yet(width: int) -> None:
    """Norms of 1, 1, 1 and 10, or the next number above: both where the Gram is tokens by tokens and where it is width by width."""
    x = torch.zeros(2, 4, width, dtype=torch.float64)
    x[..., 0] = 1
    x[0, 3, 0], x[1, 3, 0] = 10, 10 * (1 + 1e-12)
    assert cloud_measures(x).without_massive.tokens_left_out.tolist() == [0, 1]


def test_all_of_a_block_of_zeros_has_no_massive_token() -> None:
    x = torch.zeros(1, 5, 8)
    x[0, 4, 0] = 1
    assert cloud_measures(x).without_massive.tokens_left_out.item() == 0


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(3, 9, 20), (3, 20, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_healthy_clouds_are_read_off_their_gram(
    centred: bool, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded or not. No distance is taken from the cloud itself, but where tokens are all but equal."""
    asked: list[str] = []
    for name in ("consensus_after_norm", "_centred"):
        whole = getattr(geometry, name)

        def counted(x: Tensor, *args: Any, name: str = name, whole: Any = whole, **other: Any) -> Any:
            asked.extend([name] * len(x))
            return whole(x, *args, **other)

        monkeypatch.setattr(geometry, name, counted)
    x = torch.randn(shape, dtype=dtype)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    mask[1, 6:] = False
    found = cloud_measures(x, mask, read_centred=centred)
    assert asked == []
    near = x.clone()
    near[2] = near[2, :1] + 1e-3 * near[2]
    again = cloud_measures(near, mask, read_centred=centred)
    assert asked.count("consensus_after_norm") == 1
    for name in ("consensus_distance", "consensus_after_norm"):
        assert torch.equal(getattr(found, name)[:2], getattr(again, name)[:2])


@pytest.mark.parametrize(
    ("tokens", "width", "looked_at"),
    [(9, 20, [2, 5]), (20, 20, [2, 5]), (40, 20, [2, 4, 5])],
)
def test_only_clouds_that_are_not_full_are_decomposed_for_their_ranks(
    tokens: int, width: int, looked_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, padded, deficient, flat off the origin, fewer tokens than features, and not finite. With more tokens than features a
    flat is only known by its rank, and so is a sequence that has fewer real tokens than that."""
    x = torch.randn(6, tokens, width, dtype=torch.float64).float()
    mask = torch.ones(6, tokens, dtype=torch.bool)
    x[2] = torch.randn(tokens, 3) @ torch.randn(3, width)
    mask[1, -min(3, tokens // 3) :] = False
    mask[4, 7:] = False
    x[5, 1, 2] = math.nan
    seen: list[Tensor] = []
    whole = geometry.cloud_measures
    monkeypatch.setattr(geometry, "cloud_measures", lambda x, *a, **o: (seen.append(x), whole(x, *a, **o))[1])
    ranks, affine = geometry.cloud_ranks(x, mask)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], x[looked_at], equal_nan=True)
    full = min(tokens, width)
    count = mask.sum(-1).clamp(max=width).tolist()
    assert ranks[:5].tolist() == [full, count[1], 3, full, 7]
    for place in (0, 1, 3):
        assert affine[place] == min(int(mask[place].sum()) - 1, width)
    assert ranks[5].isnan()
    # As many real tokens as features, among more: of rank d, and no flat of dimension d.
    mask[0, width:] = False
    seen.clear()
    ranks, affine = geometry.cloud_ranks(x[:1], mask[:1])
    assert (ranks.item(), affine.item()) == (full, full - 1)
    assert not seen


def test_a_wide_gram_costs_little_more_than_half() -> None:
    """Of 384 columns and more; narrower than 193 nothing is left out."""
    products: list[int] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            if func is torch.ops.aten.mm.default:
                products.append(found.numel())
            return found

    shares = {}
    for width in (192, 193, 384, 768):
        x = torch.randn(10, width, dtype=torch.float64)
        products.clear()
        with Counted():
            found = column_gram(x)
        torch.testing.assert_close(found, x.mT @ x)
        shares[width] = sum(products) / width**2
    assert shares == {
        192: 1,
        193: pytest.approx(0.75, abs=1e-3),
        384: pytest.approx(0.75),
        768: pytest.approx(0.625),
    }


def test_an_accelerator_takes_sequences_of_up_to_32_lengths_together() -> None:
    """Neighbours of equal ceil(n / 32); a processor takes one length at a time. Only of one length is there no padding."""
    tokens = torch.tensor([1, 31, 32, 33, 33, 64, 5, 64])
    x = torch.empty(8, 64, 100)
    assert geometry._groups(x, tokens) == [
        (slice(0, 1), 1, False),
        (slice(1, 2), 31, False),
        (slice(2, 3), 32, False),
        (slice(3, 5), 33, False),
        (slice(5, 6), 64, False),
        (slice(6, 7), 5, False),
        (slice(7, 8), 64, False),
    ]
    assert geometry._groups(x.to("meta"), tokens) == [
        (slice(0, 3), 32, True),
        (slice(3, 6), 64, True),
        (slice(6, 7), 5, False),
        (slice(7, 8), 64, False),
    ]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_quarter_of_the_tokens_is_held_out_from_a_fit_of_any_rank(seed: int) -> None:
    """Against least squares of NumPy, with a large mean, features of which two say the same, and an output of three features."""
    x = torch.randn(27, 6, dtype=torch.float64)
    x[:, 5] = 2 * x[:, 0] - x[:, 1]
    y = torch.stack([x[:, 0] ** 2, x[:, 1] + x[:, 2] ** 3, x[:, 3] * x[:, 4]], -1) + 100
    found = geometry.nonlinear_innovation(x, y, seed=seed).item()
    order = torch.randperm(27, generator=torch.Generator().manual_seed(seed)).numpy()
    held_out, fitted = order[:6], order[6:]
    a, b = x.numpy(), y.numpy()
    mean = b[fitted].mean(0)
    design = np.column_stack([a, np.ones(27)])
    solution = np.linalg.lstsq(design[fitted], b[fitted], rcond=1e-10)[0]
    expected = ((b[held_out] - design[held_out] @ solution) ** 2).sum() / ((b[held_out] - mean) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-8)


def with_a_small_direction(tokens: int, width: int, square: float) -> Tensor:
    """Centred, with singular values of 1 and one of which the square is given."""
    short = min(tokens, width)
    generator = torch.Generator().manual_seed(tokens)
    around = torch.randn(max(tokens, width), short, generator=generator, dtype=torch.float64)
    if tokens >= width:
        around = around - around.mean(0)
    values = torch.ones(short, dtype=torch.float64)
    values[-1] = math.sqrt(square)
    x = torch.linalg.qr(around).Q * values
    turn = orthogonal(short, generator)
    return x @ turn if tokens >= width else turn @ x.T


@pytest.mark.parametrize(("part", "is_known"), [(0.94, False), (1.06, True)])
@pytest.mark.parametrize(("tokens", "width"), [(8, 30), (30, 8)])
def test_ranks_need_no_spectrum_where_a_gram_is_sure_of_its_smallest_direction(
    tokens: int, width: int, part: float, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight roundings of each of the longer side, as a share of the energy; eps of the format adds nothing at this size."""
    seen: list[int] = []
    whole = geometry.cloud_measures
    monkeypatch.setattr(geometry, "cloud_measures", lambda x, *a, **o: (seen.append(len(x)), whole(x, *a, **o))[1])
    x = with_a_small_direction(tokens, width, part * 8 * 30 * 2.0**-52 * 7)
    rank, affine = geometry.cloud_ranks(x)
    assert seen == ([] if is_known else [1])
    assert (rank.item(), affine.item()) == (8, 8 if tokens > width else 7)


@pytest.mark.parametrize(("part", "spectra"), [(0.94, 2), (1.06, 1)])
def test_affine_ranks_need_no_second_spectrum_where_a_gram_is_sure(
    part: float, spectra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four roundings of each token, as a share of the largest."""
    x = with_a_small_direction(30, 8, part * 4 * 30 * 2.0**-52)
    calls = Calls(monkeypatch)
    found = cloud_measures(x)
    assert (found.rank.item(), found.affine_rank.item()) == (8, 8)
    assert calls.times["eigvalsh"] == spectra


def test_a_centred_cloud_of_few_tokens_is_decomposed_for_its_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens that sum to 0 have rank 7 and affine rank 7; the eighth singular value of the centred ones is 0 anyway."""
    x = torch.randn(8, 20, dtype=torch.float64)
    x = x - x.mean(0)
    calls = Calls(monkeypatch)
    found = cloud_measures(x)
    assert (found.rank.item(), found.affine_rank.item()) == (7, 7)
    assert calls.times == {"eigvalsh": 2, "svdvals": 1}


@pytest.mark.parametrize("shape", [(4, 6), (8, 6)], ids=str)
def test_an_affine_rank_at_the_tolerance_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Tokens that sum to 0, whose second singular value is two parts in 10^13 above or below the tolerance: a Gram matrix that is
    rounded once errs by more than that."""
    tokens, width = shape
    generator, clouds, expected = torch.Generator().manual_seed(tokens), [], []
    for place in range(40):
        side, small = (-1, 1)[place % 2], 0.005
        for _ in range(5):
            x = torch.zeros(shape, dtype=torch.float64)
            x[0::4, 0], x[1::4, 0], x[2::4, 1], x[3::4, 1] = 1, -1, small, -small
            values = np.linalg.svd(x.numpy(), compute_uv=False)
            noise = 2.0**-7 * np.linalg.norm(values) * (tokens**-0.5 + width**-0.5)
            small *= (noise + max(shape) * 2.0**-52 * values[0]) * (1 + side * 2e-13) / values[1]
        clouds.append(x @ orthogonal(width, generator))
        expected.append(1.5 + side / 2)
    found = cloud_measures(torch.stack(clouds), precision=torch.bfloat16)
    assert found.rank.tolist() == expected
    assert found.affine_rank.tolist() == expected


@pytest.mark.parametrize("tokens", [5, 14])
def test_an_affine_rank_that_a_gram_cannot_tell_is_that_of_the_singular_values(tokens: int) -> None:
    """Points on a line, and a few of them 1e-11 to 1e-9 of it away from it, some of them twice: the square of that is lost in a
    Gram matrix of float64."""
    generator = torch.Generator().manual_seed(tokens)
    clouds = []
    for place in range(24):
        turned = orthogonal(8, generator)
        along = torch.randint(-9, 10, (tokens,), generator=generator).double()
        aside = torch.zeros(tokens, dtype=torch.float64)
        aside[1:3] = 10.0 ** -(9 + place % 3)
        x = torch.outer(along, turned[0]) + torch.outer(aside, turned[1]) + (place % 2) * turned[2]
        x[3] = x[1]
        clouds.append(x)
    expected = [np.linalg.matrix_rank((x - x.mean(0)).numpy(), tol=1e-13) for x in clouds]
    assert set(expected) == {2}
    assert cloud_measures(torch.stack(clouds)).affine_rank.tolist() == expected


@pytest.mark.parametrize(("tokens", "width"), [(9, 20), (20, 9)])
def test_singular_values_are_taken_of_the_real_tokens_alone_upright(
    tokens: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK takes a matrix that is wider than high at twice the price. One call for all clouds of one length."""
    lengths = [tokens, 3, 7, 3, 0, 8]
    real = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    x = torch.randn(6, tokens, width, dtype=torch.float64)
    expected = [np.linalg.svd(one[:n].numpy(), compute_uv=False) for one, n in zip(x, lengths, strict=True)]
    seen: list[tuple[int, ...]] = []
    whole = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: (seen.append(tuple(a.shape)), whole(a))[1])
    x[~real] = math.nan  # whatever padding holds
    found = geometry._exact_values(x, real)
    for values, sought in zip(found, expected, strict=True):
        np.testing.assert_allclose(values[: len(sought)], sought, rtol=1e-12)
        assert not values[len(sought) :].any()
    counts = {n: (lengths.count(n), max(n, width), min(n, width)) for n in (3, 7, 8, tokens)}
    assert [shape for shape in seen if shape[-1] > 1] == list(counts.values())


@pytest.mark.parametrize(("roundings", "is_known"), [(1, False), (2, True)])
def test_an_output_that_moves_by_one_rounding_is_constant(roundings: int, is_known: bool) -> None:
    """All held-out outputs are 1, all others one or two epsilons less: numbers without rounding."""
    held_out = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:2]
    y = torch.full((8, 1), 1 - roundings * 2.0**-23)
    y[held_out] = 1
    share = geometry.nonlinear_innovation(torch.arange(8.0)[:, None], y).item()
    assert math.isnan(share) is not is_known


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_tolerance_of_one_token_or_two(tokens: int) -> None:
    """2^-7 of the norm times 1/sqrt n + 1/2, and four roundings of float64 of the only singular value."""
    x = torch.full((tokens, 4), 3.0, dtype=torch.float64)
    size = 6 * tokens**0.5
    expected = 2.0**-7 * size * (tokens**-0.5 + 0.5) + 4 * 2.0**-52 * size
    assert geometry.rank_tolerance(x, precision=torch.bfloat16).item() == pytest.approx(expected, rel=1e-12)


def test_no_energy_outside_of_the_span_is_below_zero() -> None:
    for _ in range(30):
        x = torch.randn(3, 7, dtype=torch.float64)
        inside = torch.randn(9, 3, dtype=torch.float64) @ x
        energy = geometry.null_out_of_span_energy(inside.mT @ inside, x).item()
        assert 0 <= energy < 1e-12


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many clouds each call of that function of the module was made."""
    calls: list[int] = []
    whole = getattr(geometry, name)
    monkeypatch.setattr(geometry, name, lambda x, *a, **o: (calls.append(len(x)), whole(x, *a, **o))[1])
    return calls


@pytest.mark.parametrize(("share", "anew"), [(1.02e-4, False), (0.98e-4, True)])
@pytest.mark.parametrize("tokens", [2, 4])
def test_distances_below_a_hundredth_are_taken_from_the_cloud_itself(
    tokens: int, share: float, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The square of the distance is this share: a difference of numbers that agree in four digits or more has lost as many."""
    apart = math.sqrt(share / (1 - share))
    x = torch.tensor([[1.0, apart], [1.0, -apart]], dtype=torch.float64).repeat(tokens // 2, 1)
    centred = counted("_centred", monkeypatch)
    assert geometry.consensus_distance(x).item() == pytest.approx(math.sqrt(share), rel=1e-12 if anew else 1e-10)
    assert len(centred) == anew
    centred.clear()
    after = counted("consensus_after_norm", monkeypatch)
    healthy = torch.tensor([[3.0, 1.0], [1.0, 5.0]], dtype=torch.float64).repeat(tokens // 2, 1)
    found = cloud_measures(torch.stack([x, healthy]), read_centred=False)
    for name in ("consensus_distance", "consensus_after_norm"):
        assert getattr(found, name)[0].item() == pytest.approx(math.sqrt(share), rel=1e-12 if anew else 1e-10)
    # With more tokens than features the affine rank of either looks at the centred cloud, too.
    assert sorted(centred) == [1] * anew + [2] * (tokens > 2)
    assert after == [1] * anew


@pytest.mark.parametrize(("share", "anew"), [(1.02e-6, False), (0.98e-6, True)])
@pytest.mark.parametrize("tokens", [2, 4])
def test_tokens_of_a_large_level_are_centred_by_themselves(
    tokens: int, share: float, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a token's energy less than a millionth is left once its mean over the features is gone."""
    apart = math.sqrt(share / (1 - share))
    one = torch.tensor([[1 + apart, 1 - apart], [1 - apart, 1 + apart]], dtype=torch.float64).repeat(tokens // 2, 1)
    after = counted("consensus_after_norm", monkeypatch)
    healthy = torch.tensor([[3.0, 1.0], [1.0, 5.0]], dtype=torch.float64).repeat(tokens // 2, 1)
    found = cloud_measures(torch.stack([one, healthy]))
    assert found.consensus_after_norm.tolist() == pytest.approx([1, 1], rel=1e-9)
    assert after == [1] * anew
