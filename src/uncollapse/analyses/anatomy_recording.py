"""What was taken for what, from the proved anatomy and from what a probe pass bore out; and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.operands import Lead
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, ModuleCall, Norm, Part, Stack, StreamAxes
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics
from uncollapse.probe.attention_calls import Forbidding
from uncollapse.probe.passes import Observations
from uncollapse.records.anatomy import (
    AnatomyRecord,
    AttentionCallRecord,
    BlockAnatomy,
    ForbiddenPairs,
    MaskRecord,
    NormPlace,
    NotMeasured,
    PartRecord,
    StackAnatomy,
    StreamAxesRecord,
)
from uncollapse.records.diagnosis import UpdateRecord


def anatomy_record(
    anatomy: Anatomy, observed: Observations, updates: list[UpdateRecord] | None = None
) -> AnatomyRecord:
    """The record of this anatomy. `observed` is a pass over the user's batches, `updates` what it made of the sublayers."""
    measured = iter(observed.attention)
    blocks = [_block(number, block, measured) for number, block in enumerate(anatomy.blocks)]
    return AnatomyRecord(
        blocks=blocks,
        stacks=[_stack(stack) for stack in anatomy.stacks],
        not_measured=list(_not_measured(anatomy, observed, updates or [])),
    )


def _block(number: int, block: Block, measured: Iterator[AttentionStatistics]) -> BlockAnatomy:
    axes = block.axes
    return BlockAnatomy(
        block=number,
        stack=block.stack,
        module=block.name,
        placement=block.placement,
        axes=None if axes is None else _axes(block, axes),
        axes_reason=block.axes_reason if axes is None else "",
        parts=[_part(part, next(measured) if part.kind in {"attention", "cross"} else None) for part in block.parts],
        norms=[_norm(norm) for norm in block.norms],
    )


def _axes(block: Block, axes: StreamAxes) -> StreamAxesRecord:
    return StreamAxesRecord(axes.sequence, list(axes.token), axes.width, axes.streams, block.entry.fold is not None)


def _part(part: Part, statistics: AttentionStatistics | None) -> PartRecord:
    sums = None if statistics is None else statistics.row_sums
    is_measured = (
        sums is not None
        and all(map(math.isfinite, sums))
        and "entropy" not in (statistics.reasons if statistics else {})
    )
    return PartRecord(
        kind=part.kind,
        module=part.module,
        causal=None if statistics is None else part.is_causal,
        reads=_named(part.reads),
        writes=_named(part.writes),
        attention=[
            _call(call, [] if statistics is None else statistics.forbids.get(number, []))
            for number, call in enumerate(part.attention)
        ],
        deviation=statistics.deviation if statistics is not None and is_measured else None,
        row_sums=list(sums) if sums is not None and is_measured else None,
    )


def _call(call: AttentionCall, forbids: list[Forbidding]) -> AttentionCallRecord:
    is_located = bool(call.lead) and call.unreadable is None
    return AttentionCallRecord(
        product=str(call.product),
        weights=call.weight_operand,
        softmax=None if call.score is None else str(call.score),
        axes=[*map(_axis, call.lead), "query", "key"] if is_located else [],
        heads=call.heads,
        key_value_heads=call.key_value_heads,
        head_width=call.head_width,
        before=call.before,
        after=call.after,
        output_projection=_named(call.projection),
        forbids=[ForbiddenPairs(str(one.point), one.argument, list(one.axes)) for one in forbids],
        by_sequence=call.turns > 0,
    )


def _axis(lead: Lead) -> str:
    if lead.role == "sequence-major":
        return f"sequence·{lead.inner}"
    return f"{lead.inner}·sequence" if lead.role == "sequence-minor" else lead.role


def _named(where: ModuleCall | Point | None) -> str | None:
    if isinstance(where, ModuleCall):
        return where.name
    return None if where is None else str(where)


def _norm(norm: Norm) -> NormPlace:
    return NormPlace(str(norm), norm.kind, norm.role, norm.place, "" if norm.piece is None else norm.piece.obstacle)


def _stack(stack: Stack) -> StackAnatomy:
    masks = [MaskRecord(m.tensor, int(m.real), m.unit, m.is_transposed) for m in stack.masks]
    return StackAnatomy(stack.name, list(stack.blocks), masks, stack.ids)


# What was not measured ----------------------------------------------------------------------------------------------


def _not_measured(anatomy: Anatomy, observed: Observations, updates: list[UpdateRecord]) -> Iterator[NotMeasured]:
    """Everything that a reason was given for. What is left out on purpose at level `core` is not among it."""
    for site in observed.sites:
        if site.reason and not site.plain.count.any():
            yield NotMeasured(site.block, "token cloud", site.reason)
    for number, block in enumerate(anatomy.blocks):
        if any(part.kind == "mixer" for part in block.parts):
            reason = "it mixes its tokens without attention weights"
            yield NotMeasured(number, "attention", reason)
    for statistics in observed.attention:
        yield from _missing_of(statistics)
    for update in updates:
        if update.relative_norm is None:
            what = f"update of the {'cross-attention' if update.kind == 'cross' else update.sublayer}"
            yield NotMeasured(update.block, what, update.unavailable["relative_norm"])


def _missing_of(statistics: AttentionStatistics) -> Iterator[NotMeasured]:
    name = "cross-attention" if statistics.kind == "cross" else "attention"
    reasons = statistics.reasons
    of_attention = {m: reasons[m] for m in ATTENTION_MEASURES if m in reasons}
    if len(of_attention) == len(ATTENTION_MEASURES) and len(set(of_attention.values())) == 1:
        reason = next(iter(of_attention.values()))
        yield NotMeasured(statistics.block, name, f"in some of the batches {reason}" if statistics.seen else reason)
    else:
        if not statistics.seen:
            yield NotMeasured(statistics.block, name, "it did not run, or nothing finite came of it")
        for measure, reason in of_attention.items():
            yield NotMeasured(statistics.block, f"{name}: {measure}", reason)
    if statistics.matrix is None and statistics.figures is None:
        reason = reasons.get("matrix") or reasons.get("energy_share") or "the output projection did not run"
        yield NotMeasured(statistics.block, f"output projection of the {name}", reason)
        return
    for measure in ("energy_share", "gauge_dimension"):
        if measure in reasons:
            yield NotMeasured(statistics.block, f"heads of the {name}: {measure}", reasons[measure])
