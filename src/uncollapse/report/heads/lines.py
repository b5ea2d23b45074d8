"""The heads' identifiability in a terminal: the answer, what to do, then one row per block."""

from __future__ import annotations

import functools

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import wording
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.heads import tables
from uncollapse.report.heads import wording as say_it
from uncollapse.report.healthy import in_words, references
from uncollapse.report.page.heads import block_name, largest_overlap
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.columns import Column, flat, width

STYLES = {say_it.YES: "green", say_it.CARE: "bold yellow", say_it.NO: "bold red"}
SIGNS = {"critical": "!!", "warning": "!", "info": "i"}


def print_record(record: IdentifiabilityRecord, console: Console) -> None:
    """Print the answer, the table and the findings to `console`."""
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(wording.probe_sentence(record.probe))
    for sentence in not_measured_sentences(record.anatomy, "projection", "heads of"):
        say(sentence, "bold")
    console.print()
    say(say_it.FIRST)
    say(say_it.headline(record), "bold")
    for answer in say_it.answers(record):
        head = plain.plain(console, f"{answer.sign} {answer.verdict}", STYLES.get(answer.verdict, ""))
        head.append_text(plain.plain(console, f" in {answer.where}. {answer.why}"))
        for line in head.wrap(console, console.width):
            console.print(line, highlight=False)
        say(answer.remedy, indent=3)
    for sentence in say_it.heads_sentences(record):
        say(sentence)
    console.print()
    columns = list(COLUMNS)
    table = _table(record, columns, console)
    left_out: list[str] = []
    while width(table, console) > console.width and (spare := max(column.spare for column in columns)):
        left_out += [flat(column.title) for column in columns if column.spare == spare]
        columns = [column for column in columns if column.spare != spare]
        table = _table(record, columns, console)
    console.print(table)
    console.print()
    say(CAPTION, "dim")
    if sentence := _healthy_sentence(record):
        say(sentence, "dim")
    if left_out:
        say(f"Hidden because the terminal is only {console.width} columns wide: {', '.join(left_out)}.", "dim")
    say(say_it.CAVEAT)
    for group in wording.alike(record.findings):
        console.print()
        for finding in group:
            mark = SIGNS[finding.severity]
            say(f"{mark} {finding.severity}  {finding.code} ({wording.finding_place(finding)})", "bold")
            say(finding.message, indent=3)
        say(f"Remedy: {group[0].remedy}", indent=3)
    console.print()
    say(_closing(record))


def _verdict(heads: HeadsRecord) -> str:
    mark = say_it.mark(heads)
    return f"{mark.sign} {mark.verdict or 'no verdict'}"


def _singly(heads: HeadsRecord) -> str:
    amount = say_it.count_of(heads, say_it.YES)
    return wording.ABSENT if amount is None else f"{amount}/{heads.heads}"


def _rank(heads: HeadsRecord) -> str:
    attainable = min(heads.heads * heads.head_width, heads.width)
    return wording.ABSENT if heads.output_projection_rank is None else f"{heads.output_projection_rank}/{attainable}"


def _gain(heads: HeadsRecord) -> str:
    if heads.kernel_dimension is not None and heads.condition_number is None:
        return tables.INFINITE
    return wording.number(heads.condition_number)


def _beside(heads: HeadsRecord) -> str:
    said = say_it.beside_random(heads.condition_number, heads.random_noise_gain) if heads.heads > 1 else ""
    return said.removesuffix(" than random").removesuffix(" random") or wording.ABSENT


def _overlap(heads: HeadsRecord) -> str:
    pair = largest_overlap(heads)
    return wording.ABSENT if pair is None else f"{wording.number(pair[0])} h{pair[2]},{pair[1]}"


def _angle(heads: HeadsRecord) -> str:
    pair = tables.smallest_angle(heads)
    return wording.ABSENT if pair is None else f"{wording.number(pair[0])}° h{pair[1]},{pair[2]}"


def _share(heads: HeadsRecord) -> str:
    found = tables.largest_share(heads)
    return wording.ABSENT if found is None else f"{wording.percent(found[0])} h{found[1]}"


COLUMNS: tuple[Column[HeadsRecord], ...] = (
    Column("block", block_name),
    Column("verdict", _verdict),
    Column("noise\ngain", _gain),
    Column("beside\nrandom", _beside, spare=2),
    Column("kernel", lambda heads: wording.number(heads.kernel_dimension)),
    Column("heads\nalone", _singly, spare=1),
    Column("rank\nW_O", _rank, spare=2),
    Column("largest\noverlap", _overlap, spare=3),
    Column("smallest\nangle", _angle, spare=4),
    Column("largest\nshare", _share, spare=4),
)
CAPTION = (
    "Noise gain: how much an error in the layer’s output, relative to its size, can grow when it is split into heads; up to 10 "
    "counts as attributable. Beside random: better, as or worse than random weights of that size (their 5 % to 95 % points). "
    "Kernel: dimensions of the head outputs that the output projection loses, per token. Heads alone: how many single heads are "
    "attributable. Overlap and angle are between the write spaces of two heads (h3,7). Share is the share of the centred energy "
    f"written on this text. {wording.ABSENT} means not measured; the page and the JSON say why."
)


def _healthy_sentence(record: IdentifiabilityRecord) -> str:
    healthy = references(record)
    shares = healthy.of("heads.largest_energy_share")
    return healthy.said(
        {
            "noise gain": healthy.words("heads.condition_number"),
            "largest overlap": healthy.words("heads.largest_overlap"),
            "largest share": "" if shares is None else f"{in_words(shares.low, shares.high)} times an even one",
        }
    )


def _table(record: IdentifiabilityRecord, columns: list[Column[HeadsRecord]], console: Console) -> Table:
    text = functools.partial(plain.plain, console)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        title = Text("\n").join(text(line) for line in column.title.split("\n"))
        justify = "left" if column.value in (block_name, _verdict) else "right"
        table.add_column(title, justify=justify, no_wrap=True, vertical="bottom")  # type: ignore[arg-type]
    for heads in record.heads:
        style = STYLES.get(say_it.mark(heads).verdict, "")
        table.add_row(*(text(c.value(heads), style if c.value is _verdict else "") for c in columns))
    return table


def _closing(record: IdentifiabilityRecord) -> str:
    """Where to look next."""
    command = record.probe.command
    if "--html" in command:
        return "Look next: the page shows every head and a map of every block."
    if command:
        return f"Look next: `{command} --html heads.html` shows every head and a map of every block."
    return 'Look next: `to_html("heads.html")` shows every head and a map of every block.'
