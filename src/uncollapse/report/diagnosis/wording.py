"""A diagnosis in words: where the tokens come together, where attention is sharp, what can be said of the heads."""

from __future__ import annotations

from uncollapse.records.diagnosis import DiagnosisRecord, SiteRecord
from uncollapse.report.healthy import in_percent, references
from uncollapse.report.wording import (
    blocks_in_words,
    extreme,
    groups,
    head_place,
    lowest_rank_share,
    number,
    numbers_in_words,
    percent,
    site_name,
    verdicts,
)

NO_CONTEXT = 1e9  # tokens: longer than any text that a model is given


def depth_sentences(record: DiagnosisRecord) -> list[str]:
    """How the token cloud changes along each stack."""
    sentences = []
    for (stack, _), sites in groups(record.trajectory).items():
        where = f"In the {stack}, the" if stack else "The"
        first, last = extreme(sites[:1], "consensus_distance"), extreme(sites[-1:], "consensus_distance")
        lowest = extreme(sites, "consensus_distance", "min")
        if first and last and lowest:
            ends = [number(end.value) for end in (first, last)]
            course = f"goes from {ends[0]} at {_named(first.record)} to {ends[1]} at {_named(last.record)}"
            if ends[0] == ends[1]:
                course = f"is {ends[0]} at {_named(first.record)} and at {_named(last.record)}"
            words = references(record).words("trajectory.consensus_distance")
            course += f" (healthy: {words})" if words else ""
            sentences.append(
                f"{where} consensus distance {course}. The lowest sequence has {number(lowest.value)}, "
                f"at {_named(lowest.record)}."
            )
        share = lowest_rank_share(sites)
        if share and share[0] == 1.0:
            sentences.append(f"{where} affine rank is as high as attainable at every site.")
        elif share and share[1].block is None:
            sentences.append(
                f"{where} affine rank is lowest at {_named(share[1])}: {percent(share[0])} of the attainable."
            )
        elif share:
            sentences.append(
                f"{where} affine rank falls to {percent(share[0])} of the attainable at {_named(share[1])}."
            )
    return sentences


def _named(site: SiteRecord) -> str:
    name = site_name(site, with_stack=False)
    return f"the {name}" if site.block is None else name


def attention_sentences(record: DiagnosisRecord) -> list[str]:
    """The sharpest and the most uniform head, beside those of healthy models."""
    lowest = extreme(record.attention, "normalized_entropy")
    highest = extreme(record.attention, "normalized_entropy", highest=True)
    if lowest is None or highest is None:
        return []
    words = references(record).words("attention.normalized_entropy")
    beside = f" (healthy: {words})" if words else ""
    if number(lowest.value) == number(highest.value):
        return [f"Normalized entropy is {number(lowest.value)} in every head{beside}."]
    return [
        f"Normalized entropy ranges from {number(lowest.value)} at {head_place(lowest.record)} "
        f"to {number(highest.value)} at {head_place(highest.record)}{beside}."
    ]


def dispersion_sentences(record: DiagnosisRecord) -> list[str]:
    """Where the logits were shown to be bounded: from which context length on no head there can be sharp, and on what condition.
    Lengths that no context has go unsaid; they stand in the record."""
    found: dict[tuple[float, str], list[int]] = {}
    for each in record.attention:
        if each.disperses_beyond is not None and each.disperses_beyond < NO_CONTEXT and each.kind == "self":
            blocks = found.setdefault((each.disperses_beyond, each.bounded_by), [])
            blocks += [each.block] * (each.block not in blocks)
    return [
        f"{numbers_in_words(blocks).capitalize()}: over more than {number(keys)} keys no head can give one key more than half of a "
        f"row's weight, {condition}."
        for (keys, condition), blocks in found.items()
    ]


def healthy_sentence(record: DiagnosisRecord) -> str:
    """What the figures of the terminal's table are in healthy models; empty if nothing is known of them."""
    healthy = references(record)
    said = []
    if words := healthy.words("trajectory.consensus_distance"):
        said.append(f"consensus {words}")
    if found := healthy.of("trajectory.effective_rank"):
        said.append(f"effective rank {in_percent(found.low, found.high)} of the attainable")
    if words := healthy.lowest("attention.normalized_entropy"):
        said.append(f"lowest head {words}")
    return f"In {healthy.kind}: {', '.join(said).replace(' … ', ' to ')}." if said else ""


def verdict_sentences(record: DiagnosisRecord) -> list[str]:
    """Which head verdict holds where."""
    return [
        f"Head verdict “{verdict}”: {blocks_in_words(blocks)}." for verdict, blocks in verdicts(record.heads).items()
    ]


def summary(record: DiagnosisRecord) -> list[str]:
    """The diagnosis in plain sentences, each one a fact of the record."""
    return [
        *depth_sentences(record),
        *attention_sentences(record),
        *dispersion_sentences(record),
        *verdict_sentences(record),
    ]
