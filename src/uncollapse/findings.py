"""Coded rules: which of the four collapses does this model show, where, and what can be done?

A rule looks at records alone, so a stored record can be judged again by a newer rule. Each finding names the worst block
and head, never an average that hides them. The thresholds are provisional until the validity benchmark derives them; each
stands here with the reason for its present value.

What the rules tell apart: a token cloud that shrinks to one point (`DEPTH-CONSENSUS`) or one direction (`DEPTH-DIRECTION`)
or loses dimensions it had (`DEPTH-RANK`); attention whose rows are all alike, uniform (`WIDTH-UNIFORM`) or not
(`WIDTH-RANK-ONE`); heads that write into the same space (`HEADS-IDENTICAL`) or a projection that forgets part of what it
reads (`HEADS-KERNEL`); attention frozen onto single keys by huge logits (`ENTROPY-FROZEN`); and NaN or infinity
(`NUMERICS-NOT-FINITE`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from uncollapse.records import (
    SEVERITIES,
    AttentionRecord,
    Finding,
    HeadsRecord,
    Severity,
    SiteRecord,
    Stack,
    Statistic,
)

# Consensus distance, massive tokens left out: the lowest of any block was .48 in SmolLM2 and .85 in MiniLM on real text.
CONSENSUS_WARNING, CONSENSUS_CRITICAL = 0.1, 0.01
# Mean cosine of distinct tokens, massive tokens left out: 0.98 is within 12 degrees of a single ray.
DIRECTION_WARNING = 0.98
# Share of the attainable rank, relative to the share the embedding had: half of the dimensions are gone.
RANK_WARNING = 0.5
# Normalised entropy of the *least* uniform head of a block: at 0.99 no key weighs noticeably more than another.
UNIFORM_WARNING = 0.99
# ||C A V|| / ||C V|| of the *most* alive head of a block: 0.01 means that every token gets the same mixture.
RANK_ONE_WARNING = 0.01
# Normalised entropy below 0.05 with logits beyond 88: exp(-88) is zero in single precision, and so is its gradient. Heads that
# look at one token (sinks, or at themselves) reach as low an entropy with ordinary logits: MiniLM has one, its logits 38.
FROZEN_ENTROPY, FROZEN_LOGIT = 0.05, 88.0
# Mean squared cosine between two write spaces: 0.99 leaves a tenth of a radian between the heads.
IDENTICAL_OVERLAP = 0.99

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


def findings(
    trajectory: Sequence[SiteRecord], attention: Sequence[AttentionRecord], heads: Sequence[HeadsRecord]
) -> list[Finding]:
    """Every rule that fires, the most severe first, then along depth."""
    observed = Observed(trajectory, attention, heads)
    fired = [finding for rule in RULES for finding in rule(observed)]
    return sorted(fired, key=lambda f: (-SEVERITIES.index(f.severity), f.block if f.block is not None else -1))


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


def _without_massive(site: SiteRecord, measure: str) -> Statistic | None:
    """A norm-sensitive measure without the massive tokens, which otherwise decide it alone."""
    left_out = site.massive_tokens_left_out
    found: Statistic | None = getattr(left_out, measure) if left_out is not None else None
    plain: Statistic | None = getattr(site, measure)
    return plain if found is None else found


def not_finite(observed: Observed) -> Iterator[Finding]:
    for sites in _stacks(observed.trajectory):
        bad = [s for s in sites if s.not_finite]
        if bad:
            first = bad[0]
            yield Finding(
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


def consensus(observed: Observed) -> Iterator[Finding]:
    for sites in _stacks(observed.trajectory):
        measured = [(s, v) for s in sites if (v := _without_massive(s, "consensus_distance")) is not None]
        low = [(s, v) for s, v in measured if v.mean < CONSENSUS_WARNING]
        if not low:
            continue
        first, value = low[0]
        worst, least = min(low, key=lambda pair: pair[1].mean)
        severity: Severity = "critical" if least.mean < CONSENSUS_CRITICAL else "warning"
        yield Finding(
            code="DEPTH-CONSENSUS",
            phenomenon="rank-collapse-depth",
            severity=severity,
            block=first.block,
            head=None,
            value=value.mean,
            threshold=CONSENSUS_WARNING,
            message=f"The tokens come together: the consensus distance falls to {value.mean:.2g} at "
            f"{_place(first.block, first.stack)} and to {least.mean:.2g} at {_place(worst.block, worst.stack)}, the lowest.",
            remedy="See what holds the tokens apart with `uncollapse ablate`; check that the residual connections are whole "
            "and not scaled down from this block on.",
            reference=_DONG,
            stack=first.stack,
        )


def direction(observed: Observed) -> Iterator[Finding]:
    for sites in _stacks(observed.trajectory):
        measured = [(s, v) for s in sites if (v := _without_massive(s, "token_similarity")) is not None]
        high = [(s, v) for s, v in measured if v.mean > DIRECTION_WARNING]
        if not high:
            continue
        first, value = high[0]
        yield Finding(
            code="DEPTH-DIRECTION",
            phenomenon="rank-collapse-depth",
            severity="warning",
            block=first.block,
            head=None,
            value=value.mean,
            threshold=DIRECTION_WARNING,
            message=f"The tokens point the same way from {_place(first.block, first.stack)} on: mean cosine {value.mean:.3f} "
            "between distinct tokens.",
            remedy="If only a large common part is to blame, the consensus distance after the next norm is high; else see "
            "DEPTH-CONSENSUS.",
            reference=_DONG,
            stack=first.stack,
        )


def rank_lost(observed: Observed) -> Iterator[Finding]:
    for sites in _stacks(observed.trajectory):
        shares = [
            (s, s.affine_rank.mean / s.attainable_affine_rank.mean)
            for s in sites
            if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
        ]
        if not shares:
            continue
        start = shares[0][1]
        lost = [(s, share) for s, share in shares[1:] if share < RANK_WARNING * start]
        if lost:
            first, share = lost[0]
            yield Finding(
                code="DEPTH-RANK",
                phenomenon="rank-collapse-depth",
                severity="critical" if share < RANK_WARNING**2 * start else "warning",
                block=first.block,
                head=None,
                value=share,
                threshold=RANK_WARNING * start,
                message=f"Dimensions are lost: at {_place(first.block, first.stack)} the tokens span {share:.0%} of the "
                f"dimensions they could, against {start:.0%} at the embedding.",
                remedy="Look for a rank-deficient weight or a missing residual in this block (`uncollapse ablate`).",
                reference=_CIRRINCIONE,
                stack=first.stack,
            )


def uniform(observed: Observed) -> Iterator[Finding]:
    for records in _calls(observed.attention):
        measured = [(r, r.normalized_entropy) for r in records if r.normalized_entropy is not None]
        if not measured:
            continue
        least, value = min(measured, key=lambda pair: pair[1].mean)
        if value.mean > UNIFORM_WARNING:
            yield _width_finding(
                "WIDTH-UNIFORM",
                least,
                value.mean,
                UNIFORM_WARNING,
                f"attends to every key alike: even its least uniform head, {least.head}, has {value.mean:.4f} of the largest "
                "possible entropy.",
            )


def rank_one(observed: Observed) -> Iterator[Finding]:
    for records in _calls(observed.attention):
        measured = [(r, r.value_contraction) for r in records if r.value_contraction is not None]
        if not measured:
            continue
        most, value = max(measured, key=lambda pair: pair[1].mean)
        if value.mean < RANK_ONE_WARNING:
            yield _width_finding(
                "WIDTH-RANK-ONE",
                most,
                value.mean,
                RANK_ONE_WARNING,
                f"gives every token the same mixture: even its most alive head, {most.head}, keeps {value.mean:.2g} of its "
                "values' spread.",
            )


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


def frozen(observed: Observed) -> Iterator[Finding]:
    for records in _calls(observed.attention):
        hit = [
            (r, r.normalized_entropy, r.max_logit)
            for r in records
            if r.normalized_entropy is not None
            and r.max_logit is not None
            and r.normalized_entropy.mean < FROZEN_ENTROPY
            and r.max_logit.mean > FROZEN_LOGIT
        ]
        if not hit:
            continue
        worst, entropy, logit = min(hit, key=lambda h: h[1].mean)
        yield Finding(
            code="ENTROPY-FROZEN",
            phenomenon="entropy-collapse",
            severity="critical" if 2 * len(hit) >= len(records) else "warning",
            block=worst.block,
            head=worst.head,
            value=entropy.mean,
            threshold=FROZEN_ENTROPY,
            message=f"{len(hit)} of {len(records)} heads of {_place(worst.block, worst.stack)} are frozen onto single keys by "
            f"their logits; the worst is head {worst.head}: normalised entropy {entropy.mean:.2g}, largest logit {logit.mean:.3g}.",
            remedy="Lower the learning rate or the temperature; query-key normalisation, sigma-reparametrisation and logit "
            "soft-capping bound the logits.",
            reference=_ZHAI,
            stack=worst.stack,
            kind=worst.kind,
        )


def identical_heads(observed: Observed) -> Iterator[Finding]:
    for record in observed.heads:
        if record.write_space_overlap is None or 2 * record.head_width > record.width:
            continue  # two write spaces that wide must meet
        pairs = [
            (record.write_space_overlap[g][h], g, h) for g in range(record.heads) for h in range(g + 1, record.heads)
        ]
        value, first, second = max(pairs, default=(0.0, 0, 0))
        if value > IDENTICAL_OVERLAP:
            yield Finding(
                code="HEADS-IDENTICAL",
                phenomenon="head-channel-non-identifiability",
                severity="warning",
                block=record.block,
                head=second,
                value=value,
                threshold=IDENTICAL_OVERLAP,
                message=f"Heads {first} and {second} of {_place(record.block, record.stack)} write into the same space "
                f"(overlap {value:.4f}): nothing behind the projection can tell them apart.",
                remedy="Attribute to the pair, not to either head; position-gated output projections separate them in training.",
                reference=_CIRRINCIONE,
                stack=record.stack,
                kind=record.kind,
            )


def projection_kernel(observed: Observed) -> Iterator[Finding]:
    for record in observed.heads:
        if record.kernel_dimension is None:
            continue
        mixed = record.heads * record.head_width
        forced = max(0, mixed - record.width)
        if record.kernel_dimension > forced:
            lost = record.kernel_dimension - forced
            yield Finding(
                code="HEADS-KERNEL",
                phenomenon="head-channel-non-identifiability",
                severity="warning",
                block=record.block,
                head=None,
                value=float(record.kernel_dimension),
                threshold=float(forced),
                message=f"The output projection of {_place(record.block, record.stack)} forgets {record.kernel_dimension} of "
                f"the {mixed} dimensions its heads write, {lost} more than its shape forces.",
                remedy="Head outputs cannot be recovered here; attribute to the sublayer. Look for duplicated or dead heads.",
                reference=_CIRRINCIONE,
                stack=record.stack,
                kind=record.kind,
            )


RULES: tuple[Callable[[Observed], Iterator[Finding]], ...] = (
    not_finite,
    consensus,
    direction,
    rank_lost,
    uniform,
    rank_one,
    frozen,
    identical_heads,
    projection_kernel,
)
