"""Which rows of a stream a token reaches through one part of a block: by what moves when the token is another, and by the weight it
is given.

What moves is seen in every part; it cannot tell a faint influence from rounding. A mask behind the softmax is the case in point:
a hidden key still counts in the softmax's own sum, and where the weights are scaled up again they lack the digits that it has cost.
Two things can tell them apart: the weights of an attention, where they can be read (a hidden key has none), and double precision.

When not to use it: for padding on a user's batch (`influence.hearing`), which asks for all tokens at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uncollapse.anatomy.double_precision import in_double_precision
from uncollapse.anatomy.influence import Products, is_coarse, moved, poked
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.masking import LEAST_SHARE
from uncollapse.anatomy.operands import UnreadableError, arranged, fused_arguments, product_operands
from uncollapse.anatomy.vocabulary import AttentionCall, Block, StreamAxes


class Alone(Protocol):
    """A block by itself on the arguments of one pass; see `block_alone.BlockAlone`."""

    block: Block
    stream: Tensor
    module: nn.Module

    @property
    def mixing(self) -> int | None: ...

    def update(self, part: int, stream: Tensor, further: Mapping[Point, Handler] | None = None) -> Tensor: ...

    def heads_write(self, number: int, stream: Tensor) -> Tensor: ...


CLEARLY = 1e-3  # of the largest change that a token brings to a row
FAR_MORE = 16  # times the rounding that a hidden token brings
HIDDEN = 4  # units in the last place of a feature's largest element, which a hidden key may bring
FAR = 256  # units beyond which a change is no rounding: in half precision a quarter of that element, or twice as much as it

Update = Callable[[Tensor, Mapping[Point, Handler]], Tensor]  # the stream, handlers at operations → what a part adds


@dataclass(frozen=True)
class Reach:
    """The rows of a sequence that one of its tokens reaches, that token left out: beyond rounding, by more than a trace, and in
    any bit. The `largest` change of any, and how large one can be that is `rounding`: a mask behind the softmax whose rows are
    scaled up again leaves the digits that the hidden key has cost them, and a projection spreads that over all features. `weighed`:
    the rows that give the token weight in some head, and so read what it says; None where the weights cannot be read."""

    rows: Tensor
    clearly: Tensor
    in_any_bit: Tensor
    largest: float
    rounding: float
    weighed: Tensor | None

    @property
    def is_heard(self) -> bool:
        """Whether any other row reads what the token says: by the weights, or by what moves."""
        return bool((self.rows if self.weighed is None else self.weighed).any())

    def more_than(self, other: Reach) -> bool:
        """Whether it reaches rows where it reaches none in the other case, or clearly one that does not change a bit there, or far
        more than in the other case, in which that may be rounding."""
        first = bool(self.rows.any()) and not bool(other.rows.any())
        only_rounding = other.largest <= other.rounding and self.largest > FAR_MORE * other.largest
        return first or only_rounding or bool((self.clearly & ~other.in_any_bit).any())


def gained_and_lost(before: Reach, after: Reach) -> tuple[bool, bool]:
    """Whether a token reaches rows that it did not reach before, and no longer some that it did: by the weights that it is given,
    where these say it. A token that counts less is not hidden, even if rounding hides what it still says; one that counted for
    little may be hidden all the same. By what moves where they do not: no row gives it weight in either case, or each does in one
    that the other lacks."""
    if before.weighed is not None and after.weighed is not None and before.weighed.shape == after.weighed.shape:
        if torch.equal(before.weighed, after.weighed) and bool(before.weighed.any()):
            return False, False
        gained, lost = bool((after.weighed & ~before.weighed).any()), bool((before.weighed & ~after.weighed).any())
        if gained != lost:
            return gained, lost
    return after.more_than(before), before.more_than(after)


def reach_of(alone: Alone, axes: StreamAxes, token: int) -> Reach:
    """Which rows this token of the first sequence reaches. Padded rows of which every key is forbidden may see each other."""
    part = alone.mixing
    assert part is not None
    assert axes.sequence is not None
    update = functools.partial(alone.update, part)
    other = alone.stream
    number = token
    grid = [alone.stream.shape[axis] for axis in axes.token]
    places = []
    for size in reversed(grid):
        places.append(number % size)
        number //= size
    changed = poked(other, axes.sequence, torch.tensor([0]))
    index: list[Any] = [slice(None)] * other.ndim
    index[axes.sequence] = 0
    for axis, place in zip(axes.token, reversed(places), strict=True):
        index[axis] = place
    one = other.clone()
    one[tuple(index)] = changed[tuple(index)]
    calls = alone.block.parts[part].attention
    products = Products()
    seen: tuple[Seen, Seen] = ([None] * len(calls), [None] * len(calls))
    with products:
        before = axes.cloud(update(other, weights_seen(calls, axes.cloud(other), seen[0])))
    after = axes.cloud(update(one, weights_seen(calls, axes.cloud(other), seen[1])))
    rows = moved(before[0], after[0], 0, products.coarsest(), beyond=HIDDEN)
    rows[token] = False
    change = torch.where(rows, (after[0].double() - before[0].double()).abs().nan_to_num().amax(-1), 0.0)
    in_any_bit = (before[0] != after[0]).any(-1)
    eps = max(torch.finfo(before.dtype).eps, products.coarsest())
    units = 1 if is_coarse(eps) else 16  # in finer formats there is room between rounding and what a real token brings
    rounding = units * eps * float(before[0].abs().nan_to_num(0.0, 0.0, 0.0).max())
    return Reach(
        rows,
        rows & (change > CLEARLY * change.max()),
        in_any_bit,
        float(change.max()),
        rounding,
        _weighed(*seen, token),
    )


def reached_by_later(module: nn.Module, update: Update, stream: Tensor, axes: StreamAxes) -> Tensor:
    """Which tokens [sequence, token] later ones reach through a part of `module`: the last alone, then the second half, since the
    last tokens may be padding. What may be rounding is computed again in double precision."""
    products, size = Products(), stream.shape[axes.token[0]]
    with products:
        plain = update(stream, {})
    found = torch.zeros(axes.cloud(stream).shape[:2], dtype=torch.bool, device=stream.device)
    if plain.shape != stream.shape or size < 2:
        return found
    for first in {size - 1, size // 2}:
        later = torch.arange(first, size)
        other = poked(stream, axes.token[0], later)
        before, after = (axes.cloud(each).flatten(0, 1) for each in (plain, update(other, {})))
        rows, far = (moved(before, after, 0, products.coarsest(), beyond=b).view(found.shape) for b in (HIDDEN, FAR))
        rows[:, first:] = False
        if bool((rows & ~far).any()):
            finer = _in_double_precision(module, update, (stream, other), axes, later)
            rows = rows if finer is None else rows & (far | finer)
        found |= rows
    return found


def _in_double_precision(
    module: nn.Module, update: Update, streams: tuple[Tensor, Tensor], axes: StreamAxes, later: Tensor
) -> Tensor | None:
    """The rows [sequence, token] that the `later` ones move where everything is computed in double precision; None where the block
    does not run like that, or gives no finite numbers."""
    try:
        with in_double_precision(module):
            before, after = (axes.cloud(update(stream.double(), {})) for stream in streams)
    except Exception:  # the model's own code, on a format it may not take
        return None
    if before.dtype != torch.float64 or not bool(before.isfinite().all()):
        return None
    rows = moved(before.flatten(0, 1), after.flatten(0, 1), 0, torch.finfo(torch.float32).eps, beyond=HIDDEN)
    rows = rows.view(before.shape[:2])
    rows[:, later] = False
    return rows


Seen = list[tuple[Tensor, Tensor] | None]  # by attention call: its weights and its values


def _weighed(before: Seen, after: Seen, token: int) -> Tensor | None:
    """The rows of the first sequence, beside the token's own, that give weight in some head to what the token says: to values that
    are others when it is another. None where the weights of a call cannot be read."""
    found: Tensor | None = None
    for one, other in zip(before, after, strict=True):
        if one is None or other is None:
            return None
        weights, (values, changed) = one[0][0].abs(), (each[1][0, :, token] for each in (one, other))
        rows = ((weights > LEAST_SHARE * weights.amax(-1, keepdim=True)) | weights.isnan())[..., token].any(0)
        rows = rows & (values != changed).any()
        found = rows if found is None else found | rows.to(found.device)
    if found is not None:
        found[token] = False
    return found


def weights_seen(calls: Sequence[AttentionCall], cloud: Tensor, seen: Seen) -> dict[Point, Handler]:
    """Handlers that take note of the weights [sequence, head, query, key] and the values [sequence, head, key, width] of attention
    calls whose queries and keys are the tokens of the stream; `seen` stays None at others."""
    sequences, tokens = cloud.shape[:2]

    def noting(number: int, call: AttentionCall) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            with contextlib.suppress(UnreadableError):
                found = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
                weights = found.weights
                if weights is None:  # a fused call makes no weights; of values that are all unit vectors it gives them
                    given = fused_arguments(args, kwargs)
                    value = given["value"]
                    units = torch.eye(value.shape[-2]).to(value).expand(*value.shape[:-1], value.shape[-2])
                    given |= {"value": units, "dropout_p": 0.0}
                    weights = inspect.unwrap(function)(
                        given.pop("query"), given.pop("key"), given.pop("value"), **given
                    )
                laid, values = (arranged(t, call.lead, sequences).detach() for t in (weights, found.values))
                keys = slice(call.before, laid.shape[-1] - call.after)
                laid, values = laid[..., keys], values[..., keys, :]
                if laid.shape[2] == 1 and laid.shape[-2:] == (tokens, tokens):
                    seen[number] = laid[:, :, 0].clone(), values[:, :, 0].clone()
            return output

        return handler

    readable = not any(call.unreadable or call.shares_queries for call in calls)
    return {call.product: noting(i, call) for i, call in enumerate(calls)} if readable else {}
