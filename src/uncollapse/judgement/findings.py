"""Coded rules: which of the four collapses does this model show, where, and what can be done?

A rule looks at records alone, so a stored record can be judged again by a newer rule. It reads a *distance from collapse* at
each place, 0 at the collapse, and fires at the worst place where that is below a threshold; never at an average that hides it.
`readings` gives what every rule read, also where it does not fire.

What the rules tell apart: a token cloud that shrinks to one point as the next norm sees it (`DEPTH-CONSENSUS`) or loses
dimensions it had (`DEPTH-RANK`); attention whose rows are all alike, uniform (`WIDTH-UNIFORM`) or not (`WIDTH-RANK-ONE`);
heads that write into the same space (`HEADS-IDENTICAL`) or a projection that forgets part of what it reads (`HEADS-KERNEL`);
attention frozen by logits that are too large as a whole (`ENTROPY-FROZEN`); and NaN or infinity (`NUMERICS-NOT-FINITE`).

Each threshold is half of the least distance found in a healthy model, over one half of the models and confounders of
`studies/validity`; the other half scores it (docs/validity.md). A rule thus fires where even the healthy place that stood
nearest to the collapse would have gone half of its way. What a distance owes to the number of tokens, the width, the mask or
the precision is taken out in the measure or in the rule, and the reason stands there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from uncollapse.records.common import SEVERITIES, Finding, Severity, Stack
from uncollapse.records.diagnosis import AttentionRecord, HeadsRecord, SiteRecord

# All of these are distances from collapse: half of what the nearest healthy run of the deriving half keeps. Those runs, and how
# near the other models come, are in docs/validity.md.
# Consensus distance after a norm, as a share of the embedding's.
CONSENSUS = 0.22
# Share of the attainable rank, as a share of the embedding's.
RANK = 0.5
# Share of the keys that the least uniform head of an attention leaves unused, 1 - (exp(H) - 1) / (T - 1).
UNUSED_KEYS = 0.19
# ||C A V|| / ||C V|| of the most alive head of an attention.
CONTRACTION = 0.025
# Normalised entropy of a row without its strongest key, of the most frozen head.
REST_ENTROPY = 0.044
# Mean squared sine between two write spaces, as a share of what two random ones of this size have.
DISTINCTNESS = 0.09
# Dimensions that an output projection forgets beyond what its shape forces, in heads. Not a distance: twice the healthy most.
LOST_HEADS = 0.6

# What attention keeps of the spread is judged in proportion below this many tokens; see `rank_one`.
FEW_TOKENS = 16
# From where the tokens are together back to where the fall began: a block belongs to the fall that hands on less than this of
# the stream, or less than this share of the most that a block before it did. The middle of what places most of the damaged cases
# of the deriving half.
CARRIED, CARRIED_BEFORE = 0.5, 0.9
# A text with fewer different tokens than this gives an attention nothing to choose among, and too few rivals to freeze out.
DIFFERENT_TOKENS = 4
# An embedding whose tokens are this much alike has nothing to lose behind it: a text that repeats one token looks like that.
APART_AT_ENTRY = 0.1

_DONG = "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681"
_NAIT_SAADA = "Nait Saada, Naderi, Tanner 2025, arXiv 2410.07799"
_ZHAI = "Zhai et al. 2023, arXiv 2303.06296"


@dataclass(frozen=True)
class Observed:
    """What the rules look at."""

    trajectory: Sequence[SiteRecord]
    attention: Sequence[AttentionRecord]
    heads: Sequence[HeadsRecord]


@dataclass(frozen=True)
class Reading:
    """What one rule read at its worst place in one stack or attention. `margin` is ln(threshold / distance): how far beyond the
    threshold it is, in factors of e; the rule fires above 0. `finding` is what it says where it fires."""

    margin: float
    finding: Finding


def findings(
    trajectory: Sequence[SiteRecord], attention: Sequence[AttentionRecord], heads: Sequence[HeadsRecord]
) -> list[Finding]:
    """Every rule that fires, the most severe first, then along depth."""
    fired = [reading.finding for reading in readings(trajectory, attention, heads) if reading.margin > 0]
    return sorted(fired, key=lambda f: (-SEVERITIES.index(f.severity), f.block if f.block is not None else -1))


def readings(
    trajectory: Sequence[SiteRecord], attention: Sequence[AttentionRecord], heads: Sequence[HeadsRecord]
) -> list[Reading]:
    """What every rule read, wherever it could: one reading for each stack, attention or output projection."""
    observed = Observed(trajectory, attention, heads)
    return [reading for rule in RULES for reading in rule(observed)]


def _margin(distance: float, threshold: float) -> float:
    return math.log(threshold / max(distance, 1e-12))


def _place(block: int | None, stack: Stack | None) -> str:
    where = "the embedding" if block is None else f"block {block}"
    return where + (f" ({stack})" if stack else "")


def _stacks(sites: Iterable[SiteRecord]) -> Iterator[list[SiteRecord]]:
    by_stack: dict[Stack | None, list[SiteRecord]] = {}
    for site in sites:
        by_stack.setdefault(site.stack, []).append(site)
    yield from by_stack.values()


def _calls(attention: Iterable[AttentionRecord]) -> Iterator[list[AttentionRecord]]:
    by_call: dict[tuple[int, str], list[AttentionRecord]] = {}
    for record in attention:
        by_call.setdefault((record.block, record.kind), []).append(record)
    yield from by_call.values()


def not_finite(observed: Observed) -> Iterator[Reading]:
    for sites in _stacks(observed.trajectory):
        bad = [s for s in sites if s.not_finite]
        if bad:
            first = bad[0]
            finding = Finding(
                code="NUMERICS-NOT-FINITE",
                phenomenon="numerics",
                severity="critical",
                block=first.block,
                head=None,
                value=float(first.not_finite),
                threshold=0.0,
                message=f"NaN or infinity first appears at {_place(first.block, first.stack)}, in {first.not_finite} "
                "sequences. Everything behind it is unmeasured; what stands before it is measured.",
                remedy="Run with --dtype float32. If it stays, look for NaN in that block's weights.",
                reference="IEEE 754",
                stack=first.stack,
            )
            yield Reading(math.inf, finding)


def consensus(observed: Observed) -> Iterator[Reading]:
    """Behind a norm, where neither a common level nor a massive token counts; and against the embedding, for a text that
    repeats its tokens enters with them alike already, and that is not the model's doing."""
    for sites in _stacks(observed.trajectory):
        measured = [(s, s.consensus_after_norm.mean) for s in sites if s.consensus_after_norm is not None]
        if not measured or measured[0][0].block is not None:
            continue
        (embedding, start), *after = measured
        if start < APART_AT_ENTRY:
            yield _alike_from_the_start(embedding, start)
            continue
        if not after:
            continue
        crossed = next((i for i, (_, value) in enumerate(after) if value < CONSENSUS * start), None)
        worst, least = min(after, key=lambda pair: pair[1])
        end = after.index((worst, least)) if crossed is None else crossed
        at, began = after[end][0], _onset([site for site, _ in after[: end + 1]])
        share = least / start
        severity: Severity = "critical" if share < CONSENSUS / 10 else "warning"
        finding = Finding(
            code="DEPTH-CONSENSUS",
            phenomenon="rank-collapse-depth",
            severity=severity,
            block=began.block,
            head=None,
            value=share,
            threshold=CONSENSUS,
            message=f"The tokens come together from {_place(began.block, began.stack)} on: behind a norm their consensus "
            f"distance is {start:.2g} at the embedding, below {CONSENSUS:.0%} of that from {_place(at.block, at.stack)} on, and "
            f"{least:.2g} at {_place(worst.block, worst.stack)}, the lowest.",
            remedy="See what holds the tokens apart with `uncollapse ablate`; check that the residual connections are whole "
            "and not scaled down from this block on.",
            reference=_DONG,
            stack=began.stack,
        )
        yield Reading(_margin(share, CONSENSUS), finding)


def _onset(sites: Sequence[SiteRecord]) -> SiteRecord:
    """Where the fall that ends at the last of these sites began: the block that best divides those that hand the stream on from
    those that do not. A fall spreads over blocks, so the place where it passes a threshold comes too late; and a block may write
    its own stream once more in the middle of it, so the first that hands it on again does not end it."""
    falls, most = [], 0.0
    for site in sites:
        carried = math.inf if site.stream_carried is None else site.stream_carried.mean
        falls.append(carried < max(CARRIED, CARRIED_BEFORE * min(most, 1.0)))
        most = max(most, carried)
    if not falls[-1]:
        return sites[-1]
    on_the_wrong_side = [sum(falls[:began]) + falls[began:].count(False) for began in range(len(falls))]
    return sites[on_the_wrong_side.index(min(on_the_wrong_side))]


def _alike_from_the_start(embedding: SiteRecord, value: float) -> Reading:
    finding = Finding(
        code="DEPTH-CONSENSUS",
        phenomenon="rank-collapse-depth",
        severity="info",
        block=None,
        head=None,
        value=value,
        threshold=APART_AT_ENTRY,
        message=f"The tokens enter the first block alike (consensus distance {value:.2g} behind a norm): there is nothing that "
        "the blocks could lose, and depth and width are not judged.",
        remedy="Use a text with different tokens. If this one has them, the embedding itself has collapsed.",
        reference=_DONG,
        stack=embedding.stack,
    )
    return Reading(_margin(value, APART_AT_ENTRY), finding)


def rank_lost(observed: Observed) -> Iterator[Reading]:
    """Against what so many tokens of this width can have, and against the embedding, whose table may be of low rank."""
    for sites in _stacks(observed.trajectory):
        shares = [
            (s, s.affine_rank.mean / s.attainable_affine_rank.mean)
            for s in sites
            if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
        ]
        if len(shares) < 2 or not shares[0][1]:
            continue
        start = shares[0][1]
        lost = [(s, share) for s, share in shares[1:] if share < RANK * start]
        first, share = lost[0] if lost else min(shares[1:], key=lambda pair: pair[1])
        finding = Finding(
            code="DEPTH-RANK",
            phenomenon="rank-collapse-depth",
            severity="critical" if share < RANK**2 * start else "warning",
            block=first.block,
            head=None,
            value=share / start,
            threshold=RANK,
            message=f"Dimensions are lost: at {_place(first.block, first.stack)} the tokens span {share:.0%} of the "
            f"dimensions they could, against {start:.0%} at the embedding.",
            remedy="Look for a rank-deficient weight or a missing residual in this block (`uncollapse ablate`).",
            reference=_CIRRINCIONE,
            stack=first.stack,
        )
        yield Reading(_margin(share / start, RANK), finding)


def _with_different_tokens(observed: Observed) -> Iterator[list[AttentionRecord]]:
    """The attention calls of stacks whose text is no single token, or two or three, repeated."""
    distinct = {s.stack: s.distinct_tokens.mean for s in observed.trajectory if s.distinct_tokens is not None}
    for records in _calls(observed.attention):
        if distinct.get(records[0].stack, math.inf) >= DIFFERENT_TOKENS:
            yield records


def _with_tokens_apart(observed: Observed) -> Iterator[list[AttentionRecord]]:
    """Those of them whose tokens can be told apart where they are read: no attention chooses among equal keys, and that the
    tokens have come together is said once, of the depth."""
    entering: dict[tuple[Stack | None, int], float] = {}
    for sites in _stacks(observed.trajectory):
        values = [None if s.consensus_after_norm is None else s.consensus_after_norm.mean for s in sites]
        start = values[0]
        for before, site in zip(values, sites[1:], strict=False):
            if site.block is not None and before is not None and start is not None:
                entering[site.stack, site.block] = min(before / max(CONSENSUS * start, 1e-12), before / APART_AT_ENTRY)
    for records in _with_different_tokens(observed):
        if entering.get((records[0].stack, records[0].block), math.inf) >= 1:
            yield records


def uniform(observed: Observed) -> Iterator[Reading]:
    """The unused share of the keys, not the entropy's: for logits of one variance it is the same for any number of keys."""
    for records in _with_tokens_apart(observed):
        measured = [(r, 1 - r.key_share.mean) for r in records if r.key_share is not None]
        if not measured:
            continue
        least, unused = max(measured, key=lambda pair: pair[1])
        message = f"attends to every key alike: even its least uniform head, {least.head}, leaves only {unused:.2g} of them unused."
        finding = _width_finding("WIDTH-UNIFORM", least, unused, UNUSED_KEYS, message)
        yield Reading(_margin(unused, UNUSED_KEYS), finding)


def rank_one(observed: Observed) -> Iterator[Reading]:
    """Under a full mask. A causal one keeps rows different even where every logit is 0, and `uniform` sees that.

    Relative to the length below 16 tokens: the fewer other keys a row has, the more of it a sink on the first token takes, in
    proportion, so that healthy language models keep 0.04 of two tokens' spread and 0.2 of sixteen's."""
    tokens = {s.stack: s.attainable_rank.mean for s in reversed(observed.trajectory) if s.attainable_rank is not None}
    for records in _with_tokens_apart(observed):
        measured = [(r, r.value_contraction.mean) for r in records if r.value_contraction is not None]
        if not measured:
            continue
        most, kept = max(measured, key=lambda pair: pair[1])
        distance = kept / min(1.0, tokens.get(most.stack, math.inf) / FEW_TOKENS)
        message = f"gives every token the same mixture: its most alive head, {most.head}, keeps {kept:.2g} of its values' spread."
        finding = _width_finding("WIDTH-RANK-ONE", most, distance, CONTRACTION, message)
        yield Reading(_margin(distance, CONTRACTION), finding)


def _width_finding(code: str, record: AttentionRecord, value: float, threshold: float, message: str) -> Finding:
    return Finding(
        code=code,
        phenomenon="rank-collapse-width",
        severity="warning",
        block=record.block,
        head=record.head,
        value=value,
        threshold=threshold,
        message=f"The {record.kind}-attention of {_place(record.block, record.stack)} {message}",
        remedy="Check the query and key weights of this block (zero, or never trained?); at initialisation, widen the "
        "query-key gain or remove the rank-one part of the attention.",
        reference=_NAIT_SAADA,
        stack=record.stack,
        kind=record.kind,
    )


def frozen(observed: Observed) -> Iterator[Reading]:
    """Not by the entropy of the row: a head that looks at the first token, or at itself, has none and is healthy. What is left
    of its row without that token is spread like any other; logits that are too large find a winner there too."""
    for records in _with_different_tokens(observed):
        measured = [(r, r.rest_entropy.mean) for r in records if r.rest_entropy is not None]
        if not measured:
            continue
        hit = sum(value < REST_ENTROPY for _, value in measured)
        worst, least = min(measured, key=lambda pair: pair[1])
        logit = "" if worst.max_logit is None else f", largest logit {worst.max_logit.mean:.3g}"
        finding = Finding(
            code="ENTROPY-FROZEN",
            phenomenon="entropy-collapse",
            severity="critical" if 2 * hit >= len(records) else "warning",
            block=worst.block,
            head=worst.head,
            value=least,
            threshold=REST_ENTROPY,
            message=f"{hit} of {len(records)} heads of {_place(worst.block, worst.stack)} are frozen onto single keys by "
            f"their logits; the worst is head {worst.head}: also without each row's strongest key, one key takes nearly all "
            f"(normalised entropy {least:.2g}{logit}).",
            remedy="Lower the learning rate or the temperature; query-key normalisation, sigma-reparametrisation and logit "
            "soft-capping bound the logits.",
            reference=_ZHAI,
            stack=worst.stack,
            kind=worst.kind,
        )
        yield Reading(_margin(least, REST_ENTROPY), finding)


def identical_heads(observed: Observed) -> Iterator[Reading]:
    """Against two random write spaces of this size, whose mean squared sine is 1 - d_k/d: wide heads must meet."""
    for record in observed.heads:
        expected = 1 - record.head_width / record.width if record.width else 0.0
        if record.write_space_overlap is None or expected <= 0:
            continue
        pairs = [
            (record.write_space_overlap[g][h], g, h) for g in range(record.heads) for h in range(g + 1, record.heads)
        ]
        if not pairs:
            continue
        # Random spaces scatter by sqrt(2) (1 - d_k/d) / sqrt((d - 1)(d + 2)): in a stream of a few dimensions by too much.
        if 1 - 6 * math.sqrt(2 / max((record.width - 1) * (record.width + 2), 1)) < DISTINCTNESS:
            continue
        overlap, first, second = max(pairs)
        distance = (1 - overlap) / expected
        finding = Finding(
            code="HEADS-IDENTICAL",
            phenomenon="head-channel-non-identifiability",
            severity="warning",
            block=record.block,
            head=second,
            value=distance,
            threshold=DISTINCTNESS,
            message=f"Heads {first} and {second} of {_place(record.block, record.stack)} write into the same space "
            f"(overlap {overlap:.4f}): what one adds the other could add, so they are told apart badly behind the projection.",
            remedy="Attribute to the pair, not to either head; position-gated output projections separate them in training.",
            reference=_CIRRINCIONE,
            stack=record.stack,
            kind=record.kind,
        )
        yield Reading(_margin(distance, DISTINCTNESS), finding)


def projection_kernel(observed: Observed) -> Iterator[Reading]:
    """What is lost beyond what the shape forces, in heads. Single directions do not count: the count depends on the weights'
    precision, and in half precision the weakest directions of a healthy projection drown in rounding."""
    for record in observed.heads:
        if record.kernel_dimension is None:
            continue
        mixed = record.heads * record.head_width
        forced = max(0, mixed - record.width)
        lost = record.kernel_dimension - forced
        finding = Finding(
            code="HEADS-KERNEL",
            phenomenon="head-channel-non-identifiability",
            severity="warning",
            block=record.block,
            head=None,
            value=float(record.kernel_dimension),
            threshold=forced + LOST_HEADS * record.head_width,
            message=f"The output projection of {_place(record.block, record.stack)} forgets {record.kernel_dimension} of "
            f"the {mixed} dimensions its heads write, {lost} more than its shape forces.",
            remedy="Head outputs cannot be recovered here; attribute to the sublayer. Look for duplicated or dead heads.",
            reference=_CIRRINCIONE,
            stack=record.stack,
            kind=record.kind,
        )
        yield Reading(-_margin(max(lost, 0) / record.head_width, LOST_HEADS), finding)


RULES: tuple[Callable[[Observed], Iterator[Reading]], ...] = (
    not_finite,
    consensus,
    rank_lost,
    uniform,
    rank_one,
    frozen,
    identical_heads,
    projection_kernel,
)
