"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import altair as alt

from uncollapse.records.common import Finding
from uncollapse.records.comparison import Change, ComparisonRecord
from uncollapse.report import wording
from uncollapse.report.comparison import wording as say
from uncollapse.report.healthy import References, references, under_title
from uncollapse.report.page import cells, sheet
from uncollapse.report.page.curves import depth_axis
from uncollapse.report.page.figures import (
    BLUE,
    FIT,
    GREY,
    ORANGE,
    PURPLE,
    TEAL,
    Chart,
    Key,
    rows,
    specification,
    ticks,
)
from uncollapse.report.page.panels import Panel, Tile, bundle

MAPPED = ("normalized_entropy", "max_logit", "rest_entropy", "value_contraction")
SHARES = ("normalized_entropy", "rest_entropy", "key_share")  # from 0 to 1, and compared by their difference
HEADS_TABLE = "heads-table"
# Of the lines: the first diagnosis is blue.
COLORS, DASHES = (BLUE, ORANGE, PURPLE, TEAL), ("", "6 3", "2 2")


def document(record: ComparisonRecord) -> str:
    """The page of one comparison. More than two diagnoses are drawn on it together, each beside the first."""
    healthy = references(record)
    curves = [
        _curve(record, measure, healthy) for measure in ("consensus_after_norm", "effective_rank", "stream_carried")
    ]
    maps = _maps(record, healthy)
    return sheet.render(
        "comparison/page.html.j2",
        styles=["page/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=say.title(record),
        record=record,
        say=say,
        tiles=_tiles(record),
        healthy=healthy,
        worse=[(name, pair, _cards(pair)) for name, pair in say.pairs(record)],
        depth=Panel(
            "",
            [chart for chart in curves if chart],
            _tables(record, "sites", "sites-table", "Every figure of the stream", healthy),
        ),
        maps=maps,
        heads=Panel(
            "",
            [chart for each in maps for chart in each.charts],
            _tables(record, "heads", HEADS_TABLE, "Every figure of the heads", healthy),
        ),
    )


def _cards(pair: ComparisonRecord) -> list[list[tuple[Finding, str]]]:
    """The findings of one rule share a card. They lead nowhere."""
    return [[(finding, "") for finding in group] for group in wording.alike(pair.findings)]


def _tables(record: ComparisonRecord, what: str, key: str, caption: str, healthy: References) -> list[cells.Table]:
    """One table for each but the first of which anything was compared."""
    return [
        _table(changes, _key(key, number), f"{caption}: {name}" if record.further else caption, healthy)
        for number, (name, pair) in enumerate(say.pairs(record))
        if (changes := getattr(pair, what))
    ]


def _key(key: str, number: int) -> str:
    """That of the second diagnosis is the plain one."""
    return f"{key}-of-{number + 2}" if number else key


def _tiles(record: ComparisonRecord) -> list[Tile]:
    if record.further:
        return [
            Tile(name, wording.count(len(pair.findings), "finding"), f"{moved} figures moved")
            for (name, pair), (_, moved, _, _) in zip(say.pairs(record), say.overview(record), strict=True)
        ]
    moved = sum(change.moved for change in (*record.sites, *record.heads))
    tiles = [
        Tile(
            "got worse",
            str(len(record.findings)),
            wording.counts_in_words(record.findings) or "nothing by half or more",
        ),
        Tile("figures that moved", f"{moved:,}", f"of {len(record.sites) + len(record.heads):,}"),
        Tile("no longer found", str(len(record.gone)), "findings of the first"),
    ]
    most = next((change for change in say.moved_heads(record) if change.measure == "max_logit"), None)
    if most is not None:
        place = wording.place(block=most.block, head=most.head, stack=most.stack, kind=most.kind)
        both = f"{wording.number(most.before)} → {wording.number(most.after)}"
        tiles.append(Tile("logits moved most", both if most.factor is None else say.factor(most), place))
    return tiles


def _curve(record: ComparisonRecord, measure: str, healthy: References) -> Chart | None:
    """A figure along depth, a line for each diagnosis. A pair lacks the places that one of the two has no figure of."""
    by_pair = [{c.site: c for c in pair.sites if c.measure == measure} for pair in record.pairs]
    places = _in_order({site: change for pair in by_pair for site, change in pair.items()})
    if len(places) < 2:
        return None
    names = say.names(record)
    points = [
        {"depth": depth, "y": value, "line": line}
        for depth, place in enumerate(places)
        for line, value in zip(
            names,
            [place.before, *(pair[place.site].after if place.site in pair else None for pair in by_pair)],
            strict=True,
        )
        if value is not None
    ]
    colors = [COLORS[i % len(COLORS)] for i in range(len(names))]
    dashes = [DASHES[i // len(COLORS) % len(DASHES)] for i in range(len(names))]
    base = alt.Chart(rows(points)).encode(
        x=depth_axis(["in" if c.block is None else str(c.block) for c in places]),
        y=alt.Y("y:Q", scale=alt.Scale(zero=True), axis=alt.Axis(title=None, tickCount=5)),
        color=alt.Color("line:N", scale=alt.Scale(domain=names, range=colors), legend=None),
    )
    lines = base.mark_line(strokeWidth=2)
    if any(dashes):
        patterns = [[float(d) for d in (dash or "1 0").split()] for dash in dashes]
        scale = alt.Scale(domain=names, range=patterns)
        lines = lines.encode(strokeDash=alt.StrokeDash("line:N", scale=scale, legend=None))
    layers = alt.layer(lines, base.mark_circle(size=24, opacity=1))
    spec = specification(layers.properties(width="container", height=210, autosize=FIT))
    title = say.TITLES[measure].capitalize()
    legend = [Key(name, color, dash=dash) for name, color, dash in zip(names, colors, dashes, strict=True)]
    which = "of every model" if record.further else "before and after"
    return Chart(
        f"depth-{measure}".replace("_", "-"),
        title,
        f"{title} along depth, {which}.",
        spec,
        legend,
        reference=under_title(healthy.beside(measure)),
    )


def _in_order(by_site: Mapping[str, Change]) -> list[Change]:
    """By block, the embedding of a stack before the first of its blocks."""
    first: dict[str | None, int] = {}
    for change in by_site.values():
        if change.block is not None:
            first[change.stack] = min(change.block, first.get(change.stack, change.block))
    return sorted(by_site.values(), key=lambda c: first.get(c.stack, 0) - 0.5 if c.block is None else c.block)


@dataclass(frozen=True)
class Maps:
    """A figure of every head of one kind of attention: before, after, and how it changed. Where there are more than two, before
    and the changes."""

    heading: str
    charts: list[Chart]


def _maps(record: ComparisonRecord, healthy: References) -> list[Maps]:
    """The heads of the models side by side, on one scale, and the differences beside them."""
    several = len({kind for pair in record.pairs for _, kind in wording.groups(pair.heads)}) > 1
    everywhere = [change for pair in record.pairs for change in pair.heads]
    found: dict[tuple[str, Any, Any], list[Chart]] = {}
    for number, (name, pair) in enumerate(say.pairs(record)):
        table = _key(HEADS_TABLE, number)
        rows_of = {id(change): f"{table}-{row}" for row, change in enumerate(pair.heads)}
        for measure in MAPPED:
            for (stack, kind), heads in wording.groups(pair.heads).items():
                changes = [change for change in heads if change.measure == measure]
                if changes:
                    key = cells.slug("map", measure.replace("_", "-"), stack, kind)
                    alike = [c for c in everywhere if (c.measure, c.stack, c.kind) == (measure, stack, kind)]
                    both, reference = [say.names(record)[0], name], under_title(healthy.beside(measure))
                    drawn = _three(changes, alike, measure, key, both, rows_of, reference)
                    there = found.setdefault((measure, stack, kind), [])
                    if not record.further:
                        there += drawn
                        continue
                    before, _, change = drawn
                    change = replace(change, key=_key(change.key, number), title=f"{name}: {change.title.lower()}")
                    there += [change] if there else [before, change]
    return [
        Maps(_heading(measure, wording.group_name(stack, kind, several_kinds=several)), charts)
        for (measure, stack, kind), charts in found.items()
    ]


def _heading(measure: str, where: str) -> str:
    title = say.TITLES[measure].capitalize()
    return f"{title}, {where.lower()}" if where else title


def _three(
    changes: Sequence[Change],
    alike: Sequence[Change],
    measure: str,
    key: str,
    names: Sequence[str],
    rows_of: Mapping[int, str],
    reference: str,
) -> list[Chart]:
    """`alike`: the changes of all pairs, which give the scales."""
    highest = max(1.0 if measure in SHARES else 0.0, *(max(c.before, c.after) for c in alike))
    lowest = min(0.0, *(min(c.before, c.after) for c in alike))
    level = alt.Scale(domain=[lowest, highest or 1.0], scheme="viridis")
    most = max((abs(d) for c in alike if (d := _difference(c)) is not None), default=0.0) or 1.0
    most = most if measure in SHARES else max(2.0, min(6.0, most))
    change = alt.Scale(domain=[-most, 0, most], range=["#3f83c6", "#f4f4f4", "#d1403f"], interpolate="rgb", clamp=True)
    unit = "after − before" if measure in SHARES else "in doublings"
    drawn: list[tuple[str, str, Sequence[float | None], alt.Scale]] = [
        ("before", names[0], [c.before for c in changes], level),
        ("after", names[1], [c.after for c in changes], level),
        ("change", f"Difference, {unit}", [_difference(c) for c in changes], change),
    ]
    title = say.TITLES[measure]
    return [
        _map(
            f"{key}-{part}",
            words,
            f"{title[:1].upper()}{title[1:]} of every head, {part}: one row per block, one column per head.",
            [
                {"block": c.block, "head": c.head, "value": value, "row": rows_of[id(c)]}
                for c, value in zip(changes, values, strict=True)
            ],
            scale,
            "" if part == "change" else reference,
        )
        for part, words, values, scale in drawn
    ]


def _difference(change: Change) -> float | None:
    """What the third map shows: of shares how far they moved, of other figures the doublings."""
    if change.measure in SHARES:
        return change.after - change.before
    return None if change.factor is None else math.log2(change.factor)


def _map(key: str, title: str, label: str, drawn: list[dict[str, Any]], scale: alt.Scale, reference: str) -> Chart:
    """One map: a row per block, a column per head. Each cell leads to its row in the table."""
    blocks, columns = len({cell["block"] for cell in drawn}), 1 + max(cell["head"] for cell in drawn)
    base = alt.Chart(rows(drawn)).encode(
        x=alt.X("head:O", axis=alt.Axis(title="head", labelAngle=0, orient="top", values=ticks(columns, 12))),
        y=alt.Y("block:O", axis=alt.Axis(title="block", labelOverlap="greedy")),
        tooltip="row:N",
    )
    color = alt.Color(
        "value:Q", scale=scale, legend=alt.Legend(title=None, orient="bottom", gradientLength=160, tickCount=4)
    )
    layers = [
        base.transform_filter("!isValid(datum.value)").mark_rect(color=GREY, opacity=0.25),
        base.transform_filter("isValid(datum.value)").mark_rect().encode(color=color),
    ]
    height = max(60, min(500, 24 * blocks))
    spec = specification(alt.layer(*layers).properties(width="container", height=height, autosize=FIT))
    legend = [Key("not comparable", GREY, "area")] if any(cell["value"] is None for cell in drawn) else []
    return Chart(key, title, label, spec, legend, reference=reference)


def _table(changes: Sequence[Change], key: str, caption: str, healthy: References) -> cells.Table:
    titles = ("place", "figure", "before", "after", "factor", "noise", "moved", "healthy")
    columns = [cells.Column(title, numeric=title not in ("place", "figure", "moved", "healthy")) for title in titles]
    found = []
    for number, change in enumerate(changes):
        place = wording.place(block=change.block, head=change.head, stack=change.stack, kind=change.kind)
        shown = [
            cells.Cell("embedding" if change.block is None else place, sort=float(number)),
            cells.cell(say.TITLES[change.measure]),
            cells.cell(change.before),
            cells.cell(change.after),
            cells.Cell(say.factor(change), sort=change.factor),
            cells.cell(change.noise) if change.noise is not None else cells.Cell(wording.ABSENT, reason="one sequence"),
            cells.cell("yes" if change.moved else "no"),
            cells.cell(healthy.beside(change.measure)),
        ]
        found.append(cells.Row(f"{key}-{number}", shown))
    return cells.Table(key, caption, columns, found, [], [])
