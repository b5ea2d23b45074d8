"""The charts of a monitored run: curves over the steps, and maps of blocks × steps and heads × steps with alarms marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from uncollapse.records.trail import TrailReading, TrailRecord
from uncollapse.report.healthy import References, under_title
from uncollapse.report.page.figures import BLUE, FIT, ORANGE, PURPLE, RED, TEAL, Chart, Key, rows, specification
from uncollapse.report.trail.wording import HEAD_TITLES, SITE_TITLES

COLORS = (BLUE, ORANGE, PURPLE, TEAL)
COLUMNS = 240  # of a map: more looks than this are shown by every second, third, …
IN_ALARMS = "The alarms of this run are listed above; the trail holds every figure."


def loss_chart(record: TrailRecord) -> Chart | None:
    """The training loss, with a rule at every alarm."""
    points = [{"step": r.step, "y": r.loss} for r in record.readings if r.loss is not None]
    if len(points) < 2:
        return None
    base = alt.Chart(rows(points)).encode(x=_steps(record), y=_y(zero=False))
    layers = [*_alarm_rules(record), base.mark_line(color=BLUE, strokeWidth=2)]
    return _chart("loss", "Training loss", "Training loss over the steps.", layers, _alarm_key(record))


def margin_chart(record: TrailRecord) -> Chart | None:
    """For each rule its largest margin, above 0 where it fires."""
    codes: dict[str, list[dict[str, Any]]] = {}
    for reading in record.readings:
        worst: dict[str, float] = {}
        for key, margin in reading.margins.items():
            code = key.partition("/")[0]
            worst[code] = max(margin, worst.get(code, margin))
        for code, margin in worst.items():
            codes.setdefault(code, []).append({"step": reading.step, "y": max(margin, -5.0), "line": code})
    drawn = {code: points for code, points in codes.items() if len(points) > 1 and any(p["y"] > -5 for p in points)}
    if not drawn:
        return None
    colors = {code: COLORS[i % len(COLORS)] for i, code in enumerate(drawn)}
    dashes = {code: ("", "6 3", "2 2")[i // len(COLORS) % 3] for i, code in enumerate(drawn)}
    names = list(drawn)
    base = alt.Chart(rows([point for points in drawn.values() for point in points])).encode(
        x=_steps(record),
        y=_y(zero=True),
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=[colors[n] for n in names]), legend=None),
        strokeDash=alt.StrokeDash(
            "line:N",
            scale=alt.Scale(domain=names, range=[[float(d) for d in (dashes[n] or "1 0").split()] for n in names]),
            legend=None,
        ),
    )
    zero = alt.Chart(rows([{"y": 0}])).mark_rule(color=RED, strokeDash=[5, 3]).encode(y="y:Q")
    layers = [*_alarm_rules(record), zero, base.mark_line(strokeWidth=2)]
    legend = [Key(n, colors[n], dash=dashes[n]) for n in names] + [Key("threshold", RED, dash="5 3")]
    label = "The largest margin of every rule over the steps: ln(threshold / distance)."
    return _chart("margins", "How near each rule is", label, layers, legend + _alarm_key(record))


def worst_charts(record: TrailRecord, healthy: References) -> list[Chart]:
    """The worst head's and the worst block's figure over the steps."""
    found = []
    for measure, which in (("consensus_after_norm", min), ("rest_entropy", min), ("max_logit", max)):
        points = []
        for reading in record.readings:
            values = [v for v in (reading.sites | reading.heads).get(measure, []) if v is not None]
            if values:
                points.append({"step": reading.step, "y": which(values)})
        if len(points) < 2:
            continue
        title = (SITE_TITLES | HEAD_TITLES)[measure]
        base = alt.Chart(rows(points)).encode(x=_steps(record), y=_y(zero=which is min))
        layers = [*_alarm_rules(record), base.mark_line(color=TEAL, strokeWidth=2)]
        place = "block" if measure in SITE_TITLES else "head"
        reference = under_title(healthy.worst_end(measure))
        label = f"{title} over the steps."
        found.append(_chart(f"worst-{measure}", f"{title}, worst {place}", label, layers, [], reference))
    return found


def block_maps(record: TrailRecord, healthy: References) -> list[Chart]:
    """One map for each measure of the stream: a row for each site, a column for each look."""
    names = [site.site for site in record.sites]
    return [_map(record, measure, names, healthy, is_heads=False) for measure in _known(record, SITE_TITLES)]


def head_maps(record: TrailRecord, healthy: References) -> list[Chart]:
    """One map for each measure of the heads: a row for each head, a column for each look."""
    names = [f"{head.block}.{head.head}" + (" cross" if head.kind == "cross" else "") for head in record.heads]
    return [_map(record, measure, names, healthy, is_heads=True) for measure in _known(record, HEAD_TITLES)]


def _known(record: TrailRecord, titles: Mapping[str, str]) -> list[str]:
    there = {measure for reading in record.readings for measure in (*reading.sites, *reading.heads)}
    return [measure for measure in titles if measure in there]


def _map(record: TrailRecord, measure: str, names: Sequence[str], healthy: References, *, is_heads: bool) -> Chart:
    shown = record.readings[:: max(1, math.ceil(len(record.readings) / COLUMNS))]
    cells = [
        {"step": reading.step, "row": i, "value": value}
        for reading in shown
        for i, value in enumerate((reading.heads if is_heads else reading.sites).get(measure, []))
        if value is not None
    ]
    title = f"{HEAD_TITLES[measure]}, heads × steps" if is_heads else f"{SITE_TITLES[measure]}, blocks × steps"
    x = alt.X("step:O", axis=alt.Axis(title="step", labelAngle=0, labelOverlap="greedy", labelSeparation=6))
    y = alt.Y("row:O", axis=alt.Axis(title=None, labelExpr=f"{list(names)!r}[datum.value]", labelOverlap="greedy"))
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(scheme="viridis", type="symlog" if measure == "max_logit" else "linear"),
        legend=alt.Legend(title=None, orient="bottom", gradientLength=200, tickCount=5),
    )
    layers: list[alt.Chart] = [alt.Chart(rows(cells)).mark_rect().encode(x=x, y=y, color=color)]
    marked = _marked(record, shown, is_heads)
    if marked:
        ring = alt.Chart(rows(marked)).encode(x=x, y=y)
        for stroke, width in (("#ffffff", 4), (RED, 2)):
            layers.append(ring.mark_square(filled=False, size=110, stroke=stroke, strokeWidth=width, opacity=1))
    height = max(90, min(520, 14 * len(names)))
    spec = specification(alt.layer(*layers).properties(width="container", height=height, autosize=FIT))
    legend = [Key("an alarm is raised", RED, "box")] if marked else []
    key = f"{'heads' if is_heads else 'blocks'}-{measure}".replace("_", "-")
    label, reference = f"{title}. Every column is a look.", under_title(healthy.beside(measure))
    return Chart(key, title, label, spec, legend, figures=IN_ALARMS, reference=reference)


def _marked(record: TrailRecord, shown: Sequence[TrailReading], is_heads: bool) -> list[dict[str, Any]]:
    """The cells at which alarms were raised: at the nearest look that is drawn."""
    steps = [reading.step for reading in shown]
    found = []
    for alarm in record.alarms:
        if is_heads:
            about = (alarm.block, alarm.head)
            alike = [i for i, h in enumerate(record.heads) if (h.block, h.head) == about]
            at = [i for i in alike if alarm.kind in (None, record.heads[i].kind)]
        elif alarm.head is None:
            at = [i for i, s in enumerate(record.sites) if (s.block, s.stack) == (alarm.block, alarm.stack)]
        else:
            at = []
        found += [{"step": min(steps, key=lambda step: abs(step - alarm.step)), "row": i} for i in at]
    return found


def _steps(record: TrailRecord) -> alt.X:
    first, last = record.readings[0].step, record.readings[-1].step
    return alt.X(
        "step:Q",
        scale=alt.Scale(domain=[first, max(last, first + 1)], nice=False),
        axis=alt.Axis(title="step", format="~s", tickMinStep=1),
    )


def _y(*, zero: bool) -> alt.Y:
    return alt.Y("y:Q", scale=alt.Scale(zero=zero), axis=alt.Axis(title=None, tickCount=5))


def _alarm_rules(record: TrailRecord) -> list[alt.Chart]:
    steps = sorted({alarm.step for alarm in record.alarms})
    if not steps:
        return []
    return [
        alt.Chart(rows([{"step": step} for step in steps])).mark_rule(color=RED, opacity=0.6).encode(x=_steps(record))
    ]


def _alarm_key(record: TrailRecord) -> list[Key]:
    return [Key("alarm", RED)] if record.alarms else []


def _chart(
    key: str, title: str, label: str, layers: Sequence[alt.Chart], legend: list[Key], reference: str = ""
) -> Chart:
    spec = specification(alt.layer(*layers).properties(width="container", height=210, autosize=FIT))
    return Chart(key.replace("_", "-"), title, label, spec, legend, figures=IN_ALARMS, reference=reference)
