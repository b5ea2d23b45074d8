"""The diagnosis in a terminal: one row per block, the findings, and where to look next.

A mean never stands alone: the worst sequence is next to it, or the sharpest head with its number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import DiagnosisRecord, SiteRecord
from uncollapse.report import wording
from uncollapse.report.anatomy import kinds_of_blocks, not_measured_sentences
from uncollapse.report.diagnosis import corpus
from uncollapse.report.diagnosis.wording import dispersion_sentences, healthy_sentence, verdict_sentences
from uncollapse.report.page import cells
from uncollapse.report.terminal import plain
from uncollapse.report.terminal.columns import Column, flat, heading, width
from uncollapse.report.terminal.findings import SIGNS, STYLES, print_findings

STACKS = {"encoder": "enc ", "decoder": "dec "}
LONGEST_VERDICT = 28


def print_record(record: DiagnosisRecord, console: Console) -> None:
    """Print the table, the findings and the closing line to `console`."""

    text = functools.partial(plain.plain, console)
    say = functools.partial(plain.say, console)
    say(record.model.name, "bold")
    say(wording.model_sentence(record.model))
    say(wording.probe_sentence(record.probe))
    for sentence in not_measured_sentences(record.anatomy):
        say(sentence, "bold")
    for sentence in kinds_of_blocks(record.anatomy):
        say(sentence, "dim")
    columns = _columns(record)
    left_out: list[str] = []
    table = _table(record, columns, text)
    while width(table, console) > console.width and (spare := max(column.spare for column in columns)):
        left_out += [flat(column.title) for column in columns if column.spare == spare]
        columns = [column for column in columns if column.spare != spare]
        table = _table(record, columns, text)
    console.print()
    console.print(table)
    console.print()
    say(_caption(record), "dim")
    say(healthy_sentence(record), "dim")
    if names := [name for name in left_out if name not in ("head verdict", "worst seq.")]:
        say(f"Hidden because the terminal is only {console.width} columns wide: {', '.join(names)}.", "dim")
    if any(site.streams for site in record.trajectory):
        console.print()
        console.print(_streams(record, text))
        console.print()
        say(
            "The stream is several side by side. The first table has all of them together, with what they hold of a token side by "
            "side; this one has the consensus distance of each, and its effective rank.",
            "dim",
        )
    if "head verdict" in left_out:
        for sentence in verdict_sentences(record):
            say(sentence)
    for sentence in [*dispersion_sentences(record), *corpus.sentences(record)]:
        say(sentence)
    console.print()
    print_findings(record.findings, wording.looked_at(record), console)
    console.print()
    say(closing(record))


def _columns(record: DiagnosisRecord) -> list[Column[SiteRecord]]:
    several = any(site.consensus_distance is not None and site.consensus_distance.n > 1 for site in record.trajectory)
    columns: list[Column[SiteRecord]] = [
        Column("block", lambda site: _row_name(record, site), left=True),
        Column("rank", lambda site: _of(site.rank, site.attainable_rank)),
        Column("affine\nrank", lambda site: _of(site.affine_rank, site.attainable_affine_rank)),
        Column("eff.\nrank", lambda site: wording.mean(site.effective_rank), spare=1),
        Column("consen-\nsus", lambda site: wording.mean(site.consensus_distance)),
        Column("worst\nseq.", lambda site: _part(site.consensus_distance, "min")),
        Column("simi-\nlarity", lambda site: _cosine(site.token_similarity, "mean"), spare=2),
        Column("worst\nseq.", lambda site: _cosine(site.token_similarity, "max"), spare=2),
        Column("mean\nentropy", lambda site: _mean_entropy(record, site)),
        Column("lowest\nhead", lambda site: _lowest_head(record, site)),
        Column("head verdict", lambda site: _verdict(record, site), spare=3, left=True),
    ]
    if not several:
        columns = [column for column in columns if not column.title.endswith("seq.")]
    if not wording.verdicts(record.heads):
        columns = columns[:-1]
    return columns if record.attention else [c for c in columns if c.title not in ("mean\nentropy", "lowest\nhead")]


def _table(record: DiagnosisRecord, columns: list[Column[SiteRecord]], text: Callable[..., Text]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            heading(column.title, text), justify="left" if column.left else "right", no_wrap=True, vertical="bottom"
        )
    previous = None
    for site in record.trajectory:
        if previous is not None and previous.stack != site.stack:
            table.add_section()
        style = STYLES.get(_severity(record, site), "")
        line = [text(column.value(site)) for column in columns]
        line[0].stylize(style)
        table.add_row(*line)
        previous = site
    return table


def _streams(record: DiagnosisRecord, text: Callable[..., Text]) -> Table:
    """Consensus distance and effective rank of each of several streams."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("block", no_wrap=True)
    for number in range(max(len(site.streams) for site in record.trajectory)):
        table.add_column(f"stream {number}", justify="right", no_wrap=True)
    for site in (site for site in record.trajectory if site.streams):
        each = [f"{wording.mean(s.consensus_distance)} ({wording.mean(s.effective_rank)})" for s in site.streams]
        table.add_row(*(text(cell) for cell in [_row_name(record, site), *each]))
    return table


def _severity(record: DiagnosisRecord, site: SiteRecord) -> str:
    """The severity of the worst finding about the block or one of its heads."""
    return cells.severity_of(
        record.findings,
        lambda f: cells.names_site(f, site) or (f.block is not None and (f.block, f.stack) == (site.block, site.stack)),
    )


def _row_name(record: DiagnosisRecord, site: SiteRecord) -> str:
    name = STACKS.get(site.stack or "", "") + ("in" if site.block is None else str(site.block))
    severity = _severity(record, site)
    return f"{name} {SIGNS[severity]}" if severity else name


def _of(reached: Statistic | None, attainable: Statistic | None) -> str:
    return wording.ABSENT if reached is None else f"{wording.mean(reached)}/{wording.mean(attainable)}"


def _part(statistic: Statistic | None, part: str) -> str:
    return wording.number(None if statistic is None else getattr(statistic, part))


def _cosine(statistic: Statistic | None, part: str) -> str:
    """Three decimals, since a cosine of 1e-5 is practically zero."""
    return wording.ABSENT if statistic is None else f"{getattr(statistic, part):.3f}"


def _heads_of(record: DiagnosisRecord, site: SiteRecord) -> list[tuple[float, str]]:
    """The normalized entropy of every head of the block, in self- and cross-attention, and the name of the head."""
    return [
        (head.normalized_entropy.mean, f"h{head.head}" + (" cross" if head.kind == "cross" else ""))
        for head in record.attention
        if (head.block, head.stack) == (site.block, site.stack) and head.normalized_entropy is not None
    ]


def _mean_entropy(record: DiagnosisRecord, site: SiteRecord) -> str:
    seen = [value for value, _ in _heads_of(record, site)]
    if site.block is None:
        return ""
    return wording.number(sum(seen) / len(seen) if seen else None)


def _lowest_head(record: DiagnosisRecord, site: SiteRecord) -> str:
    if site.block is None:
        return ""
    value, name = min(_heads_of(record, site), default=(None, ""))
    return f"{wording.number(value)} {name}".strip()


def _verdict(record: DiagnosisRecord, site: SiteRecord) -> str:
    here = wording.verdicts([h for h in record.heads if (h.block, h.stack) == (site.block, site.stack)])
    words = "; ".join(here)
    return words if len(words) <= LONGEST_VERDICT else words[: LONGEST_VERDICT - 1] + "…"


def _caption(record: DiagnosisRecord) -> str:
    sequences = record.probe.sequences
    worst = ". The worst sequence has the lowest consensus distance or the highest similarity"
    many = "sequences" if sequences is None else wording.count(sequences, "sequence")
    over = "One sequence" if sequences == 1 else f"Means over {many}{worst}"
    return (
        f"{over}. Ranks are shown as reached/attainable. Entropy is normalized: 0 means all weight on one key, 1 equal weight on "
        f"all keys. “in” is the input of the first block. {wording.ABSENT} means not measured; the page and the JSON say why."
    )


def closing(record: DiagnosisRecord) -> str:
    """Where to look next."""
    findings = wording.worst_first(record.findings)
    worst = next((f for f in findings if f.severity != "info" and f.block is not None), None)
    command = record.probe.command
    if "--html" in command:
        where = "the page shows every head, with charts."
    elif command:
        where = f"`{command} --html report.html` shows every head, with charts."
    else:
        where = '`to_html("report.html")` shows every head, with charts.'
    if worst:
        return f"Look next at {wording.finding_place(worst)} ({worst.code}); {where}"
    more = "`--level full` adds contraction and spectral gaps; " if record.probe.level == "core" else ""
    return f"Look next: {more}{where}"
