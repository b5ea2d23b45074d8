"""The page of a diagnosis: one self-contained HTML file, drawn from the record, including the Vega bundle and the data."""

from __future__ import annotations

from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.report import wording
from uncollapse.report.anatomy import kinds_of_blocks, measured_sentences
from uncollapse.report.diagnosis import charts, corpus, tables
from uncollapse.report.diagnosis import wording as say
from uncollapse.report.diagnosis.charts import trajectory_charts
from uncollapse.report.healthy import References, in_percent, references
from uncollapse.report.page import cells, sheet
from uncollapse.report.page.heads import chosen_block_data, energy_bars, overlap_matrix
from uncollapse.report.page.panels import Panel, Tile, bundle
from uncollapse.report.page.sublayers import norms_table, update_panels
from uncollapse.report.symmetries import tables as symmetries_tables
from uncollapse.report.symmetries import wording as symmetries_wording
from uncollapse.report.symmetries.rows import symmetry_rows, width


def document(record: DiagnosisRecord) -> str:
    """The page of one diagnosis."""
    healthy, of_corpus = references(record), references(record, "corpus")
    symmetries, scaling = symmetry_rows(record.symmetries, record.findings, healthy), width(record.symmetries)
    return sheet.render(
        "diagnosis/page.html.j2",
        styles=["page/page.css", "symmetries/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=record.model.name,
        record=record,
        say=say,
        tiles=_tiles(record, healthy),
        healthy=healthy,
        findings=[[(each, _target(each, record)) for each in group] for group in wording.alike(record.findings)],
        measured=measured_sentences(record.anatomy, wording.looked_at(record).left_out),
        kinds=kinds_of_blocks(record.anatomy),
        taken=tables.anatomy_table(record.anatomy, "anatomy-table"),
        depth=_depth(record, healthy),
        corpus=corpus.corpus_tables(record.corpus, record.findings, of_corpus),
        of_corpus=of_corpus,
        pooled_output=corpus.POOLED_OUTPUT,
        routers=corpus.routers_table(record.routers),
        said_of_corpus=corpus.of_corpus(record),
        said_of_experts=corpus.of_experts(record.routers),
        attention=_attention(record, healthy),
        heads=_heads(record, healthy),
        chosen=chosen_block_data(record.heads),
        mean_length=tables.mean_length(record),
        norms=Panel("", [], [norms_table(record.norms, "norms-table")]),
        updates=update_panels(record.updates, healthy),
        symmetries=symmetries,
        order=symmetries_tables.order_table(record.symmetries, "order-table"),
        width=scaling,
        drawn=Panel("", [row.chart for row in symmetries if row.chart] + (scaling.charts if scaling else []), []),
        symmetry_words=symmetries_wording,
    )


def _target(finding: Finding, record: DiagnosisRecord) -> str:
    """The key of the row that a finding is about: a head, the heads of a block, or a site; empty if there is none."""
    heads = [cells.head_key(each) for each in record.attention if cells.names_head(finding, each)]
    blocks = [cells.block_key(each) for each in record.heads if cells.names_heads(finding, each)]
    sites = [cells.site_key(each) for each in record.trajectory if cells.names_site(finding, each)]
    return next(iter(heads + blocks + sites), "")


def _tiles(record: DiagnosisRecord, healthy: References) -> list[Tile]:
    def beside(words: str) -> str:
        return f"healthy: {words}" if words else ""

    counts = wording.counts_in_words(record.findings)
    tiles = [Tile("findings", str(len(record.findings)), counts or "no rule fired", "healthy: no warning")]
    low = wording.extreme(record.trajectory, "consensus_distance")
    if low:
        where, reference = wording.site_name(low.record), beside(healthy.lowest("trajectory.consensus_distance"))
        tiles.append(Tile("lowest consensus distance", wording.number(low.value), where, reference))
    share = wording.lowest_rank_share(record.trajectory)
    if share:
        where = "at every site" if share[0] == 1.0 else wording.site_name(share[1])
        found = healthy.of("trajectory.affine_rank")
        reference = beside(in_percent(*found.lows)) if found else ""
        tiles.append(Tile("lowest share of attainable rank", wording.percent(share[0]), where, reference))
    sharp = wording.extreme(record.attention, "normalized_entropy")
    if sharp:
        where, reference = wording.head_place(sharp.record), beside(healthy.lowest("attention.normalized_entropy"))
        tiles.append(Tile("lowest normalized entropy", wording.number(sharp.value), where, reference))
    return tiles


def _depth(record: DiagnosisRecord, healthy: References) -> list[Panel]:
    panels = []
    for (stack, _), sites in wording.groups(record.trajectory).items():
        key = cells.slug("depth", stack)
        left_out = tables.massive_table(sites, f"{key}-left-out", healthy)
        streams = tables.streams_table(sites, f"{key}-streams")
        panels.append(
            Panel(
                wording.group_name(stack, None, several_kinds=False),
                trajectory_charts(sites, record.findings, key, stack or "", healthy),
                [
                    tables.trajectory_table(sites, record.findings, f"{key}-table", healthy),
                    *([streams] if streams else []),
                    *([left_out] if left_out else []),
                ],
            )
        )
    return panels


def _attention(record: DiagnosisRecord, healthy: References) -> list[Panel]:
    kinds = {attention.kind for attention in record.attention}
    panels = []
    for (stack, kind), heads in wording.groups(record.attention).items():
        name = wording.group_name(stack, kind, several_kinds=len(kinds) > 1)
        key = cells.slug("attention", stack, kind)
        chart = charts.entropy_map(heads, record.findings, key, name.lower(), healthy)
        table = tables.attention_table(heads, record.findings, f"{key}-table", healthy)
        panels.append(Panel(name, [chart] if chart else [], [table]))
    return panels


def _heads(record: DiagnosisRecord, healthy: References) -> Panel:
    drawn = [overlap_matrix(record.heads), energy_bars(record.heads)]
    shares = tables.shares_table(record.heads, "shares-table")
    shown = [tables.heads_table(record, "heads-table", healthy), *([shares] if shares else [])]
    return Panel("", [chart for chart in drawn if chart], shown)
