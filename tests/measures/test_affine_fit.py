"""The share that no affine map explains, from sums taken piece by piece, against NumPy's least squares on all tokens at once."""

import math

import numpy as np
import pytest
import torch

from uncollapse.measures.affine_fit import AffineFit


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
