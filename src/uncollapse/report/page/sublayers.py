"""What sublayers add and what norms do, as a page shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import altair as alt

from uncollapse.records.common import Statistic
from uncollapse.records.diagnosis import NormRecord, UpdateRecord
from uncollapse.report import wording
from uncollapse.report.healthy import References
from uncollapse.report.page import cells
from uncollapse.report.page.cells import Cell, Column, Measure, Table, field, slug, table, update_key
from uncollapse.report.page.curves import Line, along_depth, measured
from uncollapse.report.page.figures import BLUE, ORANGE, PURPLE, Chart, Key
from uncollapse.report.page.panels import Panel


def updates_chart(updates: Sequence[UpdateRecord], key: str, where: str) -> Chart | None:
    """Out-of-span energy of every sublayer along depth, each with its null value."""
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
    lines = measured(lines)
    if not lines:
        return None
    keys = [" ".join(cells.update_key(u) for u in updates if u.block == block) for block in blocks]
    y = alt.Y("y:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=None, tickCount=5))
    spec = along_depth([str(block) for block in blocks], keys, lines, y, height=200)
    label = f"Share of every update that lies outside the span of the embeddings{f', {where}' if where else ''}."
    return Chart(key, "Out-of-span energy", label, spec, [line.key for line in lines])


def update_panels(records: Sequence[UpdateRecord], healthy: References | None = None) -> list[Panel]:
    """What the sublayers add, one panel per stack, with the ranges of healthy models if they are given."""
    found: dict[str | None, list[UpdateRecord]] = {}
    for update in records:
        found.setdefault(update.stack, []).append(update)
    panels = []
    for stack, updates in found.items():
        key = cells.slug("updates", stack or "all")  # "updates" is the section
        chart = updates_chart(updates, key, stack or "")
        name = wording.group_name(stack, None, several_kinds=False)
        panels.append(Panel(name, [chart] if chart else [], [updates_table(updates, f"{key}-table", healthy)]))
    return panels


UPDATES = [
    field("out_of_span_energy", "out-of-span energy"),
    field("null_out_of_span_energy", "null value"),
    field("nonlinear_innovation", "nonlinear innovation"),
    field("hidden_effective_rank", "hidden effective rank"),
    field("relative_norm", "relative norm"),
]


def norms_table(norms: Sequence[NormRecord], key: str) -> Table:
    """One row per norm call: what it does to the affine rank, and the three brackets of the exact formula."""

    order = {id(norm): index for index, norm in enumerate(norms)}

    def bracket(index: int) -> Callable[[NormRecord], Statistic | None]:
        return lambda norm: None if norm.brackets is None else norm.brackets[index]

    def change(norm: NormRecord) -> Cell | None:
        if norm.affine_rank_before is None or norm.affine_rank_after is None:
            return None
        amount = norm.affine_rank_after.mean - norm.affine_rank_before.mean
        return Cell(f"{'+' if amount > 0 else ''}{wording.number(amount)}", sort=amount)

    return table(
        key,
        "Affine rank before and after each norm in the blocks",
        [
            (Column("block"), lambda norm: Cell(str(norm.block), sort=float(norm.block))),
            (Column("norm", numeric=False), lambda norm: Cell(norm.norm, sort=norm.norm)),
        ],
        [
            field("affine_rank_before", "before"),
            field("affine_rank_after", "after"),
            Measure("affine_rank_after", Column("change"), change),
            Measure("brackets", Column("gained", "1 ∈ col X"), bracket(0)),
            Measure("brackets", Column("lost", "scales ∈ image"), bracket(1)),
            Measure("brackets", Column("lost", "row X ∩ kernel"), bracket(2)),
        ],
        norms,
        lambda norm: slug("norm", order[id(norm)]),
    )


def updates_table(updates: Sequence[UpdateRecord], key: str, healthy: References | None = None) -> Table:
    """One row per block and sublayer."""
    return table(
        key,
        "What every sublayer adds",
        [
            (Column("block"), lambda update: Cell(str(update.block), sort=float(update.block))),
            (
                Column("sublayer", numeric=False),
                lambda update: Cell(
                    f"{update.sublayer} (cross)" if update.kind == "cross" else update.sublayer, sort=update.sublayer
                ),
            ),
        ],
        UPDATES,
        updates,
        update_key,
        references=_of_both_sublayers(healthy) if healthy else {},
    )


def _of_both_sublayers(healthy: References) -> dict[str, str]:
    """The ranges of each kind of sublayer, as an attention and an MLP are rows of one table."""
    attention, mlp = healthy.columns("updates.attention"), healthy.columns("updates.mlp")
    said = {}
    for measure in attention.keys() | mlp.keys():
        parts = [("attention", attention.get(measure)), ("MLP", mlp.get(measure))]
        ranges = [f"{name} {words.removeprefix('healthy ')}" for name, words in parts if words]
        said[measure] = f"healthy: {'; '.join(ranges)}"
    said.pop("out_of_span_energy", None)  # its null value stands beside it
    return said
