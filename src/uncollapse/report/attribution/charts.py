"""The figures of an attribution's page: every head on a map, the sublayers along depth, and direct against total effects."""

from __future__ import annotations

from typing import Any

import altair as alt

from uncollapse.records.attribution import AttributionRecord
from uncollapse.report import wording
from uncollapse.report.attribution import tables
from uncollapse.report.attribution import wording as say
from uncollapse.report.page.figures import BLUE, FIT, GREY, ORANGE, TEAL, Chart, Key, rows, specification, ticks

_TAKEN_AWAY = {"head": "head", "attention": "attention"}
_COLORS = {"head": TEAL, "attention": BLUE, "MLP": ORANGE}
NEGATIVE, NONE, POSITIVE = "#b3552e", "#f2f0ec", "#1f6fb2"


def heads_maps(record: AttributionRecord) -> list[Chart]:
    """The direct effect of every head: one row per block, one column per head, a map for each kind of attention and stack."""
    places = list(dict.fromkeys((e.stack, e.attention) for e in say.heads_of(record)))
    return [_map(record, stack, attention, len(places) > 1) for stack, attention in sorted(places, key=str)]


def _map(record: AttributionRecord, stack: str | None, attention: str | None, several: bool) -> Chart:
    heads = [e for e in record.effects if e.kind == "head" and (e.stack, e.attention) == (stack, attention)]
    most = max(abs(e.value) for e in say.heads_of(record)) or 1.0
    drawn = [
        {"block": e.block, "head": e.head, "value": e.value if e.direct else None, "row": tables.key(e)} for e in heads
    ]
    blocks, columns = len({e.block for e in heads}), max(e.head or 0 for e in heads) + 1
    base = alt.Chart(rows(drawn)).encode(
        x=alt.X("head:O", axis=alt.Axis(title="head", labelAngle=0, orient="top", values=ticks(columns, 24))),
        y=alt.Y("block:O", axis=alt.Axis(title="block", labelOverlap="greedy")),
    )
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[-most, 0, most], range=[NEGATIVE, NONE, POSITIVE], interpolate="rgb", clamp=True),
        legend=alt.Legend(title=None, orient="bottom", gradientLength=220, tickCount=5),
    )
    step = max(9, min(26, 520 // max(1, blocks)))
    chart = base.mark_rect().encode(color=color, tooltip="row:N")
    spec = specification(alt.layer(chart).properties(width="container", height=step * blocks, autosize=FIT))
    where = " ".join(filter(None, [stack, "cross-attention" if attention == "cross" else ""])) if several else ""
    title = f"Direct effect of every head{f', {where}' if where else ''}"
    label = f"{title}: one row per block, one column per head, from {wording.number(-most)} to {wording.number(most)}."
    size = "small" if columns <= 8 else "medium" if columns <= 40 else "wide"
    return Chart(f"map-{stack or 'all'}-{attention}", title, label, spec, [], size)


def along_depth(record: AttributionRecord) -> Chart | None:
    """What the heads of each block do together, and what its MLP does."""
    points: list[dict[str, Any]] = []
    for line, kinds in (("attention", {"head", "attention", "attention_bias"}), ("MLP", {"mlp", "mlp_bias", "mixer"})):
        sums: dict[int, float] = {}
        for effect in record.effects:
            if effect.kind in kinds and effect.block is not None and effect.direct is not None:
                sums[effect.block] = sums.get(effect.block, 0.0) + effect.value
        points += [{"block": block, "value": value, "line": line} for block, value in sums.items()]
    blocks = {p["block"] for p in points}
    if len(blocks) < 2:
        return None
    base = alt.Chart(rows(points)).encode(
        x=alt.X("block:Q", axis=alt.Axis(title="block", values=ticks(max(blocks) + 1), format="d")),
        y=alt.Y("value:Q", axis=alt.Axis(title=None, tickCount=5)),
        color=alt.Color("line:N", scale=alt.Scale(domain=["attention", "MLP"], range=[BLUE, ORANGE]), legend=None),
    )
    zero = alt.Chart(rows([{"y": 0}])).mark_rule(color=GREY, strokeDash=[3, 3]).encode(y="y:Q")
    layers = alt.layer(zero, base.mark_line(strokeWidth=2), base.mark_circle(size=24, opacity=1))
    spec = specification(layers.properties(width="container", height=300, autosize=FIT))
    legend = [Key("attention, all heads", BLUE), Key("MLP", ORANGE)]
    return Chart(
        "depth",
        "Direct effects along depth",
        "Direct effect of attention and MLP, block by block.",
        spec,
        legend,
        "half",
    )


def direct_against_total(record: AttributionRecord) -> Chart | None:
    """Self-repair: a head below the diagonal costs less when it is taken away than it does directly."""
    drawn = [
        {"x": e.value, "y": e.total.mean, "row": tables.key(e), "kind": _TAKEN_AWAY.get(e.kind, "MLP")}
        for e in record.effects
        if e.direct is not None and e.total is not None
    ]
    if len(drawn) < 2:
        return None
    low = min(min(d["x"], d["y"]) for d in drawn if isinstance(d["x"], float) and isinstance(d["y"], float))
    high = max(max(d["x"], d["y"]) for d in drawn if isinstance(d["x"], float) and isinstance(d["y"], float))
    line = alt.Chart(rows([{"x": low, "y": low}, {"x": high, "y": high}]))
    base = alt.Chart(rows(drawn)).encode(
        x=alt.X("x:Q", axis=alt.Axis(title="direct effect", tickCount=5)),
        y=alt.Y("y:Q", axis=alt.Axis(title="total effect", tickCount=5)),
        color=alt.Color("kind:N", scale=alt.Scale(domain=[*_COLORS], range=[*_COLORS.values()]), legend=None),
    )
    layers = alt.layer(
        line.mark_line(color=GREY, strokeDash=[4, 3]).encode(x="x:Q", y="y:Q"),
        base.mark_circle(size=40, opacity=0.7).encode(tooltip="row:N"),
    )
    spec = specification(layers.properties(width="container", height=300, autosize=FIT))
    kinds = {d["kind"] for d in drawn}
    legend = [Key(kind, color, "area") for kind, color in _COLORS.items() if kind in kinds]
    legend.append(Key("direct = total", GREY, dash="4 3"))
    label = "Direct against total effect of every component that was taken away; on the dashed line they are equal."
    return Chart("repair", "Direct against total effect", label, spec, legend, "half")
