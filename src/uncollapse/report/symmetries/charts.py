"""The curves of the symmetries: each order parameter along depth over its value at collapse, and σ₂ against the context length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from uncollapse.records.common import Statistic
from uncollapse.records.symmetries import SymmetryRecord, WidthScaling
from uncollapse.report import wording
from uncollapse.report.page.cells import slug
from uncollapse.report.page.curves import Level, Line, along_depth, shared
from uncollapse.report.page.figures import BLUE, FIT, GREY, ORANGE, PURPLE, RED, TEAL, Chart, Key, rows, specification
from uncollapse.report.symmetries import tables
from uncollapse.report.symmetries import wording as say

ORDER_FIGURES = "Its figures are in the table of every order parameter."
SCALING_FIGURES = "Its figures are in the table of this section."
COLORS = (BLUE, ORANGE, PURPLE, TEAL)
INDEPENDENT = -0.5  # the power with independent logits


@dataclass
class _Columns:
    """The places of an order parameter lined up: one column a depth, one line a stack and kind of attention."""

    names: list[str] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    lines: dict[str, dict[int, Statistic | None]] = field(default_factory=dict)


def _lined_up(symmetry: SymmetryRecord, first_decoder_block: int | None) -> _Columns:
    found = _Columns()
    at: dict[tuple[str, str], int] = {}
    for position, (name, value) in enumerate(zip(symmetry.places, symmetry.order_parameter, strict=True)):
        block = say.block_of(name)
        is_input = say.LONE_PLACE.fullmatch(name) is not None and block is None
        line = say.line(name, first_decoder_block)
        stack = line.split(" ")[0] if first_decoder_block is not None else ""
        label = str(block) if block is not None else "in" if is_input else str(position)
        column = at.setdefault((stack, label), len(found.names))
        if column in found.lines.get(line, {}):  # a place that is named twice
            column = len(found.names)
        if column == len(found.names):
            found.names.append(label)
            found.keys.append([])
        found.keys[column].append(tables.order_key(symmetry, position))
        found.lines.setdefault(line, {})[column] = value
    return found


def order_chart(symmetry: SymmetryRecord, decoder_from: int | None) -> Chart | None:
    """The order parameter along depth; the value at collapse is a line across the chart."""
    values = [s for s in symmetry.order_parameter if s is not None]
    if not values:
        return None
    columns = _lined_up(symmetry, decoder_from)
    several = len(columns.lines) > 1
    lines = [
        Line(
            Key(name or ("self-attention" if several else say.measure(symmetry)), color),
            [known.get(column) for column in range(len(columns.names))],
        )
        for (name, known), color in zip(columns.lines.items(), COLORS, strict=False)
    ]
    low, high = min(s.min for s in values), max(s.max for s in values)
    bottom, top = min(0.0, low, symmetry.collapsed_value), max(high, symmetry.collapsed_value)
    top = 1.0 if 0.5 < top <= 1.0 else top if top > bottom else bottom + 1.0
    y = alt.Y(
        "y:Q", scale=alt.Scale(domain=[bottom, top], nice=top != 1.0, padding=4), axis=alt.Axis(title=None, tickCount=4)
    )
    level = Level(symmetry.collapsed_value, "collapse", RED, beneath=symmetry.collapsed_value > (bottom + top) / 2)
    spec = along_depth(
        columns.names, [" ".join(each) for each in columns.keys], lines, y, levels=[level], height=112, title=""
    )
    measure = say.measure(symmetry)
    measure = measure[:1].upper() + measure[1:]
    collapse = wording.number(symmetry.collapsed_value)
    label = f"{measure} along depth, block by block; a line marks its value at collapse, {collapse}."
    legend = [line.key for line in lines] if several else []
    key = slug("curve", symmetry.phenomenon)
    return Chart(key, f"{measure}, block by block", label, spec, legend, "wide", ORDER_FIGURES)


# Width ----------------------------------------------------------------------------------------------------------------


def slopes_chart(scaling: Sequence[WidthScaling], key: str) -> Chart | None:
    """Every attention's slope with its interval along depth, between no fall and that of independent logits; `None` where no
    stack has three of them.
    """
    blocks = sorted({(each.stack or "", each.block) for each in scaling}, key=lambda pair: pair[1])
    names = {
        (each.stack, each.kind): " ".join(filter(None, [each.stack, f"{each.kind}-attention"])) for each in scaling
    }
    lines = []
    for ((stack, kind), name), color in zip(names.items(), COLORS, strict=False):
        known = {each.block: _slope(each) for each in scaling if (each.stack, each.kind) == (stack, kind)}
        lines.append(Line(Key(name, color), [known.get(block) for _, block in blocks]))
    if max((sum(value is not None for value in line.values) for line in lines), default=0) < 3:
        return None
    keys = [" ".join(tables.scaling_key(e) for e in scaling if e.block == block) for _, block in blocks]
    low = min(INDEPENDENT, *(s.min for line in lines for s in line.values if s is not None))
    high = max(0.0, *(s.max for line in lines for s in line.values if s is not None))
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[math.floor(low * 5) / 5, math.ceil(high * 5 + 0.5) / 5], nice=False),
        axis=alt.Axis(title=None, tickCount=5),
    )
    levels = [Level(0.0, "", GREY), Level(INDEPENDENT, "", RED)]
    spec = along_depth([str(block) for _, block in blocks], keys, lines, y, levels=levels, height=200)
    legend = [line.key for line in lines] if len(lines) > 1 else []
    legend += [
        Key("95 % interval", BLUE, "band"),
        Key("no change with the context length", GREY, dash="5 3"),
        Key("independent logits: −½", RED, dash="5 3"),
    ]
    label = "Slope of ln σ₂ on ln n of every attention along depth, with its interval."
    return Chart(key, "Slope along depth", label, spec, legend, "wide", SCALING_FIGURES)


def _slope(scaling: WidthScaling) -> Statistic | None:
    if scaling.slope is None:
        return None
    low, high = scaling.slope_low, scaling.slope_high
    return Statistic(scaling.slope, scaling.slope if low is None else low, scaling.slope if high is None else high, 1)


def scaling_charts(scaling: Sequence[WidthScaling]) -> list[tuple[WidthScaling, Chart]]:
    """One small chart an attention: σ₂ against the context length, both logarithmic, on scales that all of them share."""
    drawn = [(each, _points(each)) for each in scaling]
    points = [point for _, each in drawn for point in each]
    if not points:
        return []
    lengths = sorted({point["n"] for point in points})
    values = [point[end] for point in points for end in ("low", "high")]
    domain = [min(values) / 1.2, max(values) * 1.2]
    return [(each, _scaling_chart(each, seen, lengths, domain)) for each, seen in drawn if seen]


def _points(scaling: WidthScaling) -> list[dict[str, Any]]:
    """The points that can be drawn on a logarithmic axis; a range that reaches down to 0 is cut at the mean."""
    return [
        {"n": n, "y": s.mean, "low": s.min if s.min > 0 else s.mean, "high": s.max}
        for n, s in zip(scaling.context_lengths, scaling.second_singular_value, strict=True)
        if s is not None and s.mean > 0
    ]


def _scaling_chart(
    scaling: WidthScaling, points: list[dict[str, Any]], lengths: Sequence[int], domain: Sequence[float]
) -> Chart:
    row = tables.scaling_key(scaling)
    points = [{**point, "row": row} for point in points]
    few = [lengths[0], lengths[len(lengths) // 2], lengths[-1]] if len(lengths) > 3 else lengths
    x = alt.X(
        "n:Q",
        scale=alt.Scale(type="log", domain=[lengths[0], max(lengths[-1], lengths[0] + 1)], nice=False, padding=8),
        axis=alt.Axis(title=None, values=list(few), format=",d", labelOverlap=False),
    )
    y = alt.Y(
        "y:Q",
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(title=None, values=_marks(*domain), format="~g"),
    )
    base = alt.Chart(rows(points))
    layers: list[alt.Chart] = [
        alt.Chart(rows(_power(points, INDEPENDENT, lengths))).mark_line(
            color=RED, strokeDash=[3, 3], strokeWidth=1.2, clip=True
        ),
    ]
    if scaling.slope is not None:
        fitted = alt.Chart(rows(_power(points, scaling.slope, lengths, through_mean=True)))
        layers.append(fitted.mark_line(color=BLUE, strokeWidth=2, clip=True))
    layers = [layer.encode(x=x, y=y) for layer in layers]
    ranged = base.mark_rule(color=BLUE, opacity=0.35, strokeWidth=3).encode(
        x=x, y=alt.Y("low:Q", **shared(y)), y2="high:Q", tooltip="row:N"
    )
    layers += [ranged, base.mark_circle(color=BLUE, size=36, opacity=1).encode(x=x, y=y, tooltip="row:N")]
    spec = specification(alt.layer(*layers).properties(width="container", height=110, autosize=FIT))
    label = f"Second singular value of {say.attention(scaling)} against the context length, both axes logarithmic."
    return Chart(f"{row}-chart", say.attention(scaling), label, spec, [], "multiple", SCALING_FIGURES)


def _power(
    points: Sequence[dict[str, Any]], slope: float, lengths: Sequence[int], *, through_mean: bool = False
) -> list[dict[str, Any]]:
    """The law y ~ n^slope over all lengths: through the points' geometric mean, as least squares has it, or the first one."""
    if through_mean:
        n = math.exp(sum(math.log(point["n"]) for point in points) / len(points))
        y = math.exp(sum(math.log(point["y"]) for point in points) / len(points))
    else:
        n, y = points[0]["n"], points[0]["y"]
    return [{"n": end, "y": y * (end / n) ** slope} for end in (lengths[0], lengths[-1])]


def _marks(low: float, high: float) -> list[float]:
    """Round values of a logarithmic axis, at most about five."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        marks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(marks) <= 5:
            break
    return marks


# Tests ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Where a test's defect and its rounding level lie on a logarithmic scale from 0 to 100, zero at its left end."""

    defect: float | None
    rounding: float | None


def scales(values: Sequence[tuple[float | None, float | None]]) -> tuple[list[Scale], int, int]:
    """The places of each (defect, rounding) on a scale that all share, and the powers of ten at its two ends."""
    seen = [math.log10(value) for pair in values for value in pair if value]
    low, high = math.floor(min(seen, default=-8.0)), max(0, math.ceil(max(seen, default=0.0)))
    low = min(low, high - 1)

    def at(value: float | None) -> float | None:
        if value is None:
            return None
        return 0.0 if value <= 0 else round(100 * (math.log10(value) - low) / (high - low), 1)

    return [Scale(at(defect), at(rounding)) for defect, rounding in values], low, high
