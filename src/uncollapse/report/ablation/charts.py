"""The curves of an ablation: all runs on one logarithmic axis above the rounding floor, and the share of the rank per run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import altair as alt

from uncollapse.records.ablation import AblationRecord, AblationRun
from uncollapse.records.diagnosis import followed
from uncollapse.report import wording
from uncollapse.report.ablation import tables
from uncollapse.report.ablation import wording as say
from uncollapse.report.healthy import under_title
from uncollapse.report.page.curves import POINTED_SITES, depth_axis, hover_columns, shared
from uncollapse.report.page.figures import BLUE, FIT, GREY, ORANGE, PURPLE, TEAL, Chart, Key, rows, specification

COLORS = (BLUE, ORANGE, PURPLE, TEAL)
DASHES = {
    (False, 0): "",
    (True, 0): "6 3",
    (False, 1): "2 2",
    (True, 1): "8 2 2 2",
}  # (norm removed, second time round)


def keys(record: AblationRecord) -> list[Key]:
    """One line per run. The colour says what is removed besides the norms; dashes mean that the norms are removed too."""
    beside = list(dict.fromkeys(frozenset(run.without) - {"norm"} for run in record.runs))
    among = say.components(record)
    found = []
    for run in record.runs:
        place = beside.index(frozenset(run.without) - {"norm"})
        dash = DASHES["norm" in run.without, place // len(COLORS) % 2]
        label = f"{say.mark(run, among)} {say.name(run)}"
        found.append(Key(label, COLORS[place % len(COLORS)], dash=dash))
    return found


def consensus_chart(record: AblationRecord, key: str, healthy: str = "") -> Chart | None:
    """The consensus distance of every run along depth. Points at the rounding floor are hollow and grey, without a line. `healthy`:
    what it is in healthy models."""
    sites = followed(record.runs[0].trajectory)
    drawn = [(number, line, run) for number, (line, run) in enumerate(zip(keys(record), record.runs, strict=True))]
    points = [point for number, line, run in drawn for point in _points(number, line, run)]
    if not points:
        return None
    floor = max((run.rate.floor for run in record.runs if run.rate is not None), default=None)
    met = any(point["rounding"] for point in points)
    bottom = _bottom(points, floor if met else None)
    for point in points:
        point["y"] = max(point["y"], bottom)
    above = [point for point in points if not point["rounding"]]
    x = depth_axis(["in" if site.block is None else str(site.block) for site in sites])
    y = _log_axis(bottom)
    labels = [line.label for _, line, _ in drawn]
    color = alt.Color("line:N", scale=alt.Scale(domain=labels, range=[line.color for _, line, _ in drawn]), legend=None)
    dashes = [[float(d) for d in (line.dash or "1 0").split()] for _, line, _ in drawn]
    dash = alt.StrokeDash("line:N", scale=alt.Scale(domain=labels, range=dashes), legend=None)
    layers: list[alt.Chart] = []
    if met and floor is not None:
        layers += _floor_band(len(sites), bottom, floor, x, y)
    base = alt.Chart(rows(above)).encode(x=x, y=y, color=color)
    layers.append(base.mark_line(strokeWidth=2, strokeJoin="round").encode(strokeDash=dash))
    if len(sites) <= POINTED_SITES:
        layers.append(base.mark_circle(size=26, opacity=1))
    if met:
        falls = alt.Chart(rows(_falls(points))).encode(x=x, y=y, color=color, detail="line:N")
        layers.append(falls.mark_line(strokeWidth=1.5, strokeDash=[2, 4]))
        hollow = alt.Chart(rows([point for point in points if point["rounding"]])).encode(x=x, y=y)
        layers.append(hollow.mark_point(filled=False, size=34, color=GREY, strokeWidth=1.2, opacity=1))
    layers += hover_columns([tables.depth_key(site) for site in sites], x)
    legend = [line for _, line, _ in drawn]
    if met:
        legend += [Key("rounding error", GREY, "ring"), Key("rounding floor and below", GREY, "band")]
    spec = specification(alt.layer(*layers).properties(width="container", height=380, autosize=FIT))
    label = "Consensus distance of every run along depth, on a logarithmic axis."
    return Chart(key, "Consensus distance along depth", label, spec, legend, reference=under_title(healthy))


def _points(number: int, line: Key, run: AblationRun) -> list[dict[str, Any]]:
    return [
        {"depth": i, "line": line.label, "y": site.consensus.mean, "rounding": say.at_floor(run, i), "run": number}
        for i, site in enumerate(followed(run.trajectory))
        if site.consensus is not None
    ]


def _falls(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run that reaches the floor, its last value above it and the first one at it."""
    found = []
    for before, after in itertools.pairwise(points):
        if before["run"] == after["run"] and after["rounding"] and not before["rounding"]:
            found += [before, after]
    return found


def _bottom(points: list[dict[str, Any]], floor: float | None) -> float:
    """Where the axis ends: a decade below the floor if it is reached, otherwise below the lowest value; at least one decade."""
    if floor is not None:
        return float(10.0 ** math.floor(math.log10(floor) - 1))
    lowest = min((point["y"] for point in points if point["y"] > 0), default=0.1)
    return float(10.0 ** min(-1, math.floor(math.log10(lowest) + 1e-9)))


def _log_axis(bottom: float) -> alt.Y:
    lowest = round(math.log10(bottom))
    step = math.ceil(-lowest / 8)
    marked = [1.0, 0.5, 0.2, 0.1] if lowest == -1 else [10.0**e for e in range(0, lowest - 1, -step)]
    labels = "datum.value >= 0.001 ? format(datum.value, '~g') : format(datum.value, '~e')"
    return alt.Y(
        "y:Q",
        scale=alt.Scale(type="log", domain=[bottom, 1.0], nice=False, clamp=True),
        axis=alt.Axis(title=None, values=marked, labelExpr=labels),
    )


def _floor_band(sites: int, bottom: float, floor: float, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """The floor as a shaded band that contains its name."""
    band = alt.Chart(rows([{"depth": 0, "to": sites - 1, "y": bottom, "top": floor}]))
    label = alt.Chart(
        rows(
            [
                {
                    "depth": 0,
                    "y": floor,
                    "words": f"rounding floor {wording.number(floor, 2)}: nothing below it can be measured",
                }
            ]
        )
    )
    return [
        band.mark_rect(color=GREY, opacity=0.2).encode(x=x, x2="to:Q", y=y, y2="top:Q"),
        label.mark_rule(color=GREY, strokeWidth=1).encode(y=y),
        label.mark_text(align="left", baseline="top", dx=6, dy=5, fontSize=11, color="currentColor").encode(
            x=alt.X("depth:Q", **shared(x)), y=y, text="words:N"
        ),
    ]


def share_charts(record: AblationRecord, key: str) -> list[Chart]:
    """One small chart per run: the share of the attainable affine rank along depth."""
    found = []
    for number, (line, run) in enumerate(zip(keys(record), record.runs, strict=True)):
        sites = followed(run.trajectory)
        points = [{"depth": i, "y": wording.rank_share(site)} for i, site in enumerate(sites)]
        if all(point["y"] is None for point in points):
            continue
        x = depth_axis(["in" if site.block is None else str(site.block) for site in sites], title="")
        y = alt.Y(
            "y:Q",
            scale=alt.Scale(domain=[0, 1], nice=False, padding=4),
            axis=alt.Axis(title=None, values=[0, 0.5, 1], format="%"),
        )
        base = alt.Chart(rows(points)).encode(x=x, y=y)
        layers = [
            base.mark_area(color=line.color, opacity=0.16),
            base.mark_line(color=line.color, strokeWidth=2, strokeJoin="round"),
        ]
        if len(sites) <= POINTED_SITES:
            layers.append(base.mark_circle(color=line.color, size=20, opacity=1))
        layers += hover_columns([tables.run_site_key(number, site) for site in sites], x)
        spec = specification(alt.layer(*layers).properties(width="container", height=96, autosize=FIT))
        label = f"Share of the attainable affine rank along depth, {say.name(run)}."
        found.append(Chart(f"{key}-{number}", line.label, label, spec, [], "multiple"))
    return found
