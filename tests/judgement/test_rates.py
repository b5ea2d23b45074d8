"""How sequences fall whose law is known. tests/analyses/test_ablation.py has more of them, and those of models."""

import math
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest

from uncollapse.judgement import rates
from uncollapse.judgement.rates import FLOOR, consensus, depth_rate, rate
from uncollapse.measures.line_fit import LineFit
from uncollapse.records.ablation import RateRecord
from uncollapse.records.common import Stack, Statistic
from uncollapse.records.diagnosis import SiteRecord

EPSILON = 2.0**-52


def record(kind: str, factor: float | None = None, **more: float | int | None) -> RateRecord:
    given = {"slope": None, "slope_low": None, "slope_high": None, "floor_block": None, **more}
    return RateRecord(kind, factor, floor=1e-15, **given)  # type: ignore[arg-type]


def noisy(values: list[float], size: float) -> list[float]:
    """Each number a little up or down in turn."""
    return [v * math.exp(size * (-1) ** i) for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "kind", "floor_block"),
    [
        ([1.0, 0.9, 0.8, 0.9], "none", None),
        ([1.0, 0.5, 0.25, 0.125, 0.1], "none", None),  # a tenth is not less than a tenth
        (noisy([0.5**i for i in range(8)], 0.01), "geometric", None),
        ([0.9, 0.729, 0.387, 0.058, 2e-4, 7.5e-12], "doubly exponential", None),
        ([0.9, 0.6, 1e-3, 1e-17, 1e-17], "doubly exponential", 2),  # the last step lost more than twice as much
        ([1.0, 1e-5, 1e-12, 1e-16], "open", 2),  # the last step is not known to be larger, and two steps tell no law
        ([1.0, 1.0, 0.05, 0.05, 0.05, 0.05], "open", None),  # it stops half way
        ([0.0, 0.0, 0.0], "open", 0),
    ],
)
def test_what_the_figures_support(values: list[float], kind: str, floor_block: int | None) -> None:
    found = rate(values, EPSILON)
    assert (found.kind, found.floor_block) == (kind, floor_block)
    assert found.floor == 16 * EPSILON


def test_the_factor_is_the_geometric_mean_above_the_floor() -> None:
    found = rate([0.8, 0.4, 0.1, 1e-18, 1e-3], EPSILON)
    assert found.factor == pytest.approx(math.sqrt(0.125))
    assert found.floor_block == 2
    between = (math.log(0.5) + math.log(0.25)) / 2
    half = 12.706 * abs(math.log(0.5) - math.log(0.25)) / math.sqrt(2) / math.sqrt(2)
    assert math.log(found.factor_low or 0) == pytest.approx(between - half)
    assert math.log(found.factor_high or 0) == pytest.approx(between + half)
    assert rate([1.0], EPSILON).factor is None


def test_the_slope_is_that_of_the_next_logarithm_on_this_one() -> None:
    """ln r: -1, -3, -9, -27, each three times the one before."""
    found = rate([math.exp(-(3.0**i)) for i in range(4)], EPSILON)
    assert (found.slope, found.slope_low, found.slope_high) == pytest.approx((3.0, 3.0, 3.0))
    assert found.kind == "doubly exponential"


@pytest.mark.parametrize(("last", "kind"), [(2.1, "doubly exponential"), (1.9, "open")])
def test_the_step_onto_the_floor_is_held_against_the_one_before(last: float, kind: str) -> None:
    """Two steps above the floor are too few for a law of their own; the last one loses more than twice as much, or does not."""
    first = FLOOR * EPSILON
    step = math.log(1 / first) / (1 + last)
    found = rate([1.0, math.exp(-step), first / 2], EPSILON)
    assert (found.kind, found.floor_block) == (kind, 1)


def test_a_slope_counts_only_if_its_interval_leaves_out_one() -> None:
    """ln r: the slope is 1.6 and scatters, so that its interval begins between 0 and 1."""
    logs = [-0.5, -1.3, -1.6, -3.4, -4.8, -8.6]
    found = rate([math.exp(v) for v in logs], EPSILON)
    assert found.slope is not None
    assert found.slope_low is not None
    assert found.slope > 1.5
    assert 0 < found.slope_low < 1
    assert found.kind == "open"


NOTHING = LineFit(None, None, None)
DOUBLY, GEOMETRIC, OPEN = "doubly exponential", "geometric", "open"


@pytest.mark.parametrize(
    ("fit", "factor_high", "steps", "last", "kind"),
    [
        # The slope of ln r on the one before, with its interval: above 1, and half way to 3.
        (LineFit(1.51, 1.01, 2.0), None, [-1.0], None, DOUBLY),
        (LineFit(1.5, 1.01, 2.0), None, [-1.0], None, OPEN),
        (LineFit(1.51, 1.0, 2.0), None, [-1.0], None, OPEN),
        # The step onto the floor, twice the one before or more; a slope that is known must not say otherwise.
        (NOTHING, None, [-1.0], -2.01, DOUBLY),
        (NOTHING, None, [-1.0], -2.0, OPEN),
        (NOTHING, None, [-9.0, -1.0], -2.01, DOUBLY),
        (NOTHING, None, [1.0], -0.01, DOUBLY),  # beside a step upwards any fall has grown
        (NOTHING, None, [], -9.0, OPEN),
        (LineFit(1.2, 1.01, 1.4), None, [-1.0], -2.01, DOUBLY),
        (LineFit(1.2, 1.0, 1.4), None, [-1.0], -2.01, OPEN),
        # Every block takes its share, and the interval of the slope does not reach 3.
        (NOTHING, 0.99, [-1.0], None, GEOMETRIC),
        (NOTHING, 1.0, [-1.0], None, OPEN),
        (LineFit(1.0, 0.5, 2.99), 0.99, [-1.0], None, GEOMETRIC),
        (LineFit(1.0, 0.5, 3.0), 0.99, [-1.0], None, OPEN),
        (LineFit(1.51, 1.0, 2.0), 0.99, [-1.0], None, GEOMETRIC),
    ],
)
def test_the_law_of_a_fall_at_each_of_its_limits(
    fit: LineFit, factor_high: float | None, steps: list[float], last: float | None, kind: str
) -> None:
    assert rates._kind(steps, last, fit, factor_high) == kind


def site(block: int | None, distance: float | None, stack: Stack | None = None, rank: float = 3.0) -> SiteRecord:
    """One whose consensus distance is this; without one its tokens have that rank."""
    figures: dict[str, Any] = dict.fromkeys([field.name for field in fields(SiteRecord) if field.default is MISSING])
    own = None if distance is None else Statistic(distance, distance, distance, 2)
    name = "embedding" if block is None else f"block.{block}"
    figures |= {"site": name, "block": block, "stack": stack, "consensus_distance": own}
    return SiteRecord(**figures | {"rank": Statistic(rank, 0.0, rank, 2)})


def test_the_distance_is_followed_in_the_last_stack_and_zeros_agree() -> None:
    trajectory = [
        site(None, 0.9, "encoder"),
        site(0, 0.8, "encoder"),
        site(None, 0.7, "decoder"),
        site(1, 0.6, "decoder"),
    ]
    assert consensus(trajectory) == [0.7, 0.6]
    assert consensus([site(None, 0.5), site(0, None, rank=0.0)]) == [0.5, 0.0]
    assert math.isnan(consensus([site(None, 0.5), site(0, None, rank=1.0)])[1])


def test_the_rate_of_a_trajectory_names_the_block_that_reaches_the_floor() -> None:
    """Blocks 4 to 7 of a decoder: the floor is reached in the third of them, block 6."""
    falling = [1.0, 0.5, 0.125, 1e-18, 1e-18]
    trajectory = [site(i + 3 if i else None, value, "decoder") for i, value in enumerate(falling)]
    found = depth_rate([site(None, 1.0, "encoder"), *trajectory], EPSILON)
    assert found is not None
    assert found.floor_block == 6
    assert found == replace(rate(falling, EPSILON), floor_block=6)
    above = depth_rate(trajectory[:3], EPSILON)
    assert above == rate(falling[:3], EPSILON)
    assert depth_rate([*trajectory, site(9, None)], EPSILON) is None  # not finite
