"""The page of an ablation: the curves of all runs on one axis, the predictions compared with them, and what it costs."""

from __future__ import annotations

from uncollapse.records.ablation import AblationRecord, VerdictRecord
from uncollapse.records.diagnosis import followed
from uncollapse.report import wording
from uncollapse.report.ablation import charts, tables
from uncollapse.report.ablation import wording as say
from uncollapse.report.healthy import References, references
from uncollapse.report.page import sheet
from uncollapse.report.page.panels import Panel, Tile, bundle
from uncollapse.report.page.sublayers import norms_table, update_panels


def document(record: AblationRecord) -> str:
    """The page of one ablation."""
    healthy = references(record)
    curve = charts.consensus_chart(record, "consensus", say.healthy_consensus(record, healthy))
    everything = tables.every_table(record, "every-table", healthy)
    depth = Panel("", [curve] if curve else [], [tables.curves_table(record, "curves-table"), everything])
    return sheet.render(
        "ablation/page.html.j2",
        styles=["page/page.css", "ablation/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=record.model.name,
        record=record,
        say=say,
        among=say.components(record),
        tiles=_tiles(record, healthy),
        healthy=healthy,
        questions=[
            (each, [(verdict, _target(verdict, record)) for verdict in each.verdicts]) for each in say.questions(record)
        ],
        depth=depth,
        shares=Panel("", charts.share_charts(record, "share"), []),
        rates=tables.rates_table(record, "rates-table", healthy),
        contraction=tables.contraction_table(record, "contraction-table"),
        quality=tables.quality_table(record, "quality-table", healthy),
        norms=Panel("", [], [norms_table(record.norms, "norms-table")]),
        updates=update_panels(record.updates, healthy),
    )


def _target(verdict: VerdictRecord, record: AblationRecord) -> str:
    """The key of the row of the run and site that a verdict is about; empty if it names no block."""
    for number, run in enumerate(record.runs):
        if set(run.without) == set(verdict.without) and verdict.block is not None:
            sites = [site for site in followed(run.trajectory) if site.block == verdict.block]
            return tables.run_site_key(number, sites[0]) if sites else ""
    return ""


def _tiles(record: AblationRecord, healthy: References) -> list[Tile]:
    whole, *others = record.runs
    tiles = []
    last = followed(whole.trajectory)[-1] if whole.trajectory else None
    if last is not None and last.consensus is not None:
        where = f"consensus distance at {say.place(last)}"
        range_of = say.healthy_consensus(record, healthy)
        tiles.append(
            Tile("whole model", wording.number(last.consensus.mean), where, range_of and f"healthy: {range_of}")
        )
    fallen = [run for run in others if say.collapses(run)]
    tiles.append(Tile("runs that collapse", str(len(fallen)), f"of {wording.count(len(others), 'run')}"))
    met = [(position, run) for run in others if (position := say.floor_position(run)) is not None]
    if met:
        position, run = min(met, key=lambda pair: pair[0])
        where = say.place(followed(run.trajectory)[position])
        tiles.append(Tile("rounding floor first reached", where, say.name(run)))
    if record.verdicts:
        agree = sum(verdict.agrees is True for verdict in record.verdicts)
        tiles.append(
            Tile("predictions that hold", str(agree), f"of {len(record.verdicts)}: {say.answers_in_words(record)}")
        )
    return tiles
