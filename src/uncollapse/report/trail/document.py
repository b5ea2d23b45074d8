"""The page of a monitored run."""

from __future__ import annotations

from uncollapse.records.trail import TrailRecord
from uncollapse.report import wording
from uncollapse.report.healthy import references
from uncollapse.report.page import sheet
from uncollapse.report.page.panels import Panel, Tile, bundle
from uncollapse.report.trail import charts
from uncollapse.report.trail import wording as say


def document(record: TrailRecord) -> str:
    """The page of one run."""
    healthy = references(record)
    has_readings = bool(record.readings)
    curves = (
        [charts.loss_chart(record), charts.margin_chart(record), *charts.worst_charts(record, healthy)]
        if has_readings
        else []
    )
    return sheet.render(
        "trail/page.html.j2",
        styles=["page/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=record.model.name,
        record=record,
        say=say,
        tiles=_tiles(record),
        healthy=healthy,
        alarms=[(alarm, say.what_next(record, alarm)) for alarm in record.alarms],
        curves=Panel("", [chart for chart in curves if chart is not None], []),
        blocks=Panel("", charts.block_maps(record, healthy), []),
        heads=Panel("", charts.head_maps(record, healthy), []),
    )


def _tiles(record: TrailRecord) -> list[Tile]:
    alarms = record.alarms
    tiles = [Tile("alarms", str(len(alarms)), wording.counts_in_words(alarms) or "none was raised")]
    if alarms:
        tiles.append(Tile("first alarm", f"step {alarms[0].step:,}", alarms[0].code))
    if record.readings:
        tiles.append(Tile("looks", f"{len(record.readings):,}", f"up to step {record.readings[-1].step:,}"))
        losses = [r.loss for r in record.readings if r.loss is not None]
        if losses:
            tiles.append(Tile("loss", wording.number(losses[-1]), f"{wording.number(losses[0])} at the first look"))
    return tiles
