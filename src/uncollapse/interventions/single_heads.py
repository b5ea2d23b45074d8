"""Take single heads out of an attention: other values in the place of what a head mixed, before the output projection.

A head's mixed values are replaced for all tokens: by zeros, by their mean over the tokens of a batch, or by those of another
sequence. The projection's bias stays, and so does every bit of the other heads' values. With zeros, what leaves the projection's
output is the head's contribution O_h W_h (`head_contributions`).

That holds only where the heads stay apart on the way to the projection. It is checked on the live model, on the example that the
anatomy was proved on: without a head's values its own features are zero in what the projection reads, and all others are what
they were, bit for bit. A gate that each head has for itself passes; a norm over all heads does not, and is refused.

When not to use it: to claim what the model does with the head when all is whole. Later layers can make up for a missing head.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockAlone, blocks_alone
from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.interception import Handler, Point, counted, device_of, intercepted, putting_another
from uncollapse.anatomy.operands import UnreadableError, arranged, product_operands, replaced
from uncollapse.anatomy.output_maps import laid_out, product_map, replacing
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.stacks import given_mask, hides, paddings
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.summands import with_operands
from uncollapse.anatomy.torch_calls import operation_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, ModuleCall, Part, Place
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.restoring import Changes, in_this_thread, restoring
from uncollapse.wrappers import bound

HeadsAs = Literal["zero", "mean", "resample"]
Heads = Mapping[int, Collection[int]]
_SPELLED = re.compile(r"head:(\d+)\.(\d+)")


@dataclass(frozen=True)
class Filling:
    """What comes in the place of a head's mixed values, or of what a whole sublayer adds (`whole_sublayers`). means: of `"mean"`,
    of heads by block and attention call, [head, width]."""

    kind: HeadsAs = "zero"
    seed: int = 0
    means: Mapping[Any, Tensor] = field(default_factory=dict)


# Which heads ------------------------------------------------------------------------------------------------------------


def spelled_head(component: str) -> tuple[int, int] | None:
    """Block and head of a component such as `"head:5.3"`; None for another one."""
    found = _SPELLED.fullmatch(component)
    return None if found is None else (int(found[1]), int(found[2]))


def attention_of(block: Block) -> int | None:
    """The number of the part whose heads are meant in a block: its self-attention, else its cross-attention."""
    kinds = [part.kind if part.attention else "" for part in block.parts]
    return next((kinds.index(kind) for kind in ("attention", "cross") if kind in kinds), None)


def heads_of(number: int, anatomy: Anatomy) -> frozenset[int]:
    """All heads of a block; empty where it has no attention."""
    part = attention_of(anatomy.blocks[number])
    return frozenset() if part is None else frozenset(range(anatomy.blocks[number].parts[part].heads))


def require_heads(heads: Heads, anatomy: Anatomy, what: str = "heads") -> dict[int, frozenset[int]]:
    """The heads by block. Raises `InputError` for a block without attention, a head that does not exist, or none at all."""
    there = [number for number in range(len(anatomy.blocks)) if heads_of(number, anatomy)]
    if not isinstance(heads, Mapping) or not heads or any(isinstance(h, (int, str)) or not h for h in heads.values()):
        raise InputError(
            f"without: expected {what} as block numbers with the heads to remove there, got {heads!r}. "
            f"It names no head. Pass for example {what}={{{there[-1] if there else 0}: [0]}}."
        )
    found: dict[int, frozenset[int]] = {}
    for number, wanted in heads.items():
        if not isinstance(number, int) or number not in there:
            are = f"blocks with attention: {_ranges(there)}" if there else "a model with attention that was found"
            raise InputError(
                f"without: expected {what} of {are}, got block {number!r}. Blocks are counted from 0, encoder first. "
                "Choose one of these."
            )
        part = _part(anatomy.blocks[number])
        count = part.heads if what == "heads" else part.attention[0].key_value_heads
        if any(not isinstance(head, int) or not 0 <= head < count for head in wanted):
            raise InputError(
                f"without: expected {what} from 0 to {count - 1} in block {number}, got {sorted(wanted, key=str)}. "
                "They are counted from 0 in the order the output projection reads them. Choose among these."
            )
        found[number] = frozenset(wanted)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers with runs of them written as ranges.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in found)


def _part(block: Block) -> Part:
    number = attention_of(block)
    assert number is not None
    return block.parts[number]


def heads_of_groups(
    model: nn.Module, anatomy: Anatomy, groups: Mapping[int, Collection[int]], example: Mapping[str, Any]
) -> dict[int, frozenset[int]]:
    """The query heads that read the given key-value heads, by block: those that mix the same values on the example.

    Raises `UnsupportedModel` where the values do not tell."""
    found: dict[int, frozenset[int]] = {}
    with probing(model), without_zeros(model):
        alone = blocks_alone(model, example, anatomy, groups)
        for number, wanted in groups.items():
            block = anatomy.blocks[number]
            part = _part(block)
            _refuse_static(model, number, part)
            members = _groups_of(alone[number], part)
            if len(members) != part.attention[0].key_value_heads:
                raise _not_apart(
                    model, number, part, f"its values show {len(members)} groups of heads on the example", "heads"
                )
            found[number] = frozenset(head for group in wanted for head in members[group])
    return found


def _groups_of(alone: BlockAlone, part: Part) -> list[list[int]]:
    """Heads that mix the same values, in order of their first."""
    values: list[Tensor] = []

    def noting(call: AttentionCall) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
            axes = alone.block.axes
            assert axes is not None
            laid = arranged(seen.values, call.lead, len(axes.cloud(alone.stream))).detach()
            # A fused call that is told of grouped queries takes each value head for as many heads in a row.
            values.append(laid.repeat_interleave(call.heads // laid.shape[1], 1) if laid.shape[1] else laid)
            return output

        return handler

    number = alone.block.parts.index(part)
    alone.update(number, None, {call.product: noting(call) for call in part.attention})
    members: list[list[int]] = []
    of_head = [each for laid in values for each in laid.unbind(1)]
    for head, mine in enumerate(of_head):
        own = next((group for group in members if torch.equal(of_head[group[0]], mine)), None)
        members.append([head]) if own is None else own.append(head)
    return members


# Whether they can be told apart -----------------------------------------------------------------------------------------


def require_apart(
    model: nn.Module, anatomy: Anatomy, heads: Heads, example: Mapping[str, Any], heads_as: HeadsAs = "zero"
) -> None:
    """Raise `UnsupportedModel`, with the reason, where the given heads cannot be removed by themselves, or where other values than
    zeros could not be put in the place of theirs."""
    for number, reason in not_apart(model, anatomy, heads, example, heads_as).items():
        raise _not_apart(model, number, _part(anatomy.blocks[number]), reason)


def not_apart(
    model: nn.Module,
    anatomy: Anatomy,
    heads: Heads,
    example: Mapping[str, Any],
    heads_as: HeadsAs = "zero",
    *,
    one_by_one: bool = False,
) -> dict[int, str]:
    """Why the given heads cannot be removed by themselves, by block; empty where they can. one_by_one: each of them alone, instead
    of those of a block together."""
    found: dict[int, str] = {}
    for number in sorted(heads):
        reason = _static_reason(_part(anatomy.blocks[number]))
        if reason:
            found[number] = reason
    left = [number for number in sorted(heads) if number not in found]
    if not left:
        return found
    with probing(model), without_zeros(model):
        alone = blocks_alone(model, example, anatomy, left)
        for number in left:
            part, own = _part(anatomy.blocks[number]), sorted(heads[number])
            for some in [[head] for head in own] if one_by_one else [own]:
                try:
                    reason = _acts_between(alone[number], part, some, is_zero=heads_as == "zero")
                except UnreadableError as error:
                    reason = str(error)
                if reason:
                    found[number] = reason
                    break
    return found


def _refuse_static(model: nn.Module, number: int, part: Part) -> None:
    if reason := _static_reason(part):
        raise _not_apart(model, number, part, reason)


def _static_reason(part: Part) -> str:
    reason = next((call.unreadable for call in part.attention if call.unreadable), None) or part.no_output_map
    if not reason and any(call.shares_queries for call in part.attention):
        reason = "it answers for its queries in several calls; how many there are depends on the input"
    if not reason and part.in_pieces:
        reason = "its rows are put together of several products"
    if not reason and part.by_sequence:
        reason = "it mixes each sequence by itself, in a loop"
    return reason


def _not_apart(model: nn.Module, number: int, part: Part, reason: str, instead: str = "") -> UnsupportedModel:
    advice = (
        f"Name them by {instead}={{...}}." if instead else "Remove the whole 'attention' there, or choose other blocks."
    )
    return UnsupportedModel(
        f"without: expected heads that can be told apart in block {number} ({part.module}) of {type(model).__name__}, got an "
        f"attention where they cannot: {reason}. {advice}"
    )


def _acts_between(alone: BlockAlone, part: Part, heads: Sequence[int], *, is_zero: bool) -> str:
    """Why the heads are not removed by themselves where the attention mixes; empty where they are."""
    number, projection = alone.block.parts.index(part), part.attention[0].projection
    away = _at_products(part, heads, Filling(), None, 0)
    if projection is None:  # the proof found one affine map from the mixed values to what is added
        same = torch.equal(alone.update(number, None), alone.update(number, None, away))
        return "what it adds is the same in every bit without them" if same else ""
    before, after = (_read(alone, number, projection, further) for further in ({}, away))
    if before.shape != after.shape or before.shape[-1] != len(_columns(part, range(part.heads))):
        return "its output projection does not read the heads side by side"
    moved = ~((after == before) | (after.isnan() & before.isnan()))
    if not moved.any():
        return "its output projection reads the same in every bit without them"
    own = torch.zeros(before.shape[-1], dtype=torch.bool, device=before.device)
    own[_columns(part, heads)] = True
    if bool(after[..., own].any()) or bool(moved[..., ~own].any()):
        return (
            "something acts between mixing and output projection that joins them: without their mixed values the projection "
            "reads other features differently, too, or theirs are not zero"
        )
    if not is_zero and not _reads_as_mixed(alone, part, before):
        return (
            "something acts between mixing and output projection, such as a gate, so that it reads other values than were mixed "
            "(heads_as='zero' is possible there)"
        )
    return ""


def _reads_as_mixed(alone: BlockAlone, part: Part, read: Tensor) -> bool:
    """Whether the projection reads what was mixed, feature by feature, bit for bit, in whatever order of its rows."""
    seen: dict[int, Tensor] = {}

    def noting(index: int, call: AttentionCall) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            seen[index] = laid_out(output.detach(), call, function, args, kwargs).clone()
            return output

        return handler

    acting = {call.product: noting(index, call) for index, call in enumerate(part.attention)}
    alone.update(alone.block.parts.index(part), None, acting)
    mixed = torch.cat([seen[index] for index in range(len(part.attention))], 1)
    rows = mixed.transpose(0, 1).flatten(1, 2)  # [head, sequence and token, width]
    for head, values in enumerate(rows):
        given = read[..., _columns(part, [head])].flatten(0, -2)
        if given.shape != values.shape or not torch.equal(given.sort(0).values, values.to(given).sort(0).values):
            return False
    return True


def _read(alone: BlockAlone, number: int, projection: ModuleCall | Point, further: Mapping[Point, Handler]) -> Tensor:
    """What the output projection reads."""
    seen: list[Tensor] = []
    acting, actions = dict(further), list[tuple[Place, Action]]()
    if isinstance(projection, ModuleCall):

        def keep(given: Tensor) -> None:
            seen.append(given.detach().clone())

        actions.append((Place(projection, "in", (0,)), keep))
    else:

        def multiplying(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = product_map(function, args, kwargs)
            if found is not None:
                seen.append(found.given.detach().clone())
            return function(*args, **kwargs)

        acting[projection] = multiplying
    try:
        alone.update(number, None, acting, actions)
    except UnreadableError:
        raise
    except UncollapseError as error:
        raise UnreadableError(f"what its output projection reads could not be met ({error})") from error
    if not seen:
        raise UnreadableError("its output projection is no product with one matrix")
    return seen[-1]


# What comes in their place ----------------------------------------------------------------------------------------------


def require_filling(filled_as: str, option: str = "heads_as") -> None:
    """Raise `InputError` unless it is a way to fill the place of what is taken away."""
    if filled_as not in get_args(HeadsAs):
        raise InputError(
            f"without: expected {option} among {', '.join(get_args(HeadsAs))}, got {filled_as!r}. Check the spelling."
        )


def require_sequences_apart(model: nn.Module, anatomy: Anatomy, heads: Heads) -> None:
    """Raise `UnsupportedModel` where attention within windows keeps the sequences of a batch from being told."""
    for number in sorted(heads):
        part = _part(anatomy.blocks[number])
        if any("window" in {axis.role, axis.inner} for call in part.attention for axis in call.lead):
            raise UnsupportedModel(
                f"without: expected sequences that can be told apart in block {number} ({part.module}) of {type(model).__name__}, "
                "got attention that stays within windows of them. Pass heads_as='zero'."
            )


def means_of(
    model: nn.Module, anatomy: Anatomy, heads: Heads, batch: Mapping[str, Any]
) -> dict[tuple[int, int], Tensor]:
    """The mean of what every head of the given blocks mixes over the real tokens of a batch, by block and call: [head, width]."""
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    found: dict[tuple[int, int], Tensor] = {}
    acting: dict[Point, Handler] = {}
    with probing(model):
        padding = paddings(model, given, anatomy, blocks_alone)

        def noting(number: int, index: int, call: AttentionCall) -> Handler:
            def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = function(*args, **kwargs)
                laid = _laid(model, number, call, output.detach(), function, args, kwargs)
                known = padding[anatomy.stack_of(number)]
                mask = known.mask
                if known.reason or (mask is not None and mask.shape != (laid.shape[0], laid.shape[2])):
                    raise InputError(
                        f"without: expected a batch whose real tokens can be told in block {number} for heads_as='mean', got "
                        f"{known.reason or 'another number of tokens there than in its mask'}. "
                        "Pass a batch without padding."
                    )
                real = laid.new_ones(laid.shape[0], laid.shape[2]) if mask is None else mask.to(laid.device)
                weight = real.to(torch.float64)[:, None, :, None]
                summed = torch.where(weight > 0, laid.double(), 0).sum((0, 2))
                found[number, index] = (summed / weight.sum()).to(output.dtype)
                return output

            return handler

        for number in heads:
            for index, call in enumerate(_part(anatomy.blocks[number]).attention):
                acting[call.product] = noting(number, index, call)
        with intercepted(model, acting):
            model(**given)
    return found


def _laid(
    model: nn.Module,
    number: int,
    call: AttentionCall,
    output: Tensor,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    try:
        return laid_out(output, call, function, args, kwargs)
    except UnreadableError as error:
        raise UnsupportedModel(
            f"without: expected mixed values of each sequence and token in block {number} of {type(model).__name__}, got none: "
            f"{error}. Pass heads_as='zero'."
        ) from error


class _Real(threading.local):
    """Which tokens are real in the pass that this thread is in, by stack; None: all."""

    def __init__(self) -> None:
        self.masks: list[Tensor | None] = []


@dataclass
class Standing:
    """What stands where in a pass without some heads: at operations, and at what modules read."""

    handlers: dict[Point, Handler] = field(default_factory=dict)
    reads: dict[ModuleCall, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def standing(
    block: Block, heads: Collection[int], filling: Filling, real: Callable[[], Tensor | None] | None, number: int
) -> Standing:
    """What takes some heads away from the block with this number. `real` tells which tokens [sequence, token] of the pass are: for
    `"resample"`.

    Zeros and means stand at the output projection, at the features that are the heads': what an attention mixes may be laid out
    otherwise while it reads from a cache. Where it is laid out as proved they stand at the products that mix the values, too, so
    that the projection still reads what was mixed. Where sequences have to be told apart, or no projection is known, the products
    alone are the place."""
    part = _part(block)
    projection = part.attention[0].projection
    if projection is None or filling.kind == "resample":
        return Standing(_at_products(part, heads, filling, real, number))
    acting = _at_products(part, heads, filling, real, number, strict=False)
    columns, values = _columns(part, heads), torch.zeros(0)
    if filling.kind == "mean":
        means = torch.cat([filling.means[number, index] for index in range(len(part.attention))])
        values = torch.cat([means[head] for head in sorted(heads)])
        columns = [column for head in sorted(heads) for column in _columns(part, [head])]

    def read(given: Tensor) -> Tensor:
        places = torch.tensor(columns, device=given.device)
        filled = values.to(given) if len(values) else given.new_zeros(len(columns))
        return given.index_copy(-1, places, filled.expand(*given.shape[:-1], -1))

    if isinstance(projection, ModuleCall):
        return Standing(acting, {projection: read})

    def multiplying(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operand = 1 if operation_name(function) == "addmm" else 0
        args, kwargs = with_operands(args, kwargs, {operand: read})
        return function(*args, **kwargs)

    return Standing({**acting, projection: multiplying})


def _columns(part: Part, heads: Collection[int]) -> list[int]:
    """The features of some heads in what the output projection reads."""
    width = part.attention[0].head_width
    owners = part.features or [head for head in range(part.heads) for _ in range(width)]
    return [column for column, head in enumerate(owners) if head in heads]


def _at_products(
    part: Part,
    heads: Collection[int],
    filling: Filling,
    real: Callable[[], Tensor | None] | None,
    number: int,
    *,
    strict: bool = True,
) -> dict[Point, Handler]:
    found: dict[Point, Handler] = {}
    for index, (call, own) in enumerate(_by_call(part, heads)):
        if not own:
            continue
        if filling.kind == "zero":
            made: Callable[[Tensor], Tensor] = torch.zeros_like
        elif filling.kind == "mean":
            made = _mean(filling.means[number, index][own])
        else:
            made = of_another(filling.seed, real)
        found[call.product] = putting_another(_readable(replacing(call, own, made, strict=strict), number, part))
    return found


def _readable(handler: Handler, number: int, part: Part) -> Handler:
    """The handler, with what it cannot read in a pass of the user's as a refusal."""

    def readable(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return handler(function, args, kwargs)
        except UnreadableError as error:
            raise UnsupportedModel(
                f"without: expected the heads of block {number} ({part.module}) laid out as on the example, got another layout: "
                f"{error}. With a cache the attention may run in another way. Run the model with use_cache=False."
            ) from error

    return readable


def _by_call(part: Part, heads: Collection[int]) -> list[tuple[AttentionCall, list[int]]]:
    """The heads of each attention call, counted in the call itself."""
    found, first = [], 0
    for call in part.attention:
        found.append((call, sorted(head - first for head in heads if first <= head < first + call.heads)))
        first += call.heads
    return found


def _mean(mean: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda mixed: mean.to(mixed)[None, :, None].expand(mixed.shape)


def of_another(
    seed: int, real: Callable[[], Tensor | None] | None, option: str = "heads_as"
) -> Callable[[Tensor], Tensor]:
    """Every sequence is given the values [sequence, head, token, width] of another one; the r-th real token those of its r-th, from
    the first again where that one is shorter. Refusals name the `option`."""

    def made(mixed: Tensor) -> Tensor:
        sequences, _, tokens, _ = mixed.shape
        if sequences < 2:
            raise InputError(
                f"without: expected at least 2 sequences to take values from, got 1. {option}='resample' gives every "
                f"sequence those of another one in the same batch. Pass a larger batch, or {option}='mean'."
            )
        order = another_sequence(sequences, seed)
        mask = None if real is None else real()
        if mask is None:
            return mixed[order]
        mask = mask[:, -tokens:].to(mixed.device)  # with a cache the mask is as long as all that was read so far
        if mask.shape != (sequences, tokens):
            raise InputError(
                f"without: expected a mask of {sequences} sequences with {tokens} tokens for {option}='resample', got "
                f"{list(mask.shape)}. Pass a batch without padding, or {option}='mean'."
            )
        result = mixed.clone()
        for sequence, other in enumerate(order):
            own, theirs = mask[sequence].nonzero().flatten(), mask[other].nonzero().flatten()
            if len(own) and len(theirs):
                ranks = torch.arange(len(own), device=mixed.device) % len(theirs)
                result[sequence, :, own] = mixed[other, :, theirs[ranks]]
        return result

    return made


def another_sequence(sequences: int, seed: int) -> list[int]:
    """For each sequence the number of another one, each taken once: a random cycle."""
    cycle = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [0] * sequences
    for place, sequence in enumerate(cycle):
        found[sequence] = cycle[place - 1]
    return found


def real_tokens(
    model: nn.Module, anatomy: Anatomy, changes: Changes, *, everywhere: bool
) -> Callable[[int], Callable[[], Tensor | None]]:
    """Which tokens are real in the pass that is running, by the number of a block, until `changes` are undone."""
    met = _Real()

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bound(model, args, kwargs)
        met.masks = []
        for stack in anatomy.stacks:
            met.masks.append(given_mask(stack, given))
            if any(mask.unit == "other" and hides(mask, given) for mask in stack.masks):
                raise UnsupportedModel(
                    f"without: expected padding that is told token by token for 'resample', got {stack.masks[0].tensor!r} "
                    "in another unit. Pass a batch without padding."
                )

    changes.hook(model, "forward_pre", remember if everywhere else in_this_thread(remember), with_kwargs=True)

    def of_block(number: int) -> Callable[[], Tensor | None]:
        stack = anatomy.stack_of(number)
        return lambda: met.masks[stack] if met.masks else None

    return of_block


@contextlib.contextmanager
def reading(
    model: nn.Module, name: str, by_call: Mapping[int, Callable[[Tensor], Tensor]], *, everywhere: bool
) -> Iterator[None]:
    """Within the block the given runs of a module read what `by_call` makes of the tensor that they are given first."""
    with restoring() as changes:
        runs = changes.enter(counted(model, [name]))

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            made = by_call.get(runs.begin(name))
            if made is None:
                return None
            given = next(tensors_in([args, kwargs]))
            return replaced(args, given, made(given)), kwargs

        changes.hook(
            model.get_submodule(name), "forward_pre", enter if everywhere else in_this_thread(enter), with_kwargs=True
        )
        yield
