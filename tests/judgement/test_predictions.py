"""Predictions compared with runs that were made up. tests/analyses/test_ablation.py has those of models."""

from collections.abc import Sequence

import pytest

from tests.judgement.test_rates import record as measured
from uncollapse.judgement.predictions import rate_without_residual, verdicts
from uncollapse.records.ablation import AblationRun, RateRecord, VerdictRecord
from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import SiteRecord


def one(value: float | None) -> Statistic | None:
    return None if value is None else Statistic(value, value, value, 4)


def run(
    without: Sequence[str], ranks: Sequence[float | None], distances: Sequence[float], rate: RateRecord | None = None
) -> AblationRun:
    sites = [
        SiteRecord(
            site="embedding" if i == 0 else f"block.{i - 1}",
            block=i - 1 if i else None,
            stack=None,
            rank=one(rank),
            affine_rank=one(rank),
            attainable_rank=one(10),
            attainable_affine_rank=one(10),
            effective_rank=None,
            stable_rank=None,
            participation_ratio=None,
            consensus_distance=one(distance),
            token_similarity=None,
        )
        for i, (rank, distance) in enumerate(zip(ranks, distances, strict=True))
    ]
    return AblationRun(list(without), sites, rate, None, None, [])


WHOLE = run([], [10, 10, 10], [1.0, 0.9, 0.9], measured("none"))


def told(found: list[VerdictRecord], measure: str) -> list[tuple[str, bool | None]]:
    return [(v.prediction.split()[0], v.agrees) for v in found if v.measure == measure]


@pytest.mark.parametrize(
    ("kind", "distances", "mlp", "residual", "without_residual"),
    [
        # Of each kind of fall: does it agree with "the MLP prevents it", "residuals do", "without residuals doubly exponential"?
        ("none", [1.0, 0.9, 0.8], False, True, False),
        ("none", [1.0, 0.7, 0.51], False, True, False),
        ("none", [1.0, 0.7, 0.5], None, None, None),  # half is gone: falling when the blocks end
        ("geometric", [1.0, 0.2, 0.01], True, False, False),
        ("doubly exponential", [1.0, 0.2, 1e-4], True, False, True),
        ("open", [1.0, 0.2, 0.05], True, False, None),
    ],
)
def test_a_fall_in_distance(
    kind: str, distances: list[float], mlp: bool | None, residual: bool | None, without_residual: bool | None
) -> None:
    found = verdicts([WHOLE, run(["mlp"], [10, 10, 10], distances, measured(kind))], is_causal=False)
    assert told(found, "consensus_distance") == [("The", mlp), ("Residual", residual)]
    assert [v.predicted for v in found if v.measure == "consensus_distance"] == ["falls", "does not fall"]
    found = verdicts([WHOLE, run(["residual"], [10, 10, 10], distances, measured(kind))], is_causal=False)
    assert told(found, "consensus_distance") == [("Without", without_residual)]


@pytest.mark.parametrize(
    ("ranks", "share", "lost"),
    [
        ([10, 10, 10], "100%", False),
        ([10, 10, 5], "50%", False),  # half is not less than half
        ([10, 10, 4.9], "49%", True),
        ([10, 4, 10], "40%", True),
        ([10, 4], "40%", True),  # one block is enough
        ([2, 10, 10], "100%", False),  # the first block may tell apart what the embedding does not
        ([2, 2, 10], "20%", True),  # and the whole model's embedding counts as well
        ([10, 10, 10, 20, 10], "100%", False),  # but no later block
    ],
)
def test_a_loss_of_rank(ranks: list[float], share: str, lost: bool) -> None:
    level = [1.0] * len(ranks)
    whole = run([], [10.0] * len(ranks), level, measured("none"))
    found = verdicts([whole, run(["mlp"], ranks, level, measured("none"))], is_causal=False)
    assert told(found, "affine_rank") == [("The", lost), ("Residual", not lost)]
    assert all(f"affine rank is {share} of" in v.observed for v in found if v.measure == "affine_rank")
    assert {v.block for v in found if v.measure == "affine_rank"} == {
        min(range(1, len(ranks)), key=ranks.__getitem__) - 1
    }


def test_what_was_not_measured_is_not_judged() -> None:
    bare = run(["mlp"], [None, None, None], [1.0, 0.9, 0.9])
    assert verdicts([WHOLE, bare], is_causal=False) == []
    assert verdicts([WHOLE], is_causal=False) == []
    short = run(["mlp"], [10, None, None], [1.0, 0.9, 0.9])
    assert verdicts([WHOLE, short], is_causal=False) == []
    nothing = run(["mlp"], [0, 0, 0], [1.0, 0.9, 0.9])
    zero = run([], [0, 0, 0], [1.0, 0.9, 0.9])
    assert told(verdicts([zero, nothing], is_causal=False), "affine_rank") == [("The", True), ("Residual", False)]


@pytest.mark.parametrize(
    ("ranks", "agrees", "observed", "block"),
    [
        ([10, 10, 10], True, "it is the same in every block", None),
        ([10, 9, 7], None, "it differs by at most 3", 1),
        ([10, 13, 10], None, "it differs by at most 3", 0),
        ([10, None, 10], True, "it is the same in every block whose values stay finite", None),
    ],
)
def test_norms_are_neutral_only_where_no_rank_differs(
    ranks: list[float | None], agrees: bool | None, observed: str, block: int | None
) -> None:
    (found,) = verdicts([WHOLE, run(["norm"], ranks, [1.0, 0.9, 0.9])], is_causal=False)
    assert (found.agrees, found.observed, found.block) == (agrees, observed, block)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (measured("none"), "it does not collapse"),
        (measured("open"), "it falls, and the figures do not say at what rate"),
        (
            measured("open", slope=1.25, slope_low=0.5, slope_high=2.0, floor_block=3),
            "it falls, and the figures do not say at what rate, slope 1.2 [0.5, 2], at the rounding floor from block 3",
        ),
        (measured("open", slope=1.25, slope_high=2.0), "it falls, and the figures do not say at what rate"),
        (measured("geometric", factor=0.5, slope=1.0), "geometric, multiplied by 0.5 per block"),
        (measured("geometric"), "geometric"),
        (
            measured("doubly exponential", factor=0.5, slope=3.0, floor_block=0),
            "doubly exponential, ln r grows by a factor of 3 per block, at the rounding floor from block 0",
        ),
        (measured("doubly exponential", factor=0.5), "doubly exponential, multiplied by 0.5 per block"),
    ],
)
def test_a_rate_in_words(rate: RateRecord, said: str) -> None:
    found = verdicts([WHOLE, run(["mlp"], [10, 10, 10], [1.0, 0.5, 0.25], rate)], is_causal=False)
    (seen, _) = [v for v in found if v.measure == "consensus_distance"]
    assert seen.observed == f"consensus distance 1 → 0.25: {said}"
    assert seen.block == (1 if rate.floor_block is None else rate.floor_block)


def test_the_rate_follows_from_the_pattern_at_consensus() -> None:
    eps = 1e-8
    assert rate_without_residual(True, None, eps) == "geometrically"
    assert rate_without_residual(False, None, eps) == "doubly exponentially"
    assert rate_without_residual(True, [1e-4, 0.0], eps) == "doubly exponentially"  # up to the root of epsilon
    assert rate_without_residual(False, [1.1e-4, 0.0], eps) == ""
    assert rate_without_residual(False, [0.0, 0.099], eps) == ""
    assert rate_without_residual(False, [0.0, 0.1], eps) == "geometrically"


@pytest.mark.parametrize(
    ("at_consensus", "epsilon", "how"),
    [
        ([1e-3], 1e-6, "doubly exponentially"),  # at sqrt(eps) itself
        ([1.01e-3], 1e-6, ""),
        ([1e-4, 1.01e-3], 1e-6, ""),  # the largest decides
        ([0.0999], 1e-6, ""),
        ([0.1], 1e-6, "geometrically"),
        ([0.01, 0.1], 1e-6, "geometrically"),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_what_attention_keeps_apart_at_consensus_decides_the_rate(
    at_consensus: list[float], epsilon: float, how: str, is_causal: bool
) -> None:
    assert rate_without_residual(is_causal, at_consensus, epsilon) == how


def test_without_that_the_mask_alone_decides() -> None:
    assert rate_without_residual(True, None, 1e-6) == "geometrically"
    assert rate_without_residual(False, None, 1e-6) == "doubly exponentially"
