"""The parts of a table: cells that know their range, their sort key and why they are absent.

Charts point into the tables next to them: a chart's tooltip looks up the `key` of a row. So each figure is written into the
page once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import AttentionRecord, HeadsRecord, SiteRecord, UpdateRecord
from uncollapse.report import wording

NO_REASON = "no reason was recorded"


@dataclass(frozen=True)
class Cell:
    """One figure: its text, the range over sequences, what to sort by, and the reason if it is absent."""

    text: str
    spread: str = ""
    sort: float | str | None = None
    reason: str = ""
    note: int = 0


@dataclass(frozen=True)
class Column:
    """A heading. `symbol` is shown below the title, and below that the `reference`: what the figure is elsewhere. `numeric` says
    how to align and sort."""

    title: str
    symbol: str = ""
    numeric: bool = True
    reference: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table. `key` is unique in the page; `severity` is that of the worst finding about this row."""

    key: str
    cells: list[Cell]
    severity: str = ""


@dataclass(frozen=True)
class Table:
    """What the table macro draws. `notes` are numbered from 1; `left_out` are columns without any value. The first `names`
    columns name the row.
    """

    key: str
    caption: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str]
    left_out: list[str]
    names: int = 1


@dataclass(frozen=True)
class Measure:
    """One column and how its value is read from a record. `unavailable[key]` says why a value is absent."""

    key: str
    column: Column
    value: Callable[[Any], Any]


def field(key: str, title: str, symbol: str = "", *, numeric: bool = True) -> Measure:
    """The column of one field of the record."""
    return Measure(key, Column(title, symbol, numeric), lambda record: getattr(record, key))


def cell(value: object) -> Cell:
    """A value of a record as a cell; `None` becomes an absent one, whose reason is filled in later."""
    match value:
        case Cell():
            return value
        case None:
            return Cell(wording.ABSENT)
        case Statistic():
            return Cell(wording.mean(value), wording.spread(value), value.mean)
        case str():
            return Cell(value, sort=value)
        case int() | float():
            return Cell(wording.number(value), sort=float(value))
    raise TypeError(type(value))


def table(
    key: str,
    caption: str,
    first: Sequence[tuple[Column, Callable[[Any], Cell]]],
    measures: Iterable[Measure],
    records: Sequence[Any],
    row_key: Callable[[Any], str],
    severity: Callable[[Any], str] = lambda record: "",
    references: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The table of `records`: the columns `first`, which name the row, then the measures that at least one record has. `references`
    by the key of the measure are put under the titles."""
    kept: list[Measure] = []
    missing: dict[str, list[str]] = {}
    for measure in measures:
        if any(measure.value(record) is not None for record in records):
            kept.append(measure)
        else:
            reasons = sorted({record.unavailable.get(measure.key, NO_REASON) for record in records})
            missing.setdefault("; ".join(reasons), []).append(measure.column.title)
    partly: dict[str, list[str]] = {}
    rows = []
    for record in records:
        cells = [name(record) for _, name in first]
        for measure in kept:
            shown = cell(measure.value(record))
            if shown.text == wording.ABSENT:
                reason = record.unavailable.get(measure.key, NO_REASON)
                titles = partly.setdefault(reason, [])
                if measure.column.title not in titles:
                    titles.append(measure.column.title)
                shown = replace(shown, reason=reason, note=list(partly).index(reason) + 1)
            cells.append(shown)
        rows.append(Row(row_key(record), cells, severity(record)))
    notes, left_out = _listed(partly), _listed(missing)
    columns = [column for column, _ in first]
    columns += [replace(each.column, reference=references.get(each.key, each.column.reference)) for each in kept]
    return Table(key, caption, columns, rows, notes, left_out, names=len(first))


def _listed(titles_by_reason: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(titles)}: {reason}" for reason, titles in titles_by_reason.items()]


def slug(*parts: object) -> str:
    """A key for the page, made of the parts that are present. They come from fixed fields and numbers of a record only.

    >>> slug("head", None, "self", 3, 7)
    'head-self-3-7'
    """
    return "-".join(str(part) for part in parts if part is not None)


def site_key(site: SiteRecord) -> str:
    """The key of a site's row."""
    _, _, tower = site.site.partition("embedding.")
    return slug("site", site.stack, ("in" if not tower else f"in-{tower}") if site.block is None else site.block)


def left_out_key(site: SiteRecord) -> str:
    """The key of a site's row in the table without its largest-norm tokens."""
    return f"{site_key(site)}-left-out"


def head_key(attention: AttentionRecord) -> str:
    """The key of a head's row."""
    return slug("head", attention.stack, attention.kind, attention.block, attention.head)


def block_key(heads: HeadsRecord) -> str:
    """The key of a block's row in the head panel."""
    return slug("block", heads.stack, heads.kind, heads.block)


def severity_of(findings: Sequence[Finding], names: Callable[[Finding], bool]) -> str:
    """The severity of the worst finding that `names` this place; empty if none does."""
    named = wording.worst_first(finding for finding in findings if names(finding))
    return named[0].severity if named else ""


def names_head(finding: Finding, record: AttentionRecord) -> bool:
    """Whether the finding is about this head's attention: about the head itself, or, if it names none, about a whole attention.
    What is wrong with an MLP, or with a block as a whole, marks no head."""
    if finding.phenomenon == "dead-component" and finding.kind is None:
        return False
    return (
        finding.phenomenon in ("entropy-collapse", "rank-collapse-width", "dead-component")
        and finding.head in (None, record.head)
        and (finding.block, finding.stack) == (record.block, record.stack)
        and finding.kind in (None, record.kind)
    )


def names_heads(finding: Finding, record: HeadsRecord) -> bool:
    """Whether the finding is about this block's output projection."""
    return finding.phenomenon == "head-channel-non-identifiability" and (
        (finding.block, finding.stack) == (record.block, record.stack) and finding.kind in (None, record.kind)
    )


def names_site(finding: Finding, site: SiteRecord) -> bool:
    """Whether the finding is about the token cloud here; without a block it means what enters the first one."""
    return finding.phenomenon in wording.TOKEN_CLOUD and (finding.block, finding.stack) == (site.block, site.stack)


def update_key(update: UpdateRecord) -> str:
    """The key of a sublayer's row."""
    return slug("update", update.stack, update.kind, update.block, update.sublayer)
