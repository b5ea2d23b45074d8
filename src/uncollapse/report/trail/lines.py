"""A monitored run in a terminal: one row for each of a few looks, then the alarms and what happened next."""

from __future__ import annotations

import functools

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from uncollapse.records.trail import TrailReading, TrailRecord
from uncollapse.report import wording
from uncollapse.report.healthy import references
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.findings import SIGNS, STYLES
from uncollapse.report.trail import wording as say_it

SHOWN = 16  # looks that have a row: the first, the last, those with an alarm, and some between

COLUMNS = {
    "consensus_after_norm": "lowest consensus",
    "rest_entropy": "lowest rest entropy",
    "max_logit": "largest logit",
}


def print_record(record: TrailRecord, console: Console) -> None:
    """Print it to `console`."""
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(f"{wording.probe_sentence(record.probe)} {say_it.steps_sentence(record.readings)}")
    console.print()
    if record.readings:
        console.print(_table(record, console))
        healthy = references(record)
        there = {measure for reading in record.readings for measure in (*reading.sites, *reading.heads)}
        if sentence := healthy.said({title: healthy.worst(m) for m, title in COLUMNS.items() if m in there}):
            say(sentence, "dim")
        console.print()
    say(say_it.headline(record), "bold")
    for alarm in record.alarms:
        head = plain.plain(console, f"{SIGNS[alarm.severity]:<3}step {alarm.step:,}", STYLES[alarm.severity])
        since = f", since step {alarm.onset:,}" if alarm.onset != alarm.step else ""
        where = f"  {alarm.code} ({wording.finding_place(alarm)}{since}; {say_it.AGAINST[alarm.against]})"
        head.append_text(plain.plain(console, where, "bold"))
        console.print(head, highlight=False)
        say(alarm.message, indent=3)
        say(f"What happened next: {say_it.what_next(record, alarm)}", indent=3)
        if alarm.remedy:
            say(f"Remedy: {alarm.remedy}", indent=3)


def _table(record: TrailRecord, console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "loss", *COLUMNS.values(), "nearest rule", "alarms"):
        table.add_column(title, justify="left" if title in ("nearest rule", "alarms") else "right")
    for reading in _shown(record.readings):
        nearest = max(reading.margins.items(), key=lambda item: item[1], default=None)
        near = "" if nearest is None else f"{nearest[0].partition('/')[0]} {nearest[1]:+.1f}"
        alarms = ", ".join(dict.fromkeys(alarm.code for alarm in reading.alarms))
        cells = [
            f"{reading.step:,}",
            wording.number(reading.loss),
            wording.number(_extreme(reading.sites.get("consensus_after_norm"), min)),
            wording.number(_extreme(reading.heads.get("rest_entropy"), min)),
            wording.number(_extreme(reading.heads.get("max_logit"), max)),
            near,
            alarms,
        ]
        table.add_row(*(plain.plain(console, cell) for cell in cells))
    return table


def _extreme(values: list[float | None] | None, which: object) -> float | None:
    known = [value for value in values or [] if value is not None]
    if not known:
        return None
    return min(known) if which is min else max(known)


def _shown(readings: list[TrailReading]) -> list[TrailReading]:
    step = max(1, len(readings) // SHOWN)
    return [r for i, r in enumerate(readings) if i % step == 0 or r.alarms or i == len(readings) - 1]
