"""How a record is put into words and digits, shared by the page and the terminal so that both say the same.

Only facts of the record are repeated: where a figure is lowest, how it changes along depth. The findings decide whether that
is bad; there are no thresholds here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from uncollapse.records.common import SEVERITIES, Finding, ModelInfo, Probe, Statistic
from uncollapse.records.diagnosis import AttentionRecord, HeadsRecord, SiteRecord, widest_clouds

ABSENT = "–"
PHENOMENON_NAMES = {
    "rank-collapse-depth": "rank collapse in depth",
    "rank-collapse-width": "rank collapse in width",
    "head-channel-non-identifiability": "head-channel non-identifiability",
    "entropy-collapse": "entropy collapse",
    "numerics": "numerics",
    "dead-component": "a part that does nothing",
    "dimensional-collapse": "dimensional collapse of the corpus",
}
SYMMETRY_NAMES = {
    "rank-collapse-depth": "reordering the tokens",
    "rank-collapse-width": "reordering the keys alone",
    "head-channel-non-identifiability": "exchanging heads and mixing inside them",
    "entropy-collapse": "shifting and scaling the logits",
}


# Phenomena whose findings name a site of the trajectory.
TOKEN_CLOUD = ("rank-collapse-depth", "numerics", "dimensional-collapse")


def number(value: float | int | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits; whole numbers in full, very small and very large ones as 1.6e-5.

    >>> number(0.97421), number(63.0), number(1.62e-5), number(70299), number(0.99999), number(None)
    ('0.974', '63', '1.62e-5', '70,299', '1.00', '–')
    """
    if value is None:
        return ABSENT
    if value == round(value) and abs(value) < 1e9:
        return f"{round(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:#.{digits}g}"
    return f"{value:,.0f}" if "e" in text or text.endswith(".") else text


def mean(statistic: Statistic | None, digits: int = 3) -> str:
    """The mean of a statistic in digits."""
    return number(None if statistic is None else statistic.mean, digits)


def spread(statistic: Statistic | None) -> str:
    """The lowest and the highest sequence; empty if they look the same in print.

    >>> spread(Statistic(0.9, 0.81, 0.97, 4)), spread(Statistic(64.0, 64.0, 64.0, 4))
    ('0.810 … 0.970', '')
    """
    if statistic is None or number(statistic.min) == number(statistic.max):
        return ""
    return f"{number(statistic.min)} … {number(statistic.max)}"


def count(amount: int, noun: str) -> str:
    """`amount` of `noun`, in the singular if there is one.

    >>> count(1, "finding"), count(0, "finding"), count(3, "finding")
    ('1 finding', '0 findings', '3 findings')
    """
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def place(*, block: int | None, head: int | None = None, stack: str | None = None, kind: str | None = None) -> str:
    """Where something was measured.

    >>> place(block=3, head=7), place(block=3, stack="decoder", kind="cross"), place(block=None)
    ('block 3, head 7', 'decoder block 3 (cross)', 'the whole model')
    """
    words = "the whole model" if block is None else f"block {block}"
    words = f"{stack} {words}" if stack and block is not None else words
    words += f", head {head}" if head is not None else ""
    return f"{words} (cross)" if kind == "cross" else words


def site_name(site: SiteRecord, *, with_stack: bool = True) -> str:
    """The site in words.

    >>> site = SiteRecord("block.4", 4, "encoder", *9 * [None])
    >>> site_name(site), site_name(site, with_stack=False)
    ('encoder block 4', 'block 4')
    """
    stack = site.stack if with_stack else None
    if site.block is not None:
        return place(block=site.block, stack=stack)
    return f"{stack} embedding" if stack else "embedding"


def finding_places(findings: Sequence[Finding]) -> str:
    """The places where a rule fired, in short: heads by their block, and blocks that are alike together.

    >>> from dataclasses import replace
    >>> one = Finding("", "entropy-collapse", "warning", 0, 1, None, None, "", "", "")
    >>> finding_places([replace(one, block=b, head=h) for b in (0, 1, 2) for h in (1, 2, 3, 7)])
    'blocks 0–2 (heads 1–3, 7)'
    >>> finding_places([replace(one, block=b, head=None) for b in (3, 4, 9)] + [one])
    'blocks 3–4, 9; block 0 (head 1)'
    """
    heads: dict[tuple[str | None, str | None, int | None], list[int | None]] = {}
    for finding in findings:
        heads.setdefault((finding.stack, finding.kind, finding.block), []).append(finding.head)
    alike: dict[tuple[str | None, str | None, tuple[int, ...] | None], list[int | None]] = {}
    for (stack, kind, block), found in heads.items():
        named = None if None in found else tuple(sorted({head for head in found if head is not None}))
        alike.setdefault((stack, kind, named), []).append(block)
    places = []
    for (stack, kind, named), blocks in alike.items():
        known = [block for block in blocks if block is not None]
        words = [finding_place(finding) for finding in findings if finding.block is None][:1] if None in blocks else []
        words += [(f"{stack} " if stack else "") + numbers_in_words(known)] if known else []
        within = f" ({numbers_in_words(named, 'head')})" if named else ""
        places.append(", ".join(words) + within + (" (cross)" if kind == "cross" else ""))
    return "; ".join(places)


def finding_place(finding: Finding) -> str:
    """The place where the rule fired."""
    if finding.block is None and finding.phenomenon in (*TOKEN_CLOUD, "dead-component"):
        return f"{finding.stack} embedding" if finding.stack else "embedding"
    return place(block=finding.block, head=finding.head, stack=finding.stack)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, critical ones first; within a severity the order of the rules is kept."""
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))


def alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """The findings, worst first, grouped by rule and remedy."""
    found: dict[tuple[str, ...], list[Finding]] = {}
    for finding in worst_first(findings):
        found.setdefault((finding.severity, finding.code, finding.remedy, finding.reference), []).append(finding)
    return list(found.values())


def counts_in_words(findings: Sequence[Finding]) -> str:
    """How many findings of which severity; empty if there are none."""
    parts = severity_counts(findings)
    return ", ".join(f"{n} {'warnings' if (s, n > 1) == ('warning', True) else s}" for s, n in parts)


def severity_counts(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """How many findings there are of each severity that occurs, the worst first."""
    counts = [(severity, sum(f.severity == severity for f in findings)) for severity in reversed(SEVERITIES)]
    return [(severity, amount) for severity, amount in counts if amount]


@dataclass(frozen=True)
class LookedAt:
    """What the rules had figures of, and what they had none of."""

    seen: list[str]
    missing: list[str]

    @property
    def left_out(self) -> str:
        """What was not measured, as a clause; empty if nothing is missing.

        >>> LookedAt([], ["attention"]).left_out, LookedAt([], ["attention", "depth"]).left_out
        ('attention was not measured', 'attention and depth were not measured')
        """
        return (
            f"{listed(self.missing)} {'was' if len(self.missing) == 1 else 'were'} not measured" if self.missing else ""
        )


def looked_at(record: Any) -> LookedAt:
    """What the rules could judge in this record: depth at the sites, attention by the head, output projections, the corpus where
    it has directions to lose, and in a record of symmetries each phenomenon that has an order parameter. A record without such a
    field is not about it."""
    looked = LookedAt([], [])
    sites = getattr(record, "trajectory", [])
    judged = [s for s in sites if s.consensus_after_norm or s.consensus_distance or s.affine_rank]
    _look("depth", "site", sites, judged, looked)
    attention = getattr(record, "attention", [])
    mixed = [a for a in attention if a.key_share or a.value_contraction or a.normalized_entropy or a.entropy]
    _look("attention", "head", attention, mixed, looked)
    heads = getattr(record, "heads", [])
    _look("output projections", "block", heads, [h for h in heads if h.verdict is not None], looked)
    clouds = [pair for stack in widest_clouds(sites, getattr(record, "corpus", [])) for pair in stack]
    _look("the corpus", "site", clouds, clouds, looked)
    if not hasattr(record, "trajectory"):
        for symmetry in getattr(record, "symmetries", []):
            values = [value for value in symmetry.order_parameter if value is not None]
            name, asked = PHENOMENON_NAMES[symmetry.phenomenon], symmetry.order_parameter or [None]
            _look(name, "place", asked, values, looked)
    elif not attention:
        looked.missing.append("attention")
    return looked


def _look(what: str, unit: str, asked: Sequence[Any], found: Sequence[Any], looked: LookedAt) -> None:
    """Note how many of those `asked` about had figures."""
    if found:
        looked.seen.append(f"{what} ({count(len(found), unit)})")
    if len(found) < len(asked):
        looked.missing.append(f"{what} in {len(asked) - len(found)} of {count(len(asked), unit)}" if found else what)


def headline(findings: Sequence[Finding], looked: LookedAt) -> str:
    """The verdict in one line. That there is no warning is said only of what was looked at.

    >>> headline([], LookedAt(["depth (4 sites)"], ["attention"]))
    'No warning about depth (4 sites); attention was not measured.'
    >>> headline([], LookedAt([], ["depth", "attention"]))
    'Nothing could be judged: depth and attention were not measured.'
    """
    counts = dict(severity_counts(findings))
    if set(counts) <= {"info"}:
        if not looked.seen:
            found = f"Nothing could be judged: {looked.left_out}" if looked.missing else "Nothing was judged"
        else:
            found = "; ".join(filter(None, [f"No warning about {listed(looked.seen)}", looked.left_out]))
        return f"{found}; {count(counts['info'], 'finding')} for information." if counts else f"{found}."
    nouns = {"critical": "critical finding", "warning": "warning", "info": "finding"}
    parts = [count(amount, nouns[severity]) for severity, amount in counts.items()]
    said = ", ".join(parts) + (" for information." if "info" in counts else ".")
    return f"{said} {looked.left_out[0].upper()}{looked.left_out[1:]}." if looked.missing else said


def groups(records: Iterable[Any]) -> dict[tuple[str | None, str | None], list[Any]]:
    """The records of each stack and attention kind, in the order in which they appear."""
    found: dict[tuple[str | None, str | None], list[Any]] = {}
    for record in records:
        found.setdefault((record.stack, getattr(record, "kind", None)), []).append(record)
    return found


def group_name(stack: str | None, kind: str | None, *, several_kinds: bool) -> str:
    """The heading of one stack and kind; empty if the model has only one.

    >>> group_name("decoder", "cross", several_kinds=True), group_name(None, "self", several_kinds=False)
    ('Decoder, cross-attention', '')
    """
    parts = [stack] if stack else []
    parts += [f"{kind}-attention"] if kind and several_kinds else []
    return ", ".join(parts).capitalize()


@dataclass(frozen=True)
class Extreme:
    """The extreme value of one measure, and the record where it was seen."""

    value: float
    record: Any


def extreme(records: Iterable[Any], measure: str, part: str = "mean", *, highest: bool = False) -> Extreme | None:
    """The lowest (or highest) `part` of `measure` over the records that have it; the first one of equals."""
    seen = [Extreme(getattr(s, part), r) for r in records if (s := getattr(r, measure)) is not None]
    if not seen:
        return None
    return (max if highest else min)(seen, key=lambda e: e.value)


def rank_share(site: SiteRecord, rank: str = "affine_rank") -> float | None:
    """`rank` relative to what was attainable, from the means over sequences; `None` if nothing is attainable."""
    reached, attainable = getattr(site, rank), getattr(site, f"attainable_{rank}")
    return None if reached is None or attainable is None or not attainable.mean else reached.mean / attainable.mean


def lowest_rank_share(sites: Iterable[SiteRecord]) -> tuple[float, SiteRecord] | None:
    """The smallest share of the attainable affine rank along the trajectory, and where."""
    shares = [(share, site) for site in sites if (share := rank_share(site)) is not None]
    return min(shares, key=lambda pair: pair[0]) if shares else None


def model_sentence(model: ModelInfo) -> str:
    """What was measured."""
    grouped = (
        f" sharing {count(model.key_value_heads, 'key/value head')}" if model.key_value_heads != model.heads else ""
    )
    heads = f" of {count(model.heads, 'head')}{grouped}" if model.heads else ", no heads found"
    head_width = f"head width {model.head_width:,}, " if model.heads else ""
    return (
        f"{model.architecture}: {count(model.blocks, 'block')}{heads}, "
        f"width {model.width:,}, {head_width}{model.norm_placement} norm, "
        f"{count(model.parameters, 'parameter')}, {model.dtype}, {model.attention_backend} attention."
    )


def probe_sentence(probe: Probe) -> str:
    """On what it was measured."""
    return f"Measured on {probe_counts(probe)}, from {probe.source}, level {probe.level}."


def probe_counts(probe: Probe) -> str:
    """How many sequences and tokens."""
    if probe.sequences is None or probe.tokens is None:
        return f"sequences that could not be counted ({probe.unavailable.get('tokens', 'no reason is given')})"
    each = f" ({number(probe.tokens / probe.sequences)} per sequence)" if probe.sequences > 1 else ""
    return f"{count(probe.sequences, 'sequence')}, {count(probe.tokens, 'token')}{each}"


def head_place(attention: AttentionRecord) -> str:
    """The place of one head."""
    return place(block=attention.block, head=attention.head, stack=attention.stack, kind=attention.kind)


def verdict_in_short(verdict: str) -> str:
    """A verdict without the figure in parentheses, which differs from block to block.

    >>> verdict_in_short("attributable with care (noise gain 935)")
    'attributable with care'
    """
    return verdict.split(" (")[0]


def verdicts(heads: Sequence[HeadsRecord]) -> dict[str, list[HeadsRecord]]:
    """The blocks with each head verdict, in the order in which the verdicts appear."""
    found: dict[str, list[HeadsRecord]] = {}
    for record in heads:
        if record.verdict is not None:
            found.setdefault(verdict_in_short(record.verdict), []).append(record)
    return found


def blocks_in_words(heads: Sequence[HeadsRecord]) -> str:
    """The blocks of some head records, consecutive ones as a range.

    >>> one = lambda block: HeadsRecord(block, None, "self", 1, 1, 1, *7 * [None], None)
    >>> blocks_in_words([one(b) for b in (0, 1, 2, 5)]), blocks_in_words([one(4)])
    ('blocks 0–2, 5', 'block 4')
    """
    parts = []
    for (stack, kind), records in groups(heads).items():
        words = f"{stack} " if stack else ""
        words += numbers_in_words([record.block for record in records])
        parts.append(f"{words} (cross)" if kind == "cross" else words)
    return "; ".join(parts)


def numbers_in_words(blocks: Iterable[int], noun: str = "block") -> str:
    """Blocks, or other things, by their numbers, consecutive ones as a range.

    >>> numbers_in_words([2, 0, 1, 5]), numbers_in_words([4], "head")
    ('blocks 0–2, 5', 'head 4')
    """
    numbers = sorted(blocks)
    runs: list[list[int]] = []
    for block in numbers:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    said = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {said}"


EXPONENT = re.compile(r"(?<![\w.])(-?\d(?:\.\d+)?)e([+-])(\d{2,3})(?!\w)")


def in_digits(words: str) -> str:
    """A text with its figures written as `number` writes them: a message may say 7.11e+04 beside a table that says 71,097.

    >>> in_digits("noise gain 7.11e+04, off by 1.2e-05, over 1e+03 keys"), in_digits("3e+12 and e+04")
    ('noise gain 71,100, off by 1.2e-5, over 1,000 keys', '3e12 and e+04')
    """
    if "e+" not in words and "e-" not in words:
        return words

    def said(found: re.Match[str]) -> str:
        mantissa, sign, exponent = found.groups()
        if sign == "+" and int(exponent) < 9:
            return f"{float(found[0]):,.0f}"
        return f"{mantissa}e{'-' if sign == '-' else ''}{int(exponent)}"

    return EXPONENT.sub(said, words)


def percent(share: float) -> str:
    """A share in percent; 100 % only if nothing is missing.

    >>> percent(1.0), percent(0.9996), percent(0.25)
    ('100 %', '99.9 %', '25 %')
    """
    if share < 1.0 and round(share * 1000) >= 1000:
        return "99.9 %"
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def option(value: object) -> str:
    """The value of a resolved option: text unchanged, everything else as JSON.

    >>> option("mps"), option([64, 128]), option(None)
    ('mps', '[64, 128]', 'null')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


NAMES = {
    "norm": "norm",
    "residual": "residual",
    "mlp": "MLP",
    "attention": "attention",
    "attention-residual": "attention residual",
    "mlp-residual": "MLP residual",
    "positions": "positions",
    "mask": "mask",
}


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """Words as a list in running text.

    >>> listed(["a", "b", "c"], "or"), listed(["a"])
    ('a, b or c', 'a')
    """
    return f" {conjunction} ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
