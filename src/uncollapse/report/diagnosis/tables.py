"""The tables of the page, one per kind of record: which columns, in which order, under which names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from uncollapse.records.anatomy import AnatomyRecord, AttentionCallRecord, BlockAnatomy, PartRecord
from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import AttentionRecord, DiagnosisRecord, HeadsRecord, SiteRecord, StreamRecord
from uncollapse.report import anatomy as taken
from uncollapse.report import wording
from uncollapse.report.healthy import References
from uncollapse.report.page.cells import (
    Cell,
    Column,
    Measure,
    Table,
    block_key,
    field,
    head_key,
    left_out_key,
    names_head,
    names_heads,
    names_site,
    severity_of,
    site_key,
    slug,
    table,
)
from uncollapse.report.page.heads import block_name, largest_overlap, one_of, references_of_heads
from uncollapse.report.page.trajectory import NOT_FINITE, TRAJECTORY

LEFT_OUT_MEASURES = [
    ("tokens_left_out", "tokens left out"),
    ("consensus_distance", "consensus distance"),
    ("token_similarity", "token similarity"),
    ("effective_rank", "effective rank"),
    ("stable_rank", "stable rank"),
    ("participation_ratio", "participation ratio"),
]
ATTENTION = [
    field("normalized_entropy", "normalized entropy"),
    field("entropy", "entropy", "nats"),
    field("entropy_floor", "entropy floor", "nats"),
    field("max_logit", "largest logit"),
    field("rest_entropy", "entropy without the strongest key"),
    field("keys_within_reach", "keys within reach"),
    field("key_share", "share of keys used"),
    field("value_contraction", "value contraction", "‖CAV‖/‖CV‖"),
    field("susceptibility", "susceptibility", "Var s"),
    field("contraction", "contraction", "‖CA‖₂"),
    field("spectral_gap", "spectral gap", "1 − σ₂/σ₁"),
    field("second_singular_value", "second singular value", "σ₂"),
]


def trajectory_table(sites: Sequence[SiteRecord], findings: Sequence[Finding], key: str, healthy: References) -> Table:
    """One row per site."""
    return table(
        key,
        "The token cloud at every site",
        [(Column("site", numeric=False), lambda site: Cell(wording.site_name(site), sort=_order(site)))],
        [*TRAJECTORY, NOT_FINITE] if any(site.not_finite for site in sites) else TRAJECTORY,
        sites,
        site_key,
        lambda site: severity_of(findings, lambda f: names_site(f, site)),
        healthy.columns("trajectory"),
    )


def _order(site: SiteRecord) -> float:
    return -1.0 if site.block is None else float(site.block)


def massive_table(sites: Sequence[SiteRecord], key: str, healthy: References) -> Table | None:
    """The norm-sensitive measures without the largest-norm tokens; `None` if they were not measured."""
    seen = [site for site in sites if site.massive_tokens_left_out is not None]
    if not seen:
        return None
    measures = [
        Measure(name, Column(title), attrgetter(f"massive_tokens_left_out.{name}")) for name, title in LEFT_OUT_MEASURES
    ]
    return table(
        key,
        "The same without the largest-norm tokens of each sequence",
        [(Column("site", numeric=False), lambda site: Cell(wording.site_name(site), sort=_order(site)))],
        measures,
        seen,
        left_out_key,
        references=healthy.columns("left_out"),
    )


def streams_table(sites: Sequence[SiteRecord], key: str) -> Table | None:
    """Several streams side by side, each by itself; `None` where there is one."""
    rows = [_StreamAt(site, stream) for site in sites for stream in site.streams]
    if not rows:
        return None
    measures = [
        Measure(each.key, each.column, attrgetter(f"stream.{each.key}"))
        for each in TRAJECTORY
        if hasattr(rows[0].stream, each.key)
    ]
    return table(
        key,
        "Each of the streams side by side; the table before has them all together",
        [
            (Column("site", numeric=False), lambda row: Cell(wording.site_name(row.site), sort=_order(row.site))),
            (Column("stream"), lambda row: Cell(str(row.stream.stream), sort=float(row.stream.stream))),
        ],
        measures,
        rows,
        lambda row: slug(site_key(row.site), "stream", row.stream.stream),
    )


@dataclass(frozen=True)
class _StreamAt:
    """A row of the table of streams."""

    site: SiteRecord
    stream: StreamRecord

    @property
    def unavailable(self) -> dict[str, str]:
        return self.site.unavailable


def attention_table(
    heads: Sequence[AttentionRecord], findings: Sequence[Finding], key: str, healthy: References
) -> Table:
    """One row per head."""
    measures = list(ATTENTION)
    if any(record.route for record in heads):
        measures.append(field("route", "route", numeric=False))
    return table(
        key,
        "Every head",
        [
            (Column("block"), lambda record: Cell(str(record.block), sort=float(record.block))),
            (Column("head"), lambda record: Cell(str(record.head), sort=float(record.head))),
        ],
        measures,
        heads,
        head_key,
        lambda record: severity_of(findings, lambda f: names_head(f, record)),
        healthy.columns("attention"),
    )


def mean_length(record: DiagnosisRecord) -> int | None:
    """The mean sequence length of the probe, which the figures per token are multiplied by; None where tokens were not counted."""
    tokens, sequences = record.probe.tokens, record.probe.sequences
    return None if tokens is None or sequences is None else round(tokens / max(1, sequences))


def heads_table(record: DiagnosisRecord, key: str, healthy: References) -> Table:
    """One row per output projection. Figures are per token, and also times the mean length n of the probe."""
    n = mean_length(record)
    order = {id(heads): float(index) for index, heads in enumerate(record.heads)}

    def per_token(name: str) -> Callable[[HeadsRecord], Cell | None]:
        def value(heads: HeadsRecord) -> Cell | None:
            amount = getattr(heads, name)
            times = f"× n = {amount * n:,}" if amount and n is not None else ""
            return None if amount is None else Cell(f"{amount:,}", times, amount)

        return value

    def out_of(heads: HeadsRecord) -> Cell | None:
        rank = heads.output_projection_rank
        if rank is None:
            return None
        attainable = min(heads.heads * heads.head_width, heads.width)
        return Cell(f"{rank:,}", f"of {attainable:,}", rank)

    def overlap(heads: HeadsRecord) -> Cell | None:
        pair = largest_overlap(heads)
        return None if pair is None else Cell(wording.number(pair[0]), f"heads {pair[2]} and {pair[1]}", pair[0])

    def share(heads: HeadsRecord) -> Cell | None:
        seen = [(s.mean, head) for head, s in enumerate(heads.energy_share or []) if s is not None]
        return None if not seen else Cell(wording.number(max(seen)[0]), f"head {max(seen)[1]}", max(seen)[0])

    measures = [
        field("verdict", "verdict", numeric=False),
        Measure(
            "ambiguous_degrees_of_freedom",
            Column("ambiguous d.o.f.", "(H − 1)·dₖ per token"),
            per_token("ambiguous_degrees_of_freedom"),
        ),
        Measure("kernel_dimension", Column("kernel", "D − rank W_O per token"), per_token("kernel_dimension")),
        field("gauge_dimension", "gauge dimension"),
        Measure("output_projection_rank", Column("rank W_O"), out_of),
        field("condition_number", "condition", "of the write spaces"),
    ]
    if any(heads.heads > 1 for heads in record.heads):
        measures.append(Measure("write_space_overlap", Column("largest overlap"), overlap))
        measures.append(Measure("energy_share", Column("largest energy share"), share))
    return table(
        key,
        "The heads of every block",
        [(Column("block"), lambda heads: Cell(block_name(heads), sort=order[id(heads)]))],
        measures,
        record.heads,
        block_key,
        lambda heads: severity_of(record.findings, lambda f: names_heads(f, heads)),
        references_of_heads(record.heads, healthy),
    )


@dataclass(frozen=True)
class _Taken:
    """One sublayer, or one attention call of it: a row of the table of what was taken for what."""

    block: BlockAnatomy
    part: PartRecord
    call: AttentionCallRecord | None
    unavailable: dict[str, str]

    def form(self) -> tuple[str, ...]:
        """Two rows of the same form were read alike."""
        known = "" if self.part.deviation is None else "known"
        texts = [self.part.kind, known, *(str(value(self)) for _, _, value in _TAKEN), *self.unavailable.values()]
        return tuple(taken.without_numbers(text) for text in texts)

    def of_call(self, value: Callable[[AttentionCallRecord], str | None]) -> str | None:
        """A fact of the attention call; empty for a sublayer that has none."""
        return "" if self.call is None else value(self.call)


def anatomy_table(anatomy: AnatomyRecord | None, key: str) -> Table | None:
    """One row for the sublayers and attention calls that were read alike; `None` for a record that was written before this was
    recorded."""
    if anatomy is None:
        return None
    reasons = {(m.block, m.what): m.reason for m in anatomy.not_measured}
    rows = []
    for block in anatomy.blocks:
        for part in block.parts:
            why = reasons.get((block.block, taken.PART_NAMES[part.kind]), "the projection was not found")
            missing = dict.fromkeys(["axes", "deviation", "row_sums"], why)
            missing |= {"stream": block.axes_reason, "output_projection": "no output projection follows this attention"}
            missing["softmax"] = "no softmax makes the weights"
            calls: list[AttentionCallRecord | None] = [*part.attention] or [None]
            rows += [_Taken(block, part, call, missing) for call in calls]
    alike: dict[tuple[str, ...], list[_Taken]] = {}
    for row in rows:
        alike.setdefault(row.form(), []).append(row)
    return table(
        key,
        "What was taken for what",
        [
            (Column("block"), _Alike.blocks),
            (Column("sublayer", numeric=False), lambda alike: Cell(taken.PART_NAMES[alike.rows[0].part.kind])),
        ],
        [
            *(Measure(name, column, _said(value)) for name, column, value in _TAKEN if name != "norms"),
            Measure("deviation", Column("deviation", "largest ‖AV − result‖"), _Alike.deviation),
            Measure("row_sums", Column("row sums", numeric=False), _Alike.row_sums),
            *(Measure(name, column, _said(value)) for name, column, value in _TAKEN if name == "norms"),
        ],
        [_Alike(rows, number) for number, rows in enumerate(alike.values())],
        lambda alike: slug("taken", alike.number),
    )


@dataclass(frozen=True)
class _Alike:
    """Sublayers that were read alike: they differ in the number of their block alone, which is a star in their names."""

    rows: list[_Taken]
    number: int

    @property
    def unavailable(self) -> dict[str, str]:
        return self.rows[0].unavailable

    def blocks(self) -> Cell:
        blocks = list(dict.fromkeys(row.block.block for row in self.rows))
        return Cell(wording.numbers_in_words(blocks).partition(" ")[2], sort=float(blocks[0]))

    def said(self, value: Callable[[_Taken], str | None]) -> str | None:
        texts = list(dict.fromkeys(value(row) for row in self.rows))
        return texts[0] if len(texts) == 1 or texts[0] is None else taken.without_numbers(texts[0])

    def deviation(self) -> float | str | None:
        if self.rows[0].call is None:
            return ""
        return max((row.part.deviation for row in self.rows if row.part.deviation is not None), default=None)

    def row_sums(self) -> str | None:
        if self.rows[0].call is None:
            return ""
        return taken.row_sums([row.part for row in self.rows]) or None


def _said(value: Callable[[_Taken], str | None]) -> Callable[[_Alike], str | None]:
    return lambda alike: alike.said(value)


def _heads_of(call: AttentionCallRecord) -> str:
    return str(call.heads) if call.heads == call.key_value_heads else f"{call.heads}, {call.key_value_heads}"


def _norms_of(row: _Taken) -> str:
    """The norms of the row's own block, with their role; those that cannot be removed are marked."""
    return "; ".join(
        f"{norm.norm} ({norm.role}{', cannot be removed' if norm.obstacle else ''})" for norm in row.block.norms
    )


_TAKEN: list[tuple[str, Column, Callable[[_Taken], str | None]]] = [
    ("module", Column("module", numeric=False), lambda row: row.part.module),
    ("stream", Column("stream", "its axes", False), lambda row: taken.stream_axes(row.block) or None),
    ("product", Column("mixes the values", numeric=False), lambda row: row.of_call(lambda c: c.product)),
    ("axes", Column("weights", "their axes", False), lambda row: row.of_call(lambda c: " × ".join(c.axes) or None)),
    ("softmax", Column("weights made by", numeric=False), lambda row: row.of_call(lambda c: c.softmax)),
    ("heads", Column("heads", "of keys and values", False), lambda row: row.of_call(_heads_of)),
    (
        "forbids",
        Column("forbids pairs", numeric=False),
        lambda row: row.of_call(lambda c: ", ".join(taken.forbidding(c)) or "nothing"),
    ),
    (
        "sinks",
        Column("sink columns", "before + after", False),
        lambda row: row.of_call(lambda c: f"{c.before} + {c.after}"),
    ),
    (
        "output_projection",
        Column("output projection", "W_O", False),
        lambda row: row.of_call(lambda c: c.output_projection),
    ),
    ("norms", Column("norms of the block", numeric=False), _norms_of),
]


@dataclass(frozen=True)
class _HeadShare:
    """One head of an output projection: the figures behind the matrix and the bars of the head panel."""

    block: HeadsRecord
    head: int
    energy_share: Statistic | None
    unavailable: dict[str, str]

    def overlap(self) -> Cell | None:
        """The other head whose write space is closest."""
        matrix = self.block.write_space_overlap
        others = [(v, h) for h, v in enumerate(matrix[self.head]) if h != self.head] if matrix else []
        if not others:
            return None
        value, other = max(others)
        return Cell(wording.number(value), f"head {other}", value)


def shares_table(heads: Sequence[HeadsRecord], key: str) -> Table | None:
    """One row per head: its energy share, and the head it overlaps most; `None` if no block has two heads."""
    records = [
        _HeadShare(block, head, block.energy_share[head] if block.energy_share else None, block.unavailable)
        for block in heads
        if block.heads > 1
        for head in range(block.heads)
    ]
    if not records:
        return None
    order = {id(block): float(index) for index, block in enumerate(heads)}
    return table(
        key,
        "Energy share and largest overlap of every head",
        [
            (Column("block"), lambda share: Cell(block_name(share.block), sort=order[id(share.block)])),
            (Column("head"), lambda share: Cell(str(share.head), sort=float(share.head))),
        ],
        [
            field("energy_share", "energy share"),
            Measure("write_space_overlap", Column("largest overlap", "with which head"), _HeadShare.overlap),
        ],
        records,
        lambda share: slug("share", share.block.stack, share.block.kind, share.block.block, share.head),
        references={
            "energy_share": f"even {one_of(1 / h.heads for h in heads if h.heads > 1)}",
            "write_space_overlap": f"random pair {one_of(h.head_width / h.width for h in heads if h.width)}",
        },
    )
