"""What a figure says beside its former self: has it moved, is that more than two probes differ by, and is it for the worse?

A snapshot cannot see a head whose logits grew by half; only its former self can. And no single threshold would do: healthy heads
differ among each other by far more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Final

from uncollapse.records.common import AttentionKind, Finding, Phenomenon, Stack, Statistic
from uncollapse.records.comparison import Change
from uncollapse.records.diagnosis import AttentionRecord, SiteRecord
from uncollapse.records.trail import HeadPlace

GROWN: Final = 1.5  # a change by this factor is reported
LEAST_LOGIT: Final = 1.0  # below, logits choose nothing, and their ratios say nothing
FALSE_ALARMS: Final = 0.01  # for each figure, at most
SHARE: Final = 0.05  # of the larger value: smaller changes are not called so, whatever the noise


@dataclass(frozen=True)
class Course:
    """A measure that can get worse: its code, what collapse it leads to, and whether growing (1) or falling (-1) is worse."""

    code: str
    phenomenon: Phenomenon
    worse: int
    what: str
    remedy: str
    reference: str


_ZHAI = "Zhai et al. 2023, arXiv 2303.06296"
_LOOK = "Look at what the head attends to before and after, and at its query and key updates."
HEAD_COURSES: Final[Mapping[str, Course]] = {
    "max_logit": Course(
        "BASELINE-LOGITS",
        "entropy-collapse",
        1,
        "Its largest logit",
        "If the loss does not need it, bound the logits (query-key normalisation, soft-capping) or lower the learning rate.",
        _ZHAI,
    ),
    "query_key_norm": Course(
        "BASELINE-LOGIT-SCALE",
        "entropy-collapse",
        1,
        "The size of its query-key product, which its logits are proportional to,",
        "If the loss does not need it, bound the logits (query-key normalisation, soft-capping) or lower the learning rate.",
        _ZHAI,
    ),
    "rest_entropy": Course(
        "BASELINE-ENTROPY",
        "entropy-collapse",
        -1,
        "The entropy of its rows without their strongest key",
        _LOOK,
        _ZHAI,
    ),
    "value_contraction": Course(
        "BASELINE-MIXING",
        "rank-collapse-width",
        -1,
        "The spread of the values that its mixing keeps",
        _LOOK,
        "Nait Saada, Naderi, Tanner 2025, arXiv 2410.07799",
    ),
}
SITE_COURSES: Final[Mapping[str, Course]] = {
    "consensus_after_norm": Course(
        "BASELINE-CONSENSUS",
        "rank-collapse-depth",
        -1,
        "The consensus distance after normalisation",
        "Run `uncollapse ablate` on both models to see what keeps the tokens apart, and what no longer does.",
        "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404",
    ),
    "effective_rank": Course(
        "BASELINE-RANK",
        "rank-collapse-depth",
        -1,
        "The effective rank",
        "Run `uncollapse ablate` on both models to see what keeps the tokens apart, and what no longer does.",
        "Roy, Vetterli 2007",
    ),
}
SITE_MEASURES: Final = ("consensus_after_norm", "consensus_distance", "effective_rank", "affine_rank", "stream_carried")
HEAD_MEASURES: Final = ("max_logit", "rest_entropy", "normalized_entropy", "key_share", "value_contraction")


def standard_error(statistic: Statistic) -> float | None:
    """That of the mean over sequences, from their range: n evenly spread figures reach over sqrt(12) (n - 1)/(n + 1) of their
    deviations. Normal ones reach farther, so their error is taken for larger than it is; figures that follow the length of a
    text are nearly even (docs/monitoring.md). None for a single sequence.

    >>> round(standard_error(Statistic(0.0, -1.0, 1.0, 64)), 3)
    0.074
    """
    n = statistic.n
    if n < 2:
        return None
    return (statistic.max - statistic.min) * (n + 1) / (n - 1) / math.sqrt(12 * n)


def noise(before: Statistic, after: Statistic, *, same_probe: bool) -> float | None:
    """The standard error of the difference of two means that comes from drawing two probes."""
    if same_probe:
        return 0.0
    one, other = standard_error(before), standard_error(after)
    return None if one is None or other is None else math.hypot(one, other)


def has_moved(before: float, after: float, error: float | None) -> bool:
    """Whether a change is beyond the noise, and large enough to be one."""
    if error is None:
        return False
    beyond = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2) * error
    return abs(after - before) > max(beyond, SHARE * max(abs(before), abs(after)))


def site_changes(before: Sequence[SiteRecord], after: Sequence[SiteRecord], *, same_probe: bool) -> list[Change]:
    """Every figure of the stream that both have."""
    there = {(site.site, site.stack): site for site in after}
    return [
        _change(measure, old, new, same_probe, site=site.site, block=site.block, stack=site.stack)
        for site in before
        for measure in SITE_MEASURES
        if (old := getattr(site, measure)) is not None
        and (new := getattr(there.get((site.site, site.stack)), measure, None)) is not None
    ]


def head_changes(
    before: Sequence[AttentionRecord], after: Sequence[AttentionRecord], *, same_probe: bool
) -> list[Change]:
    """Every figure of the heads that both have."""
    there = {(r.block, r.head, r.kind): r for r in after}
    return [
        _change(
            measure,
            old,
            new,
            same_probe,
            site=f"block.{r.block}",
            block=r.block,
            stack=r.stack,
            head=r.head,
            kind=r.kind,
        )
        for r in before
        for measure in HEAD_MEASURES
        if (old := getattr(r, measure)) is not None
        and (new := getattr(there.get((r.block, r.head, r.kind)), measure, None)) is not None
    ]


def _change(
    measure: str,
    old: Statistic,
    new: Statistic,
    same_probe: bool,
    *,
    site: str,
    block: int | None,
    stack: Stack | None,
    head: int | None = None,
    kind: AttentionKind | None = None,
) -> Change:
    error = noise(old, new, same_probe=same_probe)
    moved = has_moved(old.mean, new.mean, error)
    return Change(measure, site, block, head, stack, kind, old.mean, new.mean, error, moved)


def smallest(changes: Sequence[Change]) -> dict[str, float]:
    """By measure, the relative change that is found in half of the places at the false-alarm rate of 1 %."""
    quantile = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2)
    by_measure: dict[str, list[float]] = {}
    for change in changes:
        if change.noise is not None and change.before:
            found = max(SHARE, quantile * change.noise / abs(change.before))
            by_measure.setdefault(change.measure, []).append(found)
    return {measure: median(values) for measure, values in by_measure.items()}


def worse(changes: Sequence[Change]) -> Iterator[Finding]:
    """The changes by the factor `GROWN` or more for the worse, beyond the noise."""
    for change in changes:
        course = (HEAD_COURSES if change.head is not None else SITE_COURSES).get(change.measure)
        if course is None or not change.moved or change.factor is None:
            continue
        if change.measure == "max_logit" and change.before < LEAST_LOGIT:
            continue
        if course.worse * math.log(change.factor) < math.log(GROWN):
            continue
        if change.head is None:
            yield finding(course, change.before, change.after, "it was before", block=change.block, stack=change.stack)
        else:
            assert change.block is not None
            assert change.kind is not None
            place = HeadPlace(change.block, change.head, change.stack, change.kind)
            yield head_finding(course, place, change.before, change.after, "it was before")


def head_finding(course: Course, head: HeadPlace, before: float, after: float, beside: str) -> Finding:
    """The finding that a head has changed; `beside` says what its former self is."""
    return finding(course, before, after, beside, block=head.block, head=head.head, stack=head.stack, kind=head.kind)


def finding(
    course: Course,
    before: float,
    after: float,
    beside: str,
    *,
    block: int | None,
    head: int | None = None,
    stack: Stack | None = None,
    kind: AttentionKind | None = None,
) -> Finding:
    """The finding that a figure has changed."""
    factor = after / before
    where = "The embedding" if block is None else f"Block {block}" if head is None else f"Head {head} of block {block}"
    return Finding(
        code=course.code,
        phenomenon=course.phenomenon,
        severity="warning",
        block=block,
        head=head,
        value=factor,
        threshold=GROWN if factor > 1 else 1 / GROWN,
        message=f"{where} has changed. {course.what} is {factor:.2g} times what {beside} ({before:.3g} became {after:.3g}).",
        remedy=course.remedy,
        reference=course.reference,
        stack=stack,
        kind=kind,
    )
