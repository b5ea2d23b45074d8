"""Which tensors of a batch govern which stack of blocks: found by poking at the proof, read on every batch of a probe.

A mask of two values governs a stack if the value at a token decides whether that token's row of the stream reaches any other
row in the stack's first attention. The stream may begin with rows of the model's own (a learned beginning, virtual tokens), which
a mask says nothing of. One that changes which rows are heard without having the stream's axes (samples of sound, the words of a
stream that ends with patches) governs it in another unit: there the padded rows are found on each batch, again by what they
reach. A stack that nothing governs has no padding. Names decide nothing here: masks may be called anything, be given by position,
and be true for padding. A mask called `attention_mask` is at first taken at its word, a 1 for a real token, where a few real
tokens are chosen for the proof (`examples`). If it then does not hide anything, others are chosen (`masks_not_told`).

Token numbers belong to a stack if another number at a token moves that row of the stream that enters, and no other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.influence import (
    Products,
    hearing,
    hearing_one_by_one,
    is_heard,
    moved,
    poked,
    segments,
    without_zeros,
)
from uncollapse.anatomy.interception import ChangedPath
from uncollapse.anatomy.offloaded_weights import held_weights
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.reached_rows import Alone, gained_and_lost, reach_of
from uncollapse.anatomy.vocabulary import Anatomy, Stack, StreamAxes, TokenMask

# Rows of the model's own that may stand on both sides of the tokens: each way to share them out is tried.
MOST_ON_BOTH_SIDES = 8

Blocks = Callable[[nn.Module, Mapping[str, Any], Anatomy, Collection[int]], Mapping[int, Alone]]


@dataclass(frozen=True)
class Padding:
    """The tokens of one stack in one batch. mask: True for a real token, None where all are. segments: where sequences are laid
    end to end, the places of each along the token axis. reason: why the tokens cannot be told."""

    mask: Tensor | None = None
    segments: tuple[Tensor, ...] | None = None
    reason: str = ""


# At the proof -------------------------------------------------------------------------------------------------------


def find_stacks(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, blocks_alone: Blocks
) -> tuple[Stack, ...]:
    """The stacks of the anatomy with what governs them in batches such as this small one. Within `probing` only."""
    firsts = {i: first_attending(anatomy, one) for i, one in enumerate(anatomy.stacks)}
    wanted = {block for block in firsts.values() if block is not None}
    candidates = could_govern(batch)
    numbers = [name for name, value in batch.items() if isinstance(value, Tensor) and _may_be_ids(value)]
    entries = {one.blocks[0] for one in anatomy.stacks}
    found = list(anatomy.stacks)
    with contextlib.ExitStack() as stack:
        for name in {anatomy.blocks[number].module.name for number in wanted | entries} & anatomy.own_modules:
            stack.enter_context(held_weights(model.get_submodule(name)))
        stack.enter_context(without_zeros(model))
        plain = blocks_alone(model, batch, anatomy, wanted | entries) if candidates or numbers else {}
        for number, block in firsts.items():
            if block is not None and candidates:
                varied = functools.partial(_varied, model, batch, anatomy, blocks_alone, block)
                found[number] = replace(found[number], masks=masks_of(plain[block], batch, varied))
        embedded: set[int] = set()  # stacks whose tokens are known to come from somewhere
        for name in sorted(numbers, key=functools.partial(_least_like_ids, batch)):
            for number, is_transposed in _embedded(model, batch, anatomy, blocks_alone, plain, name, embedded):
                embedded.add(number)
                if not batch[name].is_floating_point():
                    found[number] = replace(found[number], ids=name, ids_transposed=is_transposed)
        for number, one in enumerate(found):
            axes = anatomy.blocks[one.blocks[0]].axes
            if axes is not None and axes.sequence is None:
                found[number] = replace(one, segments_block=_widest(model, batch, anatomy, blocks_alone, one))
    return tuple(found)


def first_attending(anatomy: Anatomy, stack: Stack) -> int | None:
    """The stack's first block whose tokens attend to each other and whose axes are known."""
    for number in stack.blocks:
        block = anatomy.blocks[number]
        if block.axes is not None and any(p.kind == "attention" for p in block.parts):
            return number
    return None


def masks_not_told(batch: Mapping[str, Any], anatomy: Anatomy | None) -> Iterable[tuple[str, bool]]:
    """Tensors that hide tokens of this batch, if they are masks, and were not seen to do so where the anatomy was proved (None: it
    could not be): each with a value that a real token may have there. The tokens of the proof may all have been hidden ones."""
    stacks = () if anatomy is None else anatomy.stacks
    is_clear = anatomy is not None and all(first_attending(anatomy, stack) is not None for stack in stacks)
    seen = {mask.tensor: mask.real for stack in stacks for mask in stack.masks}
    for name in could_hide(batch):
        if name in {"attention_mask", "decoder_attention_mask"}:
            if not seen.get(name, False):
                yield name, False
        elif not is_clear:
            yield from ((name, True), (name, False))


def could_hide(batch: Mapping[str, Any]) -> list[str]:
    """Tensors with a value for each token of each sequence, of which there are two in this batch."""
    given = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and _may_govern(v)}
    return [name for name, value in given.items() if bool(value.any()) and not bool(value.all())]


def _may_govern(value: Tensor) -> bool:
    """Whether a tensor can be a mask over tokens: two values, 0 and 1, along two or more axes."""
    if value.ndim < 2 or value.is_complex() or not value.numel():
        return False
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def _may_be_ids(value: Tensor) -> bool:
    """Whether a stack's embedding can be made of a tensor: whole numbers along two axes, or vectors along a third."""
    if value.is_complex() or value.dtype == torch.bool or not value.numel():
        return False
    return value.ndim == 3 if value.is_floating_point() else value.ndim == 2 and not _may_govern(value)


def _least_like_ids(batch: Mapping[str, Any], name: str) -> tuple[bool, bool, int]:
    """Vectors first: where they are given the numbers beside them are positions and the like. Then many different numbers,
    and what is the same in every sequence last."""
    value = batch[name]
    is_vector = value.is_floating_point()
    return not is_vector, bool((value == value[0]).all()), 0 if is_vector else -len(value.unique())


def _sizes(alone: Alone, axes: StreamAxes) -> tuple[int, int]:
    """Sequences and tokens of the stream."""
    sequences, tokens = axes.cloud(alone.stream).shape[:2]
    return sequences, tokens


def masks_of(
    plain: Alone, batch: Mapping[str, Any], varied: Callable[[Variation], Alone | None]
) -> tuple[TokenMask, ...]:
    """The masks that govern a stack. plain: its first attending block on this batch. varied: gives that on the batch with another
    value of one tensor, which is one of its `variations`; None where the model does not run on that. Within `without_zeros` of
    the block."""
    found = (_governs(plain, batch[name], name, varied) for name in could_govern(batch))
    return tuple(mask for mask in found if mask is not None)


def could_govern(batch: Mapping[str, Any]) -> list[str]:
    """Tensors of this batch that could be masks, as their values say."""
    return [name for name, value in batch.items() if isinstance(value, Tensor) and _may_govern(value)]


@dataclass(frozen=True)
class Variation:
    """A batch with another value of a tensor that could be a mask: at one place, or in the second half of its first sequence."""

    tensor: str
    place: tuple[int, int] | None

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch so."""
        value = batch[self.tensor].clone()
        if self.place is not None:
            value[self.place] = _other(value[self.place])
        else:
            flat = value.flatten(1)
            half = flat.shape[1] // 2
            flat[0, half:] = _other(flat[0, half:])
            value = flat.view(value.shape)
        return {**batch, self.tensor: value}


def variations(batch: Mapping[str, Any]) -> list[Variation]:
    """All that `masks_of` may ask for."""
    found: dict[Variation, None] = {}
    for name in could_govern(batch):
        shape = tuple(batch[name].shape)
        places = [_places(shape, is_transposed) for is_transposed in (False, True)] if len(shape) == 2 else []
        found |= dict.fromkeys(Variation(name, place) for several in places for _, place in several)
        found[Variation(name, None)] = None
    return list(found)


def _places(shape: tuple[int, ...], is_transposed: bool) -> list[tuple[int, tuple[int, int]]]:
    """The first and the last token of the first sequence, and where each is in a tensor of this shape: the first reaches none that
    come before it, the last none that come after. Of a square the second instead of the first, whose place tells no axes."""
    last = shape[0 if is_transposed else 1] - 1
    tokens = (min(1, last) if shape[0] == shape[1] else 0, last)
    return [(token, (token, 0) if is_transposed else (0, token)) for token in tokens]


def _other(value: Tensor) -> Tensor:
    """Of a mask the other of its two values."""
    return ~value if value.dtype == torch.bool else 1 - value


def _varied(
    model: nn.Module,
    batch: Mapping[str, Any],
    anatomy: Anatomy,
    blocks_alone: Blocks,
    block: int,
    variation: Variation,
) -> Alone | None:
    try:
        return blocks_alone(model, variation.of(batch), anatomy, [block])[block]
    except Exception:  # the model's own code, on a value it may not take: then it is no mask
        return None


def _governs(plain: Alone, value: Tensor, name: str, varied: Callable[[Variation], Alone | None]) -> TokenMask | None:
    axes = plain.block.axes
    if axes is None or axes.sequence is None:
        return None
    sequences, tokens = _sizes(plain, axes)
    shape, says_nothing = tuple(value.shape), False
    for is_transposed in (False, True) if value.ndim == 2 else ():
        of_sequences, counted = shape[::-1] if is_transposed else shape
        more = tokens - counted  # rows of the model's own
        if of_sequences != sequences or more < 0:
            continue
        beside: list[tuple[int, bool, Alone]] = []  # a token, its value, and the block where that is another one
        for token, place in _places(shape, is_transposed):
            other = varied(Variation(name, place))
            if other is None or other.stream.shape != plain.stream.shape:
                continue
            if more:
                beside.append((token, bool(value[place]), other))
                continue
            before, after = (reach_of(alone, axes, token) for alone in (plain, other))
            gained, lost = gained_and_lost(before, after)
            if gained != lost:
                return TokenMask(name, bool(value[place]) == lost, "token", is_transposed)
            if bool(before.rows.any()):
                says_nothing = True  # the token is heard, whatever its value
                break
        found = _among_others(plain, axes, beside, more)
        if found is not None:
            real, first = found
            return TokenMask(name, real, "token", is_transposed, first, more - first)
    return None if says_nothing else _governs_otherwise(plain, value, name, varied)


def _among_others(
    plain: Alone, axes: StreamAxes, beside: Sequence[tuple[int, bool, Alone]], more: int
) -> tuple[bool, int] | None:
    """The value of a mask at a real token, and how many of `more` rows that it says nothing of come before its first: with its
    value another one, a token is heard by nobody that somebody hears, or the other way round. At another row than its own no more
    changes than that a row of which all is hidden hears all. beside: some tokens of the mask, their values, and the block with
    another value at each."""
    between = range(more - 1, 0, -1) if more <= MOST_ON_BOTH_SIDES else ()
    for first in (more, 0, *between):  # a beginning of the model's own is the common case
        for token, value, other in beside:
            before, after = (reach_of(alone, axes, first + token) for alone in (plain, other))
            if before.is_heard != after.is_heard:
                return value == before.is_heard, first
    for token, value, other in beside:
        gained, lost = gained_and_lost(*(reach_of(alone, axes, more + token) for alone in (plain, other)))
        if gained != lost:
            return value == lost, more
    return None


def _governs_otherwise(
    plain: Alone, value: Tensor, name: str, varied: Callable[[Variation], Alone | None]
) -> TokenMask | None:
    """Whether a mask that does not have the stream's axes decides which of its rows are heard."""
    axes = plain.block.axes
    assert axes is not None
    if value.shape[0] != _sizes(plain, axes)[0]:
        return None
    other = varied(Variation(name, None))
    if other is None or other.stream.shape != plain.stream.shape:
        return None
    sizes = [_sizes_of_hearing(alone) for alone in (plain, other)]
    if sizes[0] is None or sizes[1] is None:
        return None
    most = torch.maximum(sizes[0], sizes[1])
    before, after = (is_heard(size, most, _precision(plain)) for size in (sizes[0], sizes[1]))
    if torch.equal(before, after):
        return None
    is_real = int(after.sum()) < int(before.sum())
    half = value.flatten(1).shape[1] // 2
    return TokenMask(name, is_real == bool(value.flatten(1)[0, half:].double().mean() >= 0.5), "other")


def _sizes_of_hearing(alone: Alone) -> Tensor | None:
    """How much each row of the stream reaches other rows, [sequence, token]; None where that cannot be found, or none does."""
    axes = alone.block.axes
    if axes is None or alone.mixing is None:
        return None
    updates = [functools.partial(alone.update, alone.mixing)]
    if alone.block.parts[alone.mixing].written is not None:  # it may be away from the model, and then nothing is added
        updates.append(functools.partial(alone.heads_write, alone.mixing))
    for update in updates:
        found: Tensor | None
        try:
            found = hearing(update, alone.stream, axes)
        except UnreadableError:
            return None
        except RuntimeError:  # a block that cannot be differentiated: it writes in place, or has a kernel of its own
            found = hearing_one_by_one(update, alone.stream, axes)
        if found is None or bool(found.any()):
            return found
    return None


def _precision(alone: Alone) -> float:
    """The machine epsilon of the coarsest number format in which the block's attention is computed (autocast)."""
    assert alone.mixing is not None
    products = Products()
    with products:
        alone.update(alone.mixing, alone.stream)
    return max(torch.finfo(alone.stream.dtype).eps, products.coarsest())


def _embedded(
    model: nn.Module,
    batch: Mapping[str, Any],
    anatomy: Anatomy,
    blocks_alone: Blocks,
    plain: Mapping[int, Alone],
    name: str,
    known: Collection[int],
) -> Iterable[tuple[int, bool]]:
    """The stacks, beside those known, whose entering stream is made of this tensor, and whether its axes are token, sequence."""
    value = batch[name]
    place = (0, min(1, value.shape[1] - 1))
    changed = value.clone()
    if value.is_floating_point():
        changed[place] = changed[place].flip(-1) + 1
    else:
        others = value[value != value[place]]
        changed[place] = others[0] if len(others) else value[place] + (1 if int(value[place]) == 0 else -1)
    entries = {i: stack.blocks[0] for i, stack in enumerate(anatomy.stacks) if i not in known}
    if not entries:
        return
    try:
        after = blocks_alone(model, {**batch, name: changed}, anatomy, list(entries.values()))
    except Exception:  # the model's own code, on numbers it may not take
        return
    for stack, block in entries.items():
        axes = anatomy.blocks[block].axes
        if axes is None or axes.sequence is None or after[block].stream.shape != plain[block].stream.shape:
            continue
        before, now = (axes.cloud(alone.stream) for alone in (plain[block], after[block]))
        rows = (before != now).any(-1)
        for is_transposed in (False, True):
            shape = tuple(value.shape[1::-1] if is_transposed else value.shape[:2])
            at = place[::-1] if is_transposed else place
            if shape == tuple(before.shape[:2]) and bool(rows[at]) and int(rows.sum()) == 1:
                yield stack, is_transposed
                break


def _widest(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, blocks_alone: Blocks, stack: Stack
) -> int | None:
    """The block of a stack whose attention carries its first row furthest."""
    able = [i for i in stack.blocks if any(p.kind == "attention" for p in anatomy.blocks[i].parts)]
    reach: dict[int, int] = {}
    for number, alone in blocks_alone(model, batch, anatomy, able).items():
        axes, part = alone.block.axes, alone.mixing
        if axes is not None and part is not None:
            update = functools.partial(alone.update, part)
            first = poked(alone.stream, axes.token[0], torch.tensor([0]))
            reach[number] = int(moved(update(alone.stream), update(first), axes.token[0]).sum())
    return max(reach, key=lambda i: (reach[i], -i), default=None)


# On every batch -----------------------------------------------------------------------------------------------------


def paddings(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, blocks_alone: Blocks) -> list[Padding]:
    """The tokens of each stack in this batch. Within `probing` only; the model is run once more where tokens can only be told
    by what they reach.

    Raises `ChangedPath` where a tensor may hide tokens of it that the model was read without."""
    require_known_masks(batch, anatomy)
    found = [Padding(given_mask(stack, batch)) for stack in anatomy.stacks]
    asked: dict[int, int] = {}
    for number, stack in enumerate(anatomy.stacks):
        if stack.segments_block is not None:
            asked[number] = stack.segments_block
        elif any(m.unit == "other" and hides(m, batch) for m in stack.masks):
            block = first_attending(anatomy, stack)
            if block is not None:
                asked[number] = block
    if not asked:
        return found
    with without_zeros(model):
        alone = blocks_alone(model, batch, anatomy, list(asked.values()))
        for number, block in asked.items():
            stack = anatomy.stacks[number]
            if stack.segments_block is not None:
                found[number] = _told_apart(alone[block])
                continue
            try:
                opened = blocks_alone(model, {**batch, **_hiding_nothing(stack, batch)}, anatomy, [block])[block]
            except Exception:  # the model's own code, on masks it may not take
                opened = None
            found[number] = _told_by_influence(alone[block], opened, stack, found[number], batch)
    return found


def require_known_masks(batch: Mapping[str, Any], anatomy: Anatomy) -> None:
    """Refuse a batch with a tensor that may hide tokens, if the model was read without it: what it hides would count as tokens.

    Raises `ChangedPath`."""
    new = [name for name in could_hide(batch) if anatomy.inputs and name not in anatomy.inputs]
    if new:
        raise ChangedPath(
            f"masks: expected inputs of the kind that the model was read on, got {new[0]!r} besides. It may hide tokens, and which "
            "of them was never looked at. Begin with such a batch: diagnose it first, or pass it as batch=..."
        )


def _hiding_nothing(stack: Stack, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of a stack with all their tokens real."""
    return {m.tensor: torch.full_like(batch[m.tensor], m.real) for m in stack.masks if hides(m, batch)}


def _told_apart(alone: Alone) -> Padding:
    """Sequences laid end to end, by which rows reach each other."""
    axes, part = alone.block.axes, alone.mixing
    assert axes is not None
    assert part is not None
    update, axis = functools.partial(alone.update, part), axes.token[0]
    every = torch.arange(alone.stream.shape[axis])
    if not bool(moved(update(alone.stream), update(poked(alone.stream, axis, every)), axis).any()):
        return Padding(reason="sequences laid end to end, and no attention is left by which they could be told apart")
    parts = segments(update, alone.stream, axis)
    if parts is None:
        return Padding(reason="sequences laid end to end, too many of them to be told apart")
    return Padding(segments=tuple(parts))


def _told_by_influence(
    alone: Alone, opened: Alone | None, stack: Stack, known: Padding, batch: Mapping[str, Any]
) -> Padding:
    """The rows that reach others. `opened`: the block in a pass whose masks hide nothing, None where there is no such pass."""
    axes, part = alone.block.axes, alone.mixing
    assert axes is not None
    assert part is not None
    size = _sizes_of_hearing(alone)
    if size is None:
        return Padding(
            reason="padding in another unit than tokens, and no block whose tokens are seen to reach others to find it"
        )
    open_size = None if opened is None or opened.stream.shape != alone.stream.shape else _sizes_of_hearing(opened)
    heard = is_heard(size, size if open_size is None else open_size, _precision(alone))
    if alone.block.parts[part].is_causal:
        # Nothing hears the last token: it is real unless padding must have ended there.
        hiding = torch.stack([_hiding_rows(m, batch) for m in stack.masks if hides(m, batch)]).any(0).to(heard.device)
        heard[:, -1] = heard[:, -2] & ~(hiding & heard[:, :-1].all(-1))
    return Padding(heard if known.mask is None else heard & known.mask.to(heard.device))


def given_mask(stack: Stack, batch: Mapping[str, Any]) -> Tensor | None:
    """True for a real token [sequence, token], as the batch's own masks over the tokens of this stack say; None where they hide
    none."""
    real: Tensor | None = None
    for mask in stack.masks:
        value = batch.get(mask.tensor)
        if mask.unit == "token" and isinstance(value, Tensor) and value.ndim == 2:
            one = value.bool() == mask.real
            one = one.T if mask.is_transposed else one
            one = torch.nn.functional.pad(one, (mask.before, mask.after), value=True)
            real = one if real is None or real.shape != one.shape else real & one.to(real.device)
    return None if real is None or bool(real.all()) else real


def real_tokens(anatomy: Anatomy, batch: Mapping[str, Any]) -> Tensor | None:
    """The same for the first stack whose tokens some mask hides, as [sequence, token] of the batch: without what the stream begins
    with by itself."""
    for stack in anatomy.stacks:
        real = given_mask(stack, batch)
        if real is not None:
            masks = [m for m in stack.masks if m.unit == "token"]
            return real[:, max(m.before for m in masks) : real.shape[1] - max(m.after for m in masks)]
    return None


def per_token(anatomy: Anatomy) -> set[str]:
    """The names of tensors that are known to have a value for each token of each sequence."""
    masks = {mask.tensor for stack in anatomy.stacks for mask in stack.masks if mask.unit == "token"}
    return masks | {stack.ids for stack in anatomy.stacks if stack.ids is not None}


def _hiding_rows(mask: TokenMask, batch: Mapping[str, Any]) -> Tensor:
    """Which sequences this mask hides something of."""
    return (batch[mask.tensor].bool() != mask.real).flatten(1).any(-1)


def hides(mask: TokenMask, batch: Mapping[str, Any]) -> bool:
    """Whether this mask hides anything in this batch."""
    value = batch.get(mask.tensor)
    return isinstance(value, Tensor) and not bool((value.bool() == mask.real).all())
