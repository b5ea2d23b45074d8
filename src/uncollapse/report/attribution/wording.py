"""What an attribution says in words. Facts of the record only: what adds up, what is largest, what may be said of a head."""

from __future__ import annotations

from collections.abc import Sequence

from uncollapse.records.attribution import AttributionRecord, EffectRecord, Estimate
from uncollapse.report import wording

KINDS = {
    "embedding": "embedding",
    "head": "head",
    "attention": "attention",
    "attention_bias": "attention, beside its heads",
    "mlp": "MLP",
    "mlp_bias": "bias of the MLP",
    "mixer": "mixer",
    "norm_bias": "shift of a norm",
    "output_bias": "constant",
}
MOST = 5  # heads that are named in sentences


def figure(estimate: Estimate | None, digits: int = 3) -> str:
    """An estimate with its interval.

    >>> figure(Estimate(1.25, 0.5, 0.7, 1.8, 3)), figure(Estimate(1.25, None, 1.25, 1.25, 1)), figure(None)
    ('1.25 ± 0.500', '1.25', '–')
    """
    if estimate is None:
        return wording.ABSENT
    half = "" if estimate.half_width is None else f" ± {wording.number(estimate.half_width, digits)}"
    return f"{wording.number(estimate.mean, digits)}{half}"


def name(effect: EffectRecord) -> str:
    """A component in words.

    >>> name(EffectRecord("head", 3, 7, None, "self", *4 * [None])), name(EffectRecord("embedding", *8 * [None]))
    ('block 3, head 7', 'embedding')
    """
    if effect.block is None:
        return " ".join(filter(None, [effect.stack, KINDS[effect.kind]]))
    place = wording.place(block=effect.block, head=effect.head, stack=effect.stack, kind=effect.attention)
    return place if effect.kind == "head" else f"{place}, {KINDS[effect.kind]}"


def heads_of(record: AttributionRecord) -> list[EffectRecord]:
    """The heads, the largest direct effect first."""
    heads = [e for e in record.effects if e.kind == "head" and e.direct is not None]
    return sorted(heads, key=lambda e: -abs(e.value))


def sum_of(effects: Sequence[EffectRecord]) -> float:
    """The sum of their mean direct effects."""
    return sum(e.value for e in effects if e.direct is not None)


def headline(record: AttributionRecord) -> str:
    """The number, and whether the effects add up to it."""
    metric = record.metric
    value = f"{metric.name}: {figure(metric.value)}."
    if metric.is_affine:
        count = wording.count(len(record.effects), "component")
        return f"{value} The direct effects of {count} add up to it."
    rest = wording.number(metric.remainder.mean)
    return (
        f"{value} The direct effects sum to {wording.number(metric.sum.mean)}; {rest} is no component’s. They are effects on "
        f"{metric.sum_of}."
    )


def sentences(record: AttributionRecord) -> list[str]:
    """What stands out."""
    said = []
    heads = heads_of(record)
    if heads:
        named = ", ".join(f"{name(h)} ({wording.number(h.value)})" for h in heads[:MOST] if h.value)
        said.append(f"Largest direct effects of heads: {named}.")
    if record.metric.value.n == 1:
        said.append(
            "One sequence: no figure has an interval. Pass several prompts of the same kind to see which effects hold."
        )
    if record.metric.left:
        said.append(
            f"Passed by their derivative, because no frozen scale stands for them: {', '.join(record.metric.left[:MOST])}."
        )
    said += filter(None, [repair(record)])
    return said


def repair(record: AttributionRecord) -> str:
    """How the total effects of the heads with the largest direct ones compare with these: self-repair."""
    largest = [h for h in heads_of(record)[:10] if h.total is not None and h.direct is not None and h.value]
    if not largest:
        return ""
    smaller = [h for h in largest if h.total is not None and h.total.mean * h.value < h.value**2]
    by = {"zero": "zeros", "mean": "its mean", "resample": "another sequence’s"}[record.ablated_as or "zero"]
    count = len(largest)
    if not smaller:
        return f"No self-repair shows: taken away ({by} in its place), each of the {count} largest heads costs as much or more."
    return (
        f"Self-repair: of the {count} heads with the largest direct effects, {len(smaller)} cost less than their direct effect "
        f"when they are taken away ({by} in their place)."
    )


def question(record: AttributionRecord) -> list[str]:
    """May an effect be attributed to a single head? For who records the heads, and for who sees their sum."""
    heads = heads_of(record)
    if not heads:
        return ["No head could be told apart, so no effect is a head’s."]
    said = [
        "An observer who records the heads before the output projection knows what each of them writes: the direct effects below "
        "are exact."
    ]
    share = wording.percent(record.noise)
    known = [h for h in heads if h.behind is not None]
    if known:
        top = known[0]
        inside = [h for h in known if h.behind is not None and abs(h.value) <= h.behind]
        beside = (
            ""
            if top.behind_random is None
            else f" (random weights of that size: ± {wording.number(top.behind_random)})"
        )
        said.append(
            f"An observer who sees only the sum after it, with an error of {share} of its size, knows the largest, {name(top)}, to "
            f"within ± {wording.number(top.behind)}{beside}. For {len(inside):,} of {len(known):,} heads that is more than the "
            "effect itself."
        )
    lost = [h for h in heads if h.behind is None and h.noise_gain is None]
    if lost:
        said.append(
            f"For {wording.count(len(lost), 'head')} nothing can be told after the projection: other heads can write part of what "
            "they write."
        )
    copies = [h for h in heads if h.indistinguishable_from]
    if copies:
        said.append("; ".join(f"{name(h)}: {indistinguishable(h)}" for h in copies[:MOST]) + ".")
    return said


def indistinguishable(effect: EffectRecord) -> str:
    """With which heads it can be confused.

    >>> indistinguishable(EffectRecord("head", 0, 1, None, "self", *4 * [None], indistinguishable_from=[2, 7]))
    'indistinguishable from heads 2 and 7'
    """
    others = effect.indistinguishable_from
    if not others:
        return ""
    listed = " and ".join(filter(None, [", ".join(map(str, others[:-1])), str(others[-1])]))
    return f"indistinguishable from {'head' if len(others) == 1 else 'heads'} {listed}"
