"""Student's quantiles against the integral of his density."""

import math
from statistics import NormalDist, fmean, stdev

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


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_error_of_the_expansion_falls_with_the_fourth_power(confidence: float) -> None:
    """It goes to third order. A wrong coefficient would leave an error of first, second or third order."""

    def error(freedom: int) -> float:
        low, high = 1.0, 10.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if inside(middle, freedom) < confidence else (low, middle)
        return abs(quantile(freedom, confidence) - low)

    assert 12 < error(10) / error(20) < 20


def test_the_half_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    mean, half = mean_and_half(values)
    assert mean == fmean(values)
    assert half == pytest.approx(3.182 * stdev(values) / 2)


@pytest.mark.parametrize("confidence", [0.9, 0.99, 0.999])
def test_with_its_next_term_the_expansion_is_right_to_the_fifth_order(confidence: float) -> None:
    """The fourth of Abramowitz and Stegun 26.7.5. One unit in any coefficient would move the quantile by 1e-9 or more."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    limit = quantile(200, confidence) + fourth / 200**4
    assert inside(limit - 4e-10, 200) < confidence < inside(limit + 4e-10, 200)
