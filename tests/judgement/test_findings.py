"""Each rule at its boundary, on records made by hand: what fires, what stays silent, where it points."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from uncollapse.judgement import findings as rules
from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import (
    AttentionRecord,
    CorpusRecord,
    EmbeddingRecord,
    HeadsRecord,
    PartRecord,
    Pooling,
    SiteRecord,
)
from uncollapse.report.page.cells import names_head

TOKENS = 40


def measured(value: float) -> Statistic:
    return Statistic(value, value, value, 8)


def site(
    block: int | None, consensus: float, carried: float = 0.95, rank: float = 1.0, tokens: int = TOKENS
) -> SiteRecord:
    name = "embedding" if block is None else f"block.{block}"
    return SiteRecord(
        name,
        block,
        None,
        rank=measured(rank * tokens),
        affine_rank=measured(rank * (tokens - 1)),
        attainable_rank=measured(tokens),
        attainable_affine_rank=measured(tokens - 1),
        effective_rank=None,
        stable_rank=None,
        participation_ratio=None,
        consensus_distance=measured(consensus),
        token_similarity=None,
        consensus_after_norm=measured(consensus),
        stream_carried=None if block is None else measured(carried),
    )


def trajectory(*consensus: float, carried: tuple[float, ...] = (), tokens: int = TOKENS) -> list[SiteRecord]:
    """The embedding and one site a block."""
    handed = [0.95, *carried] if carried else [0.95] * len(consensus)
    return [
        site(i - 1 if i else None, c, k, tokens=tokens) for i, (c, k) in enumerate(zip(consensus, handed, strict=True))
    ]


def head(
    number: int,
    block: int = 0,
    *,
    share: float = 0.3,
    contraction: float = 0.6,
    rest: float = 0.7,
    reach: float | None = 0.0,
) -> AttentionRecord:
    return AttentionRecord(
        block=block,
        head=number,
        stack=None,
        kind="self",
        entropy=measured(2.0),
        normalized_entropy=measured(0.6),
        entropy_floor=None,
        max_logit=measured(7.0),
        rest_entropy=measured(rest),
        key_share=measured(share),
        value_contraction=measured(contraction),
        keys_within_reach=None if reach is None else measured(reach),
    )


def projection(overlap: float, *, kernel: int = 0, head_width: int = 8, width: int = 64, heads: int = 3) -> HeadsRecord:
    """Heads 0 and 2 share `overlap`, all others as much as random write spaces."""
    chance = head_width / width
    matrix = [[1.0 if g == h else chance for h in range(heads)] for g in range(heads)]
    matrix[0][2] = matrix[2][0] = overlap
    return HeadsRecord(
        block=1,
        stack=None,
        kind="self",
        heads=heads,
        head_width=head_width,
        width=width,
        ambiguous_degrees_of_freedom=None,
        kernel_dimension=kernel,
        gauge_dimension=None,
        output_projection_rank=None,
        condition_number=None,
        write_space_overlap=matrix,
        energy_share=None,
        verdict=None,
    )


HEALTHY = trajectory(0.95, 0.9, 0.85, 0.8)


def found(
    sites: list[SiteRecord] = HEALTHY, attention: Any = (), heads: Any = (), code: str | None = None
) -> list[Finding]:
    return [f for f in rules.findings(sites, attention, heads) if code in (None, f.code)]


def test_a_healthy_record_has_no_finding_and_every_rule_was_read() -> None:
    attention, heads = [head(0), head(1)], [projection(0.3)]
    assert found(HEALTHY, attention, heads) == []
    codes = {r.finding.code for r in rules.readings(HEALTHY, attention, heads)}
    assert codes == {
        "DEPTH-CONSENSUS",
        "DEPTH-RANK",
        "WIDTH-UNIFORM",
        "WIDTH-RANK-ONE",
        "ENTROPY-FROZEN",
        "HEADS-IDENTICAL",
        "HEADS-KERNEL",
    }


@pytest.mark.parametrize(
    ("carried", "evidence", "severity"),
    [
        ((1.4, 1.2), "hardly trained: gains and biases have moved by at most 0.01 of their scale", "info"),
        ((1.4, 0.9), "hardly trained: gains and biases have moved by at most 0.01 of their scale", "warning"),
        ((1.4, 1.2), "12 gains and biases are where they start", "warning"),  # made so: no step explains it
        ((1.4, 1.2), "", "warning"),
    ],
)
def test_a_common_part_that_outgrows_a_whole_stream_in_the_first_steps_is_no_fault_yet(
    carried: tuple[float, float], evidence: str, severity: str
) -> None:
    sites = trajectory(1.0, 0.5, rules.CONSENSUS * 0.9, carried=carried)
    part = PartRecord(
        block=1, stack=None, sublayer="attention", kind="self", initial=bool(evidence), initial_evidence=evidence
    )
    part = replace(part, block_change=0.5)
    (finding,) = [f for f in rules.findings(sites, [], [], [part]) if f.code == "DEPTH-CONSENSUS"]
    assert finding.severity == severity


def test_other_thresholds_than_those_in_force_judge_the_same_records() -> None:
    limits = rules.Thresholds(unused_keys=0.8, rest_entropy=0.9, within_reach=0.9)
    attention = [head(0, reach=0.8)]
    of = {r.finding.code: r for r in rules.readings(HEALTHY, attention, [], thresholds=limits)}
    now = {r.finding.code: r for r in rules.readings(HEALTHY, attention, [])}
    assert of["WIDTH-UNIFORM"].margin == pytest.approx(math.log(0.8 / 0.7))
    assert now["WIDTH-UNIFORM"].margin < 0
    assert of["ENTROPY-FROZEN"].margin == pytest.approx(math.log(0.9 / 0.8))
    assert now["ENTROPY-FROZEN"].margin < 0


@pytest.mark.parametrize(("factor", "fires"), [(1.01, False), (0.99, True)])
@pytest.mark.parametrize("start", [0.95, 0.5])
def test_consensus_is_held_against_the_embedding(start: float, factor: float, fires: bool) -> None:
    lowest = rules.CONSENSUS * start * factor
    sites = trajectory(start, rules.CONSENSUS * start * 1.05, lowest, carried=(0.9, 0.2))
    hit = found(sites, code="DEPTH-CONSENSUS")
    assert bool(hit) == fires
    for finding in hit:
        assert (finding.severity, finding.block) == ("warning", 0)  # which made nearly all of the fall
        assert finding.value == pytest.approx(rules.CONSENSUS * factor)
        assert "from block 1 on, and" in finding.message  # block 0 is below the threshold only as a bare number


@pytest.mark.parametrize(("part", "severity"), [(10.1, "critical"), (9.9, "warning")])
def test_a_tenth_of_the_threshold_is_critical(part: float, severity: str) -> None:
    (finding,) = found(trajectory(1.0, 0.5, rules.CONSENSUS / part, carried=(0.9, 0.2)), code="DEPTH-CONSENSUS")
    assert finding.severity == severity


def test_a_fall_is_dated_from_the_first_block_that_did_not_hand_the_stream_on() -> None:
    fall = trajectory(0.95, 0.93, 0.9, 0.7, 0.4, 0.05, carried=(0.95, 0.95, 0.6, 0.5, 0.1))
    (finding,) = found(fall, code="DEPTH-CONSENSUS")
    assert finding.block == 2  # the threshold is passed in block 4
    assert "from block 4 on" in finding.message


def test_one_block_that_writes_its_stream_again_does_not_end_a_fall() -> None:
    fall = trajectory(0.95, 0.93, 0.9, 0.8, 0.7, 0.4, 0.05, carried=(0.95, 0.2, 0.1, 2.0, 0.1, 0.1))
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 1


def test_an_early_weak_block_is_no_part_of_a_later_fall() -> None:
    fall = trajectory(0.95, 0.93, 0.9, 0.9, 0.05, carried=(0.1, 0.95, 0.95, 0.2))
    (finding,) = found(fall, code="DEPTH-CONSENSUS")
    assert finding.block == 3


# A fall over which the tokens come together by the same factor in each block.
EVENLY = (1.0, 0.7, 0.49, 0.34, 0.24, 0.17, 0.12)


def test_a_fall_begins_where_the_shortfalls_add_up_to_most_and_not_where_one_more_block_is_a_little_short() -> None:
    """From block 1 on four blocks of five are short of 0.7, and lack 1.28 - 0.25; from block 4 on two of two, which lack 1.2."""
    fall = trajectory(*EVENLY, carried=(0.9, 0.66, 0.66, 0.95, 0.1, 0.1))
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 4


def test_a_fall_whose_last_block_carries_the_stream_on_is_still_dated_from_the_blocks_before_it() -> None:
    fall = trajectory(1.0, 0.95, 0.9, 0.8, 0.5, 0.3, 0.12, carried=(0.9, 0.9, 0.1, 0.1, 0.2, 0.9))
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 2


@pytest.mark.parametrize(
    ("carried", "block"), [((0.05, 1.2, 0.3, 0.5), 2), ((0.05, 0.3, 0.3, 0.5), 0), ((0.9, 0.3, 0.3, 0.5), 1)]
)
def test_the_first_block_may_rewrite_the_embedding_and_begins_a_fall_only_with_the_second(
    carried: tuple[float, ...], block: int
) -> None:
    """As in SmolLM2, whose first block carries on 0.08 of the embedding in good health."""
    fall = trajectory(1.0, 0.7, 0.7, 0.4, 0.1, carried=carried)
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == block


@pytest.mark.parametrize(
    "carried", [(0.65, 0.9, 0.02, 0.5, 0.5), (0.9, 0.9, 1.3, 0.1, 0.1), (0.9, 0.75, 0.02, 1.0, 1.0)]
)
def test_where_one_block_brought_the_tokens_together_it_is_named_whatever_the_blocks_after_it_carry_on(
    carried: tuple[float, ...],
) -> None:
    """The shares 0.95, 0.9, then 0.14: the threshold, 13 %, is passed in the last block only."""
    fall = trajectory(1.0, 0.95, 0.9, 0.14, 0.135, 0.12, carried=carried)
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 2


@pytest.mark.parametrize("began", range(1, 8))
@pytest.mark.parametrize("first", [0.05, 0.5, 0.95, 3.0])
def test_a_fall_with_every_block_short_from_one_on_is_placed_there(first: float, began: int) -> None:
    """Eight blocks, those before `began` healthy. What the first carries on is no matter, unless the second is short."""
    carried = (
        first,
        *([0.8, 1.4, 0.75, 1.0, 6.0, 0.9, 0.85][: began - 1]),
        *([0.5, -0.3, 0.1, 0.6, 0.2, 0.0, 0.65][began - 1 :]),
    )
    fall = trajectory(*(0.75**i for i in range(9)), carried=carried)
    expected = 0 if began == 1 and first < rules.CARRIED else began
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == expected


@pytest.mark.parametrize(("limit", "block"), [(0.5, 2), (0.75, 2), (0.76, 1)])
def test_a_block_belongs_to_the_fall_if_it_carries_on_less_than_the_limit(limit: float, block: int) -> None:
    fall = trajectory(0.95, 0.93, 0.9, 0.05, carried=(0.95, 0.75, 0.2))
    (reading,) = read("DEPTH-CONSENSUS", fall, limits=rules.Thresholds(carried=limit))
    assert reading.finding.block == block


@pytest.mark.parametrize(("shares", "block"), [((0.9, 0.16, 0.12), 1), ((0.9, 0.7, 0.06), 2), ((0.15, 0.14, 0.12), 0)])
def test_where_the_stream_is_carried_on_the_fall_began_where_tokens_came_together_most(
    shares: tuple[float, ...], block: int
) -> None:
    """A common part that came in at one block: the threshold, 13 %, is passed there or later. It may look as if that block let go
    of its stream."""
    for own in (0.05, 1.0):
        carried = tuple(own if i == block else 1.0 for i in range(3))
        (finding,) = found(trajectory(0.9, *(0.9 * s for s in shares), carried=carried), code="DEPTH-CONSENSUS")
        assert finding.block == block


def test_where_nothing_is_short_and_no_block_made_half_of_the_fall_the_steepest_is_named() -> None:
    fall = trajectory(1.0, 0.8, 0.7, 0.3, 0.2, 0.12, carried=(1.0, 0.9, 0.8, 1.1, 0.95))
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 2


def test_a_block_that_turns_its_stream_round_is_as_short_as_one_that_loses_it() -> None:
    """And not short enough to outweigh three blocks that carry all of it on."""
    fall = trajectory(*EVENLY, carried=(0.9, -3.0, 1.0, 1.0, 1.0, 0.1))
    assert found(fall, code="DEPTH-CONSENSUS")[0].block == 5


def test_tokens_that_enter_alike_are_information_and_silence_depth_and_width() -> None:
    alike = trajectory(0.01, 0.001, 0.001)
    (finding,) = found(alike, [head(0, share=1.0, contraction=0.0)])
    assert (finding.code, finding.severity, finding.block) == ("DEPTH-CONSENSUS", "info", None)


@pytest.mark.parametrize(("share", "fires"), [(rules.RANK + 0.01, False), (rules.RANK - 0.01, True)])
@pytest.mark.parametrize("start", [1.0, 0.4])
def test_rank_is_held_against_the_embedding(start: float, share: float, fires: bool) -> None:
    sites = [site(None, 0.9, rank=start), site(0, 0.9, rank=start), site(1, 0.9, rank=start * share)]
    hit = found(sites, code="DEPTH-RANK")
    assert [f.block for f in hit] == ([1] if fires else [])


def corpus(*ranks: float | None, pooling: Pooling = "mean", points: int = 64) -> list[CorpusRecord]:
    """The cloud of the corpus at the sites of a trajectory, by its centred effective rank."""
    return [
        CorpusRecord(
            "embedding" if number == 0 else f"block.{number - 1}",
            number - 1 if number else None,
            None,
            pooling,
            points,
            128,
            None,
            points,
            points - 1,
            None,
            rank,
            *[None] * 12,
        )
        for number, rank in enumerate(ranks)
    ]


def dimensions(*clouds: CorpusRecord) -> list[Finding]:
    sites = trajectory(0.9, 0.9, 0.9)
    return [f for f in rules.findings(sites, [], [], corpus=clouds) if f.code == "CORPUS-DIMENSIONS"]


@pytest.mark.parametrize(("factor", "fires"), [(1.01, False), (0.99, True)])
@pytest.mark.parametrize("start", [50.0, 8.0])
def test_dimensions_are_held_against_the_embedding(start: float, factor: float, fires: bool) -> None:
    low = factor * rules.DIMENSIONS * start
    hit = dimensions(*corpus(start, start, low))
    assert [(f.block, f.severity, f.phenomenon) for f in hit] == (
        [(1, "warning", "dimensional-collapse")] if fires else []
    )
    (worse,) = dimensions(*corpus(start, low * 0.9, 0.9 * rules.DIMENSIONS**2 * start))
    assert (worse.block, worse.severity, worse.value) == (0, "critical", pytest.approx(0.9 * rules.DIMENSIONS**2))


def test_dimensions_are_those_of_the_pooling_that_keeps_most() -> None:
    """A massive token may dominate the means, and the first token may be the same in every sequence."""
    collapsed = corpus(50.0, 40.0, 2.0)
    assert dimensions(*collapsed)
    assert not dimensions(*collapsed, *corpus(15.0, 30.0, 40.0, pooling="last"))
    assert dimensions(*collapsed, *corpus(15.0, 30.0, 3.0, pooling="last"))
    assert dimensions(*collapsed, *corpus(50.0, 40.0, 40.0, pooling="tokens")), "tokens are no sequences"


@pytest.mark.parametrize(
    "clouds",
    [
        corpus(6.0, 1.0, 1.0, points=7),  # too few sequences
        corpus(3.9, 0.1, 0.1),  # too few directions to begin with
        corpus(None, 1.0, 1.0),  # nothing to compare with
        corpus(50.0, None, None),
    ],
)
def test_a_corpus_that_has_nothing_to_lose_is_not_judged(clouds: list[CorpusRecord]) -> None:
    assert not [
        r for r in rules.readings(trajectory(0.9, 0.9, 0.9), [], [], corpus=clouds) if "CORPUS" in r.finding.code
    ]


def test_directions_that_nobody_can_have_are_not_lost() -> None:
    """Sequences that turned to NaN are another finding, and a block that narrows the stream is none."""
    whole = corpus(50.0, 48.0, 48.0)
    for attainable in (1, 7):
        few = replace(
            whole[2], points=attainable + 1, attainable_centred_rank=attainable, centred_effective_rank=0.9 * attainable
        )
        assert not dimensions(*whole[:2], few)
    assert dimensions(*whole[:2], replace(few, centred_effective_rank=1.2))


@pytest.mark.parametrize(("unused", "fires"), [(1.02, False), (0.98, True)])
def test_uniformity_is_judged_by_the_least_uniform_head(unused: float, fires: bool) -> None:
    attention = [head(0, share=1.0), head(1, share=1 - rules.UNUSED_KEYS * unused)]
    hit = found(attention=attention, code="WIDTH-UNIFORM")
    assert [(f.block, f.head, "(1)" in f.message) for f in hit] == ([(0, None, True)] if fires else [])


def test_attention_that_no_token_steers_is_said_once_where_its_rows_are_alike_already() -> None:
    """As a whole; a single head is said in any case, and a finding about something else does not stand for it."""
    fall = trajectory(0.95, 0.05, 0.04)  # of block 0: it has lost rank in depth, which says nothing of its queries
    blind = PartRecord(
        block=0,
        sublayer="attention",
        stack=None,
        kind="self",
        heads=2,
        query_variation=[0.0, 0.0],
        update_size=1.0,
        update_variation=1.0,
        stream_variation=1.0,
        epsilon=1e-7,
    )

    def codes(sites: list[SiteRecord], share: float, part: PartRecord = blind) -> set[str]:
        attention = [head(0, share=share), head(1, share=share)]
        return {f.code for f in rules.findings(sites, attention, (), [part])}

    assert codes(HEALTHY, 0.3) == {"HEAD-BLIND"}
    assert codes(HEALTHY, 1.0) == {"WIDTH-UNIFORM"}
    assert codes(HEALTHY, 1.0, replace(blind, query_variation=[0.0, 1.0])) == {"WIDTH-UNIFORM", "HEAD-BLIND"}
    assert {"HEAD-BLIND", "DEPTH-CONSENSUS"} <= codes(fall, 0.3)


def test_no_width_finding_behind_tokens_that_have_come_together() -> None:
    dead = [head(0, block, share=1.0, contraction=0.0) for block in (0, 2)]
    fall = trajectory(0.95, 0.9, 0.1, 0.1, carried=(0.9, 0.1, 0.1))
    hit = found(fall, dead)
    assert {(f.code, f.block) for f in hit} == {("DEPTH-CONSENSUS", 1), ("WIDTH-UNIFORM", 0), ("WIDTH-RANK-ONE", 0)}


@pytest.mark.parametrize("different", [1, 3, 4, None])
def test_a_text_of_a_few_tokens_repeated_says_nothing_of_attention(different: int | None) -> None:
    first, *rest = HEALTHY
    first = replace(first, distinct_tokens=None if different is None else measured(different))
    hit = found([first, *rest], [head(0, share=1.0, contraction=0.0, rest=0.0)])
    expected = {"WIDTH-UNIFORM", "WIDTH-RANK-ONE", "ENTROPY-FROZEN"} if different in (4, None) else set()
    assert {f.code for f in hit if f.severity != "info"} == expected


@pytest.mark.parametrize(
    ("tokens", "different", "is_judged"),
    [(2, 2, False), (3, 3, True), (TOKENS, 1, False), (TOKENS, 2, True), (2, None, False), (TOKENS, None, True)],
)
def test_a_pair_of_tokens_and_one_token_repeated_have_nothing_to_lose(
    tokens: int, different: int | None, is_judged: bool
) -> None:
    first, *rest = trajectory(0.95, 0.5, 0.01, carried=(0.9, 0.2), tokens=tokens)
    first = replace(first, distinct_tokens=None if different is None else measured(different))
    (finding,) = found([first, *rest], code="DEPTH-CONSENSUS")
    assert (finding.severity, finding.block) == (("critical", 1) if is_judged else ("info", None))


def test_one_sequence_with_something_to_lose_is_enough() -> None:
    first, *rest = trajectory(0.95, 0.5, 0.01, carried=(0.9, 0.2))
    (finding,) = found([replace(first, distinct_tokens=Statistic(1.2, 1, 2, 5)), *rest], code="DEPTH-CONSENSUS")
    assert finding.severity == "critical"
    short = [
        replace(s, attainable_rank=Statistic(2.2, 2, 3, 5), attainable_affine_rank=Statistic(1.2, 1, 2, 5))
        for s in rest
    ]
    first = replace(
        first, attainable_rank=short[0].attainable_rank, attainable_affine_rank=short[0].attainable_affine_rank
    )
    (finding,) = found([first, *short], code="DEPTH-CONSENSUS")
    assert finding.severity == "critical"


def test_a_stream_of_two_dimensions_does_not_hide_how_many_tokens_there_are() -> None:
    narrow = [
        replace(
            s,
            attainable_rank=measured(2),
            attainable_affine_rank=measured(2),
            rank=measured(2),
            affine_rank=measured(2),
        )
        for s in trajectory(0.95, 0.5, 0.01, carried=(0.9, 0.2))
    ]
    assert [f.severity for f in found(narrow, code="DEPTH-CONSENSUS")] == ["critical"]


@pytest.mark.parametrize(("apart", "is_explained"), [(0.3, True), (0.9, False), (1.0, False)])
def test_uniform_attention_says_if_the_tokens_that_enter_explain_it(apart: float, is_explained: bool) -> None:
    """Logits are linear in the keys' differences, and the unused share is quadratic in small logits."""
    attention = [head(0, block=1, share=0.95), head(1, block=1, share=0.97)]
    (finding,) = found(trajectory(0.9, 0.9 * apart, 0.9 * apart), attention, code="WIDTH-UNIFORM")
    assert ("The tokens that enter it" in finding.message) == is_explained
    assert finding.remedy.startswith("Look before this block") == is_explained
    assert finding.severity == "warning"


@pytest.mark.parametrize(("kept", "fires"), [(1.02, False), (0.98, True)])
@pytest.mark.parametrize("tokens", [64, 16, 4])
def test_rank_one_is_judged_by_the_most_alive_head_and_by_length(tokens: int, kept: float, fires: bool) -> None:
    limit = rules.CONTRACTION * min(1, tokens / 16)
    attention = [head(0, contraction=0.0), head(1, contraction=limit * kept)]
    hit = found(trajectory(0.95, 0.9, tokens=tokens), attention, code="WIDTH-RANK-ONE")
    assert [(f.head, "(1)" in f.message) for f in hit] == ([(None, True)] if fires else [])


@pytest.mark.parametrize(("factor", "fires"), [(1.02, False), (0.98, True)])
def test_frozen_is_judged_by_what_is_left_without_the_strongest_key(factor: float, fires: bool) -> None:
    attention = [head(0), head(1), head(2, rest=rules.REST_ENTROPY * factor)]
    hit = found(attention=attention, code="ENTROPY-FROZEN")
    assert [(f.head, f.severity) for f in hit] == ([(2, "warning")] if fires else [])


def test_half_of_the_heads_frozen_is_critical() -> None:
    (finding,) = found(attention=[head(0), head(1, rest=0.0)], code="ENTROPY-FROZEN")
    assert finding.severity == "critical"
    assert finding.message.startswith("In block 0, 1 of 2 heads")


def test_a_head_without_entropy_whose_rest_is_spread_is_a_sink() -> None:
    sink = replace(head(0), entropy=measured(0.0), normalized_entropy=measured(0.0), max_logit=measured(300.0))
    assert found(attention=[sink]) == []


@pytest.mark.parametrize(("factor", "fires"), [(1.02, False), (0.98, True)])
@pytest.mark.parametrize("head_width", [8, 24, 48])
def test_identical_heads_are_held_against_random_write_spaces(head_width: int, factor: float, fires: bool) -> None:
    overlap = 1 - rules.DISTINCTNESS * factor * (1 - head_width / 64)
    hit = found(heads=[projection(overlap, head_width=head_width)], code="HEADS-IDENTICAL")
    assert [(f.block, f.head) for f in hit] == ([(1, 2)] if fires else [])
    assert all("Heads 0 and 2 of block 1" in f.message for f in hit)


def test_heads_of_a_stream_too_narrow_to_judge_are_not() -> None:
    """Two random lines in three dimensions overlap by more than 0.99 once in a hundred pairs or so."""
    assert found(heads=[projection(0.999, head_width=1, width=3)], code="HEADS-IDENTICAL") == []
    assert found(heads=[projection(1.0, head_width=64, width=64)], code="HEADS-IDENTICAL") == []  # they must
    # Six deviations of two random lines, 6 sqrt(2/((d - 1)(d + 2))), reach the threshold up to eight dimensions.
    assert found(heads=[projection(0.999, head_width=1, width=8)], code="HEADS-IDENTICAL") == []
    assert len(found(heads=[projection(0.999, head_width=1, width=9)], code="HEADS-IDENTICAL")) == 1
    # In 25 dimensions they are sqrt(2/648) = 1/18 each: a third in all. Up to there nothing is chance.
    for threshold, judged in ((1 - 1 / 3, 1), (0.667, 0)):
        limits = replace(HALF, distinctness=threshold)
        assert len(read("HEADS-IDENTICAL", heads=[projection(0.999, head_width=1, width=25)], limits=limits)) == judged


@pytest.mark.parametrize(("lost", "fires"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("width", [64, 16])
def test_a_kernel_counts_from_most_of_a_head_on(width: int, lost: float, fires: bool) -> None:
    wide = 20  # three heads of 20 dimensions: a stream of 16 forces a kernel of 44
    forced = max(0, 3 * wide - width)
    kernel = forced + round(lost * rules.LOST_HEADS * wide)
    hit = found(heads=[projection(wide / width, kernel=kernel, head_width=wide, width=width)], code="HEADS-KERNEL")
    assert [f.value for f in hit] == ([float(kernel)] if fires else [])


def test_not_a_number_comes_first_and_at_its_first_block() -> None:
    broken = [*HEALTHY[:2], *(replace(site(b, 0.9), not_finite=3, consensus_after_norm=None) for b in (1, 2))]
    (finding,) = found(broken)
    assert (finding.code, finding.severity, finding.block) == ("NUMERICS-NOT-FINITE", "critical", 1)


def test_what_was_not_measured_is_not_judged() -> None:
    """Records of an older version have none of the measures that came later."""
    old = [replace(s, consensus_after_norm=None, stream_carried=None, affine_rank=None) for s in HEALTHY]
    bare = replace(
        head(0, share=1.0, contraction=0.0, rest=0.0), key_share=None, rest_entropy=None, value_contraction=None
    )
    nothing = replace(projection(1.0, kernel=9), write_space_overlap=None, kernel_dimension=None)
    assert rules.readings(old, [bare], [nothing]) == []


def test_the_margin_is_the_factor_beyond_the_threshold() -> None:
    readings = rules.readings(HEALTHY, [head(0, rest=rules.REST_ENTROPY / 2)], [])
    margins = {r.finding.code: r.margin for r in readings}
    assert margins["ENTROPY-FROZEN"] == pytest.approx(math.log(2))
    assert margins["WIDTH-UNIFORM"] == pytest.approx(math.log(rules.UNUSED_KEYS / 0.7))


def test_the_most_severe_comes_first_then_along_depth() -> None:
    attention = [head(0, 2, rest=0.0), head(0, 1, rest=0.0), head(1, 1), head(2, 1)]
    order = [(f.severity, f.block) for f in found(attention=attention)]
    assert order == [("critical", 2), ("warning", 1)]
    equal = [
        EmbeddingRecord(stack=stack, block=0, apart=0.0, pairs=1, epsilon=1e-7) for stack in ("encoder", "decoder")
    ]
    attention = [head(0, rest=0.0), head(1), head(2)]
    told = rules.findings(HEALTHY, attention, [], [], equal)  # the embedding comes before the first block
    assert [(f.block, f.stack) for f in told] == [(None, "encoder"), (None, "decoder"), (0, None)]


@pytest.mark.parametrize(
    ("rest", "reach", "is_frozen"),
    [
        (0.02, 1.0, False),  # two peaks at fixed offsets
        (0.2, 0.1, False),  # a bias that falls with distance
        (0.02, 0.1, True),
        (
            0.0,
            None,
            False,
        ),  # a record from before the reach was kept: its rest entropy may be that of underflowed weights
    ],
)
def test_a_head_is_frozen_if_its_other_keys_are_out_of_reach_and_one_of_them_wins(
    rest: float, reach: float | None, is_frozen: bool
) -> None:
    attention = [head(0), head(1, rest=rest, reach=reach), head(2)]
    hit = rules.findings(trajectory(0.95, 0.9), attention, [])
    assert [(f.code, f.head) for f in hit] == ([("ENTROPY-FROZEN", 1)] if is_frozen else [])


def test_a_finding_marks_what_is_at_fault() -> None:
    """Of a whole attention all its heads, not the best of them; of a head that head; of an MLP none."""
    attention = [head(0, share=1.0), head(1, share=0.99), head(2, block=1)]
    (whole,) = found(attention=attention, code="WIDTH-UNIFORM")
    assert [names_head(whole, each) for each in attention] == [True, True, False]
    one = replace(whole, phenomenon="dead-component", head=1)
    assert [names_head(one, each) for each in attention] == [False, True, False]
    assert not any(names_head(replace(one, head=None, kind=None), each) for each in attention)


@pytest.mark.parametrize(("part", "severity"), [(0.99, "critical"), (1.01, "warning")])
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_the_square_of_the_limit_is_a_critical_loss_of_rank(part: float, severity: str, start: float) -> None:
    sites = [site(None, 0.9, rank=start), site(0, 0.9, rank=start * rules.RANK**2 * part)]
    (finding,) = found(sites, code="DEPTH-RANK")
    assert (finding.severity, finding.block) == (severity, 0)


def test_a_rank_can_fall_to_nothing_but_not_from_nothing() -> None:
    (finding,) = found([site(None, 0.9), site(0, 0.9, rank=0.0)], code="DEPTH-RANK")
    assert (finding.severity, finding.value, finding.block) == ("critical", 0.0, 0)
    nothing = [site(None, 0.9, rank=0.0), site(0, 0.9, rank=0.0)]
    assert [r for r in rules.readings(nothing, [], []) if r.finding.code == "DEPTH-RANK"] == []
    assert [r for r in rules.readings([site(None, 0.9)], [], []) if r.finding.code == "DEPTH-RANK"] == []


def test_the_margin_is_the_logarithm_of_how_far_past_the_threshold() -> None:
    sites = trajectory(1.0, 0.9, rules.CONSENSUS / 2, carried=(0.9, 0.2))
    (reading,) = [r for r in rules.readings(sites, [], []) if r.finding.code == "DEPTH-CONSENSUS"]
    assert reading.margin == pytest.approx(math.log(2))
    sites = trajectory(1.0, 0.9, 0.0, carried=(0.9, 0.2))
    (reading,) = [r for r in rules.readings(sites, [], []) if r.finding.code == "DEPTH-CONSENSUS"]
    assert reading.margin == pytest.approx(math.log(rules.CONSENSUS / 1e-12))


def test_the_thresholds_are_those_that_were_measured() -> None:
    """docs/validity.md: the smallest healthy distance, half of it, and what is in force."""
    page = (Path(__file__).parents[2] / "docs" / "validity.md").read_text("utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")
    ]
    told = {row[0]: row for row in rows if len(row) == 6}
    for code, constant in (
        ("DEPTH-CONSENSUS", rules.CONSENSUS),
        ("DEPTH-RANK", rules.RANK),
        ("WIDTH-UNIFORM", rules.UNUSED_KEYS),
        ("WIDTH-RANK-ONE", rules.CONTRACTION),
        ("HEADS-IDENTICAL", rules.DISTINCTNESS),
    ):
        smallest, half, in_force = (float(cell.partition(" ")[0]) for cell in told[code][2:5])
        assert constant == in_force == float(f"{half:.2g}")
        assert half == pytest.approx(smallest / 2, rel=0.01)
    frozen = told["ENTROPY-FROZEN"][1]
    assert f"keys within reach / {rules.WITHIN_REACH} and rest entropy / {rules.REST_ENTROPY}" in frozen
    assert (rules.LOST_HEADS, rules.FEW_TOKENS) == (1 / 2, 16)  # half a head; "min(1, n/16)"
    assert f"min(1, n/{rules.FEW_TOKENS})" in told["WIDTH-RANK-ONE"][1]


HALF = rules.Thresholds(
    consensus=0.5, rank=0.5, unused_keys=0.5, contraction=0.5, rest_entropy=0.5, within_reach=0.5, distinctness=0.5
)


def read(code: str, sites: list[SiteRecord] = HEALTHY, attention: Any = (), heads: Any = (), limits: Any = HALF) -> Any:
    return [r for r in rules.readings(sites, attention, heads, thresholds=limits) if r.finding.code == code]


def test_at_the_threshold_itself_nothing_fires() -> None:
    """Numbers without rounding: a distance that equals its threshold is not below it."""
    (depth,) = read("DEPTH-CONSENSUS", trajectory(1.0, 0.5))
    (rank,) = read("DEPTH-RANK", [site(None, 0.9), site(0, 0.9, rank=0.5)])
    (uniform,) = read("WIDTH-UNIFORM", attention=[head(0, share=0.5)])
    (single,) = read("WIDTH-RANK-ONE", attention=[head(0, contraction=0.5)])
    (frozen,) = read("ENTROPY-FROZEN", attention=[head(0, rest=0.5)])
    (alike,) = read("HEADS-IDENTICAL", heads=[projection(0.75, head_width=32)])  # 1/4 of what random spaces have, 1/2
    assert [r.margin for r in (depth, rank, uniform, single, frozen, alike)] == [0.0] * 6


def test_a_fall_passes_its_threshold_where_it_is_below() -> None:
    (depth,) = read("DEPTH-CONSENSUS", trajectory(1.0, 0.5, 0.25))
    assert "from block 1 on, and" in depth.finding.message
    (rank,) = read("DEPTH-RANK", [site(None, 0.9), site(0, 0.9, rank=0.5), site(1, 0.9, rank=0.25)])
    assert (rank.finding.block, rank.finding.severity) == (1, "warning")  # the square of 1/2 is not below itself
    limits = replace(HALF, consensus=0.625)
    (depth,) = read("DEPTH-CONSENSUS", trajectory(1.0, 0.0625), limits=limits)
    assert depth.finding.severity == "warning"  # a tenth, and not below it


def test_a_head_at_its_threshold_is_not_counted_as_frozen() -> None:
    attention = [head(0, rest=0.5), head(1, rest=0.25), head(2), head(3)]
    (frozen,) = read("ENTROPY-FROZEN", attention=attention)
    assert "1 of 4 heads" in frozen.finding.message
    assert (frozen.finding.severity, frozen.finding.head) == ("warning", 1)


def test_frozen_names_the_figures_that_decided() -> None:
    limits = replace(HALF, within_reach=0.75)
    (frozen,) = read("ENTROPY-FROZEN", attention=[head(0, rest=0.25, reach=0.125)], limits=limits)
    assert (frozen.finding.value, frozen.finding.threshold) == (0.125, 0.75)
    assert "88% of the other keys have a weight of 0 beside it, normalised entropy 0.25" in frozen.finding.message


def test_a_place_that_was_not_measured_does_not_end_the_search() -> None:
    blank = replace(head(0, 0), key_share=None, value_contraction=None, rest_entropy=None)
    bad = head(0, 1, share=1.0, contraction=0.0, rest=0.0)
    codes = {(f.code, f.block) for f in found(attention=[blank, bad])}
    assert codes == {("WIDTH-UNIFORM", 1), ("WIDTH-RANK-ONE", 1), ("ENTROPY-FROZEN", 1)}
    unknown = replace(projection(1.0), write_space_overlap=None, kernel_dimension=None)
    single = replace(projection(0.3), heads=1, write_space_overlap=[[1.0]])
    shapeless = replace(projection(1.0), width=0, kernel_dimension=None)
    narrow = replace(projection(0.999, head_width=1, width=3), kernel_dimension=None)
    for other in (unknown, single, shapeless, narrow):
        hits = {f.code for f in found(heads=[replace(other, block=0), projection(1.0, kernel=24)])}
        assert hits == {"HEADS-IDENTICAL", "HEADS-KERNEL"}


@pytest.mark.parametrize("first", ["one token repeated", "alike", "no blocks", "not from the embedding"])
def test_one_stack_that_cannot_be_judged_does_not_silence_the_other(first: str) -> None:
    fall = trajectory(0.95, 0.9, 0.01, carried=(0.9, 0.2))
    other = {
        "one token repeated": [replace(HEALTHY[0], distinct_tokens=measured(1)), *HEALTHY[1:]],
        "alike": trajectory(0.01, 0.01),
        "no blocks": HEALTHY[:1],
        "not from the embedding": HEALTHY[1:],
    }[first]
    sites = [replace(s, stack="encoder") for s in other] + [replace(s, stack="decoder") for s in fall]
    hits = [(f.stack, f.block) for f in found(sites, code="DEPTH-CONSENSUS") if f.severity != "info"]
    assert hits == [("decoder", 1)]
    lost = [site(None, 0.9), site(0, 0.9, rank=0.1)]
    sites = [replace(s, stack="encoder") for s in HEALTHY[:1]] + [replace(s, stack="decoder") for s in lost]
    assert [(f.stack, f.block) for f in found(sites, code="DEPTH-RANK")] == [("decoder", 0)]


@pytest.mark.parametrize(("start", "is_judged"), [(0.1, True), (0.099, False)])
def test_a_tenth_apart_at_entry_is_enough(start: float, is_judged: bool) -> None:
    (finding,) = found(trajectory(start, start, start / 20, carried=(0.9, 0.2)), code="DEPTH-CONSENSUS")
    assert (finding.block is not None) == is_judged
    assert is_judged or finding.value == start


@pytest.mark.parametrize(("logit", "initial"), [(0.0624, False), (0.0626, True)])
def test_logits_a_sixteenth_as_large_as_at_initialisation_are_not_initial(logit: float, initial: bool) -> None:
    """A typical value of 1/2 gives logits of about 1/4."""
    uniform = replace(head(0, share=1.0), max_logit=measured(logit / 4))
    part = PartRecord(
        block=0,
        stack=None,
        sublayer="attention",
        kind="self",
        initial=True,
        initial_evidence="as drawn",
        typical_value=0.5,
    )
    (finding,) = [f for f in rules.findings(HEALTHY, [uniform], [], [part]) if f.code == "WIDTH-UNIFORM"]
    assert finding.severity == ("info" if initial else "warning")
    assert ("as drawn" in finding.message) == initial


def said(reading: Any) -> tuple[float | None, float | None, int | None]:
    return reading.finding.value, reading.finding.threshold, reading.finding.block


def test_each_finding_says_its_figure_its_limit_and_its_place() -> None:
    """Worked out by hand; the margin is ln(threshold / value), or endless where a part is dead or nothing could be measured."""
    broken = [*HEALTHY[:2], *(replace(site(b, 0.9), not_finite=3, consensus_after_norm=None) for b in (1, 2))]
    (numerics,) = read("NUMERICS-NOT-FINITE", broken)
    assert (said(numerics), numerics.margin) == ((3.0, 0.0, 1), math.inf)
    assert "first appears at block 1, in 3 sequences" in numerics.finding.message
    (depth,) = read("DEPTH-CONSENSUS", trajectory(0.8, 0.6, 0.2, 0.3))
    assert (said(depth), depth.margin) == ((0.25, 0.5, 1), pytest.approx(math.log(2)))
    assert (
        "0.8 at the embedding, under 50% of that from block 1 on, and lowest (0.2) at block 1" in depth.finding.message
    )
    (rank,) = read("DEPTH-RANK", [site(None, 0.9, rank=0.8), site(0, 0.9, rank=0.2), site(1, 0.9, rank=0.7)])
    assert (said(rank), rank.margin) == ((pytest.approx(0.25), 0.5, 0), pytest.approx(math.log(2)))
    assert "At block 0 the tokens span 20% of the dimensions they could span; at the embedding it was 80%" in (
        rank.finding.message
    )
    (uniform,) = read("WIDTH-UNIFORM", trajectory(0.8, 0.4, 0.4), [head(1, 1, share=0.75)])
    assert (said(uniform), uniform.margin) == ((0.25, 0.5, 1), pytest.approx(math.log(2)))
    assert "its least uniform head (1) leaves only 0.25 of them unused" in uniform.finding.message
    assert "enter it are at 50% of their distance" in uniform.finding.message
    (single,) = read("WIDTH-RANK-ONE", trajectory(0.95, 0.9, tokens=8), [head(0, contraction=0.0625)])
    assert (said(single), single.margin) == (
        (0.125, 0.5, 0),
        pytest.approx(math.log(4)),
    )  # half of 16 tokens: twice as far
    assert "most (0) keeps only 0.062 of the spread" in single.finding.message
    (alike,) = read("HEADS-IDENTICAL", heads=[projection(0.875, head_width=32)])
    assert (said(alike), alike.margin) == ((0.25, 0.5, 1), pytest.approx(math.log(2)))
    assert "(overlap 0.8750)" in alike.finding.message
    limits = replace(HALF, lost_heads=0.5)
    wide = {"head_width": 20, "width": 16}  # three heads of 20: 60 dimensions into 16
    (kernel,) = read("HEADS-KERNEL", heads=[projection(0.5, kernel=60, **wide)], limits=limits)
    assert (said(kernel), kernel.margin) == ((60.0, 54.0, 1), pytest.approx(math.log(0.8 / 0.5)))
    assert "loses 60 of the 60 dimensions that its heads write. Its shape accounts for 44" in kernel.finding.message
    for forced in (44, 43):
        (nothing,) = read("HEADS-KERNEL", heads=[projection(0.5, kernel=forced, **wide)], limits=limits)
        assert nothing.margin == pytest.approx(math.log(1e-12 / 0.5))  # a distance of 0 counts as 10^-12
    found = rules.readings(trajectory(0.9, 0.9), [], [], corpus=corpus(40.0, 5.0))
    (few,) = [r for r in found if r.finding.code == "CORPUS-DIMENSIONS"]
    assert said(few) == (0.125, rules.DIMENSIONS, 0)
    assert "they use 5.0 of 63 directions at block 0" in few.finding.message
    assert "at the embedding it was 40.0" in few.finding.message
    gone = PartRecord(block=0, sublayer="mlp", stack=None, kind=None, update_size=0.0)
    assert [r.margin for r in rules.readings(HEALTHY, [], [], [gone])][-1] == math.inf


@pytest.mark.parametrize(
    ("first", "figures", "words"),
    [
        (site(None, 0.0625), (0.0625, 0.1), "consensus distance 0.062 after"),
        (replace(site(None, 0.9), distinct_tokens=measured(1)), (1.0, 2.0), "each is one token repeated"),
        (site(None, 0.9, tokens=2), (2.0, 3.0), "each has at most two tokens"),
    ],
)
def test_a_text_that_cannot_be_judged_says_what_it_would_need(
    first: SiteRecord, figures: tuple[float, float], words: str
) -> None:
    (reading,) = read("DEPTH-CONSENSUS", [first, site(0, 0.01)])
    assert said(reading) == (*figures, None)
    assert reading.margin == pytest.approx(math.log(figures[1] / figures[0]))
    assert (words in reading.finding.message, reading.finding.severity) == (True, "info")
