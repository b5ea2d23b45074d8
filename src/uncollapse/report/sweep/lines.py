"""A sweep in a terminal: one row for each checkpoint, then the first finding of each kind, then what failed."""

from __future__ import annotations

import functools

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from uncollapse.records.sweep import SweepRecord, SweptCheckpoint, SweptRun
from uncollapse.report import wording
from uncollapse.report.healthy import references
from uncollapse.report.sweep import wording as say_it
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.findings import SIGNS, STYLES

SHOWN = 24  # checkpoints of a run that have a row: the first, the last, those where something is found first, and some between
COLUMNS = {
    "consensus_after_norm": "lowest consensus",
    "rest_entropy": "lowest rest entropy",
    "max_logit": "largest logit",
}


def print_record(record: SweepRecord, console: Console) -> None:
    """Print it to `console`."""
    say = functools.partial(plain.say, console)
    firsts = say_it.firsts(record)
    for run in record.runs:
        say(run.name, "bold")
        if run.model is not None:
            say(wording.model_sentence(run.model))
        notable = {each.index for each in firsts if each.run is run}
        step = max(1, len(run.checkpoints) // SHOWN)
        last = len(run.checkpoints) - 1
        shown = [c for i, c in enumerate(run.checkpoints) if i % step == 0 or i in notable or i == last]
        console.print(_table(shown, console))
        if len(shown) < len(run.checkpoints):
            say(f"and {wording.count(len(run.checkpoints) - len(shown), 'checkpoint')} between them", "dim")
        if sentence := _healthy_sentence(run):
            say(sentence, "dim")
        console.print()
    say(say_it.headline(record), "bold")
    for each in firsts:
        finding = each.finding
        head = plain.plain(
            console, f"{SIGNS[finding.severity]:<3}{say_it.name(each.checkpoint)}", STYLES[finding.severity]
        )
        where = f"  {finding.code} ({wording.finding_place(finding)}; {say_it.extent(each)})"
        head.append_text(plain.plain(console, where, "bold"))
        console.print(head, highlight=False)
        say(finding.message, indent=3)
    for checkpoint in record.checkpoints:
        if checkpoint.failure is not None:
            say(f"{checkpoint.name}: {checkpoint.failure.kind}", "bold")
            say(checkpoint.failure.message, indent=3)


def _healthy_sentence(run: SweptRun) -> str:
    if run.model is None:
        return ""
    healthy, there = references(run), {measure for checkpoint in run.checkpoints for measure in checkpoint.figures}
    return healthy.said({title: healthy.worst(m) for m, title in COLUMNS.items() if m in there})


def _table(checkpoints: list[SweptCheckpoint], console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoint")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    table.add_column("findings")
    for checkpoint in checkpoints:
        figures = [checkpoint.figures.get(measure) for measure in COLUMNS]
        found = "failed" if checkpoint.failure else wording.counts_in_words(checkpoint.findings) or "none"
        cells = [
            say_it.name(checkpoint),
            *(wording.number(None if figure is None else figure.worst) for figure in figures),
            found,
        ]
        table.add_row(*(plain.plain(console, cell) for cell in cells))
    return table
