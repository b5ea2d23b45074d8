"""The share that no affine map explains, from sums taken piece by piece, against NumPy's least squares on all tokens at once."""

import math

import numpy as np
import pytest
import torch

from uncollapse.measures.affine_fit import AffineFit
from uncollapse.measures.storage_noise import storage_noise


def numpy_share(x: np.ndarray, y: np.ndarray, z: np.ndarray, w: np.ndarray) -> float:
    fit, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)
    rest = w - np.column_stack([z, np.ones(len(z))]) @ fit
    return float((rest**2).sum() / ((w - y.mean(0)) ** 2).sum())


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("pieces", [1, 4])
def test_pieces_add_up_to_the_least_squares_of_all(shift: float, pieces: int) -> None:
    rng = np.random.default_rng(pieces)
    x, z = (rng.standard_normal((n, 5)) * [1, 2, 3, 1, 1] + shift for n in (120, 60))
    mixing = rng.standard_normal((5, 3))
    y, w = ((np.maximum(v - shift, 0) ** 1.5) @ mixing + 7 for v in (x, z))
    fit = AffineFit()
    for held_out, (given, made) in ((False, (x, y)), (True, (z, w))):
        for a, b in zip(np.array_split(given, pieces), np.array_split(made, pieces), strict=True):
            fit.add(torch.tensor(a), torch.tensor(b), held_out=held_out)
    assert fit.missing() is None
    assert fit.share() == pytest.approx(numpy_share(x, y, z, w), rel=1e-7)
    assert 0.01 < fit.share() < 1


def test_directions_that_the_input_does_not_have_are_left_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2)) @ rng.standard_normal((2, 6))  # two directions of six
    y = np.sin(x @ rng.standard_normal((6, 2)))
    fit = AffineFit()
    fit.add(torch.tensor(x[:150]), torch.tensor(y[:150]), held_out=False)
    fit.add(torch.tensor(x[150:]), torch.tensor(y[150:]), held_out=True)
    assert fit.share() == pytest.approx(numpy_share(x[:150], y[:150], x[150:], y[150:]), rel=1e-6)


def test_a_constant_output_has_no_variance_to_explain() -> None:
    fit, x = AffineFit(), torch.randn(40, 2, dtype=torch.float64)
    fit.add(x[:20], torch.full((20, 1), 3.0, dtype=torch.float64), held_out=False)
    fit.add(x[20:], torch.full((20, 1), 3.0, dtype=torch.float64), held_out=True)
    assert math.isnan(fit.share())


def test_why_there_is_no_share() -> None:
    fit, x = AffineFit(), torch.randn(20, 2, dtype=torch.float64)
    fit.add(x[:0], x[:0], held_out=False)
    assert "sequences or more" in str(fit.missing())
    fit.add(x[:5], x[:5], held_out=False)
    assert "sequences or more" in str(fit.missing())  # nothing was held out
    fit.add(x[5:], x[5:], held_out=True)
    assert fit.missing() == "5 tokens to fit, and an affine map of width 2 wants 6"
    fit.add(x[:1], x[:1], held_out=False)
    assert fit.missing() is None
    other = AffineFit()
    other.add(x, x, held_out=True)
    assert "sequences or more" in str(other.missing())


def test_two_fits_about_one_origin_add_up() -> None:
    """What processes do that share a corpus: each counts from its own first tokens, then from common ones."""
    rng = np.random.default_rng(3)
    x, z = (rng.standard_normal((n, 4)) + 5 for n in (90, 40))
    y, w = (np.sin(v) @ rng.standard_normal((4, 3)) - 2 for v in (x, z))
    halves = [AffineFit(), AffineFit()]
    for number, fit in enumerate(halves):
        fit.add(torch.tensor(x[number::2] + 0), torch.tensor(y[number::2]), held_out=False)
        fit.add(torch.tensor(z[number::2]), torch.tensor(w[number::2]), held_out=True)
    origins = torch.full((4,), 4.0, dtype=torch.float64), torch.full((3,), -1.0, dtype=torch.float64)
    for fit in halves:
        fit.move(origins)
        assert fit.origins == origins
    one, other = halves
    for split, given, made in ((False, x, y), (True, z, w)):
        mine, theirs = one.sums[split], other.sums[split]
        assert mine is not None
        assert theirs is not None
        total = mine.plus(theirs)
        a, m = given - 4, made + 1
        expected = (len(given), a.sum(0), m.sum(0), a.T @ a, a.T @ m, (m**2).sum())
        for found, sought in zip(total, expected, strict=True):
            np.testing.assert_allclose(found, sought, rtol=1e-9, atol=1e-9)
        one.sums[split] = total
    a, m = y[0::2], y[1::2]
    together = numpy_share(np.concatenate([x[0::2], x[1::2]]), np.concatenate([a, m]), z, w)
    assert one.share() == pytest.approx(together, rel=1e-7)


def test_an_empty_fit_only_takes_the_origin() -> None:
    fit, x = AffineFit(), torch.randn(6, 2, dtype=torch.float64)
    origins = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    fit.move(origins)
    fit.add(x, x, held_out=False)
    found = fit.sums[False]
    assert found is not None
    np.testing.assert_allclose(found.x, (x - 1).sum(0))
    fit.move((torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)))
    assert fit.sums[True] is None


@pytest.mark.parametrize(("spread", "is_known"), [(1.2, True), (0.8, False)])
def test_an_output_counts_as_constant_within_its_rounding(spread: float, is_known: bool) -> None:
    """Constant: the squared distances from the mean add up to eps^2 times the squared size of the output, or less."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    fit = AffineFit()
    fit.eps = eps = float(torch.finfo(torch.float32).eps)
    fit.add(x, torch.ones(4, 1, dtype=torch.float64), held_out=False)
    made = 1 + spread * eps * torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], dtype=torch.float64)
    fit.add(x, made, held_out=True)
    assert math.isnan(fit.share()) is not is_known


@pytest.mark.parametrize("common", [0.0, 30.0])
@pytest.mark.parametrize(("size", "is_used"), [(2.0, True), (0.5, False)])
def test_a_direction_of_the_input_counts_above_its_rounding(size: float, is_used: bool, common: float) -> None:
    """A second direction at `size` times the storage noise of X as it is, and an output that is that direction."""
    eps, n = float(torch.finfo(torch.float32).eps), 64
    first, other = (np.where(np.arange(n) % period < period // 2, 1.0, -1.0) for period in (4, 2))
    x = np.stack([first + common, np.zeros(n)], 1)
    noise = float(storage_noise(eps, torch.tensor(float(np.linalg.norm(x))), n, 2))
    x[:, 1] = other * size * noise / np.linalg.norm(other)
    fit = AffineFit()
    fit.eps = eps
    fit.move((torch.tensor([1e3, 0.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)))  # counts from afar
    for held_out in (False, True):
        fit.add(torch.tensor(x), torch.tensor(other[:, None]), held_out=held_out)
    assert fit.share() == pytest.approx(0.0 if is_used else 1.0, abs=1e-6)
