"""An ablation in a terminal: one row per run, the predictions compared with the observations, and what not to conclude."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from uncollapse.records.ablation import AblationRecord, AblationRun, VerdictRecord
from uncollapse.records.diagnosis import followed
from uncollapse.report import wording
from uncollapse.report.ablation import wording as say_it
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.healthy import in_percent, references
from uncollapse.report.terminal import plain

STYLES = {"agrees": "green", "disagrees": "bold red", "open": "bold yellow"}
FLOOR = "floor"
INDENT = 3


def print_record(record: AblationRecord, console: Console) -> None:
    """Print the table of runs, the predictions and the closing lines to `console`."""
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(f"{wording.probe_sentence(record.probe)} {say_it.scope(record)}")
    for sentence in not_measured_sentences(record.anatomy, "token cloud", "update"):
        say(sentence, "bold")
    console.print()
    console.print(_fitting(record, console))
    console.print()
    say(_caption(record), "dim")
    if sentence := _healthy_sentence(record):
        say(sentence, "dim")
    console.print()
    say(say_it.headline(record), "bold")
    if sentence := say_it.positions_sentence(record):
        say(sentence)
    for question in say_it.questions(record):
        console.print()
        _print_question(question, record, console)
    console.print()
    say(say_it.CAVEAT, "bold")
    say(_closing(record))


def _healthy_sentence(record: AblationRecord) -> str:
    healthy = references(record)
    ranks = healthy.of("trajectory.affine_rank")
    lowest = f"{in_percent(*ranks.lows)} at the lowest" if ranks else ""
    return healthy.said({"r": say_it.healthy_consensus(record, healthy), "affine rank": lowest})


def _fitting(record: AblationRecord, console: Console) -> Table:
    """The table with as many sites as fit the console, at least the first and the last."""
    last = len(followed(record.runs[0].trajectory)) - 1
    table = _table(record, [], console)
    for amount in range(last + 1, 1, -1):
        table = _table(record, _spread(last, amount), console)
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
            break
    return table


def _spread(last: int, amount: int) -> list[int]:
    """`amount` positions from 0 to `last`, evenly spaced as far as whole numbers allow, with both ends.

    >>> _spread(6, 7), _spread(12, 5), _spread(6, 2), _spread(0, 2)
    ([0, 1, 2, 3, 4, 5, 6], [0, 3, 6, 9, 12], [0, 6], [0])
    """
    return sorted({round(last * i / (amount - 1)) for i in range(amount)})


def _table(record: AblationRecord, positions: Sequence[int], console: Console) -> Table:
    text = functools.partial(plain.plain, console)
    among = say_it.components(record)
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        title_justify="left",
    )
    table.add_column(_lines(["run", "removed"], text), no_wrap=True)
    sites = followed(record.runs[0].trajectory)
    for number, position in enumerate(positions):
        block = sites[position].block
        heading = ["r in" if not number else "", "in" if block is None else str(block)]
        table.add_column(_lines(["r at" if not number else "", heading[1]], text), justify="right", no_wrap=True)
    extra = _quality(record)
    table.add_column(_lines(["affine", "rank"], text), justify="right", no_wrap=True)
    table.add_column(_lines(["how the distance r", "falls along depth"], text), no_wrap=True)
    for title, _ in extra:
        table.add_column(_lines(title, text), justify="right", no_wrap=True)
    for run in record.runs:
        share = say_it.lowest_share(run)
        row = [_lines([say_it.mark(run, among), *_taken(run)], text)]
        row += [_value(run, position, text) for position in positions]
        row.append(text(wording.ABSENT if share is None else wording.percent(share[0])))
        row.append(_lines(_fall(run), text))
        row += [text(value(run)) for _, value in extra]
        table.add_row(*row)
    return table


def _taken(run: AblationRun) -> list[str]:
    """What was removed, two components per line."""
    names = say_it.names(run) or ["nothing"]
    return [("+ " if i else "") + " + ".join(names[i : i + 2]) for i in range(0, len(names), 2)]


def _quality(record: AblationRecord) -> list[tuple[list[str], Callable[[AblationRun], str]]]:
    """The columns about the output, those that at least one run has."""
    columns: list[tuple[list[str], Callable[[AblationRun], str]]] = []
    if any(run.output_shift for run in record.runs):
        columns.append((["out.", "shift"], lambda run: wording.mean(run.output_shift, 2) if run.without else "0"))
    if any(run.loss for run in record.runs):
        columns.append((["", "loss"], lambda run: wording.mean(run.loss)))
    return columns


def _fall(run: AblationRun) -> list[str]:
    """The rate, its figure and where the floor is reached, one line each."""
    met = say_it.floor_position(run)
    floor = "" if met is None else f"floor from {say_it.place(followed(run.trajectory)[met])}"
    kind = wording.ABSENT if run.rate is None else say_it.KINDS.get(run.rate.kind, run.rate.kind)
    return [line for line in (kind, say_it.rate_figure(run), floor) if line]


def _value(run: AblationRun, position: int, text: Callable[..., Text]) -> Text:
    statistic = followed(run.trajectory)[position].consensus
    if statistic is not None and say_it.at_floor(run, position):
        return text(FLOOR, "dim")
    return text(wording.mean(statistic, 2))


def _lines(words: Sequence[str], text: Callable[..., Text]) -> Text:
    return Text("\n").join(text(line) for line in words)


def _print_question(question: say_it.Question, record: AblationRecord, console: Console) -> None:
    say = functools.partial(plain.say, console)
    say(question.prediction, "bold")
    mark = say_it.mark(question.run, say_it.components(record))
    say(f"{question.source}; tested {say_it.name(question.run)} ({mark}).", "dim", INDENT)
    for verdict in question.verdicts:
        answer = say_it.answer(verdict)
        words = plain.plain(console, f"{say_it.SIGNS[answer]} {answer}", STYLES[answer])
        line = Text(" " * INDENT).append_text(words)
        line.append_text(plain.plain(console, f" in {say_it.MEASURES[verdict.measure]}"))
        console.print(line, highlight=False)
        say(f"predicted: {verdict.predicted}", indent=2 * INDENT)
        say(f"observed: {verdict.observed}{_at(verdict)}", indent=2 * INDENT)
    if question.divided:
        say(say_it.DIFFERENT_ANSWERS, indent=INDENT)


def _at(verdict: VerdictRecord) -> str:
    """The block, unless the observation names it."""
    words = f"block {verdict.block}"
    return "" if verdict.block is None or words in verdict.observed else f" ({words})"


def _caption(record: AblationRecord) -> str:
    among = say_it.components(record)
    floors = [run.rate.floor for run in record.runs if run.rate is not None]
    floor = f", {wording.number(max(floors), 2)} or less" if floors else ""
    left_out = " It leaves out the largest-norm tokens." if say_it.largest_norms_left_out(record) else ""
    sequences = record.probe.sequences
    over = "sequences" if sequences is None else wording.count(sequences, "sequence")
    return (
        f"The marks read {say_it.key_to_marks(among)}: 1 means present, 0 removed. r is the consensus distance after a block "
        f"(“in”: before the first), {'in' if sequences == 1 else 'averaged over'} {over}.{left_out} “Floor” means "
        f"rounding error{floor}: nothing below it can be measured. Affine rank is the lowest share of the attainable along "
        "depth. Slope is that of ln r after a block against ln r before it, with its 95 % interval; 1 is geometric, 3 is cubic."
        + (" Output shift is 1 − cosine to the mean output vector of the whole model." if _has_shift(record) else "")
    )


def _has_shift(record: AblationRecord) -> bool:
    return any(run.output_shift for run in record.runs)


def _closing(record: AblationRecord) -> str:
    """Where to look next."""
    command = record.probe.command
    if "--html" in command:
        return "Look next: the page draws every run along depth."
    if command:
        return f"Look next: `{command} --html ablation.html` draws every run along depth."
    return 'Look next: `to_html("ablation.html")` draws every run along depth.'
