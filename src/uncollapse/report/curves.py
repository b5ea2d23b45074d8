"""Lines along depth: the ranks, the consensus distance, the token similarity, the sublayers' updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from uncollapse.records import Finding, SiteRecord, Statistic, UpdateRecord
from uncollapse.report import cells, wording
from uncollapse.report.figures import BLUE, FIT, GREY, ORANGE, PURPLE, RED, TEAL, Chart, Key, rows, specification, ticks

DRAWN_FLOOR = 1e-17  # a logarithmic axis has no zero: smaller values are drawn here, and the tooltip tells the truth


POINTED_SITES = 40


@dataclass(frozen=True)
class Line:
    """One line along depth: its legend entry and the value of every site."""

    key: Key
    values: Sequence[Statistic | None]
    banded: bool = True


@dataclass(frozen=True)
class Level:
    """A value that lines are held against, drawn across the chart: `words` stand on it or, where it is high, beneath it."""

    value: float
    words: str
    color: str
    beneath: bool = False


def depth_axis(names: Sequence[str], title: str = "block") -> alt.X:
    """The sites along depth, few enough of them named for a phone."""
    inputs = 1 if names[0] == "in" else 0
    marked = [0] * inputs + [tick + inputs for tick in ticks(len(names) - inputs, most=9)]
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
    """Lines along depth with their range over sequences, over an area of what is attainable and across given levels."""
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
    """The words stand at the left: what falls towards a level along depth meets it at the right."""
    base = alt.Chart(rows([{"depth": 0, "y": level.value, "words": level.words}]))
    rule = base.mark_rule(color=level.color, strokeWidth=1.5, strokeDash=[5, 3]).encode(y=y)
    if not level.words:
        return [rule]
    text = base.mark_text(
        align="left", baseline="top" if level.beneath else "bottom", dy=4 if level.beneath else -4, fontSize=11
    )
    return [rule, text.encode(x=alt.X("depth:Q", **shared(x)), y=y, text="words:N")]


def hover_columns(keys: Sequence[str], x: alt.X) -> list[alt.Chart]:
    """One invisible column a site: wherever the pointer is, the nearest site's row is shown, and a rule marks it."""
    columns = [{"depth": i, "from": i - 0.5, "to": i + 0.5, "row": key} for i, key in enumerate(keys)]
    hover = alt.selection_point(name="hover", fields=["depth"], on="pointerover", clear="pointerout", empty=False)
    base = alt.Chart(rows(columns))
    rule = base.mark_rule(color=GREY).encode(x=x, opacity=alt.condition(hover, alt.value(0.9), alt.value(0)))
    column = base.mark_rect(opacity=0, clip=True).encode(x=alt.X("from:Q", **shared(x)), x2="to:Q", tooltip="row:N")
    return [rule, column.add_params(hover)]


def shared(channel: alt.X | alt.Y) -> dict[str, Any]:
    """The scale and axis of a channel, for another field that must share them."""
    given: Any = channel.to_dict()
    return {key: given[key] for key in ("scale", "axis") if key in given}


def trajectory_charts(sites: Sequence[SiteRecord], findings: Sequence[Finding], key: str, where: str) -> list[Chart]:
    """Ranks against the attainable, the consensus distance on a logarithmic axis, the token similarity."""
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
    ranks = _measured(ranks)
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
        label = f"Rank, affine rank and effective rank along depth{inside}, against the attainable rank."
        charts.append(Chart(f"{key}-ranks", "Ranks against the attainable", label, spec, legend))
    named = [depth for depth, site in enumerate(sites) if any(cells.names_site(f, site) for f in findings)]
    charts += [
        chart
        for measure, title, y, drawn in (
            ("consensus_distance", "Consensus distance", _log_axis(sites), _on_log_axis),
            ("token_similarity", "Token similarity", _cosine_axis(sites), float),
        )
        if (chart := _pair_chart(sites, names, keys, measure, title, y, drawn, named, key, inside))
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
) -> Chart | None:
    """A norm-sensitive measure of all tokens and, where that differs in print, without the largest-norm ones."""
    everything = [getattr(site, measure) for site in sites]
    rest = [getattr(site.massive_tokens_left_out, measure, None) for site in sites]
    differ = any(r is not None and wording.mean(r) != wording.mean(e) for r, e in zip(rest, everything, strict=True))
    lines = [Line(Key("all tokens" if differ else title.lower(), BLUE), everything)]
    if differ:
        lines.append(Line(Key("largest-norm tokens left out", ORANGE, dash="5 3"), rest, banded=False))
    if not _measured(lines):
        return None
    ringed = named if measure == "consensus_distance" else ()
    spec = along_depth(names, keys, lines, y, drawn=drawn, ringed=ringed)
    legend = [line.key for line in lines] if differ else []
    if any(s and wording.spread(s) for s in everything):
        legend.append(Key("lowest to highest sequence", BLUE, "band"))
    if ringed:
        legend.append(Key("named by a finding", RED, "ring"))
    scale = ", logarithmic axis" if measure == "consensus_distance" else ""
    return Chart(f"{key}-{measure}".replace("_", "-"), title, f"{title} along depth{inside}{scale}.", spec, legend)


def _measured(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if any(value is not None for value in line.values)]


def _on_log_axis(value: float) -> float:
    return max(value, DRAWN_FLOOR)


def _log_axis(sites: Sequence[SiteRecord]) -> alt.Y:
    """Decades from the lowest sequence up to 1, at least one of them, so that a flat line looks flat."""
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


def updates_chart(updates: Sequence[UpdateRecord], key: str, where: str) -> Chart | None:
    """Out-of-span energy of every sublayer along depth, each beside its null."""
    blocks = sorted({u.block for u in updates})
    colors = {"attention": BLUE, "cross-attention": PURPLE, "MLP": ORANGE}
    found: dict[str, dict[int, UpdateRecord]] = {}
    for update in updates:
        name = "MLP" if update.sublayer == "mlp" else "cross-attention" if update.kind == "cross" else "attention"
        found.setdefault(name, {})[update.block] = update
    lines = []
    for name, chosen in found.items():
        seen = [chosen.get(block) for block in blocks]
        lines.append(Line(Key(name, colors[name]), [u.out_of_span_energy if u else None for u in seen]))
        null = [u.null_out_of_span_energy if u else None for u in seen]
        lines.append(Line(Key(f"{name}, null", colors[name], dash="3 3"), null, banded=False))
    lines = _measured(lines)
    if not lines:
        return None
    keys = [" ".join(cells.update_key(u) for u in updates if u.block == block) for block in blocks]
    y = alt.Y("y:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, tickCount=5))
    spec = along_depth([str(block) for block in blocks], keys, lines, y, height=200)
    label = f"Share of every update that lies outside the span of the embeddings{f', {where}' if where else ''}."
    return Chart(key, "Out-of-span energy", label, spec, [line.key for line in lines])
