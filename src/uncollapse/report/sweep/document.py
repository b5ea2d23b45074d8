"""The page of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from uncollapse.records.sweep import SweepRecord, SweptCheckpoint, SweptRun
from uncollapse.report import wording
from uncollapse.report.healthy import References, references
from uncollapse.report.page import sheet
from uncollapse.report.page.cells import Cell, Column, Measure, Table, severity_of, slug, table
from uncollapse.report.page.panels import Panel, Tile, bundle
from uncollapse.report.sweep import charts
from uncollapse.report.sweep import wording as say


def document(record: SweepRecord) -> str:
    """The page of one sweep."""
    return sheet.render(
        "sweep/page.html.j2",
        styles=["page/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=f"Sweep of {' and '.join(run.name for run in record.runs[:2])}{' and more' if len(record.runs) > 2 else ''}",
        record=record,
        say=say,
        tiles=_tiles(record),
        healthy=_sentences(record),
        firsts=[(each, row_key(record.runs.index(each.run), each.index)) for each in say.firsts(record)],
        curves=_curves(record),
        checkpoints=_table(record),
        failures=[checkpoint for checkpoint in record.checkpoints if checkpoint.failure is not None],
        comparable=_comparable(record),
    )


def row_key(run: int, index: int) -> str:
    """The key of a checkpoint's row."""
    return slug("checkpoint", run, index)


def _tiles(record: SweepRecord) -> list[Tile]:
    failed = sum(checkpoint.failure is not None for checkpoint in record.checkpoints)
    tiles = [
        Tile("checkpoints", f"{len(record.checkpoints):,}", f"{wording.count(failed, 'failure')}"),
        Tile("findings", f"{len(record.findings):,}", wording.counts_in_words(record.findings) or "none"),
    ]
    serious = [each for each in say.firsts(record) if each.finding.severity != "info"]
    if serious:
        tiles.append(Tile("first warning", say.name(serious[0].checkpoint), serious[0].finding.code))
    return tiles


def _references(run: SweptRun) -> References | None:
    return None if run.model is None else references(run)


def _sentences(record: SweepRecord) -> list[str]:
    """What “healthy” means beside the figures: once for each kind of models."""
    return list(dict.fromkeys(found.sentence for run in record.runs if (found := _references(run)) is not None))


def _elsewhere(record: SweepRecord, measure: str) -> str:
    """What the worst figure of a checkpoint is in healthy models of the kind of each run."""
    found = [known.worst(measure) for run in record.runs if (known := _references(run)) is not None]
    return "; or ".join(dict.fromkeys(f"healthy {words}" for words in found if words))


def _curves(record: SweepRecord) -> list[Panel]:
    panels = []
    for number, run in enumerate(record.runs):
        keys = [row_key(number, index) for index in range(len(run.checkpoints))]
        healthy = _references(run)
        drawn = [charts.measure_chart(run, number, measure, keys, healthy) for measure in say.measures([run])]
        found = [chart for chart in drawn if chart is not None]
        if found:
            panels.append(Panel(run.name if len(record.runs) > 1 else "", found, []))
    return panels


@dataclass(frozen=True)
class _Row:
    """A checkpoint, and why it has no figures."""

    key: str
    run: SweptRun
    checkpoint: SweptCheckpoint
    order: int
    unavailable: dict[str, str]

    def figure(self, measure: str) -> Cell | None:
        """The worst figure, and where it is."""
        figure = self.checkpoint.figures.get(measure)
        return None if figure is None else Cell(wording.number(figure.worst), say.place(figure), figure.worst)

    def findings(self) -> Cell:
        """How many of which severity."""
        counts = dict(wording.severity_counts(self.checkpoint.findings))
        weight = sum(
            counts.get(severity, 0) * 1000**place for place, severity in enumerate(("info", "warning", "critical"))
        )
        words = "failed" if self.checkpoint.failure else wording.counts_in_words(self.checkpoint.findings) or "none"
        return Cell(words, sort=1e12 if self.checkpoint.failure else float(weight))


def _table(record: SweepRecord) -> Table:
    measures = say.measures(record.runs)
    rows: list[_Row] = []
    for number, run in enumerate(record.runs):
        for index, checkpoint in enumerate(run.checkpoints):
            why = (
                "not in this model"
                if checkpoint.failure is None
                else f"{checkpoint.name}: {checkpoint.failure.message}"
            )
            unavailable = dict.fromkeys(measures, why)
            rows.append(_Row(row_key(number, index), run, checkpoint, len(rows), unavailable))
    return table(
        "checkpoints-table",
        "All checkpoints, each with its worst block or head",
        [
            (Column("checkpoint", numeric=False), lambda row: Cell(row.checkpoint.name, sort=float(row.order))),
            (Column("step"), lambda row: Cell(wording.number(row.checkpoint.step), sort=row.checkpoint.step)),
            (Column("findings", numeric=False), _Row.findings),
        ],
        [
            *(Measure(m, Column(say.TITLES[m].lower()), partial(_Row.figure, measure=m)) for m in measures),
            Measure("file", Column("record", numeric=False), lambda row: row.checkpoint.file),
        ],
        rows,
        lambda row: row.key,
        lambda row: severity_of(row.checkpoint.findings, lambda _: True),
        {measure: _elsewhere(record, measure) for measure in measures},
    )


def _comparable(record: SweepRecord) -> tuple[str, str] | None:
    """The first and the last record of a run, for an example of a command."""
    for run in record.runs:
        files = [c.file for c in run.checkpoints if c.failure is None and c.file]
        if len(files) > 1:
            return files[0], files[-1]
    return None
