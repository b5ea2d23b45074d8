"""The page of `uncollapse heads`: the answer first, then the blocks with a small map of each, then every head."""

from __future__ import annotations

from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import wording
from uncollapse.report.heads import tables
from uncollapse.report.heads import wording as say
from uncollapse.report.healthy import References, references
from uncollapse.report.page import cells, sheet
from uncollapse.report.page.heads import chosen_block_data, energy_bars, overlap_matrix
from uncollapse.report.page.panels import Panel, Tile, bundle


def document(record: IdentifiabilityRecord) -> str:
    """The page of one model's heads."""
    healthy = references(record)
    drawn = [overlap_matrix(record.heads), energy_bars(record.heads)]
    return sheet.render(
        "heads/page.html.j2",
        styles=["page/page.css", "heads/page.css"],
        scripts=[bundle(), sheet.source("page/page.js"), sheet.source("heads/page.js")],
        title=record.model.name,
        record=record,
        say=say,
        tiles=_tiles(record, healthy),
        healthy=healthy,
        answers=say.answers(record),
        maps=[(heads, say.mark(heads)) for heads in record.heads],
        chosen=chosen_block_data(record.heads),
        panel=Panel("", [chart for chart in drawn if chart], []),
        blocks=tables.blocks_table(record, "blocks-table", healthy),
        heads=tables.heads_table(record.heads, record.findings, "heads-table"),
        findings=[[(each, _target(each.block, record)) for each in group] for group in wording.alike(record.findings)],
    )


def _target(block: int | None, record: IdentifiabilityRecord) -> str:
    """The key of the row of the first attention call of this block."""
    return next((cells.block_key(heads) for heads in record.heads if heads.block == block), "")


def _tiles(record: IdentifiabilityRecord, healthy: References) -> list[Tile]:
    judged = [heads for heads in record.heads if heads.verdict is not None]
    tiles = []
    yes = [heads for heads in judged if heads.verdict == say.YES]
    tiles.append(Tile("attributable", f"{len(yes)} of {len(record.heads)}", "attention calls, without reservation"))
    single = sum(say.count_of(heads, say.YES) or 0 for heads in judged)
    if total := sum(heads.heads for heads in judged):
        tiles.append(Tile("heads attributable", f"{single:,} of {total:,}", "head by head"))
    gains = [(heads.condition_number, heads) for heads in judged if heads.condition_number is not None]
    if gains:
        gain, where = max(gains, key=lambda pair: pair[0])
        beside = say.beside_random(gain, where.random_noise_gain) if where.heads > 1 else ""
        detail = ", ".join(filter(None, [wording.blocks_in_words([where]), beside]))
        reference = healthy.highest("heads.condition_number")
        tiles.append(
            Tile("largest relative noise gain", wording.number(gain), detail, reference and f"healthy: {reference}")
        )
    kernels = [(heads.kernel_dimension or 0, heads) for heads in judged]
    if kernels:
        kernel, where = max(kernels, key=lambda pair: pair[0])
        detail = wording.blocks_in_words([where]) if kernel else "every head output follows from the layer’s output"
        forced = max(max(0, heads.heads * heads.head_width - heads.width) for heads in judged)
        reference = f"forced by the shape: {wording.number(forced)}"
        tiles.append(Tile("largest kernel per token", wording.number(kernel), detail, reference))
    return tiles
