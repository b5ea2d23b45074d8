"""An attribution in a terminal: the number, what may be said of heads, then the largest effects."""

from __future__ import annotations

import functools

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from uncollapse.records.attribution import AttributionRecord, EffectRecord
from uncollapse.report import wording
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.attribution import wording as say_it
from uncollapse.report.terminal import plain

SHOWN = 16


def print_record(record: AttributionRecord, console: Console) -> None:
    """Print it to `console`."""
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(wording.probe_sentence(record.probe))
    for sentence in not_measured_sentences(record.anatomy, "projection", "heads of"):
        say(sentence, "bold")
    console.print()
    say(say_it.headline(record), "bold")
    for sentence in (*say_it.sentences(record), *say_it.question(record)):
        say(sentence)
    console.print()
    effects = sorted((e for e in record.effects if e.direct is not None), key=lambda e: -abs(e.value))
    console.print(_table(effects[:SHOWN], record, console))
    if len(effects) > SHOWN:
        rest = say_it.sum_of(effects[SHOWN:])
        say(f"{len(effects) - SHOWN:,} more components, together {wording.number(rest)}.", "dim")
    console.print()
    say(
        "Direct: on the stream’s own way, norms at frozen scale. Total: taken away, later layers answering. First order: by "
        f"gradients. Behind W_O: how far an observer of the layer’s output can be off, at {wording.percent(record.noise)} noise.",
        "dim",
    )
    if record.probe.command and "--html" not in record.probe.command:
        say(f"Look next: `{record.probe.command} --html attribution.html` shows every component.")


def _table(effects: list[EffectRecord], record: AttributionRecord, console: Console) -> Table:
    text = functools.partial(plain.plain, console)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("component", no_wrap=True)
    wide = console.width >= 100
    titles = ["direct", "total", "first order", "behind W_O"] if wide else ["direct", "total"]
    for title in titles:
        table.add_column(text(title), justify="right", no_wrap=True)
    for effect in effects:
        shown = [say_it.figure(effect.direct), say_it.figure(effect.total)]
        if wide:
            behind = wording.ABSENT if effect.behind is None else f"± {wording.number(effect.behind)}"
            shown += [say_it.figure(effect.first_order), behind]
        table.add_row(text(say_it.name(effect)), *map(text, shown))
    return table
