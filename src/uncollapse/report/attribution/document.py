"""The page of `uncollapse attribute`: the number and the answer first, then maps, then every component."""

from __future__ import annotations

from uncollapse.records.attribution import AttributionRecord
from uncollapse.report import wording
from uncollapse.report.attribution import charts, tables
from uncollapse.report.attribution import wording as say
from uncollapse.report.page import sheet
from uncollapse.report.page.panels import Panel, Tile, bundle


def document(record: AttributionRecord) -> str:
    """The page of one attribution."""
    largest = sorted(record.effects, key=lambda effect: 0.0 if effect.direct is None else -abs(effect.value))
    heads = [effect for effect in largest if effect.kind == "head"]
    rest = [effect for effect in largest if effect.kind != "head"]
    beside = [charts.along_depth(record), charts.direct_against_total(record)]
    return sheet.render(
        "attribution/page.html.j2",
        styles=["page/page.css", "attribution/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=record.model.name,
        record=record,
        say=say,
        tiles=_tiles(record),
        panels=[Panel("", charts.heads_maps(record), []), Panel("", [chart for chart in beside if chart], [])],
        heads=tables.effects_table(record, heads, "heads-table", "Every head") if heads else None,
        rest=tables.effects_table(record, rest, "rest-table", "Everything else"),
    )


def _tiles(record: AttributionRecord) -> list[Tile]:
    metric = record.metric
    value, _, interval = say.figure(metric.value).partition(" ± ")
    sequences = wording.count(metric.value.n, "sequence")
    tiles = [Tile(metric.name, value, f"± {interval}, {sequences}" if interval else sequences)]
    for title, kinds in (
        ("heads, directly", {"head", "attention"}),
        ("MLPs, directly", {"mlp", "mixer"}),
        ("embedding, directly", {"embedding"}),
        ("biases and constants", {"attention_bias", "mlp_bias", "norm_bias", "output_bias"}),
    ):
        own = [effect for effect in record.effects if effect.kind in kinds]
        if own:
            noun = wording.count(len(own), "component")
            tiles.append(Tile(title, wording.number(say.sum_of(own)), noun))
    detail = "rounding" if metric.is_affine else "of a linearisation"
    tiles.append(Tile("remainder", wording.number(metric.remainder.mean, 2), detail))
    return tiles
