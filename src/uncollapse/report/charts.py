"""Maps and bars: the entropy of every head, how far heads write into the same space, how much each one writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from uncollapse.records import AttentionRecord, Finding, HeadsRecord
from uncollapse.report import cells, wording
from uncollapse.report.figures import FIT, GREY, RED, TEAL, Chart, Key, rows, specification, ticks

LABELLED_HEADS = 16  # up to here a cell of the map is wide enough for its number, on a phone too


def entropy_map(heads: Sequence[AttentionRecord], findings: Sequence[Finding], key: str, where: str) -> Chart | None:
    """Normalized entropy, one cell a block and head, on the fixed scale from 0 to 1."""
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
        base.mark_rect(color=GREY, opacity=0.25).encode(tooltip="row:N"),
        base.transform_filter("isValid(datum.value)").mark_rect().encode(color=color, tooltip="row:N"),
    ]
    if labelled:
        ink = alt.condition("isValid(datum.value) && datum.value < 0.6", alt.value("#ffffff"), alt.value("#10151a"))
        layers.append(base.mark_text(fontSize=10).encode(text="label:N", color=ink, tooltip="row:N"))
    marked = [
        cell for cell, record in zip(drawn, heads, strict=True) if any(cells.names_head(f, record) for f in findings)
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
    label = (
        f"Normalized entropy of every head{f' in the {where}' if where else ''}: one row a block, one column a head."
    )
    size = "small" if columns <= LABELLED_HEADS else "medium" if columns <= 40 else "wide"
    return Chart(key, "Normalized entropy, blocks × heads", label, spec, legend, size)


def _short(value: float | None) -> str:
    """A value from 0 to 1 in two or three characters."""
    if value is None:
        return wording.ABSENT
    return "1" if value >= 0.995 else f"{value:.2f}"[1:]


def overlap_matrix(heads: Sequence[HeadsRecord]) -> Chart | None:
    """The heads' write-space overlaps. The data of the chosen block are put in by the page's script."""
    matrices = [record.write_space_overlap for record in heads if record.write_space_overlap]
    beside = [m[g][h] for m in matrices for g in range(len(m)) for h in range(len(m)) if g != h]
    if not beside:
        return None
    size = max(map(len, matrices))
    step = max(4, min(48, 300 // size))
    base = alt.Chart(alt.NamedData(name="overlap")).encode(
        x=alt.X("g:O", axis=alt.Axis(title="head", labelAngle=0, orient="top", values=ticks(size))),
        y=alt.Y("h:O", axis=alt.Axis(title="head", values=ticks(size))),
    )
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[0, max(beside)], scheme="cividis", clamp=True),
        legend=alt.Legend(title=None, orient="bottom", gradientLength=200, tickCount=3),
    )
    chart = alt.layer(
        base.transform_filter("datum.g == datum.h").mark_rect(color=GREY, opacity=0.3),
        base.transform_filter("datum.g != datum.h").mark_rect().encode(color=color, tooltip="tip:N"),
    )
    spec = specification(chart.properties(width=alt.Step(step), height=alt.Step(step)))
    label = "Overlap of the write spaces of every two heads of the chosen block; 1 means identical."
    figures = "Each head’s largest overlap is in the tables of this section, all of them in the record."
    return Chart("overlap", "Write-space overlap, head by head", label, spec, [], "half", figures)


def energy_bars(heads: Sequence[HeadsRecord]) -> Chart | None:
    """Each head's share of the energy written, with its range over sequences; one block at a time."""
    shares = [s for record in heads for s in record.energy_share or [] if s is not None]
    columns = max((len(record.energy_share or []) for record in heads), default=0)
    if not shares or columns < 2:
        return None
    base = alt.Chart(alt.NamedData(name="energy")).encode(
        x=alt.X("head:O", axis=alt.Axis(title="head", labelAngle=0, values=ticks(columns))), tooltip="tip:N"
    )
    scale = alt.Scale(domain=[0, max(s.max for s in shares)])
    bars = base.mark_bar(color=TEAL, opacity=0.75).encode(
        y=alt.Y("value:Q", scale=scale, axis=alt.Axis(title=None, tickCount=5))
    )
    whiskers = base.mark_rule(color=GREY, strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q")
    spec = specification(alt.layer(bars, whiskers).properties(width="container", height=300, autosize=FIT))
    legend = [Key("mean over sequences", TEAL, "area")]
    if any(wording.spread(s) for s in shares):
        legend.append(Key("lowest to highest sequence", GREY))
    label = "Share of the energy written by each head of the chosen block."
    return Chart("energy", "Energy share", label, spec, legend, "half")


def chosen_block_data(heads: Sequence[HeadsRecord]) -> list[dict[str, Any]]:
    """What the block selector switches between. Overlaps in thousandths: 80 blocks of 64 heads stay near a megabyte."""
    return [
        {
            "row": cells.block_key(record),
            "name": wording.place(block=record.block, stack=record.stack, kind=record.kind),
            "overlap": [[round(1000 * v) for v in line] for line in record.write_space_overlap or []],
            "energy": [s and [s.mean, s.min, s.max] for s in record.energy_share or []],
        }
        for record in heads
    ]
