"""The four symmetries in a terminal: how far the model is from each collapse and what keeps it there, then one row per test."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from uncollapse.records.symmetries import SymmetriesRecord, SymmetryRecord
from uncollapse.report import wording
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.symmetries import wording as say_it
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.findings import SIGNS, STYLES, print_findings

INDENT = 3
OUTCOME_STYLES = {"exact": "blue", "broken": "bold", "none": "dim", "open": "yellow", "untested": "dim"}


def print_record(record: SymmetriesRecord, console: Console) -> None:
    """Print one paragraph per phenomenon, the table of tests and the findings."""
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(wording.probe_sentence(record.probe))
    for sentence in not_measured_sentences(record.anatomy):
        say(sentence, "bold")
    decoder_from = say_it.first_decoder_block(record.symmetries)
    for symmetry in record.symmetries:
        console.print()
        _print_symmetry(symmetry, decoder_from, record, console)
    if record.tests:
        console.print()
        outcomes = say_it.outcomes(record.tests, record.symmetries)
        say(say_it.counted(outcomes), "bold")
        console.print(_table(record, outcomes, console))
        _print_notes(record, outcomes, console)
    console.print()
    print_findings(record.findings, wording.looked_at(record), console)
    console.print()
    say(_closing(record))


def _print_symmetry(
    symmetry: SymmetryRecord, decoder_from: int | None, record: SymmetriesRecord, console: Console
) -> None:
    say = functools.partial(plain.say, console)
    name = wording.PHENOMENON_NAMES[symmetry.phenomenon]
    about = wording.alike(finding for finding in record.findings if finding.phenomenon == symmetry.phenomenon)
    say(f"{name[:1].upper()}{name[1:]}: {wording.SYMMETRY_NAMES[symmetry.phenomenon]}", "bold")
    for group in about:
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        words = f"{group[0].severity} {group[0].code} ({wording.finding_place(group[0])}{more})"
        say(f"{SIGNS[group[0].severity]} {words}", STYLES[group[0].severity], INDENT)
    measure, course = say_it.measure(symmetry), say_it.course(symmetry, decoder_from)
    stands = f"{measure[:1].upper()}{measure[1:]}: {course[:1].lower()}{course[1:]}"
    say(" ".join(filter(None, [stands, say_it.closest(symmetry), say_it.defect(symmetry)])), indent=INDENT)
    if symmetry.scaling:
        say(say_it.slopes(symmetry), indent=INDENT)
        for regime, members in say_it.regimes(symmetry.scaling):
            say(f"{wording.count(len(members), 'attention layer')}: {regime}", indent=2 * INDENT)
    held = (("Breakers", symmetry.breakers), ("Stabilisers", symmetry.stabilisers))
    say(" ".join(f"{title}: {', '.join(names) or 'none'}." for title, names in held), indent=INDENT)


def _table(record: SymmetriesRecord, outcomes: Sequence[str], console: Console) -> Table:
    """One row per test. The column “what acted” wraps, the figures do not."""
    text = functools.partial(plain.plain, console)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(text("outcome"), no_wrap=True)
    table.add_column(text("what acted"))
    for title in ("defect", "rounding", "dim."):
        table.add_column(text(title), justify="right", no_wrap=True)
    for test, kind in zip(record.tests, outcomes, strict=True):
        table.add_row(
            text(f"{say_it.SIGNS[kind]} {say_it.OUTCOMES[kind]}", OUTCOME_STYLES[kind]),
            text(say_it.acted(test)),
            text(wording.mean(test.defect)),
            text(wording.mean(test.rounding)),
            text(wording.number(test.dimension)),
        )
    return table


def _print_notes(record: SymmetriesRecord, outcomes: Sequence[str], console: Console) -> None:
    """What the signs mean, and why some tests were not possible."""
    console.print()
    for test, kind in zip(record.tests, outcomes, strict=True):
        if kind == "untested":
            why = say_it.found(test, kind)
            plain.say(console, f"{say_it.acted(test)}: {why[:1].lower()}{why[1:]}")
    plain.say(
        console,
        "Exact: the defect is at the level of rounding. Broken: the defect is above it. That is not a fault; the tests without a "
        "component show what breaks the symmetry. Dim.: dimension of the subgroup that survives in this architecture; the page "
        "names it.",
        "dim",
    )


def _closing(record: SymmetriesRecord) -> str:
    """Where to look next."""
    command = record.probe.command
    if "--html" in command:
        return "Look next: the page draws every order parameter along depth and says what each test means."
    if command:
        return f"Look next: `{command} --html symmetries.html` draws every order parameter along depth."
    return 'Look next: `to_html("symmetries.html")` draws every order parameter along depth.'
