"""The charts of a diagnosis: the entropy of every head, and the measures of the token cloud along depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import AttentionRecord, SiteRecord
from uncollapse.report import wording
from uncollapse.report.healthy import References, in_percent, under_title
from uncollapse.report.page import cells
from uncollapse.report.page.curves import Line, along_depth, measured
from uncollapse.report.page.figures import BLUE, FIT, GREY, ORANGE, RED, TEAL, Chart, Key, rows, specification, ticks

# Black or white, whichever has the higher contrast on the cell's own colour: it is equal at a luminance of 0.179.
INK = alt.condition("luminance(scale('color', datum.value)) < 0.179", alt.value("#ffffff"), alt.value("#000000"))
LABELLED_HEADS = 16  # up to here a cell of the map is wide enough for its number, on a phone too


def entropy_map(
    heads: Sequence[AttentionRecord], findings: Sequence[Finding], key: str, where: str, healthy: References
) -> Chart | None:
    """Normalized entropy, one cell per block and head, on a fixed scale from 0 to 1."""
    if not any(record.normalized_entropy for record in heads):
        return None
    columns = 1 + max(record.head for record in heads)
    blocks = {record.block for record in heads}
    labelled = columns <= LABELLED_HEADS
    drawn: list[dict[str, Any]] = []
    for record in heads:
        value = record.normalized_entropy.mean if record.normalized_entropy else None
        drawn.append(
            {
                "block": record.block,
                "head": record.head,
                "value": value,
                "row": cells.head_key(record),
                **({"label": _short(value)} if labelled else {}),
            }
        )
    step = 28 if len(blocks) <= 16 else max(7, 450 // len(blocks))
    x = alt.X("head:O", axis=alt.Axis(title="head", labelAngle=0, orient="top", values=ticks(columns)))
    y = alt.Y(
        "block:O", axis=alt.Axis(title="block", values=[tick for tick in ticks(1 + max(blocks)) if tick in blocks])
    )
    data = rows(drawn)
    base = alt.Chart(data).encode(x=x, y=y)
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[0, 1], scheme="viridis"),
        legend=alt.Legend(title=None, orient="bottom", gradientLength=200, tickCount=5),
    )
    layers = [
        base.transform_filter("!isValid(datum.value)").mark_rect(color=GREY, opacity=0.25).encode(tooltip="row:N"),
        base.transform_filter("isValid(datum.value)").mark_rect().encode(color=color, tooltip="row:N"),
    ]
    if labelled:
        measured_cells = base.transform_filter("isValid(datum.value)")
        layers.append(measured_cells.mark_text(fontSize=10).encode(text="label:N", color=INK, tooltip="row:N"))
        layers.append(
            base.transform_filter("!isValid(datum.value)")
            .mark_text(fontSize=10, color="currentColor")  # on the page's own ground, light or dark
            .encode(text="label:N", tooltip="row:N")
        )
    faults = [finding for finding in findings if finding.severity != "info"]  # what is only told is not at fault
    marked = [
        cell for cell, record in zip(drawn, heads, strict=True) if any(cells.names_head(f, record) for f in faults)
    ]
    legend = []
    if marked:
        ring = alt.Chart(rows(marked)).encode(x=x, y=y, tooltip="row:N")
        for stroke, width in (("#ffffff", 4), (RED, 2)):
            if step >= 20 and columns <= 40:
                layers.append(ring.mark_rect(fillOpacity=0, stroke=stroke, strokeWidth=width))
            else:  # around the cell, since a frame of its own size would hide it
                layers.append(ring.mark_square(filled=False, size=260, stroke=stroke, strokeWidth=width, opacity=1))
        legend.append(Key("named by a finding", RED, "box"))
    if any(cell["value"] is None for cell in drawn):
        legend.append(Key("not measured", GREY, "area"))
    spec = specification(alt.layer(*layers).properties(width="container", height=step * len(blocks), autosize=FIT))
    label = f"Normalized entropy of every head{f' in the {where}' if where else ''}: one row per block, one column per head."
    size = "small" if columns <= LABELLED_HEADS else "medium" if columns <= 40 else "wide"
    reference = _reference(healthy, "attention.normalized_entropy")
    return Chart(key, "Normalized entropy, blocks × heads", label, spec, legend, size, reference=reference)


def _reference(healthy: References, figure: str) -> str:
    """What a figure is in healthy models: over all places, and how low it gets from model to model."""
    words = healthy.words(figure)
    return f"Healthy models: {words}; their lowest {healthy.lowest(figure)}." if words else ""


def _short(value: float | None) -> str:
    """A value from 0 to 1 in two or three characters."""
    if value is None:
        return wording.ABSENT
    return "1" if value >= 0.995 else f"{value:.2f}"[1:]


DRAWN_FLOOR = 1e-17  # a logarithmic axis has no zero: smaller values are drawn here, and the tooltip has the true value


def trajectory_charts(
    sites: Sequence[SiteRecord], findings: Sequence[Finding], key: str, where: str, healthy: References
) -> list[Chart]:
    """The ranks and the attainable rank, the consensus distance on a logarithmic axis, the token similarity."""
    names = ["in" if site.block is None else str(site.block) for site in sites]
    keys = [
        f"{cells.site_key(site)} {cells.left_out_key(site)}" if site.massive_tokens_left_out else cells.site_key(site)
        for site in sites
    ]
    inside = f" in the {where}" if where else ""
    charts = []
    ranks = [
        Line(Key("rank", BLUE), [s.rank for s in sites], banded=False),
        Line(Key("affine rank", TEAL, dash="5 3"), [s.affine_rank for s in sites], banded=False),
        Line(Key("effective rank", ORANGE), [s.effective_rank for s in sites], banded=False),
    ]
    ranks = measured(ranks)
    attainable = [s.attainable_rank for s in sites]
    if ranks:
        shown = any(attainable)
        spec = along_depth(
            names,
            keys,
            ranks,
            alt.Y("y:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=None, tickCount=6)),
            area=attainable if shown else (),
        )
        legend = [line.key for line in ranks] + ([Key("attainable rank", GREY, "area")] if shown else [])
        label = f"Rank, affine rank and effective rank along depth{inside}, compared with the attainable rank."
        found = healthy.of("trajectory.effective_rank")
        reference = f"Healthy effective rank: {in_percent(found.low, found.high)} of the attainable." if found else ""
        charts.append(Chart(f"{key}-ranks", "Ranks and the attainable rank", label, spec, legend, reference=reference))
    named = [depth for depth, site in enumerate(sites) if any(cells.names_site(f, site) for f in findings)]
    charts += [
        chart
        for measure, title, y, drawn in (
            ("consensus_distance", "Consensus distance", _log_axis(sites), _on_log_axis),
            ("token_similarity", "Token similarity", _cosine_axis(sites), float),
        )
        if (chart := _pair_chart(sites, names, keys, measure, title, y, drawn, named, key, inside, healthy))
    ]
    return charts


def _pair_chart(
    sites: Sequence[SiteRecord],
    names: Sequence[str],
    keys: Sequence[str],
    measure: str,
    title: str,
    y: alt.Y,
    drawn: Callable[[float], float],
    named: Sequence[int],
    key: str,
    inside: str,
    healthy: References,
) -> Chart | None:
    """A norm-sensitive measure of all tokens and, if the printed figures differ, without the largest-norm ones."""
    everything = [getattr(site, measure) for site in sites]
    rest = [getattr(site.massive_tokens_left_out, measure, None) for site in sites]
    differ = any(r is not None and wording.mean(r) != wording.mean(e) for r, e in zip(rest, everything, strict=True))
    lines = [Line(Key("all tokens" if differ else title.lower(), BLUE), everything)]
    if differ:
        lines.append(Line(Key("largest-norm tokens left out", ORANGE, dash="5 3"), rest, banded=False))
    if not measured(lines):
        return None
    ringed = named if measure == "consensus_distance" else ()
    spec = along_depth(names, keys, lines, y, drawn=drawn, ringed=ringed)
    legend = [line.key for line in lines] if differ else []
    if any(s and wording.spread(s) for s in everything):
        legend.append(Key("lowest to highest sequence", BLUE, "band"))
    if ringed:
        legend.append(Key("named by a finding", RED, "ring"))
    scale = ", on a logarithmic axis" if measure == "consensus_distance" else ""
    reference = under_title(healthy.words(f"trajectory.{measure}"))
    label = f"{title} along depth{inside}{scale}."
    return Chart(f"{key}-{measure}".replace("_", "-"), title, label, spec, legend, reference=reference)


def _on_log_axis(value: float) -> float:
    return max(value, DRAWN_FLOOR)


def _log_axis(sites: Sequence[SiteRecord]) -> alt.Y:
    """Decades from the lowest sequence up to 1. At least one decade, so that a flat line looks flat."""
    drawn = [
        _on_log_axis(s.min)
        for site in sites
        for s in (site.consensus_distance, getattr(site.massive_tokens_left_out, "consensus_distance", None))
        if s is not None
    ]
    lowest = min(-1, math.floor(math.log10(min(drawn, default=0.1)) + 1e-9))
    step = math.ceil(-lowest / 6)
    marked = [1.0, 0.5, 0.2, 0.1] if lowest == -1 else [10.0**e for e in range(0, lowest - 1, -step)]
    labels = "datum.value >= 0.001 ? format(datum.value, '~g') : format(datum.value, '~e')"
    return alt.Y(
        "y:Q",
        scale=alt.Scale(type="log", domain=[10.0**lowest, 1.0], nice=False, clamp=True),
        axis=alt.Axis(title=None, values=marked, labelExpr=labels),
    )


def _cosine_axis(sites: Sequence[SiteRecord]) -> alt.Y:
    lowest = min((s.min for site in sites if (s := site.token_similarity) is not None), default=0.0)
    return alt.Y(
        "y:Q",
        scale=alt.Scale(domain=[min(0.0, math.floor(lowest * 5) / 5), 1.0], nice=False),
        axis=alt.Axis(title=None, tickCount=5),
    )
