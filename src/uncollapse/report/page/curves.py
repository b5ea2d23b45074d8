"""Lines along depth: the ranks, the consensus distance, the token similarity, the sublayers' updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from uncollapse.records.common import Statistic
from uncollapse.report.page.figures import FIT, GREY, RED, Key, rows, specification, ticks

POINTED_SITES = 40


@dataclass(frozen=True)
class Line:
    """One line along depth: its legend entry and the value of every site."""

    key: Key
    values: Sequence[Statistic | None]
    banded: bool = True


@dataclass(frozen=True)
class Level:
    """A value to compare the lines with, drawn across the chart. `words` are written above it, or below it if it is high."""

    value: float
    words: str
    color: str
    beneath: bool = False


def depth_axis(names: Sequence[str], title: str = "block") -> alt.X:
    """The sites along depth, with few enough labels for a phone. Where not every block has one, block 0 has none beside “in”."""
    inputs = 1 if names[0] == "in" else 0
    blocks = ticks(len(names) - inputs, most=9)
    if inputs and len(blocks) < len(names) - inputs:
        blocks = blocks[1:]
    marked = [0] * inputs + [tick + inputs for tick in blocks]
    return alt.X(
        "depth:Q",
        scale=alt.Scale(domain=[0, max(1, len(names) - 1)], nice=False, padding=6),
        axis=alt.Axis(title=title, values=marked, labelExpr=f"{list(names)!r}[datum.value]"),
    )


def along_depth(
    names: Sequence[str],
    keys: Sequence[str],
    lines: Sequence[Line],
    y: alt.Y,
    *,
    drawn: Callable[[float], float] = float,
    area: Sequence[Statistic | None] = (),
    ringed: Sequence[int] = (),
    levels: Sequence[Level] = (),
    height: int = 230,
    title: str = "block",
) -> dict[str, Any]:
    """Lines along depth with their range over sequences, above an area of what is attainable, with the given levels."""
    x = depth_axis(names, title)
    long = [
        {"depth": depth, "line": line.key.label, "y": drawn(s.mean), "low": drawn(s.min), "high": drawn(s.max)}
        if s
        else {"depth": depth, "line": line.key.label, "y": None, "low": None, "high": None}
        for line in lines
        for depth, s in enumerate(line.values)
    ]
    labels = [line.key.label for line in lines]
    color = alt.Color("line:N", scale=alt.Scale(domain=labels, range=[line.key.color for line in lines]), legend=None)
    dash = alt.StrokeDash(
        "line:N",
        scale=alt.Scale(domain=labels, range=[[float(d) for d in (line.key.dash or "1 0").split()] for line in lines]),
        legend=None,
    )
    layers: list[alt.Chart] = []
    if area:
        ceiling = alt.Chart(rows([{"depth": i, "y": s.mean if s else None} for i, s in enumerate(area)]))
        layers.append(ceiling.mark_area(color=GREY, opacity=0.16).encode(x=x, y=y))
        layers.append(ceiling.mark_line(color=GREY, strokeWidth=1).encode(x=x, y=y))
    for level in levels:
        layers += _level(level, x, y)
    base = alt.Chart(rows(long)).encode(x=x, color=color)
    banded = [line.key.label for line in lines if line.banded]
    spreads = [row for row in long if row["line"] in banded and row["low"] != row["high"]]
    if spreads:
        band = alt.Chart(rows([row for row in long if row["line"] in banded]))
        layers.append(band.mark_area(opacity=0.13).encode(x=x, y=alt.Y("low:Q", **shared(y)), y2="high:Q", color=color))
    layers.append(base.mark_line(strokeWidth=2, strokeJoin="round").encode(y=y, strokeDash=dash))
    if len(names) <= POINTED_SITES:
        layers.append(base.mark_circle(size=24, opacity=1).encode(y=y))
    if ringed:
        first = lines[0].values
        rings = [{"depth": d, "y": drawn(s.mean)} for d in ringed if (s := first[d]) is not None]
        layers.append(
            alt.Chart(rows(rings)).mark_point(size=150, filled=False, color=RED, strokeWidth=2).encode(x=x, y=y)
        )
    layers += hover_columns(keys, x)
    return specification(alt.layer(*layers).properties(width="container", height=height, autosize=FIT))


def _level(level: Level, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The words are at the left: lines that fall along depth reach the level at the right."""
    base = alt.Chart(rows([{"depth": 0, "y": level.value, "words": level.words}]))
    rule = base.mark_rule(color=level.color, strokeWidth=1.5, strokeDash=[5, 3]).encode(y=y)
    if not level.words:
        return [rule]
    text = base.mark_text(
        align="left",
        baseline="top" if level.beneath else "bottom",
        dy=4 if level.beneath else -4,
        fontSize=11,
        color="currentColor",  # the page's, light or dark
    )
    return [rule, text.encode(x=alt.X("depth:Q", **shared(x)), y=y, text="words:N")]


def hover_columns(keys: Sequence[str], x: alt.X) -> list[alt.Chart]:
    """One invisible column per site. Wherever the pointer is, the row of the nearest site is shown and a rule marks it."""
    columns = [{"depth": i, "from": i - 0.5, "to": i + 0.5, "row": key} for i, key in enumerate(keys)]
    hover = alt.selection_point(name="hover", fields=["depth"], on="pointerover", clear="pointerout", empty=False)
    base = alt.Chart(rows(columns))
    rule = base.mark_rule(color=GREY).encode(x=x, opacity=alt.condition(hover, alt.value(0.9), alt.value(0)))
    column = base.mark_rect(opacity=0, clip=True).encode(x=alt.X("from:Q", **shared(x)), x2="to:Q", tooltip="row:N")
    return [rule, column.add_params(hover)]


def shared(channel: alt.X | alt.Y) -> dict[str, Any]:
    """The scale and axis of a channel, for another field that has to share them."""
    given: Any = channel.to_dict()
    return {key: given[key] for key in ("scale", "axis") if key in given}


def measured(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if any(value is not None for value in line.values)]
