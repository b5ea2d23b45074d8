"""What all figures of the page share: data, legend, configuration and colours.

A chart contains only what it draws. Its marks name the rows of the table next to it (`row`), and the script of the page shows
those rows as the tooltip. So an absent value says why it is absent, and nothing is rounded twice. Axes, text and grid take
their colours from the style sheet, which follows light and dark mode. The colours of the marks work in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

BLUE, TEAL, ORANGE, PURPLE, GREY, RED = "#3f83c6", "#1c957f", "#cf7420", "#a35cb4", "#8a949e", "#d1403f"
CONFIG: dict[str, Any] = {
    "aria": False,
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "tickSize": 4,
        "domain": False,
        "labelOverlap": "greedy",
    },
    "axisX": {"grid": False},
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "gradientThickness": 10},
    "rect": {"strokeWidth": 0},
}


@dataclass(frozen=True)
class Key:
    """One entry of a legend, drawn in HTML so that it wraps on a phone: a line, an area or a ring."""

    label: str
    color: str
    shape: str = "line"
    dash: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure of the page. `label` describes it to readers who cannot see it. `figures` says where its values are written
    out. `size` is a class in the style sheet. `reference` says what the figures are elsewhere.
    """

    key: str
    title: str
    label: str
    spec: dict[str, Any]
    legend: list[Key]
    size: str = "wide"
    figures: str = "Its figures are in the tables of this section."
    reference: str = ""


def specification(chart: alt.LayerChart | alt.FacetChart) -> dict[str, Any]:
    """The specification with this page's configuration, whatever theme the caller's session has enabled."""
    with alt.theme.enable("none"):
        return {**chart.to_dict(), "config": CONFIG}


def rows(values: Sequence[dict[str, Any]]) -> alt.InlineData:
    """The data of a chart, one object per mark."""
    return alt.InlineData(values=list(values))


def ticks(amount: int, most: int = 16) -> list[int]:
    """Round numbers below `amount`, few enough for a phone."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if amount <= most * step or step == 100)
    return list(range(0, amount, step))


FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
