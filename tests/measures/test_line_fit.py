"""The slope against NumPy's, its interval against the textbook's formula with quantiles from a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.measures.line_fit import line_fit, mean_interval

POINTS = st.lists(st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=3, max_size=9)


@given(POINTS.filter(lambda points: len({x for x, _ in points}) > 1))
def test_the_slope_is_that_of_polyfit(points: list[tuple[int, int]]) -> None:
    x, y = zip(*points, strict=True)
    expected = np.polyfit(x, y, 1)[0]
    assert line_fit(x, y).slope == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("count", "quantile"), [(3, 12.706), (4, 4.303), (6, 2.776), (12, 2.228)])
def test_the_interval_is_students(count: int, quantile: float) -> None:
    x = np.arange(count)
    y = np.random.default_rng(count).normal(size=count)
    slope, cov = np.polyfit(x, y, 1)[0], np.polyfit(x, y, 1, cov=True)[1] if count > 4 else None
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    error = np.sqrt((residual**2).sum() / (count - 2) / ((x - x.mean()) ** 2).sum())
    if cov is not None:
        assert error == pytest.approx(np.sqrt(cov[0, 0]), rel=1e-9)
    fit = line_fit(list(x), list(y))
    assert fit.low == pytest.approx(slope - quantile * error)
    assert fit.high == pytest.approx(slope + quantile * error)


@pytest.mark.parametrize("count", [4, 7])
def test_weights_are_those_of_polyfit(count: int) -> None:
    rng = np.random.default_rng(count)
    x, y, weights = rng.normal(size=count), rng.normal(size=count), rng.uniform(0.1, 4, size=count)
    (slope, _), cov = np.polyfit(x, y, 1, w=weights**0.5, cov=True)
    fit = line_fit(list(x), list(y), list(weights))
    half = {4: 4.303, 7: 2.571}[count] * cov[0, 0] ** 0.5
    assert fit == pytest.approx((slope, slope - half, slope + half), rel=1e-9)


def test_a_line_far_above_zero_keeps_its_slope() -> None:
    """Integers beside 2^40, at places whose mean is no binary fraction: y enters as its distance from its own mean."""
    x, y = [0.0, 1.0, 3.0], [2.0**40, 2.0**40 + 3, 2.0**40 + 9]
    assert line_fit(x, y) == pytest.approx((3.0, 3.0, 3.0), abs=1e-9)


def test_the_interval_of_a_mean_is_students() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    half = 3.182 * np.std(values, ddof=1) / 2
    assert mean_interval(values) == pytest.approx((3.75 - half, 3.75 + half))
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706))
    assert mean_interval([1.0]) is None


def test_what_cannot_be_said_is_none() -> None:
    assert line_fit([1.0], [2.0]) == (None, None, None)
    assert line_fit([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]) == (None, None, None)
    assert line_fit([0.0, 1.0], [0.0, 3.0]) == (3.0, None, None)
