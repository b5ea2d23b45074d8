"""The heads of a block, as a page shows them: how far their write spaces overlap, and how much each one writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.report import wording
from uncollapse.report.healthy import References, in_words
from uncollapse.report.page import cells
from uncollapse.report.page.figures import FIT, GREY, TEAL, Chart, Key, specification, ticks


def overlap_matrix(heads: Sequence[HeadsRecord]) -> Chart | None:
    """The write-space overlaps of the heads. The script of the page fills in the data of the chosen block."""
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
    label = "Overlap between the write spaces of every pair of heads in the chosen block; 1 means identical."
    random = {wording.number(record.head_width / record.width) for record in heads if record.width}
    reference = f"Random write spaces of this size: {' or '.join(sorted(random))} on average."
    figures = "The tables of this section have the largest overlap of each head; the record has all of them."
    return Chart("overlap", "Write-space overlap, head by head", label, spec, [], "half", figures, reference)


def energy_bars(heads: Sequence[HeadsRecord]) -> Chart | None:
    """The share of the energy that each head writes, with its range over sequences; one block at a time."""
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
    even = {wording.number(1 / record.heads) for record in heads if record.heads > 1}
    reference = f"An even share: {' or '.join(sorted(even))}."
    return Chart("energy", "Energy share", label, spec, legend, "half", reference=reference)


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


def largest_overlap(record: HeadsRecord) -> tuple[float, int, int] | None:
    """The pair of heads whose write spaces overlap most."""
    matrix = record.write_space_overlap
    if matrix is None or len(matrix) < 2:
        return None
    return max((matrix[g][h], g, h) for g in range(len(matrix)) for h in range(g))


def block_name(heads: HeadsRecord) -> str:
    """The number of the block, with its stack and kind if the model has several."""
    return wording.place(block=heads.block, stack=heads.stack, kind=heads.kind).removeprefix("block ")


def references_of_heads(heads: Sequence[HeadsRecord], healthy: References | None) -> dict[str, str]:
    """What the figures of a block's heads are elsewhere: forced by the shape, in random weights of the size, and in healthy models
    if they are given."""
    said = {
        "kernel_dimension": f"forced by the shape: {one_of(max(0, h.heads * h.head_width - h.width) for h in heads)}"
    }
    if condition := healthy.words("heads.condition_number") if healthy else "":
        said["condition_number"] = f"healthy {condition}"
    random = one_of(h.head_width / h.width for h in heads if h.width)
    healthy_overlap = healthy.words("heads.largest_overlap") if healthy else ""
    beside = f"; healthy {healthy_overlap}" if healthy_overlap else ""
    said["write_space_overlap"] = f"random pair {random}{beside}"
    shares = healthy.of("heads.largest_energy_share") if healthy else None
    even = one_of(1 / h.heads for h in heads if h.heads)
    beside = f"; healthy {in_words(shares.low, shares.high)} times that" if shares else ""
    said["energy_share"] = f"even {even}{beside}"
    return said


def one_of(values: Iterable[float]) -> str:
    """The values that occur, in print."""
    return " or ".join(dict.fromkeys(map(wording.number, values)))
