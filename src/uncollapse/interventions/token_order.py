"""What tells a model the order of its tokens, its mask and its positions, and how to remove that.

Without both, a Transformer is a function on sets: permuting the tokens permutes the outputs. That is how each removal is
checked before it is believed.

* The *mask*: every real token may attend to every real token. Padding stays hidden, as the batch's `attention_mask` says. At
  a fused call the mask operand is replaced; before a softmax of the model's own, nothing is forbidden any more. Of a mask that
  was put into a bias first, wherever in the model's code, the bias stays.
* *Positions*: every token is told that it stands at position 0, through `position_ids`. That removes learned tables and
  rotary embeddings. A model that does not take `position_ids`, or that knows positions in another way as well (relative
  biases, convolutions), is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import ChangedPath, Handler, Paths, Point, in_turn, intercepted
from uncollapse.anatomy.masking import (
    LEAST_SHARE,
    factor_of,
    far_below,
    forbidden_by_addition,
    forbids_and_shifts,
    laid_like,
    out_of_reach,
    result_shape,
    spread_out,
    step_with,
    step_without,
    without_what_forbids,
)
from uncollapse.anatomy.operands import UnreadableError, arranged, fused_arguments, product_operands, replaced
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.stacks import given_mask, hides, require_known_masks
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.torch_calls import operands_of, operation_name, tensors_in, writes_in_place
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, MaskingStep, Place, StreamAxes
from uncollapse.errors import UncollapseError, UnsupportedModel
from uncollapse.restoring import in_this_thread, restoring
from uncollapse.wrappers import bound, rebound, takes


@contextlib.contextmanager
def mask_removed(
    model: nn.Module, anatomy: Anatomy, blocks: frozenset[int], *, everywhere: bool = False
) -> Iterator[None]:
    """Within the context, self-attention in the given blocks sees every real token, in this thread or `everywhere`."""
    paddings = [_Padding() for _ in anatomy.stacks]

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bares.clear()
        given = bound(model, args, kwargs)
        require_known_masks(given, anatomy)
        for stack, padding in zip(anatomy.stacks, paddings, strict=True):
            mask = given_mask(stack, given)
            padding.real = mask
            if any(m.unit == "other" and hides(m, given) for m in stack.masks):
                raise UnsupportedModel(
                    f"without: expected padding that is told token by token, got {stack.masks[0].tensor!r} in another unit. Which "
                    f"tokens of {type(model).__name__} are padding is not known inside its own pass. Pass a batch without padding."
                )

    handlers: dict[Point, Handler] = {}
    bares, made = Bares(), dict[Point, Handler]()
    streams: list[tuple[Place, Action]] = []
    entered = _Entered()
    for number, block in enumerate(anatomy.blocks):
        padding = paddings[anatomy.stack_of(number)]
        for part, call in (
            (p, c) for p in block.parts if p.kind == "attention" for c in p.attention if number in blocks
        ):
            if call.is_fused:
                handlers[call.product] = _unmasked_fused(call, padding, bares)
            for step in call.masking:
                handlers[step.point] = _unmasked_step(step, padding, call, bares)
            made |= dict.fromkeys([*call.made, *(point for step in call.masking for point in step.made)], bares.beside)
            in_turn_with = part.attention if call.shares_queries else (call,)
            # Turns of a loop recur, and each answers for all tokens of its sequence: of one that lies beside others, for some.
            is_whole = not call.product.recurs or (block.axes is not None and block.axes.sequence is not None)
            counts = (call.queries_of_tokens and is_whole) or call.shares_queries
            if counts and call.unreadable is None and not block.chooses_tokens:
                check, own = _answering(call, in_turn_with, block, entered), handlers.get(call.product)
                handlers[call.product] = check if own is None else in_turn(check, own)
        if number in blocks and block.axes is not None:
            streams.append((block.entry, functools.partial(_note_entering, block.axes, entered)))
    with restoring() as changes:
        changes.hook(model, "forward_pre", remember if everywhere else in_this_thread(remember), with_kwargs=True)
        changes.enter(met(model, streams, strict=False))
        changes.enter(intercepted(model, made, strict=False, everywhere=everywhere))  # a batch may need no mask
        changes.enter(intercepted(model, handlers, everywhere=everywhere, paths=_of_products(anatomy, blocks)))
        yield


def _of_products(anatomy: Anatomy, blocks: frozenset[int]) -> Paths | None:
    """How often each run does the products that mix values: masks may be skipped where a batch needs none."""
    parts = (p for number in blocks for p in anatomy.blocks[number].parts)
    products = {call.product.operation for part in parts for call in part.attention}
    return {run: {o: n for o, n in path.items() if o in products} for run, path in anatomy.paths.items()} or None


def require_no_mask_left(
    model: nn.Module, anatomy: Anatomy, blocks: frozenset[int], example: Mapping[str, Any]
) -> None:
    """Raise `UnsupportedModel` where a pair of tokens of the example, none of which is padding, still has no weight in any sequence
    and head of an attention whose mask is removed: another mask was overlooked. A fused call has no place for another one.

    One that hides pairs from some heads only is looked for in a second pass, in which all queries are zero: where nothing is steep,
    a pair without weight in one head is a hidden one."""
    for without_queries in (False, True):
        for name, unheard in _pairs_unheard(model, anatomy, blocks, example, without_queries):
            if any(bool(pairs.any()) for pairs in unheard):
                where = "a head" if without_queries else "any sequence and head"
                raise UnsupportedModel(
                    f"without: expected all tokens to give each other some weight in {name} of {type(model).__name__} without its "
                    f"mask, got pairs with none in {where}. Another mask was overlooked, or the logits are too steep. "
                    "Remove another component, or leave this block out with blocks=[...]."
                )


def _pairs_unheard(
    model: nn.Module, anatomy: Anatomy, blocks: frozenset[int], example: Mapping[str, Any], without_queries: bool
) -> list[tuple[str, list[Tensor]]]:
    """The pairs that have no weight in the example without its mask, by block and attention: in any sequence and head, or,
    `without_queries`, in any sequence of one head."""
    handlers: dict[Point, Handler] = {}
    streams: list[tuple[Place, Action]] = []
    found: list[tuple[str, list[Tensor]]] = []  # by block and attention
    for number in sorted(blocks):
        block, entered = anatomy.blocks[number], _Entered()
        for part in (p for p in block.parts if p.kind == "attention"):
            calls = [c for c in part.attention if not (c.is_fused or c.is_piece) and c.unreadable is None]
            if without_queries:
                calls = [c for c in calls if c.score is not None and c.similarity not in {None, c.product}]
                handlers |= {c.similarity: _without_queries(c) for c in calls if c.similarity is not None}
            alone = part.shares_queries or without_queries
            together = [[c] for c in calls] if alone else [calls]  # one call a head: all of them
            for several in together:
                unheard: list[Tensor] = []
                handlers |= {c.product: _asking(c, several, unheard, entered, without_queries) for c in several}
                found += [(block.name, unheard)]
        if block.axes is not None:
            streams.append((block.entry, functools.partial(_note_entering, block.axes, entered)))
    with probing(model), mask_removed(model, anatomy, blocks), met(model, streams, handlers=handlers, strict=False):
        model(**example)
    return found


def _without_queries(call: AttentionCall) -> Handler:
    """The product of queries and keys with queries of zero: its logits are what is added to them."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        query = operands_of(operation_name(function), args, kwargs)[call.query_operand]
        nothing = torch.zeros_like(query)
        return function(*replaced(args, query, nothing), **replaced(kwargs, query, nothing))

    return handler


def _asking(
    call: AttentionCall, several: Sequence[AttentionCall], unheard: list[Tensor], entered: _Entered, by_head: bool
) -> Handler:
    """Notes which pairs [window, query, key] have no weight in any sequence and head of `several` calls; `by_head`, which
    [head, window, query, key] have none in any sequence, where the row has any."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if entered.sizes is None or not isinstance(output, Tensor):
            return output
        try:
            seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
            assert seen.weights is not None
            weights = arranged(seen.weights, call.lead, entered.sizes[0])
        except UnreadableError:  # other axes than where it was proved: nothing was measured of it, either
            return output
        weights = weights[..., call.before : weights.shape[-1] - call.after].abs()
        largest = weights.amax(-1, keepdim=True)
        heard = (weights > LEAST_SHARE * largest) | weights.isnan()
        if by_head:
            # In float16 a bias of 17 nats, which a position may have, leaves no weight either.
            if torch.finfo(weights.dtype).tiny < LEAST_SHARE:
                unheard.append(~(heard | (largest == 0)).any(0))
            return output
        own = ~heard.any(1).any(0)
        if call != several[0] and unheard and unheard[-1].shape == own.shape:
            own &= unheard.pop()
        unheard.append(own)
        return output

    return handler


class _Padding(threading.local):
    """Which tokens of a stack are real in the pass that this thread is in; `None`: all."""

    def __init__(self) -> None:
        self.real: Tensor | None = None


class Bares(threading.local):
    """Operands of the logits as the model's own code makes them when nothing is forbidden, in the pass that this thread is in. What
    makes such an operand runs a second time, on what was made so before, and without what puts a mask in."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing has been made yet."""
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # with the operand itself, lest another one gets its number

    def of(self, operand: Tensor) -> Tensor | None:
        """The operand with nothing forbidden; None where nothing was seen to forbid, or it came here unseen."""
        known = self.known.get(id(operand))
        return None if known is None else known[1]

    def beside(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handler of an operation that makes such an operand, or something that it is made of."""
        once_more = inspect.unwrap(function)  # this run is none of the model's own
        given, named, is_bare = args, kwargs, False
        for tensor in operands_of(operation_name(function), args, kwargs):
            bare = self.of(tensor)
            if bare is not None:
                given, named, is_bare = replaced(given, tensor, bare), replaced(named, tensor, bare), True
        in_place = writes_in_place(function)
        if in_place:
            given = (given[0].clone(), *given[1:])
        is_opened, result = without_what_forbids(once_more, given, named)
        if is_bare and not is_opened:
            result = once_more(*given, **named)
        output = function(*args, **kwargs)
        if is_bare or is_opened:
            pairs = zip(
                tensors_in(args[0] if in_place else output), tensors_in(given[0] if in_place else result), strict=True
            )
            self.known |= {id(tensor): (tensor, bare) for tensor, bare in pairs}
        return output


class _Entered(threading.local):
    """Sequences and tokens of the stream that last entered a block in this thread, `None` where that is not known, and how many
    of its tokens were answered for by calls that do so in turn."""

    def __init__(self) -> None:
        self.sizes: tuple[int, int] | None = None
        self.answered = 0


def _note_entering(axes: StreamAxes, entered: _Entered, stream: Tensor) -> None:
    cloud = axes.cloud(stream) if stream.ndim == axes.ndim else None
    entered.sizes = None if cloud is None else (cloud.shape[0], cloud.shape[1])


def _answering(call: AttentionCall, several: Sequence[AttentionCall], block: Block, entered: _Entered) -> Handler:
    """Refuse a pass in which the calls that answered for every token of the example, `several` in turn, answer for some: others
    follow, unseen, and their mask would stay."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        if entered.sizes is None or not isinstance(output, Tensor):
            return output
        sequences, tokens = entered.sizes
        try:
            seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
            found = arranged(seen.mixed, call.lead, sequences)
        except UnreadableError:  # other axes than on the example: what they hold is not known
            return output
        before = 0 if call == several[0] else entered.answered
        entered.answered = before + found.shape[2] * found.shape[3]
        if call == several[-1] and entered.answered != tokens:
            raise ChangedPath(
                f"without: expected an attention in {block.name} that answers for its {tokens} tokens in as many calls as on the "
                f"example ({len(several)}), got answers for {entered.answered} of them. How many calls there are depends on the "
                "input. Pass a batch of this length as batch=, or remove another component."
            )
        return output

    return handler


def _unmasked_fused(call: AttentionCall, padding: _Padding, bares: Bares) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = fused_arguments(args, kwargs)
        query, mask, real = given["query"], given.get("attn_mask"), padding.real
        shown = None
        if real is not None:
            shape = (*query.shape[:-2], 1, given["key"].shape[-2])
            shown = spread_out(_with_other_keys(real, shape[-1], call), _axes_of(call), shape)
        given |= {"is_causal": False, "attn_mask": shown if mask is None else _opened(mask, shown, bares, call)}
        return function(given.pop("query"), given.pop("key"), given.pop("value"), **given)

    return handler


def _axes_of(call: AttentionCall) -> list[str | None]:
    """What the axes of a fused call's mask hold, where it has all of them."""
    return [*(_AXIS[axis.role] for axis in call.lead), None, "key"]


def _bare(
    operand: Tensor, bare: Tensor | None, hidden: Tensor | None, call: AttentionCall, factor: float = 1.0
) -> Tensor:
    """What an operand of the logits that holds a mask beside a bias is without the mask, with `hidden` pairs out of reach (None:
    none). `bare`: the same as far as it could be made. `factor`: by what it is multiplied when it is added.

    Raises `UnsupportedModel` where it could not, where a pair is still out of reach, or where the bias would be another one."""
    forbidden, _ = forbidden_by_addition(factor * operand)
    assert forbidden is not None
    if bare is not None and bare.shape == operand.shape:
        remains, _ = forbidden_by_addition(factor * bare)
        is_open = remains is None or (hidden is not None and not bool((remains & ~hidden).any()))
        if is_open and bool(((bare == operand) | forbidden | far_below(factor * operand)).all()):
            return bare if hidden is None else torch.where(hidden, out_of_reach(bare.dtype, factor), bare)
    advice = "Load the model with attn_implementation='eager'" if call.is_fused else "Add the two one after the other"
    raise UnsupportedModel(
        "without: expected a mask that only forbids, got one that also adds a bias to the logits. The bias of a forbidden pair "
        f"is not known. {advice}, or remove another component."
    )


def _opened(mask: Tensor, shown: Tensor | None, bares: Bares, call: AttentionCall) -> Tensor:
    """A fused call's mask that forbids nothing but what is not `shown` (None: nothing): one of the same kind, lest another kernel
    run and round otherwise. A bias in it stays."""
    if mask.dtype == torch.bool:
        return laid_like(torch.ones_like(mask) if shown is None else torch.ones_like(mask) & shown, mask)
    hidden = None if shown is None else ~shown
    forbidden, shifts = forbidden_by_addition(mask)
    if shifts and forbidden is not None:
        return laid_like(_bare(mask, bares.of(mask), hidden, call), mask)
    bare = mask if shifts else torch.zeros_like(mask)
    return laid_like(bare if hidden is None else bare.masked_fill(hidden, torch.finfo(mask.dtype).min), mask)


_AXIS = {"head": None, "window": None, "sequence": "sequence"} | {s: s for s in ("sequence-major", "sequence-minor")}


def _with_other_keys(real: Tensor, keys: int, call: AttentionCall) -> Tensor:
    """Which of the keys are real [sequence, key]: also those of a sink, which belong to no token, where the call has them."""
    if keys != call.before + real.shape[1] + call.after:
        return real
    parts = [real.new_ones(len(real), call.before), real, real.new_ones(len(real), call.after)]
    return torch.cat(parts, 1)


def _unmasked_step(step: MaskingStep, padding: _Padding, call: AttentionCall, bares: Bares) -> Handler:
    """An operation between logits and weights that no longer forbids anything but padded keys."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        real, hidden = padding.real, None
        if real is not None:
            shape = result_shape(function, args, kwargs)
            keys = [size for size, role in zip(shape, step.axes, strict=False) if role == "key"]
            real = _with_other_keys(real, keys[0], call) if len(keys) == 1 else real
            hidden = spread_out(~real, step.axes, shape)
        if forbids_and_shifts(function, args, kwargs, step.operand):
            mask = operands_of(operation_name(function), args, kwargs)[step.operand]
            bare = _bare(mask, bares.of(mask), hidden, call, factor_of(function, kwargs, step.operand))
            return step_with(function, args, kwargs, step.operand, bare)
        return step_without(function, args, kwargs, step.operand, step.after_softmax, hidden)

    return handler


@contextlib.contextmanager
def positions_removed(model: nn.Module, *, everywhere: bool = False) -> Iterator[None]:
    """Within the context every token stands at position 0, in this thread or `everywhere`."""
    if not takes(model, "position_ids"):
        raise UnsupportedModel(
            f"without: expected a model that takes position_ids, got {type(model).__name__}. Its positions cannot be told "
            "from outside. Remove another component."
        )

    def at_zero(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = bound(model, args, kwargs)
        tokens = given.get("input_ids", args[0] if args else None)
        shaped = tokens if tokens is not None else given["inputs_embeds"][..., 0]
        changed = {"position_ids": torch.zeros(shaped.shape[:2], dtype=torch.long, device=shaped.device)}
        if takes(model, "attention_mask") and given.get("attention_mask") is None:
            # Without a mask, positions that start again are taken for sequences packed into one row, and kept apart.
            changed["attention_mask"] = torch.ones_like(changed["position_ids"])
        return rebound(model, args, kwargs, changed)

    with restoring() as changes:
        hook = at_zero if everywhere else in_this_thread(at_zero)
        changes.hook(model, "forward_pre", hook, with_kwargs=True, prepend=True)  # position gates listen, too
        yield


def require_order_blind(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedModel` unless, without mask and positions, permuting the tokens permutes the outputs."""
    if "input_ids" not in batch:
        raise UnsupportedModel(
            f"without: expected a model proved on input_ids, got {type(model).__name__} on {', '.join(batch) or 'nothing'}. "
            "Positions are removed from token numbers only. Remove another component."
        )
    if any(stack.ids_transposed for stack in anatomy.stacks):
        raise UnsupportedModel(
            f"without: expected token numbers with the axes sequence, token, got {type(model).__name__} with token, sequence. "
            "Which axes its position_ids have is then not known. Remove another component."
        )
    every = frozenset(range(len(anatomy.blocks)))
    tokens = batch["input_ids"].shape[1]
    order = torch.arange(tokens).roll(tokens // 2)  # another one than they had, however few
    permuted = {k: v[:, order] if v.ndim == 2 and v.shape[1] == tokens else v for k, v in batch.items()}
    streams: list[Tensor] = []
    with probing(model), mask_removed(model, anatomy, every), positions_removed(model):
        for given in (batch, permuted):
            with met(model, [(anatomy.blocks[-1].exit, lambda stream: streams.append(stream.detach().clone()))]):
                try:
                    model(**given)
                except UncollapseError:
                    raise
                except Exception as error:  # the model's own code, told positions in a form it may not know
                    raise UnsupportedModel(
                        f"without: expected {type(model).__name__} to run with every token at position 0, got "
                        f"{type(error).__name__}: {error}. Its position_ids mean something else. Remove another component."
                    ) from error
    axes = anatomy.blocks[-1].axes
    gap = math.inf
    if axes is not None and len(streams) == 2:
        plain, moved = (axes.cloud(stream).double() for stream in streams)
        own = plain.shape[1] - tokens  # a beginning of the model's own, which stays where it is
        if own >= 0 and plain.shape == moved.shape:
            rows = torch.cat([torch.arange(own), own + order])
            gap = float((moved - plain[:, rows]).abs().max() / plain.abs().max())
    if not gap < 1e-3:
        raise UnsupportedModel(
            f"without: expected {type(model).__name__} without mask and positions to treat its tokens as a set, got outputs that "
            f"still depend on their order (relative difference {gap:.2g}). It knows positions in another way, such as a "
            "relative bias or a convolution. Remove another component."
        )
