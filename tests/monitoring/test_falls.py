"""Where a fall began: the block that a run's own past names."""

from __future__ import annotations

from uncollapse.judgement.findings import CONSENSUS
from uncollapse.monitoring.falls import StreamHistory
from uncollapse.records.trail import Alarm, SitePlace

SITES = [SitePlace("embedding", None, None), *(SitePlace(f"block.{n}", n, None) for n in range(12))]
FELL = Alarm(
    "DEPTH-CONSENSUS", "rank-collapse-depth", "critical", 0, None, 0.001, CONSENSUS, "They converge.", "", "",
    step=90, onset=15, against="threshold", key="DEPTH-CONSENSUS",
)  # fmt: skip

# What each block carried on in two runs whose residual connections decay from block 4 on (docs/early-warning.md, seeds 3 and 7),
# before and ten steps after that began. The first block carries little, and what it carries changes as it learns.
SEED_3 = (
    [0.529, 1.562, 1.142, 1.208, 1.150, 1.191, 1.081, 1.124, 1.107, 1.126, 1.114, 1.102],
    [0.140, 1.572, 1.151, 1.188, 0.499, 0.634, 0.622, 0.862, 0.756, 0.775, 0.848, 0.850],
)
SEED_7 = (
    [-0.823, 1.427, 1.254, 1.352, 1.186, 1.128, 1.113, 1.140, 1.082, 1.091, 1.116, 1.087],
    [-1.479, 1.414, 1.257, 1.337, 0.517, 0.553, 0.756, 0.926, 0.600, 0.899, 0.984, 0.873],
)


def placed(before: list[float], now: list[float], looks: int = 8, alarm: Alarm = FELL) -> Alarm:
    history = StreamHistory(SITES)
    for _ in range(looks):
        assert history.placed([], {"stream_carried": [None, *before]}) == []
    [found] = history.placed([alarm], {"stream_carried": [None, *now]})
    return found


def test_the_block_is_named_from_which_on_less_is_carried_than_before() -> None:
    for before, now in (SEED_3, SEED_7):
        found = placed(before, now)
        assert found.block == 4
        assert "from block 4 on" in found.message
        assert found.message.endswith("Now: They converge.")
    assert "0.43 times" in placed(*SEED_3).message


def test_without_enough_looks_or_a_change_the_rule_names_the_block() -> None:
    assert placed(*SEED_3, looks=7) == FELL
    before = SEED_3[0]
    assert placed(before, before) == FELL
    assert placed(before, [0.9 * value for value in before]) == FELL
    assert StreamHistory(SITES).placed([FELL], {}) == [FELL]


def test_other_alarms_stay_as_they_are() -> None:
    rank = Alarm(**{**vars(FELL), "code": "DEPTH-RANK"})
    assert placed(*SEED_3, alarm=rank) == rank


def test_the_blocks_of_another_stack_are_not_asked() -> None:
    sites = [SitePlace(site.site, site.block, "encoder") for site in SITES]
    history = StreamHistory(sites)
    for _ in range(8):
        history.placed([], {"stream_carried": [None, *SEED_3[0]]})
    assert history.began([None, *SEED_3[1]], "decoder") is None
    assert history.began([None, *SEED_3[1]], "encoder") == (4, 0.499 / 1.150)
