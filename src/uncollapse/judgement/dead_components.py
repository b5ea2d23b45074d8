"""Parts that do nothing: which block, sublayer, head or hidden unit could be taken out and nobody would notice?

A part is dead if it does nothing at *any* real token of the probe, down to rounding: what it adds is lost in the rounding of the
stream, or does not vary, or is what another head gives anyway. The number format says what rounding is. A part that does little
is healthy: a head that rests on the first token adds 1e-9 of the energy and is not dead.

Whatever holds for a whole is said once: a dead block is not also reported as dead attention, nor a dead attention head by head.
Where the input of a part does not vary, nothing is said about the part. `initial` states are told apart: some initialisations
start every sublayer at zero on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from uncollapse.records.common import Finding, Severity
from uncollapse.records.diagnosis import EmbeddingRecord, PartRecord

# What is added to the stream below this share of it is lost to rounding. In half precision too: the products are summed in
# single precision, so an update of exactly zero comes out as exactly zero.
ROUNDING = 2.0**-23
# An update whose variable part is below this share of it is constant. The smallest share of a healthy sublayer is above 0.1.
CONSTANT = 1e-3
SINGLE = 2.0**-23  # the same number, as the epsilon of a format
# Vectors that ought to be equal differ by a few roundings, depending on how a product was split up.
ROUNDINGS = 4
# Of the tokens that a part reads: below this share they do not vary, and the part cannot be judged by them.
INPUT = 10 * CONSTANT
# Share of the hidden units from which dead ones are a warning.
MANY_UNITS = 0.5
# Widest share of a second direction in half precision, where 16 roundings would be more.
SECOND_DIRECTION = 0.03

# Every code that a finding about a part can have. What the wider ones say is not said again of what lies inside.
WIDER_CODES = ("DEAD-BLOCK", "DEAD-ATTENTION", "DEAD-MLP", "CONSTANT-UPDATE")
CODES = (
    *WIDER_CODES,
    "DEAD-HEAD",
    "DEAD-KEY-VALUE-GROUP",
    "DEAD-UNITS",
    "HEAD-BLIND",
    "HEAD-COPIED",
    "MLP-RANK-ONE",
    "EMBEDDINGS-EQUAL",
)

_REFERENCE = "docs/decisions/0007-dead-components.md"


def dead_components(parts: Sequence[PartRecord], embeddings: Sequence[EmbeddingRecord]) -> Iterator[Finding]:
    """The findings about parts that do nothing, in the order of blocks."""
    yield from _equal_embeddings(embeddings)
    alike = {kind: _is_everywhere(parts, kind) for kind in ("attention", "mlp")}
    for block in dict.fromkeys(part.block for part in parts):
        inside = [part for part in parts if part.block == block]
        initial = all(alike[part.sublayer] and part.initial for part in inside)
        change = inside[0].block_change
        if change == 0 or all(_is_dead(part) for part in inside):
            yield _finding(
                "DEAD-BLOCK",
                inside[0],
                0.0 if change is None else change,
                "changes nothing: whatever enters it leaves it, at every token.",
                "Look for output projections that are zero, for a gate or a residual scale of 0.",
                initial=initial,
                whole=True,
            )
            continue
        for part in inside:
            yield from _part(part, initial=alike[part.sublayer] and bool(part.initial))


def _is_everywhere(parts: Sequence[PartRecord], sublayer: str) -> bool:
    """Whether all sublayers of one kind do nothing, as where an initialisation starts them at zero."""
    same = [part for part in parts if part.sublayer == sublayer]
    return len(same) > 1 and all(_is_dead(part) or _is_constant(part) for part in same)


def _is_dead(part: PartRecord) -> bool:
    """Zero, or lost in the rounding of a stream that varies: in one that is huge and constant everything is lost."""
    if part.update_size is None:
        return False
    return part.update_size == 0 or (part.update_size <= ROUNDING and _sees_different_tokens(part))


def _is_constant(part: PartRecord) -> bool:
    return part.update_variation is not None and part.update_variation <= max(CONSTANT, ROUNDINGS * part.epsilon)


def _sees_different_tokens(part: PartRecord) -> bool:
    return part.stream_variation is not None and part.stream_variation > max(INPUT, 10 * part.epsilon)


def _part(part: PartRecord, *, initial: bool) -> Iterator[Finding]:
    name = "attention" if part.sublayer == "attention" else "MLP"
    if _is_dead(part):
        yield _finding(
            f"DEAD-{name.upper()}",
            part,
            part.update_size or 0.0,
            "adds nothing: its update is zero, or lost in the rounding of the stream, at every token.",
            "Look at its output projection, and at a gate or scale behind it: is it zero, pruned, or never trained?",
            initial=initial,
        )
        return
    if not _sees_different_tokens(part):
        return
    if _is_constant(part):
        yield _finding(
            "CONSTANT-UPDATE",
            part,
            part.update_variation or 0.0,
            "adds the same vector to every token of every sequence: only a bias is left of it.",
            "Look for weights that are zero or far smaller than the bias of the output projection.",
            initial=initial,
        )
        return
    if part.sublayer == "attention":
        yield from _heads(part)
        return
    straight = min(16 * max(part.epsilon, 1e-8), SECOND_DIRECTION)
    if (
        part.update_directions is not None
        and part.stream_directions is not None
        and part.update_directions <= straight < part.stream_directions / 10
    ):
        yield _finding(
            "MLP-RANK-ONE",
            part,
            part.update_directions,
            "moves all tokens along one and the same direction: one number says all that it adds to a token.",
            "Look for an output projection of rank one, or a hidden layer in which one unit is left.",
        )
    if part.dead_units and part.hidden_units:
        share = len(part.dead_units) / part.hidden_units
        shown = ", ".join(map(str, part.dead_units[:8])) + (", …" if len(part.dead_units) > 8 else "")
        yield _finding(
            "DEAD-UNITS",
            part,
            share,
            f"has {len(part.dead_units)} of {part.hidden_units} hidden units that carry nothing: they never vary, or no "
            f"weight reads them ({shown}).",
            "These units can be pruned. Were they pruned already, padded, or did training kill them?",
            severity="warning" if share >= MANY_UNITS else "info",
            threshold=MANY_UNITS,
        )


def _heads(part: PartRecord) -> Iterator[Finding]:
    count = part.heads or 0
    silent = _silent_heads(part)
    by_values = {head for head, why in silent.items() if why == "values"}
    groups = part.key_value_heads
    if groups and count > groups:
        size = count // groups
        for group in range(groups):
            members = range(group * size, (group + 1) * size)
            if by_values.issuperset(members):
                for head in members:
                    del silent[head]
                yield _finding(
                    "DEAD-KEY-VALUE-GROUP",
                    part,
                    0.0,
                    f"has a key-value head whose values do not vary ({group}): the query heads {members[0]}–{members[-1]} that "
                    "share it add the same to every token.",
                    "Look at the rows of the value projection that belong to this key-value head.",
                    head=members[0],
                )
    for head, why in silent.items():
        told = {
            "values": "its values are zero, or the same for every token",
            "output": "what it writes is zero at every token, as if its rows of the output projection were",
        }
        yield _finding(
            "DEAD-HEAD",
            part,
            0.0 if part.head_output is None else part.head_output[head],
            f"has a head that does nothing ({head}): {told[why]}.",
            "Was it pruned? If not, look at its columns of the value projection and its rows of the output projection.",
            head=head,
        )
    dead = {*silent, *by_values}
    blind = [head for head in _blind_heads(part, count) if head not in dead]
    whole = len(blind) == count and count > 1
    for head in blind[:1] if whole else blind:
        which = (
            "queries or keys that do not vary in any head"
            if whole
            else f"a head ({head}) whose queries or keys do not vary"
        )
        yield _finding(
            "HEAD-BLIND",
            part,
            0.0,
            f"has {which}: what it attends to does not depend on the tokens.",
            "Look at the query and key weights of this head: are they zero?",
            head=None if whole else head,
        )
    for first, second in part.copied_heads or []:
        if second in dead or {first, second} <= set(blind):
            continue
        yield _finding(
            "HEAD-COPIED",
            part,
            0.0,
            f"has two heads that are one: head {second} attends and mixes exactly as head {first} does, at every token.",
            "Look for query, key and value weights that were copied. The pair does what one head could do.",
            head=second,
        )


def _silent_heads(part: PartRecord) -> dict[int, str]:
    """The heads that add nothing, or a constant, and by what."""
    found: dict[int, str] = {}
    tolerance = ROUNDINGS * part.epsilon
    values, count = part.value_variation or [], part.heads or 0
    for head in range(count):
        if values and count % len(values) == 0 and values[head // (count // len(values))] <= tolerance:
            found[head] = "values"
        elif (
            part.head_output is not None and len(part.head_output) == count and part.head_output[head] <= ROUNDING / 16
        ):
            found[head] = "output"
    return found


def _blind_heads(part: PartRecord, count: int) -> list[int]:
    """The heads whose logits cannot depend on the tokens."""
    tolerance = ROUNDINGS * part.epsilon
    found = set()
    for variation in (part.query_variation, part.key_variation, part.logit_range):
        if variation and count % len(variation) == 0:
            found |= {head for head in range(count) if variation[head // (count // len(variation))] <= tolerance}
    return sorted(found)


def exactly(
    parts: Sequence[PartRecord], embeddings: Sequence[EmbeddingRecord]
) -> tuple[list[PartRecord], list[EmbeddingRecord]]:
    """The same, as a run is judged: what half precision may have rounded off is not taken for nothing. While a model is young its
    tokens nearly agree, and so do the updates of a healthy part, down to the digits of bfloat16. A part that is dead gives the same
    in every digit."""
    judged = [
        replace(p, epsilon=SINGLE, stream_variation=p.stream_variation if _sees_different_tokens(p) else 0.0)
        if p.epsilon > SINGLE and p.stream_variation is not None
        else p
        for p in parts
    ]
    return judged, [replace(each, epsilon=min(each.epsilon, SINGLE)) for each in embeddings]


def measured_blocks(parts: Sequence[PartRecord], embeddings: Sequence[EmbeddingRecord]) -> set[int | None]:
    """The blocks of which it is known whether a part of theirs is dead; None among them if it is known of the embedding."""
    known = {part.block for part in parts if part.update_size is not None and part.stream_variation is not None}
    return {*known, *(None for each in embeddings if each.apart is not None)}


def _equal_embeddings(embeddings: Sequence[EmbeddingRecord]) -> Iterator[Finding]:
    for each in embeddings:
        if each.apart is not None and each.apart <= ROUNDINGS * each.epsilon:
            place = "the embedding" + (f" ({each.stack})" if each.stack else "")
            yield Finding(
                code="EMBEDDINGS-EQUAL",
                phenomenon="dead-component",
                severity="warning",
                block=None,
                head=None,
                value=each.apart,
                threshold=ROUNDINGS * each.epsilon,
                message=f"At {place} tokens with different ids are the same: {each.pairs} pairs at equal positions do not differ. "
                "The model cannot see which tokens it was given.",
                remedy="Look at the embedding table: are all its rows equal, or was it never loaded?",
                reference=_REFERENCE,
                stack=each.stack,
            )


def _finding(
    code: str,
    part: PartRecord,
    value: float,
    message: str,
    remedy: str,
    *,
    head: int | None = None,
    severity: Severity = "warning",
    threshold: float | None = None,
    initial: bool = False,
    whole: bool = False,
) -> Finding:
    place = f"block {part.block}" + (f" ({part.stack})" if part.stack else "")
    subject = f"Block {part.block}" + (f" ({part.stack})" if part.stack else "")
    if not whole:
        sublayer = f"{part.kind}-attention" if part.sublayer == "attention" else "MLP"
        subject = f"The {sublayer} of {place}"
    why = f" This is how it was initialised: {part.initial_evidence}, and it is so in every block." if initial else ""
    return Finding(
        code=code,
        phenomenon="dead-component",
        severity="info" if initial else severity,
        block=part.block,
        head=head,
        value=value if math.isfinite(value) else None,
        threshold=ROUNDING if threshold is None else threshold,
        message=f"{subject} {message}{why}",
        remedy=remedy,
        reference=_REFERENCE,
        stack=part.stack,
        kind=None if whole else part.kind,
    )
