"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from uncollapse.records.comparison import Change, ComparisonRecord
from uncollapse.report import wording
from uncollapse.report.comparison import wording as say
from uncollapse.report.page import cells, sheet
from uncollapse.report.page.curves import depth_axis
from uncollapse.report.page.figures import BLUE, FIT, ORANGE, Chart, Key, rows, specification
from uncollapse.report.page.panels import Panel, Tile, bundle


def document(record: ComparisonRecord) -> str:
    """The page of one comparison."""
    curves = [_curve(record, measure) for measure in ("consensus_after_norm", "effective_rank", "stream_carried")]
    maps = [_map(record, measure) for measure in ("max_logit", "rest_entropy", "value_contraction")]
    return sheet.render(
        "comparison/page.html.j2",
        styles=["page/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=" → ".join(say.names(record)),
        record=record,
        say=say,
        tiles=_tiles(record),
        depth=Panel(
            "",
            [chart for chart in curves if chart],
            [_table(record.sites, "sites-table", "Every figure of the stream")],
        ),
        heads=Panel(
            "", [chart for chart in maps if chart], [_table(record.heads, "heads-table", "Every figure of the heads")]
        ),
    )


def _tiles(record: ComparisonRecord) -> list[Tile]:
    moved = sum(change.moved for change in (*record.sites, *record.heads))
    tiles = [
        Tile(
            "got worse",
            str(len(record.findings)),
            wording.counts_in_words(record.findings) or "nothing by half or more",
        ),
        Tile("figures that moved", f"{moved:,}", f"of {len(record.sites) + len(record.heads):,}"),
        Tile("no longer found", str(len(record.gone)), "findings of the first"),
    ]
    heads = [c for c in say.moved_heads(record) if c.measure == "max_logit" and c.factor is not None]
    if heads:
        place = wording.place(block=heads[0].block, head=heads[0].head, stack=heads[0].stack)
        tiles.append(Tile("logits moved most", say.factor(heads[0]), place))
    return tiles


def _curve(record: ComparisonRecord, measure: str) -> Chart | None:
    """A figure along depth, before and after."""
    changes = [change for change in record.sites if change.measure == measure]
    if len(changes) < 2:
        return None
    names = say.names(record)
    points = [
        {"depth": depth, "y": value, "line": line}
        for depth, change in enumerate(changes)
        for line, value in zip(names, (change.before, change.after), strict=True)
    ]
    color = alt.Color("line:N", scale=alt.Scale(domain=names, range=[BLUE, ORANGE]), legend=None)
    base = alt.Chart(rows(points)).encode(
        x=depth_axis(["in" if c.block is None else str(c.block) for c in changes]),
        y=alt.Y("y:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=None, tickCount=5)),
        color=color,
    )
    layers = alt.layer(base.mark_line(strokeWidth=2), base.mark_circle(size=24, opacity=1))
    spec = specification(layers.properties(width="container", height=210, autosize=FIT))
    title = say.TITLES[measure].capitalize()
    legend = [Key(names[0], BLUE), Key(names[1], ORANGE)]
    return Chart(f"depth-{measure}".replace("_", "-"), title, f"{title} along depth, before and after.", spec, legend)


def _map(record: ComparisonRecord, measure: str) -> Chart | None:
    """By how many doublings a figure of each head changed: one row per block, one column per head."""
    drawn: list[dict[str, Any]] = [
        {"block": c.block, "head": c.head, "value": max(-3.0, min(3.0, math.log2(c.factor)))}
        for c in record.heads
        if c.measure == measure and c.kind == "self" and c.factor is not None
    ]
    if not drawn:
        return None
    blocks = len({cell["block"] for cell in drawn})
    chart = (
        alt.Chart(rows(drawn))
        .mark_rect()
        .encode(
            x=alt.X("head:O", axis=alt.Axis(title="head", labelAngle=0, orient="top", labelOverlap="greedy")),
            y=alt.Y("block:O", axis=alt.Axis(title="block", labelOverlap="greedy")),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(domain=[-2, 0, 2], range=["#3f83c6", "#f4f4f4", "#d1403f"], clamp=True),
                legend=alt.Legend(title="doublings", orient="bottom", gradientLength=200, tickCount=5),
            ),
        )
    )
    height = max(60, min(500, 24 * blocks))
    spec = specification(alt.layer(chart).properties(width="container", height=height, autosize=FIT))
    title = f"{say.TITLES[measure].capitalize()}: change of every head"
    label = f"{title}, in doublings: one row per block, one column per head."
    return Chart(f"heads-{measure}".replace("_", "-"), title, label, spec, [], "medium")


def _table(changes: Sequence[Change], key: str, caption: str) -> cells.Table:
    titles = ("place", "figure", "before", "after", "factor", "noise", "moved")
    columns = [cells.Column(title, numeric=title not in ("place", "figure", "moved")) for title in titles]
    found = []
    for number, change in enumerate(changes):
        place = wording.place(block=change.block, head=change.head, stack=change.stack, kind=change.kind)
        shown = [
            cells.Cell("embedding" if change.block is None else place, sort=float(number)),
            cells.cell(say.TITLES[change.measure]),
            cells.cell(change.before),
            cells.cell(change.after),
            cells.Cell(say.factor(change), sort=change.factor),
            cells.cell(change.noise) if change.noise is not None else cells.Cell(wording.ABSENT, reason="one sequence"),
            cells.cell("yes" if change.moved else "no"),
        ]
        found.append(cells.Row(f"{key}-{number}", shown))
    return cells.Table(key, caption, columns, found, [], [])
