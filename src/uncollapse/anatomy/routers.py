"""Routers: where an MLP sends each token to a few of several experts.

Found by what they do. A choice is an operation that picks the largest of a row of numbers (top-k, arg-max), one row for each token,
within a block. It is a router if it decides what the MLP adds. One token's choice is changed to another member of its row, in the
block run alone: this token's output changes, no other token's does, and none does if the MLP is taken away. Of several choices on
one way (groups of experts first, then experts) the last one counts, if the others act through it alone.

What this cannot find: routers that mix all experts, that take a token's first and second expert by two choices (NLLB-MoE), that
choose along another axis than the last, or whose rows are in another order than the stream's tokens. Nor choices that are limited
by what other tokens chose: there other tokens move too. That shows only where a capacity is full on the example. A sparse hidden
layer that keeps its largest units is a choice as well; its units then count as experts, each a unit wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.block_alone import BlockAlone
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.torch_calls import operation_name, tensors_in
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import Block, Router, StreamAxes

CHOICES = frozenset(["topk", "argmax"])


def choices_in(recorded: Trace, block: Block) -> list[tuple[Point, int]]:
    """The choices within the module of a block, in order, each with the number of members that a row has."""
    found: dict[Point, int] = {}
    for node in recorded.nodes:
        if node.operation not in CHOICES or not node.inputs:
            continue
        around = {(recorded.calls[i].name, recorded.calls[i].ordinal) for i in recorded.call_path(node.call)}
        members = recorded.nodes[node.inputs[0]].shape[-1:]
        if (block.module.name, block.module.call) in around and members:
            call = recorded.calls[node.call]
            found[Point(call.name, call.ordinal, node.counted, node.ordinal)] = members[0]
    return list(found.items())


def routers_of(alone: BlockAlone, recorded: Trace) -> dict[int, Router]:
    """By part of a proved block its router, if it has one."""
    block = alone.block
    choices, axes = choices_in(recorded, block), block.axes
    found: dict[int, Router] = {}
    if not choices or axes is None or axes.streams is not None:
        return found
    for number, part in enumerate(block.parts):
        if part.kind != "mlp":
            continue
        for point, members in reversed(choices):
            if _decides(alone, number, point, axes):
                others = [other for other, _ in choices if other != point]
                if not any(_decides(alone, number, other, axes, held=point) for other in others):
                    found[number] = Router(point, members)
                break
    return found


def _decides(alone: BlockAlone, number: int, point: Point, axes: StreamAxes, held: Point | None = None) -> bool:
    """Whether the choice of one token decides its own output of the block and no other's, and does so through this part. held: a
    choice that stays what it was."""
    assert alone.run.output is not None
    before = axes.cloud(alone.run.output)
    tokens = before.shape[0] * before.shape[1]
    row = min(1, tokens - 1)  # not the first, which is the first in any order
    met: list[bool] = []
    otherwise = {point: _choosing_otherwise(met, tokens, row)}
    try:
        if held is not None:
            kept: list[Any] = []
            alone.replay((), {held: _keeping(kept)})
            otherwise[held] = lambda *_: kept[0]
        after = axes.cloud(alone.replay((), otherwise))
        if met != [True] or after.shape != before.shape:
            return False
        past = [axes.cloud(alone.replay((number,), handlers)) for handlers in ({}, otherwise)]
    except Exception:  # the model's own code, given a choice that it may not expect: nothing is known of this one
        return False
    rounding = 4 * torch.finfo(before.dtype).eps * float(before.abs().max())
    gap, around = ((one - other).double().abs().amax(-1).flatten() for one, other in ((after, before), past))
    # Where tokens come first, the rows may follow either axis.
    own = row if (axes.sequence, axes.token) == (0, (1,)) else int(gap.argmax())
    others = torch.cat([gap[:own], gap[own + 1 :]])
    # Where the others are the same in every bit, any change of its own is one; half precision would hide a small update below its
    # rounding.
    least = 4 * rounding if bool(others.any()) else 0.0
    return bool(gap[own] > least) and bool((others <= rounding).all()) and bool((around <= rounding).all())


def _keeping(kept: list[Any]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept.append(function(*args, **kwargs))
        return kept[-1]

    return handler


def _choosing_otherwise(met: list[bool], tokens: int, row: int) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        chosen = chosen_in(output)
        among = next(tensors_in([args, kwargs]))
        members, rows = among.shape[-1], None if chosen is None else as_rows(chosen, tokens)
        if rows is None or rows.shape[1] >= members or not _is_along_the_last(function, among, args, kwargs):
            met.append(False)
            return output
        met.append(True)
        assert chosen is not None
        free = next(i for i in range(members) if i not in rows[row].tolist())
        other = chosen.clone()
        other.view(tokens, -1)[row, 0] = free
        if isinstance(output, Tensor):
            return other
        return type(output)((output[0], other))

    return handler


def _is_along_the_last(
    function: Callable[..., Any], among: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a choice picks along the last axis of what it is given."""
    place, usual = (2, -1) if operation_name(function) == "topk" else (1, None)
    axis = kwargs.get("dim", args[place] if len(args) > place else usual)
    return axis is not None and axis % among.ndim == among.ndim - 1


def chosen_in(output: Any) -> Tensor | None:
    """The indices that a choice gives."""
    return next((t for t in tensors_in(output) if not t.is_floating_point() and t.is_contiguous()), None)


def as_rows(chosen: Tensor, tokens: int) -> Tensor | None:
    """The choice as [token, chosen]; None where it has not a row for each of so many tokens."""
    if chosen.numel() == tokens:
        return chosen.reshape(tokens, 1)
    if chosen.ndim > 1 and chosen.shape[:-1].numel() == tokens:
        return chosen.reshape(tokens, -1)
    return None
