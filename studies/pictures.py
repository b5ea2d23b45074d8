"""The pictures of docs/results.md, drawn by altair and vl-convert; no browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

BLUE, ORANGE, GREY, RED, TEAL = "#2f6db3", "#d9822b", "#8a94a3", "#c2453d", "#2a8a78"
DRAWN_FLOOR = 1e-17  # a logarithmic axis has no zero


def saved(chart: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    chart = chart.configure(background="white", font="Helvetica, Arial, sans-serif")
    chart = chart.configure_view(stroke="#d5dae1").configure_axis(**text, gridColor="#eceff3")
    chart.configure_legend(**text).configure_header(labelFontSize=12, labelFontWeight="bold").save(str(path))


def _log(title: str, low: float = DRAWN_FLOOR) -> alt.Y:
    axis = alt.Axis(format=".0e", tickCount=5) if low < 1e-6 else alt.Axis(format="~g", tickCount=4)
    return alt.Y("y:Q", title=title, scale=alt.Scale(type="log", domain=[low, 1], clamp=True), axis=axis)


def grid(curves: dict[str, Sequence[float | None]], floor: float, path: Path) -> None:
    """The eight runs in four panels. `curves` by mark (norm·residual·MLP), from the embedding on; the floor in grey."""
    panels = {
        "1·1": "whole, or without the MLP",
        "0·1": "without norms",
        "1·0": "without residuals",
        "0·0": "without both",
    }
    rows = [
        {
            "panel": panels[mark[:3]],
            "mlp": "MLP kept" if mark[-1] == "1" else "MLP removed",
            "depth": i,
            "y": max(v, DRAWN_FLOOR),
        }
        for mark, values in curves.items()
        for i, v in enumerate(values)
        if v is not None
    ]
    base = alt.Chart(alt.Data(values=[row | {"floor": floor, "bottom": DRAWN_FLOOR} for row in rows]))
    x = alt.X("depth:Q", title="block (0: embedding)", axis=alt.Axis(tickMinStep=1))
    color = alt.Color("mlp:N", title=None, scale=alt.Scale(domain=["MLP kept", "MLP removed"], range=[BLUE, ORANGE]))
    below = base.transform_aggregate(floor="max(floor)", bottom="min(bottom)").mark_rect(color=GREY, opacity=0.2)
    y = _log("consensus distance")
    line = base.mark_line(point=alt.OverlayMarkDef(size=22)).encode(x=x, y=y, color=color)
    layers = alt.layer(below.encode(y="floor:Q", y2="bottom:Q"), line).properties(width=185, height=190)
    saved(layers.facet(facet=alt.Facet("panel:N", title=None, sort=list(panels.values())), columns=4), path)


def dong(found: dict[str, dict[str, Any]], path: Path) -> None:
    """The composite-norm ratio after each block, a panel a model, a line a variant."""
    rows = [
        {"panel": name, "variant": variant, "depth": i + 1, "y": max(value, 1e-8)}
        for name, model in found.items()
        for variant, seeds in model["ratios"].items()
        for i, value in enumerate(sum(values) / len(values) for values in zip(*seeds, strict=True))
    ]
    variants = ["attention only", "with MLP", "with skip", "whole"]
    color = alt.Color("variant:N", title=None, scale=alt.Scale(domain=variants, range=[RED, ORANGE, TEAL, BLUE]))
    x = alt.X("depth:Q", title="block", axis=alt.Axis(tickMinStep=1))
    chart = alt.Chart(alt.Data(values=rows)).mark_line(point=alt.OverlayMarkDef(size=18))
    chart = chart.encode(x=x, y=_log("‖res X‖ / ‖X‖", 1e-8), color=color).properties(width=200, height=170)
    saved(chart.facet(facet=alt.Facet("panel:N", title=None, sort=list(found)), columns=3), path)


def trained(curves: Sequence[tuple[str, str, Sequence[float]]], path: Path) -> None:
    """Lines (panel, component, consensus distances): trained without beside removed, one line a seed."""
    rows = [
        {"panel": panel, "name": name, "seed": number, "depth": i, "y": max(v, DRAWN_FLOOR)}
        for number, (panel, name, values) in enumerate(curves)
        for i, v in enumerate(values)
    ]
    names = list(dict.fromkeys(name for _, name, _ in curves))
    color = alt.Color("name:N", title=None, scale=alt.Scale(domain=names, range=[BLUE, ORANGE, RED, TEAL]))
    x = alt.X("depth:Q", title="block (0: embedding)", axis=alt.Axis(tickMinStep=1))
    chart = alt.Chart(alt.Data(values=rows)).mark_line(point=alt.OverlayMarkDef(size=22))
    lowest = min(max(value, DRAWN_FLOOR) for *_, values in curves for value in values)
    low = 10.0 ** min(-2, math.floor(math.log10(lowest)))
    chart = chart.encode(x=x, y=_log("consensus distance", low), color=color, detail="seed:N")
    chart = chart.properties(width=300, height=210)
    saved(
        chart.facet(facet=alt.Facet("panel:N", title=None, sort=["trained without", "removed from the trained whole"])),
        path,
    )
