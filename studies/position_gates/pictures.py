"""The pictures of the section on position gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from studies.pictures import BLUE, GREY, ORANGE, RED, TEAL, saved

COLORS = {"plain": GREY, "gated": BLUE, "perturbed": TEAL, "constant": ORANGE}
PLANTED = {"sinusoidal gates": TEAL, "learned gates": BLUE, "no gates, MLP behind": ORANGE}
Row = dict[str, Any]


def _color(key: str, colors: dict[str, str]) -> alt.Color:
    scale = alt.Scale(domain=list(colors), range=list(colors.values()))
    return alt.Color(
        f"{key}:N", title=None, scale=scale, legend=alt.Legend(orient="bottom", symbolType="stroke", symbolOpacity=1)
    )


def _banded(rows: Sequence[Row], x: alt.X, y: alt.Y, color: alt.Color) -> Any:
    """A line through `mean` and a band from `low` to `high`."""
    base = alt.Chart(alt.Data(values=list(rows)))
    low = y.copy()
    low.shorthand = "low:Q"
    band = base.mark_area(opacity=0.18).encode(x=x, y=low, y2="high:Q", color=color)
    return band + base.mark_line().encode(x=x, y=y, color=color)


def training(
    losses: dict[str, Sequence[Row]], differences: Sequence[Row], conditions: Sequence[Row], path: Path
) -> None:
    """Losses by step, the held-out difference from the plain model of the same seed, and the condition of the gates."""
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4))
    color = _color("arm", COLORS)
    size = {"width": 205, "height": 190}
    panels = []
    for title, rows in losses.items():
        y = alt.Y("mean:Q", title=f"{title} (nats a byte)", scale=alt.Scale(zero=False))
        panels.append(_banded(rows, x, y, color).properties(**size))
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(color=GREY).encode(y="y:Q")
    difference = alt.Y("mean:Q", title="held-out loss, minus plain")
    panels.append(alt.layer(zero, _banded(differences, x, difference, color)).properties(**size))
    scale = alt.Scale(type="log", nice=False)
    condition = alt.Y("mean:Q", title="condition of the gates", scale=scale, axis=alt.Axis(format="~g", tickCount=4))
    dash = alt.StrokeDash("block:N", title="block", legend=alt.Legend(orient="bottom", direction="horizontal"))
    line = alt.Chart(alt.Data(values=list(conditions))).mark_line()
    panels.append(line.encode(x=x, y=condition, color=color, strokeDash=dash).properties(**size))
    saved(alt.hconcat(*panels), path)


def recovery(rows: Sequence[Row], path: Path) -> None:
    """Error of recovery against the number of positions, a panel an observer."""
    x = alt.X(
        "positions:Q",
        title="positions where the content recurs",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(format="~g"),
    )
    axis = alt.Axis(format="~g", tickCount=5)
    y = alt.Y("mean:Q", title="error of a head's signal", scale=alt.Scale(type="log"), axis=axis)
    panels = [
        _banded([r for r in rows if r["observer"] == observer], x, y, _color("arm", COLORS)).properties(
            width=330, height=210, title=title
        )
        for observer, title in (
            ("shared channel", "sees the sum of the heads in one shared channel"),
            ("stream", "sees the layer's output and knows W_O"),
        )
    ]
    saved(alt.hconcat(*panels).resolve_scale(y="shared"), path)


def planted(rows: Sequence[Row], floors: dict[str, float], path: Path) -> None:
    """Error by step, a panel a task; dashed, what no layer without gates can pass, under the other lines."""
    x = alt.X("step:Q", title="step")
    axis = alt.Axis(format=".0e", tickCount=5)
    y = alt.Y("mean:Q", title="error, share of the variance", scale=alt.Scale(type="log"), axis=axis)
    panels = []
    for task, floor in floors.items():
        chart = _banded([r for r in rows if r["task"] == task], x, y, _color("arm", PLANTED))
        if floor:
            rule = alt.Chart(alt.Data(values=[{"floor": floor}])).mark_rule(color=RED, strokeDash=[4, 3], size=5)
            chart = alt.layer(rule.encode(y="floor:Q"), chart)
        panels.append(chart.properties(width=240, height=200, title=task))
    saved(alt.hconcat(*panels).resolve_scale(y="shared"), path)
