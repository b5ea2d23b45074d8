"""How a comparison is put into words."""

from __future__ import annotations

import math

from uncollapse.records.comparison import Change, ComparisonRecord
from uncollapse.report import wording

TITLES = {
    "consensus_after_norm": "consensus after norm",
    "consensus_distance": "consensus distance",
    "effective_rank": "effective rank",
    "affine_rank": "affine rank",
    "stream_carried": "stream carried",
    "max_logit": "largest logit",
    "rest_entropy": "rest entropy",
    "normalized_entropy": "normalised entropy",
    "key_share": "share of keys",
    "value_contraction": "spread kept",
}


def names(record: ComparisonRecord) -> list[str]:
    """What they are called: before and after, if the two bear the same name; numbered, if several of more do."""
    own = [model.name for model in record.models]
    if record.further:
        return [own[0], _numbered(own[1], own, 1), *(each.name for each in record.further)]
    one, other = own[0], own[1]
    return [f"{one} (before)", f"{other} (after)"] if one == other else [one, other]


def title(record: ComparisonRecord) -> str:
    """What is compared with what."""
    base, *others = names(record)
    return f"{base} → {', '.join(others)}"


def _numbered(name: str, own: list[str], index: int) -> str:
    return name if own.count(name) == 1 else f"{name} ({index + 1})"


def headline(record: ComparisonRecord) -> str:
    """What got worse, in one sentence."""
    if record.further:
        worse = sum(bool(pair.findings) for pair in record.pairs)
        return f"Something got worse in {worse} of {len(record.pairs)}, compared with {names(record)[0]}."
    moved = sum(change.moved for change in (*record.sites, *record.heads))
    total = len(record.sites) + len(record.heads)
    figures = f"{moved:,} of {wording.count(total, 'figure')} moved"
    if not record.findings:
        return f"Nothing got worse by half or more; {figures}."
    return f"{wording.count(len(record.findings), 'thing')} got worse ({wording.counts_in_words(record.findings)}); {figures}."


def probe_sentence(record: ComparisonRecord) -> str:
    """Whether the two were measured on the same text, and what that means for the figures."""
    if record.same_probe:
        return "Both were measured on the same probe, so every difference is the models'."
    lead = (
        "The two were measured on different probes"
        if record.same_probe is False
        else "A record is too old to say on which probe"
    )
    if not record.smallest:
        return f"{lead}; how much of a difference comes from the text is not known."
    least = ", ".join(f"{TITLES[name]} {wording.percent(share)}" for name, share in record.smallest.items())
    return f"{lead}. Smaller changes than these may come from the text (1 % false alarms each): {least}."


def pairs(record: ComparisonRecord) -> list[tuple[str, ComparisonRecord]]:
    """The name of each but the first, and what it is beside the first."""
    return list(zip(names(record)[1:], record.pairs, strict=True))


def overview(record: ComparisonRecord) -> list[tuple[str, str, str, str]]:
    """A row for each but the first: its name, how much moved, what got worse, and what is no longer found."""
    found = []
    for name, pair in pairs(record):
        changes = [*pair.sites, *pair.heads]
        moved = f"{sum(c.moved for c in changes):,} of {len(changes):,}"
        found.append((name, moved, wording.counts_in_words(pair.findings) or "nothing", str(len(pair.gone))))
    return found


def moved_heads(record: ComparisonRecord) -> list[Change]:
    """The heads' figures that moved, most first."""
    return sorted((change for change in record.heads if change.moved), key=lambda change: -size(change))


def size(change: Change) -> float:
    """How far a figure moved, in factors of e."""
    factor = change.factor
    return math.inf if factor is None else abs(math.log(factor))


def factor(change: Change) -> str:
    """The change as a factor.

    >>> factor(Change("max_logit", "block.0", 0, 1, None, "self", 2.0, 3.0, 0.0, True))
    '× 1.50'
    """
    return wording.ABSENT if change.factor is None else f"× {wording.number(change.factor)}"


def not_compared(record: ComparisonRecord) -> list[str]:
    """What was not compared, and why."""
    words = {"heads": "Single heads were not compared", "sites": "The stream was not compared"}
    return [f"{words.get(what, what)}: {reason}." for what, reason in record.unavailable.items()]
