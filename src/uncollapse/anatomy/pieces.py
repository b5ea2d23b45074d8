"""Attention whose rows are put together of several products: block-sparse attention, where queries are shared out among products,
and a query's weights are cut into slices that meet different values and are added up.

Where each weight stands is found on the batch itself, by numbers in the place of values. Each token's value is its own number: what
then arrives at a product says which token each of its keys is. Each entry of a product's result is its own number, and the other
products give zeros: what then arrives at the output projection says which token and head each of its rows is. Keys may stand in any
order, be gathered at random, or stand in a row twice.

When not to use it: where values do not arrive at their product as they were made, or a norm or the like stands between the products
and the output projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import AT_A_TIME, BlockAlone, blocks_alone
from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.operands import Mixed, UnreadableError, product_operands
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, ModuleCall, Part, Place, StreamAxes

SHARED_OUT = "several products share its queries out and add up"


@dataclass(frozen=True)
class Placed:
    """Where the weights of one product stand. By leading slice of it, flattened: `queries` and `heads` [slice, query] and `keys`
    [slice, key], tokens counted through all sequences, -1 where a row or a column is none."""

    queries: Tensor
    heads: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Pieces:
    """Where the weights of an attention's products stand in one batch: of each product, and the sizes of the whole."""

    placed: tuple[Placed, ...]
    sequences: int
    tokens: int
    heads: int
    head_width: int


def pieces_of(alone: BlockAlone, number: int, part: Part, axes: StreamAxes | None) -> Pieces:
    """Where the weights of a part's products stand on what the block was given. `axes`: those of its stream.

    Raises `UnreadableError` where that cannot be told."""
    calls = part.attention
    values, projection = _one_of(call.values for call in calls), projection_of(calls)
    if values is None or not isinstance(projection, ModuleCall) or axes is None:
        raise UnreadableError(f"{SHARED_OUT}, with no one map before and behind them")
    if axes.sequence is None or len(axes.token) != 1 or axes.streams is not None:
        raise UnreadableError(f"{SHARED_OUT}, and no axis is that of the sequences")
    sequences, tokens = axes.cloud(alone.stream).shape[:2]
    others = tuple(i for i in range(len(alone.block.parts)) if i != number)

    def laid(made: Tensor) -> Tensor:
        """A result as [sequence * token, feature]."""
        if made.ndim != alone.stream.ndim or axes.cloud(made).shape[:2] != (sequences, tokens):
            raise UnreadableError(f"{SHARED_OUT}, and what is before or behind them is not laid out as the stream is")
        return axes.cloud(made).flatten(0, 1)

    shapes: list[tuple[int, ...]] = [()] * len(calls)
    formats: set[torch.dtype] = set()

    def formatted(made: Tensor) -> None:
        formats.add(made.dtype)

    noting = {call.product: _noting_shape(shapes, formats, i) for i, call in enumerate(calls)}
    _run(alone, others, values, formatted, noting, [(Place(projection, "in", (0,)), formatted)])
    if not all(shapes):
        raise UnreadableError("it did not run")
    # To the numbers below it each of these counts exactly.
    base = min(round(1 / torch.finfo(each).eps) for each in formats)
    # Which token each key is.
    counted = torch.arange(1, sequences * tokens + 1)
    keys: list[Tensor | None] = [None] * len(calls)
    for digit in range(_digits(sequences * tokens, base)):
        codes = counted // base**digit % base

        def numbered(made: Tensor, codes: Tensor = codes) -> Tensor:
            laid(made)
            rows = codes.to(made)[:, None].expand(-1, made.shape[axes.width])
            return axes.stream(rows.unflatten(0, (sequences, tokens)), made).contiguous()

        seen: dict[int, Tensor] = {}
        handlers = {call.product: _noting_values(seen, i, call) for i, call in enumerate(calls)}
        _run(alone, others, values, numbered, handlers)
        for i, found in seen.items():
            first = found[..., 0].double()
            if not bool((found == found[..., :1]).all()) or not _are_codes(first, base):
                raise UnreadableError(f"{SHARED_OUT}, and its values do not arrive as they were made")
            known, step = keys[i], first.long() * base**digit
            keys[i] = step if known is None else known + step
    # Which token and head each row of a result is.
    width = 0
    rows: list[Tensor] = []
    for i in range(len(calls)):
        landed: Tensor | None = None
        size = math.prod(shapes[i])
        places: list[Tensor] = []
        for digit in range(_digits(size, base)):
            read: list[Tensor] = []
            handlers = {
                call.product: _numbering(places, call, digit, base) if j == i else _silent
                for j, call in enumerate(calls)
            }
            action = _reading(read)
            alone.update(number, None, handlers, [(Place(projection, "in", (0,)), action)])
            if not read:
                raise UnreadableError(f"{SHARED_OUT}, and what is read behind them was not met")
            given = laid(read[-1]).double()
            width = given.shape[1]
            if not _are_codes(given, base):
                raise UnreadableError(f"{SHARED_OUT}, and something acts on what they give")
            step = given.long() * base**digit
            landed = step if landed is None else landed + step
        assert landed is not None
        rows.append(_landing(landed, places[0], size))
    head_width = rows[0].shape[-1]
    if not head_width or width % head_width or any(r.shape[-1] != head_width for r in rows):
        raise UnreadableError(f"{SHARED_OUT}, and their heads are not read side by side")
    placed = []
    for of_rows, of_keys in zip(rows, keys, strict=True):
        assert of_keys is not None
        first = of_rows[..., 0]
        is_met = first >= 0
        expected = first[..., None] + torch.arange(head_width)
        if not bool((torch.where(is_met[..., None], expected, -1) == of_rows).all()):
            raise UnreadableError(f"{SHARED_OUT}, and their heads are not read side by side")
        feature = first % width
        if bool((feature[is_met] % head_width != 0).any()):
            raise UnreadableError(f"{SHARED_OUT}, and their heads are not read side by side")
        queries = torch.where(is_met, first // width, -1).flatten(0, -2)
        own = (of_keys - 1).flatten(0, -2)
        mixed = (queries // tokens)[:, :, None] != (own // tokens)[:, None]
        if bool((mixed & (queries >= 0)[:, :, None] & (own >= 0)[:, None]).any()):
            raise UnreadableError("it mixes several sequences of the batch")
        placed.append(Placed(queries, torch.where(is_met, feature // head_width, -1).flatten(0, -2), own))
    return Pieces(tuple(placed), sequences, tokens, width // head_width, head_width)


def projection_of(calls: Sequence[AttentionCall]) -> ModuleCall | Point | None:
    """The one output projection that is found behind some of the calls."""
    return _one_of(call.projection for call in calls if call.projection is not None)


def _one_of(places: Iterable[ModuleCall | Point | None]) -> ModuleCall | Point | None:
    found = set(places)
    return found.pop() if len(found) == 1 else None


def pieces_of_batch(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy
) -> dict[tuple[int, int], Pieces | str]:
    """The same of every attention that is put together so, by block and part, on this batch; or why it cannot be told. Within
    `probing` only. Costs nothing where there is none."""
    asked = {
        number: [place for place, part in enumerate(block.parts) if part.in_pieces]
        for number, block in enumerate(anatomy.blocks)
    }
    numbers = [number for number, places in asked.items() if places]
    found: dict[tuple[int, int], Pieces | str] = {}
    for first in range(0, len(numbers), AT_A_TIME):
        with without_zeros(model):
            for number, alone in blocks_alone(model, batch, anatomy, numbers[first : first + AT_A_TIME]).items():
                for place in asked[number]:
                    try:
                        found[number, place] = pieces_of(alone, place, alone.block.parts[place], alone.block.axes)
                    except UnreadableError as error:
                        found[number, place] = str(error)
    return found


def _digits(count: int, base: int) -> int:
    """How many digits numbers up to `count` have."""
    found = 1
    while count >= base**found:
        found += 1
    return found


def _are_codes(numbers: Tensor, base: int) -> bool:
    """Whether these are digits to this base, and nothing else."""
    return bool(((numbers == numbers.round()) & (numbers >= 0) & (numbers < base)).all())


def _run(
    alone: BlockAlone,
    others: tuple[int, ...],
    values: ModuleCall | Point,
    numbered: Action,
    handlers: dict[Point, Handler],
    actions: Sequence[tuple[Place, Action]] = (),
) -> None:
    """The block alone with other values, and handlers at its products."""
    if isinstance(values, ModuleCall):
        actions = [*actions, (Place(values), numbered)]
    else:

        def made(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            other = numbered(output)
            return output if other is None else other

        handlers = {**handlers, values: made}
    alone.rerun(others, handlers, actions)


def _noting_shape(shapes: list[tuple[int, ...]], formats: set[torch.dtype], number: int) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        shapes[number] = tuple(output.shape)
        formats.add(output.dtype)
        return output

    return handler


def _noting_values(seen: dict[int, Tensor], number: int, call: AttentionCall) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        found = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
        seen[number] = found.values.detach().clone()
        return output

    return handler


def _numbering(places: list[Tensor], call: AttentionCall, digit: int, base: int) -> Handler:
    """Let a product give one digit of the number of each entry of its result, from 1; `places` takes these numbers as the weights'
    canonical axes have them, [*lead, query, width]."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        numbers = torch.arange(1, output.numel() + 1, dtype=torch.float64).reshape(output.shape).to(output.device)
        seen = product_operands(function, args, kwargs, numbers, call.weight_operand or 0, call.pair)
        if seen.summed or seen.mixed.numel() != output.numel():
            raise UnreadableError("the product that mixes its values adds the heads up in the same step")
        places[:] = [seen.mixed.long().cpu()]
        return (numbers // base**digit % base).to(output.dtype)

    return handler


def _silent(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Zeros in place of what an operation gives."""
    return torch.zeros_like(function(*args, **kwargs))


def _reading(read: list[Tensor]) -> Action:
    def note(given: Tensor) -> None:
        read.append(given.detach().clone())

    return note


def _landing(landed: Tensor, places: Tensor, size: int) -> Tensor:
    """Where each entry of a result [*lead, query, width] arrived among what is read, counted through all of that; -1: nowhere.
    `landed` [row, feature]: the number of the entry that arrived there."""
    numbers = landed.flatten().cpu()
    met = numbers > 0
    if bool((numbers[met].bincount(minlength=1) > 1).any()) or (bool(met.any()) and int(numbers.max()) > size):
        raise UnreadableError(f"{SHARED_OUT}, and what they give arrives at several tokens")
    at = torch.full((size + 1,), -1, dtype=torch.long)
    at[numbers[met]] = torch.arange(len(numbers))[met]
    return at[places]


# The whole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One product in a pass, with what is known of its pairs: forbidden ones, and their logits, [*lead, query, key]."""

    product: Mixed
    forbidden: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Whole:
    """The attention of one sequence: weights, logits and forbidden pairs [1, head, query, key], values and mixed values
    [1, head, token, width]. A key that stands in a row several times counts once, with the sum of its weights, and the logarithm of
    the sum of exponentials as its logit. Pairs that stand nowhere are forbidden. `met` [head, query]: rows that were given;
    `valued` [head, key]: keys that met a value."""

    product: Mixed
    forbidden: Tensor
    logits: Tensor | None
    met: Tensor
    valued: Tensor


def whole(pieces: Pieces, sequence: int, seen: Sequence[Piece]) -> Whole:
    """The attention of one sequence of a batch, from what its products were given and gave."""
    heads, tokens, width = pieces.heads, pieces.tokens, pieces.head_width
    first = seen[0].product.mixed
    assert seen[0].product.weights is not None
    dtype = torch.promote_types(seen[0].product.weights.dtype, first.dtype)
    device = first.device
    size = heads * tokens
    A = torch.zeros(size * tokens, dtype=dtype, device=device)
    most = torch.full((size * tokens,), -math.inf, dtype=dtype, device=device)
    is_open = torch.zeros(size * tokens, dtype=torch.bool, device=device)
    raised = torch.zeros_like(A)
    V, M = (torch.zeros(size, width, dtype=first.dtype, device=device) for _ in range(2))
    met, valued = (torch.zeros(size, dtype=torch.bool, device=device) for _ in range(2))
    has_logits = all(piece.logits is not None for piece in seen)
    entries: list[tuple[Tensor, Tensor]] = []
    for placed, piece in zip(pieces.placed, seen, strict=True):
        product = piece.product
        assert product.weights is not None
        queries, owners, keys = (t.to(device) for t in (placed.queries, placed.heads, placed.keys))
        rows = (queries >= 0) & (queries // tokens == sequence)
        where = owners * tokens + queries % tokens  # [slice, query]
        slices = rows.nonzero()[:, 0]
        own_keys = keys[slices]  # [row, key]
        columns = own_keys >= 0
        pairs = (where[rows][:, None] * tokens + own_keys % tokens)[columns]

        def laid(known: Tensor, rows: Tensor = rows, columns: Tensor = columns) -> Tensor:
            return known.flatten(0, -3)[rows][columns]

        A.index_add_(0, pairs, laid(product.weights).to(dtype))
        barred = None if piece.forbidden is None else laid(piece.forbidden.expand(product.weights.shape))
        is_open[pairs if barred is None else pairs[~barred]] = True
        if has_logits:
            assert piece.logits is not None
            logits = laid(piece.logits.expand(product.weights.shape)).to(dtype)
            most.scatter_reduce_(0, pairs, logits, "amax")
            entries.append((pairs, logits))
        M.index_add_(0, where[rows], product.mixed.flatten(0, -3)[rows].to(M.dtype))
        met[where[rows]] = True
        at = owners[rows][:, None] * tokens + own_keys % tokens
        V[at[columns]] = product.values.flatten(0, -3)[slices][columns].to(V.dtype)
        valued[at[columns]] = True
    for pairs, logits in entries:
        highest = most[pairs]
        raised.index_add_(0, pairs, torch.where(highest.isfinite(), logits - highest, -math.inf).exp())
    summed = torch.where(most.isfinite(), most + raised.log(), most)

    def square(t: Tensor) -> Tensor:
        return t.view(1, heads, tokens, tokens)

    product = Mixed(square(A), V.view(1, heads, tokens, width), M.view(1, heads, tokens, width))
    return Whole(
        product,
        ~square(is_open),
        square(summed) if has_logits else None,
        met.view(heads, tokens),
        valued.view(heads, tokens),
    )
