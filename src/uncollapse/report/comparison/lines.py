"""A comparison in a terminal: one row per block, the heads that moved, and what got worse."""

from __future__ import annotations

import functools

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from uncollapse.records.comparison import Change, ComparisonRecord
from uncollapse.report import wording
from uncollapse.report.comparison import wording as say_it
from uncollapse.report.healthy import references
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.findings import SIGNS, STYLES

HEADS = 12  # rows of heads that moved
HEALTHY = ("max_logit", "rest_entropy")  # of the heads, what the sentence about healthy models says
COLUMNS = ("consensus_after_norm", "effective_rank", "stream_carried")


def print_record(record: ComparisonRecord, console: Console) -> None:
    """Print it to `console`: one table of all, where there are more than two, and each beside the first."""
    say = functools.partial(plain.say, console)
    if record.further:
        say(say_it.headline(record), "bold")
        console.print()
        console.print(_overview(record, console))
        console.print()
    for name, pair in say_it.pairs(record):
        say(f"{say_it.names(record)[0]} → {name}", "bold")
        _print_pair(pair, console)
        if record.further:
            console.print()


def _overview(record: ComparisonRecord, console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("beside the first", "figures that moved", "got worse", "no longer found"):
        table.add_column(title, justify="left" if title in ("beside the first", "got worse") else "right")
    for row in say_it.overview(record):
        table.add_row(*(plain.plain(console, cell) for cell in row))
    return table


def _print_pair(record: ComparisonRecord, console: Console) -> None:
    say = functools.partial(plain.say, console)
    say(say_it.probe_sentence(record))
    for sentence in say_it.not_compared(record):
        say(sentence, "bold")
    console.print()
    if record.sites:
        console.print(_blocks(record, console))
        console.print()
    if sentence := _healthy_sentence(record):
        say(sentence, "dim")
        console.print()
    heads = say_it.moved_heads(record)
    if heads:
        console.print(_heads(heads[:HEADS], console))
        if len(heads) > HEADS:
            say(f"and {len(heads) - HEADS} more figures of heads", "dim")
        console.print()
    say(say_it.headline(record), "bold")
    for finding in record.findings:
        head = plain.plain(console, f"{SIGNS[finding.severity]:<3}{finding.severity}", STYLES[finding.severity])
        head.append_text(plain.plain(console, f"  {finding.code} ({wording.finding_place(finding)})", "bold"))
        console.print(head, highlight=False)
        say(finding.message, indent=3)
        if finding.remedy:
            say(f"Remedy: {finding.remedy}", indent=3)
    if record.gone:
        places = "; ".join(f"{f.code} ({wording.finding_place(f)})" for f in record.gone)
        say(f"No longer found: {places}.")


def _healthy_sentence(record: ComparisonRecord) -> str:
    healthy, there = references(record), {change.measure for change in (*record.sites, *record.heads)}
    shown = [m for m in (*COLUMNS, *HEALTHY) if m in there]
    return healthy.said({say_it.TITLES[m]: healthy.beside(m) for m in shown})


def _blocks(record: ComparisonRecord, console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("site")
    for measure in COLUMNS:
        table.add_column(say_it.TITLES[measure], justify="right")
    by_site: dict[str, dict[str, Change]] = {}
    for change in record.sites:
        by_site.setdefault(change.site, {})[change.measure] = change
    for site, changes in by_site.items():
        cells = [_cell(changes[measure]) if measure in changes else wording.ABSENT for measure in COLUMNS]
        table.add_row(*(plain.plain(console, cell) for cell in (site, *cells)))
    return table


def _heads(heads: list[Change], console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("head", "figure"):
        table.add_column(title)
    for title in ("before", "after", "factor"):
        table.add_column(title, justify="right")
    for change in heads:
        where = wording.place(block=change.block, head=change.head, stack=change.stack, kind=change.kind)
        figures = (wording.number(change.before), wording.number(change.after), say_it.factor(change))
        cells = (where, say_it.TITLES[change.measure], *figures)
        table.add_row(*(plain.plain(console, cell) for cell in cells))
    return table


def _cell(change: Change) -> str:
    arrow = f"{wording.number(change.before)} → {wording.number(change.after)}"
    return f"{arrow} *" if change.moved else arrow
