"""The tables of the heads' page: one row per attention call, and one row per head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import wording
from uncollapse.report.heads import wording as say
from uncollapse.report.healthy import References
from uncollapse.report.page.cells import (
    Cell,
    Column,
    Measure,
    Table,
    block_key,
    field,
    names_heads,
    severity_of,
    slug,
    table,
)
from uncollapse.report.page.heads import block_name, largest_overlap, references_of_heads

INFINITE = "∞"
BEYOND = 1e300  # what an infinite gain is sorted as: the page's script compares numbers


@dataclass(frozen=True)
class OneHead:
    """One head of an attention call, as a row of the table of heads."""

    block: HeadsRecord
    head: int
    unavailable: dict[str, str]

    @property
    def key(self) -> str:
        return slug("one", self.block.stack, self.block.kind, self.block.block, self.head)

    @property
    def energy_share(self) -> Statistic | None:
        return self.block.energy_share[self.head] if self.block.energy_share else None

    def verdict(self) -> str | None:
        verdicts = self.block.head_verdict
        return wording.verdict_in_short(verdicts[self.head]) if verdicts else None

    def noise_gain(self) -> Cell | None:
        if self.block.head_noise_gain is None:
            return None
        gain = self.block.head_noise_gain[self.head]
        random = self.block.random_head_noise_gain if self.block.heads > 1 else None
        return (
            Cell(INFINITE, sort=BEYOND)
            if gain is None
            else Cell(wording.number(gain), say.beside_random(gain, random), gain)
        )

    def overlap(self) -> Cell | None:
        """The other head whose write space is closest on average."""
        matrix = self.block.write_space_overlap
        others = [(v, h) for h, v in enumerate(matrix[self.head]) if h != self.head] if matrix else []
        return _with(max(others), others) if others else None

    def angle(self) -> Cell | None:
        """The other head with the closest single direction, in degrees."""
        matrix = self.block.smallest_principal_angle
        row = matrix[self.head] if matrix else []
        others = [(math.degrees(a), h) for h, a in enumerate(row) if h != self.head and a is not None]
        return _with(min(others), others) if others else None


def _with(pair: tuple[float, int], others: Sequence[tuple[float, int]]) -> Cell:
    value, other = pair
    alike = sum(wording.number(v) == wording.number(value) for v, _ in others)
    return Cell(wording.number(value), f"head {other}" if alike == 1 else f"with {wording.count(alike, 'head')}", value)


def smallest_angle(record: HeadsRecord) -> tuple[float, int, int] | None:
    """The pair of heads with the smallest angle between their write spaces, in degrees."""
    matrix = record.smallest_principal_angle
    pairs = [
        (math.degrees(a), g, h) for h, row in enumerate(matrix or []) for g, a in enumerate(row[:h]) if a is not None
    ]
    return min(pairs) if pairs else None


def largest_share(record: HeadsRecord) -> tuple[float, int] | None:
    """The head that writes most, and its share."""
    seen = [(share.mean, -head) for head, share in enumerate(record.energy_share or []) if share is not None]
    return (max(seen)[0], -max(seen)[1]) if seen else None


def blocks_table(record: IdentifiabilityRecord, key: str, healthy: References) -> Table:
    """One row per attention call."""
    order = {id(heads): float(index) for index, heads in enumerate(record.heads)}

    def verdict(heads: HeadsRecord) -> Cell | None:
        return None if heads.verdict is None else Cell(wording.verdict_in_short(heads.verdict), sort=heads.verdict)

    def told(heads: HeadsRecord) -> Cell | None:
        amount = say.count_of(heads, say.YES)
        care = say.count_of(heads, say.CARE)
        note = f"{care} more with care" if care else ""
        return None if amount is None else Cell(f"{amount} of {heads.heads}", note, amount / max(1, heads.heads))

    def rank(heads: HeadsRecord) -> Cell | None:
        found = heads.output_projection_rank
        attainable = min(heads.heads * heads.head_width, heads.width)
        return None if found is None else Cell(f"{found:,}", f"of {attainable:,}", found)

    def gain(heads: HeadsRecord) -> Cell | None:
        if heads.kernel_dimension is None:
            return None
        value = heads.condition_number
        beside = say.beside_random(value, heads.random_noise_gain) if heads.heads > 1 else ""
        return Cell(INFINITE, sort=BEYOND) if value is None else Cell(wording.number(value), beside, value)

    def random(heads: HeadsRecord) -> Cell | None:
        points = heads.random_noise_gain
        return (
            None if points is None else Cell(say.random_range(points), f"median {wording.number(points[1])}", points[1])
        )

    def absolute(heads: HeadsRecord) -> Cell | None:
        value = heads.absolute_noise_gain
        if value is None and heads.condition_number is None and heads.kernel_dimension is not None:
            return Cell(INFINITE, sort=BEYOND)
        return None if value is None else Cell(wording.number(value), sort=value)

    def overlap(heads: HeadsRecord) -> Cell | None:
        pair = largest_overlap(heads)
        return None if pair is None else Cell(wording.number(pair[0]), f"heads {pair[2]} and {pair[1]}", pair[0])

    def angle(heads: HeadsRecord) -> Cell | None:
        pair = smallest_angle(heads)
        return None if pair is None else Cell(wording.number(pair[0]), f"heads {pair[1]} and {pair[2]}", pair[0])

    def share(heads: HeadsRecord) -> Cell | None:
        found = largest_share(heads)
        return None if found is None else Cell(wording.percent(found[0]), f"head {found[1]}", found[0])

    measures = [
        Measure("verdict", Column("verdict", numeric=False), verdict),
        Measure("head_verdict", Column("heads attributable", "head by head"), told),
        Measure("output_projection_rank", Column("rank W_O"), rank),
        field("kernel_dimension", "kernel", "D − rank W_O per token"),
        field("contribution_ambiguity", "shared", "Σ rank W_h − rank W_O"),
        Measure("condition_number", Column("relative noise gain", "κ of all heads"), gain),
        Measure("random_noise_gain", Column("random weights", "κ, 5 % to 95 %"), random),
        Measure("absolute_noise_gain", Column("absolute noise gain", "1/σ_min"), absolute),
    ]
    if any(heads.heads > 1 for heads in record.heads):
        measures.append(Measure("write_space_overlap", Column("largest overlap"), overlap))
        measures.append(Measure("smallest_principal_angle", Column("smallest angle", "degrees"), angle))
        measures.append(Measure("energy_share", Column("largest energy share"), share))
    measures.append(field("gauge_dimension", "gauge", "dimensions"))
    return table(
        key,
        "Every block",
        [(Column("block"), lambda heads: Cell(block_name(heads), sort=order[id(heads)]))],
        measures,
        record.heads,
        block_key,
        lambda heads: severity_of(record.findings, lambda f: names_heads(f, heads)),
        references_of_heads(record.heads, healthy),
    )


def heads_table(heads: Sequence[HeadsRecord], findings: Sequence[Finding], key: str) -> Table | None:
    """One row per head; `None` if no figure of a single head is known."""
    rows = [OneHead(block, head, block.unavailable) for block in heads for head in range(block.heads)]
    if not any(row.verdict() or row.energy_share for row in rows):
        return None
    order = {id(block): float(index) for index, block in enumerate(heads)}
    elsewhere = references_of_heads(heads, None)  # healthy ranges are those of blocks, not of single heads
    return table(
        key,
        "Every head",
        [
            (Column("block"), lambda one: Cell(block_name(one.block), sort=order[id(one.block)])),
            (Column("head"), lambda one: Cell(str(one.head), sort=float(one.head))),
        ],
        [
            Measure("head_verdict", Column("verdict", numeric=False), OneHead.verdict),
            Measure("head_noise_gain", Column("noise gain", "absolute"), OneHead.noise_gain),
            field("energy_share", "energy share"),
            Measure("write_space_overlap", Column("largest overlap", "with which head"), OneHead.overlap),
            Measure("smallest_principal_angle", Column("smallest angle", "degrees"), OneHead.angle),
        ],
        rows,
        lambda one: one.key,
        lambda one: severity_of(findings, lambda f: names_heads(f, one.block) and f.head == one.head),
        elsewhere,
    )
