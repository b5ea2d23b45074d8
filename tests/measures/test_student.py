"""Student's quantiles against the integral of his density."""

import math
from statistics import fmean, stdev

import pytest

from uncollapse.measures.student import mean_and_half, quantile, quantile_95


def inside(limit: float, freedom: int) -> float:
    """P(|T| <= limit) by Simpson's rule."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    steps = 20_000
    values = [(1 + (limit * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    return 2 * scale * limit / steps / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))


@pytest.mark.parametrize("freedom", range(1, 17))
def test_the_table_is_students(freedom: int) -> None:
    assert inside(quantile_95(freedom) - 6e-4, freedom) < 0.95 < inside(quantile_95(freedom) + 6e-4, freedom)


def test_beyond_the_table_the_interval_is_wider_than_it_must_be() -> None:
    assert quantile_95(16) == quantile_95(17) == quantile_95(1000) > 1.96


@pytest.mark.parametrize(("freedom", "error"), [(4, 2e-2), (6, 5e-3), (10, 1e-3), (30, 2e-5)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_expansion_comes_close(freedom: int, error: float, confidence: float) -> None:
    """Its error falls with the fourth power of the freedom; at 99.9 % and four degrees it is some per cent."""
    assert inside(quantile(freedom, confidence), freedom) == pytest.approx(confidence, abs=error * (1 - confidence) * 4)


def test_the_half_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    mean, half = mean_and_half(values)
    assert mean == fmean(values)
    assert half == pytest.approx(3.182 * stdev(values) / 2)
