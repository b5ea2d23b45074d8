"""What the parts do, against plain double precision over the real tokens only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from uncollapse.measures import heads
from uncollapse.probe.activity import Directions, Units, Varying, _largest
from uncollapse.probe.attention import spread
from uncollapse.probe.projections import (
    MOST_ROUNDING,
    centred_energy,
    is_rounding,
    roots,
    rounding_share,
    written_sizes,
)
from uncollapse.probe.sizes import norms


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def holes(sequences: int, tokens: int) -> Tensor:
    real = torch.rand(sequences, tokens, generator=torch.Generator().manual_seed(9)) > 0.3
    real[0, 0], real[1, :3] = False, True
    return real


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 0.0])
def test_norms_keep_what_single_precision_cannot_square(scale: float) -> None:
    x = drawn(3, 5, 8) * scale
    expected = np.linalg.norm(x.double().numpy(), axis=-1)
    np.testing.assert_allclose(norms(x).numpy(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("common", "spread"), [(0.0, 1.0), (1.0, 1e-5), (3.0, 0.0), (0.0, 1e-25), (0.0, 0.0)])
def test_how_far_vectors_vary_is_that_of_the_real_tokens(common: float, spread: float) -> None:
    real, varying = holes(4, 6), Varying()
    expected: list[np.ndarray] = []
    for seed in range(2):
        x = common + spread * drawn(4, 3, 6, 5, seed=seed)
        expected.append(x.double().numpy().transpose(0, 2, 1, 3)[real.numpy()])
        x[~real[:, None].expand(4, 3, 6)] = torch.nan  # whatever padding holds
        varying.add(x, norms(x), real)
    seen = np.concatenate(expected)  # [token, part, width]
    apart = np.linalg.norm(seen - seen[:1], axis=-1).max(0)
    size = np.linalg.norm(seen, axis=-1).max(0)
    assert varying.apart is not None
    assert varying.size is not None
    np.testing.assert_allclose(varying.apart.numpy(), apart, rtol=1e-6, atol=0)
    np.testing.assert_allclose(varying.size.numpy(), size, rtol=1e-6, atol=0)
    assert varying.tokens == len(seen)
    typical = varying.typical()
    assert typical is not None
    np.testing.assert_allclose(typical, np.sqrt(np.square(seen).sum(-1).sum(0).mean() / (len(seen) * 5)), rtol=1e-6)


@pytest.mark.parametrize("second", [1.0, 1e-3, 1e-6, 0.0])
def test_directions_are_told_down_to_a_straight_line(second: float) -> None:
    line, other = drawn(2, 2048, seed=1)
    x = drawn(3, 30, 1) * line + second * drawn(3, 30, 1, seed=2) * other
    real = torch.ones(3, 30, dtype=torch.bool)
    coarse, fine = Directions(), Directions()
    coarse.add(x, norms(x), real)
    fine.add(x.double(), norms(x.double()), real)
    told, exact = coarse.beyond_one(), fine.beyond_one()
    assert told is not None
    assert exact is not None
    assert abs(told - exact) <= 1e-6 * exact + 3e-9  # a sketch in single precision is off by 1e-7
    assert (told < 1e-6) == (second == 0.0) or second == 1e-6


def test_units_that_are_always_zero_count_only_where_no_other_ever_is() -> None:
    hidden = drawn(20, 4).abs() + 0.1
    hidden[:, 1] = 0.0
    hidden[:, 2] = 0.7
    units = Units()
    assert units.add(hidden)
    assert units.dead(1e-7) == [1, 2]
    later = hidden.clone()
    later[3, 0] = 0.0  # a ReLU that cuts off
    assert units.add(later)
    assert units.dead(1e-7) == [2]
    woken = Units()
    woken.add(hidden)
    other = hidden.clone()
    other[:, 1] = 1.0
    woken.add(other)
    assert woken.dead(1e-7) == [2]
    assert not Units().add(torch.full((2, 3), torch.nan))


def test_norms_of_heads_are_those_of_their_vectors_however_they_lie() -> None:
    x = drawn(2, 5, 12)
    laid = [x.unflatten(-1, (3, 4)).transpose(1, 2), x.transpose(0, 1).unflatten(-1, (3, 4)).permute(1, 2, 0, 3)]
    for heads_of in (*laid, laid[0].contiguous(), x[:1, :1].expand(2, 5, 12)):
        expected = np.linalg.norm(heads_of.double().numpy(), axis=-1)
        np.testing.assert_allclose(norms(heads_of).numpy(), expected, rtol=3e-7)


@pytest.mark.parametrize("seed", range(5))
def test_units_that_have_settled_stay_alive_whatever_comes(seed: int) -> None:
    units, more = Units(), drawn(30, 50, 6, seed=seed) * torch.logspace(-3, 3, 30)[:, None, None]
    units.add(0.5 + 0.1 * drawn(8, 6, seed=seed + 90))
    assert units.has_settled()
    for hidden in more.abs():
        units.add(hidden)
        assert units.has_settled()
        assert units.dead(float(torch.finfo(torch.bfloat16).eps)) == []


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_units_do_not_settle_while_one_of_them_is_dead(value: float) -> None:
    hidden = drawn(20, 4)
    hidden[:, 1] = value
    units = Units()
    assert units.add(hidden)
    assert not units.has_settled()
    assert not Units().has_settled()


@pytest.mark.parametrize("common", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("padding", [None, 0.0, 5.0, torch.nan, torch.inf])
@pytest.mark.parametrize("size", [1e-22, 1.0, 1e22])
def test_the_spread_of_values_is_that_of_their_real_tokens(common: float, padding: float | None, size: float) -> None:
    x = (size * (drawn(3, 9, 8) + common)).unflatten(-1, (2, 4)).transpose(1, 2)
    mask = None if padding is None else holes(3, 9)
    if mask is not None:
        x = torch.where(mask[:, None, :, None], x, padding)
    kept = [x[i, h] if mask is None else x[i, h][mask[i]] for i in range(3) for h in range(2)]
    exact = [np.linalg.norm(y - y.mean(0)) for y in (one.double().numpy() for one in kept)]
    # Single precision keeps what is common to an eps of its size.
    np.testing.assert_allclose(spread(x, mask).flatten().numpy(), exact, rtol=1e-6, atol=2e-6 * common * size)


def test_the_largest_ratio_is_one_of_a_real_token_with_finite_sizes() -> None:
    part = torch.tensor([[3.0, 0.0, 9.0, torch.inf, torch.nan]])
    whole = torch.tensor([[2.0, 0.0, 1.0, 1.0, 1.0]])
    counted = torch.tensor([[True, True, False, True, True]])
    assert _largest(part, whole, counted) == 1.5
    assert _largest(part, whole, torch.tensor([[False, True, False, True, True]])) == 0.0
    assert _largest(part, whole, torch.tensor([[False, False, False, True, True]])) is None
    assert _largest(part, whole, torch.zeros(1, 5, dtype=torch.bool)) is None


@pytest.mark.parametrize("common", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_energy_of_heads_is_told_by_their_sizes_or_not_at_all(common: float, masked: bool) -> None:
    matrix, cloud = drawn(12, 10, seed=3), drawn(4, 9, 12) + common
    mask = holes(4, 9) if masked else None
    if mask is not None:
        cloud[~mask] = torch.inf  # whatever padding holds
    root = roots(heads.write_grams(matrix, 3))
    sizes = written_sizes(cloud, root)
    exact = torch.stack(
        [
            torch.linalg.vector_norm(
                cloud[..., h * 4 : h * 4 + 4].double() @ matrix[h * 4 : h * 4 + 4].double(), dim=-1
            )
            for h in range(3)
        ],
        1,
    )
    real = torch.ones(4, 9, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(sizes.transpose(1, 2)[real], exact.transpose(1, 2)[real], rtol=1e-5, atol=0)
    energy = centred_energy(cloud, root, sizes, mask)
    wanted = heads.contribution_energy(cloud.double(), matrix.double(), 3, mask)
    if energy is not None:
        torch.testing.assert_close(energy, wanted, rtol=3e-6, atol=0)
    assert energy is None or common < 1e3  # there the difference has no digits left
    assert energy is not None or common


def test_a_head_that_writes_nothing_has_a_root_all_the_same() -> None:
    matrix = drawn(8, 6)
    matrix[:4] = 0
    root = roots(heads.write_grams(matrix, 2))
    torch.testing.assert_close(root @ root.mT, heads.write_grams(matrix, 2))
    assert bool((written_sizes(drawn(2, 5, 8), root)[:, 0] == 0).all())


@pytest.mark.parametrize("spread", 10.0 ** np.arange(-9, 1))
def test_what_is_rounding_is_told_by_a_bound_or_exactly(spread: float) -> None:
    matrix, cloud = drawn(8, 6), drawn(2, 50, 8) * spread + 1.0
    energy, rows = heads.contribution_energy(cloud, matrix, 2), matrix.square().sum(-1)
    assert is_rounding(cloud, rows, energy, None) == (rounding_share(cloud, rows, energy, None) > MOST_ROUNDING)
