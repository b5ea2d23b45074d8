"""What was taken for what, and what was not measured, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from uncollapse.records.anatomy import AnatomyRecord, AttentionCallRecord, BlockAnatomy, NotMeasured, PartRecord
from uncollapse.report.wording import count, listed, number, numbers_in_words

PART_NAMES = {"attention": "attention", "cross": "cross-attention", "mlp": "MLP", "mixer": "token mixer"}
MEASURE_NAMES = {
    "max_logit": "largest logit",
    "rest_entropy": "entropy without the strongest key",
    "keys_within_reach": "keys within reach",
    "key_share": "share of keys used",
    "gauge_dimension": "gauge dimension",
    "energy_share": "energy share",
}


def not_measured_sentences(anatomy: AnatomyRecord | None, *about: str) -> list[str]:
    """One line for each reason: what is missing, in how many blocks, and why. `about` keeps only what is about one of these words.

    >>> missing = [NotMeasured(0, "attention", "rows sum to 0.9"), NotMeasured(2, "attention", "rows sum to 0.8")]
    >>> not_measured_sentences(AnatomyRecord(3 * [None], [], missing))
    ['No attention was measured in 2 of 3 blocks: rows sum to 0.9 (block 0; alike in block 2).']
    """
    if anatomy is None:
        return []
    by_reason: dict[tuple[str, str], list[NotMeasured]] = {}
    for missing in anatomy.not_measured:
        if not about or any(word in missing.what for word in about):
            what = missing.what.partition(":")[0]
            by_reason.setdefault((what, _alike(missing.reason)), []).append(missing)
    return [_sentence(what, found, len(anatomy.blocks)) for (what, _), found in by_reason.items()]


def _alike(reason: str) -> str:
    """The reason without its numbers, which differ from block to block."""
    return re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", reason)


def _sentence(what: str, found: Sequence[NotMeasured], blocks: int) -> str:
    where = list(dict.fromkeys(missing.block for missing in found if missing.block is not None))
    measures = [m.what.partition(": ")[2] for m in found if ": " in m.what]
    figures = listed([MEASURE_NAMES.get(name, name.replace("_", " ")) for name in dict.fromkeys(measures)])
    reason = found[0].reason
    if len({missing.reason for missing in found}) > 1:
        reason += f" (block {where[0]}; alike in {numbers_in_words(where[1:])})"
    place = f"in {len(where)} of {count(blocks, 'block')}" if where else "where a stack begins"
    if figures:
        return f"Of the {what.removesuffix(' of the')}, no {figures} was measured {place}: {reason}."
    return f"No {what} was measured {place}: {reason}."


def kinds_of_blocks(anatomy: AnatomyRecord | None) -> list[str]:
    """One line for each distinct kind of block, then one for each mask."""
    if anatomy is None:
        return []
    kinds: dict[str, list[int]] = {}
    for block in anatomy.blocks:
        kinds.setdefault(_kind(block), []).append(block.block)
    lines = [f"{numbers_in_words(where).capitalize()}: {kind}." for kind, where in kinds.items()]
    for stack in anatomy.stacks:
        where = f" in {numbers_in_words(stack.blocks)}" if len(anatomy.stacks) > 1 else ""
        lines += [f"Padding{where} is hidden by {mask.tensor}." for mask in stack.masks]
    return lines


def _kind(block: BlockAnatomy) -> str:
    parts = " + ".join(_part(part) for part in block.parts)
    norms = "no norm" if block.placement == "none" else f"{block.placement} norm"
    several = block.axes is not None and block.axes.streams is not None
    stream = "several streams side by side," if several else "stream"
    return f"{parts}; {norms}; {stream} {stream_axes(block) or 'of unknown axes'}"


def _part(part: PartRecord) -> str:
    words = PART_NAMES[part.kind]
    if not part.attention:
        return words
    first = part.attention[0]
    said = [count(sum(call.heads for call in part.attention), "head"), f"values mixed by {operation(first.product)}"]
    if len(part.attention) > 1:
        said[1] += f" in {len(part.attention)} calls"
    if first.by_sequence:
        said.append("one sequence at a time")
    if part.causal:
        said.append("causal")
    if first.softmax is None:
        said.append("no softmax")
    forbids = list(dict.fromkeys(name for call in part.attention for name in forbidding(call)))
    if forbids:
        said.append(f"pairs forbidden by {listed(forbids)}")
    if first.before + first.after:
        said.append(count(first.before + first.after, "sink column"))
    return f"{words} ({', '.join(said)})"


def operation(place: str) -> str:
    """The operation of a place, without its number and module.

    >>> operation("matmul #1 of blocks.0.attn"), operation("add of 4 axes #0 of blocks.0")
    ('matmul', 'add')
    """
    return place.partition(" #")[0].partition(" of ")[0]


def forbidding(call: AttentionCallRecord) -> list[str]:
    """What forbids pairs: the argument of a fused call, or the operation."""
    return list(dict.fromkeys(one.argument or operation(one.operation) for one in call.forbids))


def stream_axes(block: BlockAnatomy) -> str:
    """The axes of the block's stream, in its own order; empty where they were not told."""
    if block.axes is None:
        return ""
    named = {block.axes.width: "width"} | dict.fromkeys(block.axes.token, "token")
    if block.axes.sequence is not None:
        named[block.axes.sequence] = "sequence"
    if block.axes.streams is not None:
        named[block.axes.streams] = "stream"
    return " × ".join(named[axis] for axis in sorted(named))


def row_sums(parts: Sequence[PartRecord]) -> str:
    """The range of the row sums of these sublayers; one number if they look the same in print."""
    sums = [part.row_sums for part in parts if part.row_sums is not None]
    if not sums:
        return ""
    low, high = number(min(low for low, _ in sums)), number(max(high for _, high in sums))
    return low if low == high else f"{low} … {high}"


def without_numbers(names: str) -> str:
    """Names of modules with a star for each number in their path.

    >>> without_numbers("matmul #1 of layers.2.attention; layers.2.norms.0 (before)")
    'matmul #1 of layers.*.attention; layers.*.norms.* (before)'
    """
    return re.sub(r"(?<![\w#.])\d+(?=\.[a-z_])|(?<=[a-z_0-9]\.)\d+(?!\w)", "*", names)


def measured_sentences(anatomy: AnatomyRecord | None, left_out: str = "") -> list[str]:
    """What was not measured, or that no part was left out. `left_out` is what the rules had no figures of, as a clause."""
    if anatomy is None:
        return ["The record does not say what was taken for what: an older version wrote it."]
    missing = not_measured_sentences(anatomy)
    if left_out and not missing:
        missing = [f"{left_out[0].upper()}{left_out[1:]}."]
    blocks = count(len(anatomy.blocks), "block")
    return missing or [
        f"No part that was found in the {blocks} was left out. Where a single figure is absent, its table says why."
    ]
