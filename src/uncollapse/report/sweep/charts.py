"""The charts of a sweep: each measure against the checkpoints, with the block that is worst in front of all others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import altair as alt

from uncollapse.records.figures import WORST_IS_LARGEST
from uncollapse.records.sweep import SweptFigure, SweptRun
from uncollapse.report.healthy import References, under_title
from uncollapse.report.page.curves import depth_axis, hover_columns, shared
from uncollapse.report.page.figures import FIT, GREY, ORANGE, RED, Chart, Key, rows, specification
from uncollapse.report.sweep import wording as say

IN_TABLE = "Its figures are in the table of all checkpoints."


def measure_chart(
    run: SweptRun, number: int, measure: str, keys: Sequence[str], healthy: References | None = None
) -> Chart | None:
    """A line for the block in which the measure is worst, over a band of all blocks; None where fewer than two checkpoints have
    it in any block. `number` is that of the run; `keys` are those of the rows."""
    places = run.attentions if measure in say.OF_HEADS else run.sites
    of_blocks = [i for i, site in enumerate(places) if measure in say.OF_HEADS or "embedding" not in site] or [0]
    seen = [
        (index, figure)
        for index, c in enumerate(run.checkpoints)
        if (figure := c.figures.get(measure)) and any(figure.along[i] is not None for i in of_blocks)
    ]
    if len(seen) < 2:
        return None
    worst = max if measure in WORST_IS_LARGEST else min
    index, place = worst(
        (value, index, i) for index, figure in seen for i in of_blocks if (value := figure.along[i]) is not None
    )[1:]
    points = [_point(index, figure, of_blocks, place) for index, figure in seen]
    x = depth_axis(say.short_names(run), "step" if run.checkpoints[0].step is not None else "checkpoint")
    y = alt.Y("y:Q", scale=alt.Scale(zero=worst is min), axis=alt.Axis(title=None, tickCount=5))
    base = alt.Chart(rows(points)).encode(x=x)
    layers = [
        base.mark_area(color=GREY, opacity=0.2).encode(y=alt.Y("low:Q", **shared(y)), y2="high:Q"),
        base.mark_line(color=GREY, strokeWidth=1.5, strokeDash=[5, 3]).encode(y=alt.Y("middle:Q", **shared(y))),
        base.mark_line(color=ORANGE, strokeWidth=2).encode(y=y),
        base.mark_circle(color=ORANGE, size=24, opacity=1).encode(y=y),
        alt.Chart(rows([p for p in points if p["depth"] == index]))
        .mark_point(size=150, filled=False, color=RED, strokeWidth=2)
        .encode(x=x, y=y),
        *hover_columns(keys, x),
    ]
    spec = specification(alt.layer(*layers).properties(width="container", height=210, autosize=FIT))
    where = places[place].replace("block.", "block ")
    each = "worst head of each block" if measure in say.OF_HEADS else "all blocks"
    legend = [
        Key(f"{where}, where it is worst", ORANGE),
        Key("its worst checkpoint", RED, "ring"),
        Key("median of the blocks", GREY, dash="5 3"),
        Key(each, GREY, "band"),
    ]
    title = say.TITLES[measure]
    key = f"run-{number}-{measure}".replace("_", "-")
    return Chart(
        key,
        title,
        f"{title} against the checkpoints.",
        spec,
        legend,
        figures=IN_TABLE,
        reference="" if healthy is None else under_title(healthy.worst_end(measure)),
    )


def _point(index: int, figure: SweptFigure, of_blocks: Sequence[int], place: int) -> dict[str, Any]:
    known = [value for i in of_blocks if (value := figure.along[i]) is not None]
    return {
        "depth": index,
        "y": figure.along[place],
        "low": min(known),
        "high": max(known),
        "middle": statistics.median(known),
    }
