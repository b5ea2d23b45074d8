"""A diagnosis in words: where the tokens come together, where attention is sharp, what can be said of the heads."""

from __future__ import annotations

from uncollapse.records.diagnosis import DiagnosisRecord, SiteRecord
from uncollapse.report.wording import (
    blocks_in_words,
    extreme,
    groups,
    head_place,
    lowest_rank_share,
    number,
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
            sentences.append(
                f"{where} consensus distance goes from {number(first.value)} at {_named(first.record)} to "
                f"{number(last.value)} at {_named(last.record)}. The lowest sequence has {number(lowest.value)}, "
                f"at {_named(lowest.record)}."
            )
        share = lowest_rank_share(sites)
        if share and share[0] == 1.0:
            sentences.append(f"{where} affine rank is as high as attainable at every site.")
        elif share:
            sentences.append(
                f"{where} affine rank falls to {percent(share[0])} of the attainable at {_named(share[1])}."
            )
    return sentences


def _named(site: SiteRecord) -> str:
    name = site_name(site, with_stack=False)
    return f"the {name}" if site.block is None else name


def attention_sentences(record: DiagnosisRecord) -> list[str]:
    """The sharpest and the most uniform head."""
    lowest = extreme(record.attention, "normalized_entropy")
    highest = extreme(record.attention, "normalized_entropy", highest=True)
    if lowest is None or highest is None:
        return []
    return [
        f"Normalized entropy ranges from {number(lowest.value)} at {head_place(lowest.record)} "
        f"to {number(highest.value)} at {head_place(highest.record)}."
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
        f"Block {', '.join(map(str, blocks))}: over more than {keys:.3g} keys no head can give one key more than half of a "
        f"row's weight, {condition}."
        for (keys, condition), blocks in found.items()
    ]


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
