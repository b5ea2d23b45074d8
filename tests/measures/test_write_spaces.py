"""Figures by products against those by singular values, where they are easy and where they are near a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.heads import storage_tolerance, write_space_figures
from uncollapse.errors import InputError
from uncollapse.measures import heads, random_projections, write_spaces
from uncollapse.measures.random_projections import random_write_space_overlap


def random(mixed: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(mixed, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deficient() -> Tensor:
    """The second of four heads writes three dimensions fewer than its width."""
    W = random(32, 48)
    W[8:16] = random(8, 5, 1) @ random(5, 48, 2)
    return W


def silent() -> Tensor:
    W = random(32, 48)
    W[24:] = 0
    return W


def copied() -> Tensor:
    """Two heads write into one space, in two bases; the others are apart."""
    W = random(32, 48)
    W[8:16] = random(8, 8, 3) @ W[:8]
    return W


def nearly(share: float, eps: float = 2.0**-23) -> Callable[[], Tensor]:
    """The last direction of the last head lies at a multiple of the tolerance from the space of the others."""

    def build() -> Tensor:
        W = random(32, 48)
        W[31] = W[0] + W[9] - W[17]
        apart = random(1, 48, 5)[0]
        W[31] += share * storage_tolerance(W.numpy(), eps) * apart
        return W

    return build


def steep(least: float) -> Callable[[], Tensor]:
    """Singular values of W fall to `least`, as those of the stacked bases do."""

    def build() -> Tensor:
        left, right = torch.linalg.qr(random(32, 32)).Q, torch.linalg.qr(random(48, 32, 1)).Q
        return left * torch.logspace(0, math.log10(least), 32, dtype=torch.float64) @ right.T

    return build


def weak_row(share: float, eps: float = 2.0**-23) -> Callable[[], Tensor]:
    """A head whose smallest singular value is a multiple of its tolerance."""

    def build() -> Tensor:
        W = random(32, 48)
        left, sigma, right = torch.linalg.svd(W[:8], full_matrices=False)
        sigma[-1] = share * storage_tolerance(W[:8].numpy(), eps)
        W[:8] = left * sigma @ right
        return W

    return build


CASES: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: random(32, 48),
    "square": lambda: random(48, 48),
    "tall": lambda: random(64, 48),
    "one direction a head": lambda: random(4, 48),
    "heads wider than the stream": lambda: random(32, 6),
    "beyond one Krylov block": lambda: random(576, 640),
    "square, beyond one Krylov block": lambda: random(576, 576, 4),
    "deficient": deficient,
    "silent": silent,
    "all silent": lambda: torch.zeros(32, 48, dtype=torch.float64),
    "copied": copied,
    "deficient and tall": lambda: random(64, 20) @ random(20, 48, 1),
    **{f"nearly dependent, {share}": nearly(share) for share in (0.0, 0.3, 0.9, 1.1, 3.0, 30.0, 1e3)},
    **{f"steep, {least}": steep(least) for least in (1e-3, 1e-6, 1e-9)},
    **{f"weak row, {share}": weak_row(share) for share in (0.0, 0.7, 0.99, 1.01, 1.5, 10.0)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", list(CASES))
def test_figures_are_those_of_the_singular_values(case: str, dtype: torch.dtype) -> None:
    W = CASES[case]().to(dtype)
    # Numbers stored in bfloat16 are exact in float32, which is what they are computed with.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    expected = write_space_figures(W.double().numpy(), 4, eps)
    spaces = write_spaces.WriteSpaces(W, 4)
    assert spaces.rank == expected["rank"]
    np.testing.assert_allclose(spaces.gains, expected["gains"], rtol=1e-7)
    np.testing.assert_allclose(heads.conditioning(spaces, 4), expected["condition"], rtol=1e-7)
    np.testing.assert_allclose(heads.write_space_overlap(spaces, 4), expected["overlaps"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["wide", "square", "square, beyond one Krylov block"])
def test_easy_projections_are_never_decomposed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decomposed")

    W = CASES[case]().float()
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(write_spaces, "numerical_rank", refuse)
    spaces = write_spaces.WriteSpaces(W, 4)
    assert spaces.rank == len(W)
    assert bool(spaces.gains.isfinite().all())
    assert math.isfinite(heads.conditioning(spaces, 4))


def test_which_decomposition_serves_follows_from_the_condition_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces at an angle to each other: of a large stack the Gram matrix up to a condition number of 3e4, else QR."""
    asked: list[str] = []
    whole = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *a, **o: (asked.append(o.get("mode", "reduced")), whole(*a, **o))[1])
    for width, angle, expected in [(300, 0.5, 0), (300, 1e-4, 0), (300, 5e-5, 1), (300, 1e-6, 1), (10, 0.5, 1)]:
        W = torch.eye(2 * width, dtype=torch.float64)
        W[width, 0], W[width, width] = math.cos(angle), math.sin(angle)
        asked.clear()
        gains = write_spaces.WriteSpaces(W, 2).gains
        assert gains.tolist() == pytest.approx([1 / math.sin(angle)] * 2, rel=1e-7)
        assert asked.count("r") == expected, (width, angle)


@pytest.mark.parametrize("least", [0.3, 1e-4, 1e-6, 1e-12])
def test_rows_of_a_head_are_orthonormal_however_steep_its_weights(least: float) -> None:
    left, right = torch.linalg.qr(random(6, 6)).Q, torch.linalg.qr(random(40, 6, 1)).Q
    W = left * torch.logspace(0, math.log10(least), 6, dtype=torch.float64) @ right.T
    rows, corners = write_spaces._orthonormal_rows(torch.stack([W, 1e-150 * random(6, 40, 2)]))
    np.testing.assert_allclose(rows @ rows.mT, torch.eye(6).expand(2, 6, 6), atol=1e-14)
    np.testing.assert_allclose(corners[0].mT @ rows[0], W, atol=1e-14)
    np.testing.assert_allclose(np.linalg.svd(corners[0].numpy())[1][-1], least, rtol=max(1e-12, 1e-14 / least))


@pytest.mark.parametrize("size", [1, 256, 257, 700])
def test_a_triangle_is_inverted_by_halves(size: int) -> None:
    triangle = random(size, size).tril() + size * torch.eye(size, dtype=torch.float64)
    found = write_spaces._inverse_of_lower(triangle)
    np.testing.assert_allclose(found @ triangle, np.eye(size), atol=1e-12)
    assert torch.equal(found, found.tril())


def test_gains_of_a_tall_projection_need_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """More directions than the stream has: every head is undetermined by far."""
    spaces = write_spaces.WriteSpaces(CASES["tall"]().float(), 4)
    monkeypatch.setattr(spaces, "_gains_by_decomposition", None)
    assert spaces.gains.tolist() == [math.inf] * 4


@pytest.mark.parametrize(("head_width", "width"), [(8, 64), (1, 12), (5, 9), (20, 12)])
def test_the_overlap_of_random_write_spaces_is_that_of_draws(head_width: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [
        float(heads.write_space_overlap(torch.randn(2 * head_width, width, generator=generator).double(), 2)[0, 1])
        for _ in range(2000)
    ]
    mean, spread = random_write_space_overlap(head_width, width)
    drawn = torch.tensor(draws, dtype=torch.float64)
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * spread / len(draws) ** 0.5 + 1e-12)
    assert float(drawn.std()) == pytest.approx(spread, rel=0.1, abs=1e-12)


def test_a_random_overlap_needs_sizes() -> None:
    with pytest.raises(InputError, match="sizes of at least 1"):
        random_write_space_overlap(0, 12)


@pytest.mark.parametrize("width", [2, 3, 5, 12])
def test_the_overlap_of_random_lines_has_the_moments_of_a_squared_coordinate(width):
    """A line against a fixed one: u_1^2 of a random unit vector, E u_1^2 = 1/d, E u_1^4 = 3/(d(d + 2))."""
    mean, deviation = random_projections.random_write_space_overlap(1, width)
    assert mean == pytest.approx(1 / width)
    assert deviation**2 == pytest.approx(3 / (width * (width + 2)) - 1 / width**2)
    assert random_projections.random_write_space_overlap(width, width) == (1.0, 0.0)
    assert random_projections.random_write_space_overlap(1, 1) == (1.0, 0.0)


def test_a_gain_is_as_random_between_the_outer_points():
    points = (2.0, 5.0, 9.0)
    said = [random_projections.beside_random(gain, points) for gain in (1.9, 2.0, 9.0, 9.1)]
    assert said == ["better than random", "as random", "as random", "worse than random"]


def asked_for(n: int, apply: Callable[[Tensor], Tensor]) -> tuple[float, list[int]]:
    """The largest eigenvalue, and of how many rows each product was asked for."""
    asked: list[int] = []

    def counted(x: Tensor) -> Tensor:
        asked.append(len(x))
        return apply(x)

    like = torch.zeros(n, 1, dtype=torch.float64)
    return float(write_spaces._largest_eigenvalue(counted, like)), asked


@pytest.mark.parametrize("n", [3, 512])
def test_a_small_map_is_taken_whole(n: int) -> None:
    values = torch.linspace(0, 1, n, dtype=torch.float64).flip(0)
    largest, asked = asked_for(n, lambda x: x * values)
    assert largest == pytest.approx(1, rel=1e-12)
    assert asked == [n]


def test_of_a_large_map_a_few_blocks_of_eight_are_enough() -> None:
    """Looked at after every four of them; after 60 without an end it is taken whole."""
    values = 0.5 ** torch.arange(513, dtype=torch.float64)
    largest, asked = asked_for(513, lambda x: x * values)
    assert largest == pytest.approx(1, rel=1e-12)
    assert asked == [8] * 4
    assert asked_for(513, lambda x: 0 * x) == (0, [8] * 4)  # nothing is left to be sought
    slower = torch.linspace(0, 1, 513, dtype=torch.float64).square()
    largest, asked = asked_for(513, lambda x: x * slower)
    assert largest == pytest.approx(1, rel=1e-8)
    assert 4 < len(asked) < 60
    assert len(asked) % 4 == 0
    assert set(asked) == {8}
    generator = torch.Generator().manual_seed(0)
    never = torch.randn(513, 513, generator=generator, dtype=torch.float64)  # no symmetric map: no residual gets small
    largest, asked = asked_for(513, lambda x: x @ never)
    assert asked == [8] * 60 + [513]
    assert largest == pytest.approx(np.linalg.eigvalsh((never + never.T).numpy() / 2)[-1], rel=1e-12)


@pytest.mark.parametrize("ratio", [1e-3, 1e-9])
def test_a_steep_spectrum_leaves_no_ghost_of_its_largest_value(ratio: float) -> None:
    """What has converged comes back by rounding unless the blocks are kept orthogonal; the value would then be too large."""
    values = torch.full((600,), ratio, dtype=torch.float64) * torch.linspace(0.9, 1, 600, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 1 - 1e-7, 1 - 2e-7])
    turn = torch.linalg.qr(random(600, 600, 7)).Q
    largest, _ = asked_for(600, lambda x: x @ turn * values @ turn.T)
    assert largest == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize(
    ("share", "asked"), [(0.4, True), (0.7, True), (1.5, True), (1.9, True), (2.2, False), (2.8, False)]
)
def test_a_head_is_decomposed_only_within_twice_its_tolerance(
    share: float, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    W, whole = weak_row(share)().float(), torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **o: (seen.append(len(a[0])), whole(*a, **o))[1])
    spaces = write_spaces.WriteSpaces(W, 4)
    assert seen == [1] * asked
    assert spaces.ranks.tolist() == [8 if share > 1 else 7, 8, 8, 8]


@pytest.mark.parametrize(
    ("factor", "asked"), [(0.4, False), (0.6, True), (1.5, True), (1.9, True), (2.1, False), (2.9, False)]
)
def test_the_stack_is_decomposed_only_within_a_factor_of_two_of_its_tolerance(
    factor: float, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = write_spaces.WriteSpaces(nearly(30.0)().float(), 4)
    assert spaces.are_independent
    del spaces.__dict__["are_independent"]
    assert "stack" not in spaces.__dict__
    spaces.__dict__["tolerance"] = spaces.least / factor
    assert spaces.are_independent == (factor > 1)
    assert ("stack" in spaces.__dict__) is asked


@pytest.mark.parametrize(("heads_", "head_width", "width"), [(2, 3, 7), (3, 2, 6), (4, 1, 5)])
def test_the_gains_of_random_projections_are_those_of_256_draws_in_numpy(heads_, head_width, width):
    """Bases by QR, gains by the pseudo-inverse of the stack; its 5 %, 50 % and 95 % points."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(256, heads_, head_width, width, generator=generator, dtype=torch.float64).numpy()
    together, single = [], []
    for W in drawn:
        stack = np.concatenate([np.linalg.qr(block.T)[0].T for block in W])
        together.append(np.linalg.cond(stack))
        reading = np.linalg.pinv(stack)
        single += [np.linalg.norm(columns, 2) for columns in np.split(reading, heads_, axis=1)]
    found = random_projections.random_noise_gain(heads_, head_width, width)
    np.testing.assert_allclose(found.together, np.quantile(together, [0.05, 0.5, 0.95]), rtol=1e-8)
    np.testing.assert_allclose(found.single, np.quantile(single, [0.05, 0.5, 0.95]), rtol=1e-8)


@pytest.mark.parametrize(("heads_", "head_width"), [(12, 32), (3, 43)])
def test_the_gains_of_large_square_projections_are_those_of_the_law(heads_, head_width):
    """P(x <= t) = 1 - exp(-t/2 - sqrt t), solved by bisection. The gain falls with x: the 5 % point is that of 95 % of x."""
    width = heads_ * head_width
    for place, share in enumerate((0.05, 0.5, 0.95)):
        low, high = 0.0, 100.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if math.exp(-middle / 2 - middle**0.5) < share else (middle, high)
        found = random_projections.random_noise_gain(heads_, head_width, width)
        assert found.together[place] == pytest.approx(2 * width * (1 - 1 / heads_) / low**0.5, rel=1e-9)
        assert found.single[place] == pytest.approx((head_width * (width - head_width) / low) ** 0.5, rel=1e-9)


def test_larger_projections_are_drawn_as_smaller_ones_of_the_same_proportions(monkeypatch):
    """At most 128 dimensions, which is made 8 here; a square one up to there, and beyond it by the law."""
    gains = random_projections.random_noise_gain
    assert random_projections._DRAWN_AT_MOST == 128
    by_law = gains(2, 65, 130), gains(2, 64, 128)
    assert by_law[0].single[1] != pytest.approx(
        by_law[1].single[1] * 65 / 64, rel=1e-6
    )  # of 128 dimensions they are drawn
    monkeypatch.setattr(random_projections, "_DRAWN_AT_MOST", 8)
    gains.cache_clear()
    for large, small in (((2, 8, 40), (2, 4, 20)), ((3, 4, 13), (3, 2, 6)), ((10, 2, 30), (10, 1, 15))):
        assert gains(*large) == gains(*small)
    assert gains(3, 5, 16) == gains(3, 2, 6)  # 6.4: as wide as all heads together at least
    gains.cache_clear()


@pytest.mark.parametrize(("size", "columns"), [(8, 16), (2, 8)])
def test_dependent_directions_are_sought_among_sixteen_in_six_steps(
    size: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step orthonormalises twice, once on either side of the inverse. Of four heads two write into one space."""
    W = random(4 * size, 48)
    W[size : 2 * size] = random(size, size, 3) @ W[:size]
    spaces = write_spaces.WriteSpaces(W.float(), 4)
    assert not spaces.are_independent
    assert spaces._inverse is not None
    seen: list[tuple[int, ...]] = []
    whole = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda x, *a, **o: (seen.append(tuple(x.shape)), whole(x, *a, **o))[1])
    assert not spaces._all_undetermined()  # the other heads are apart
    assert seen == [(4 * size, columns)] * 12
