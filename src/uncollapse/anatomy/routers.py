"""Routers: where an MLP sends each token to a few of several experts.

Found by what they do. A choice is an operation that picks the largest of a row of numbers (top-k, arg-max), one row for each token,
within a block. It is a router if it decides what the MLP adds. One token's choice is changed to another member of its row, in the
block run alone: this token's output changes, no other token's does, and none does if the MLP is taken away. Of several choices on
one way (groups of experts first, then experts) the last one counts.

What this cannot find: routers that mix all experts, and choices that are limited by what other tokens chose (capacities that are
full): there other tokens move too. A sparse hidden layer that keeps its largest units is a choice as well; its units then count as
experts, each a unit wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.block_alone import BlockAlone
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.tracing import Trace, tensors_in
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
                found[number] = Router(point, members)
                break
    return found


def _decides(alone: BlockAlone, number: int, point: Point, axes: StreamAxes) -> bool:
    """Whether the choice of the first token decides its own output of the block and no other's, and does so through this part."""
    assert alone.run.output is not None
    before = axes.cloud(alone.run.output)
    met: list[bool] = []
    otherwise = {point: _choosing_otherwise(met, before.shape[0] * before.shape[1])}
    try:
        after = axes.cloud(alone.replay((), otherwise))
        if met != [True] or after.shape != before.shape:
            return False
        past = [axes.cloud(alone.replay((number,), handlers)) for handlers in ({}, otherwise)]
    except Exception:  # the model's own code, given a choice that it may not expect: nothing is known of this one
        return False
    rounding = 4 * torch.finfo(before.dtype).eps * float(before.abs().max())
    gap, around = ((one - other).double().abs().amax(-1).flatten() for one, other in ((after, before), past))
    # The first row is the first token of the first sequence, whichever of the two axes comes first. Where the others are the same
    # in every bit, any change of its own is one; half precision would hide a small update below its rounding.
    least = 4 * rounding if bool(gap[1:].any()) else 0.0
    return bool(gap[0] > least) and bool((gap[1:] <= rounding).all()) and bool((around <= rounding).all())


def _choosing_otherwise(met: list[bool], tokens: int) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        chosen = chosen_in(output)
        members = next(tensors_in([args, kwargs])).shape[-1]
        rows = None if chosen is None else as_rows(chosen, tokens)
        if rows is None or rows.shape[1] >= members:
            met.append(False)
            return output
        met.append(True)
        assert chosen is not None
        free = next(i for i in range(members) if i not in rows[0].tolist())
        other = chosen.clone()
        other.view(-1)[0] = free
        if isinstance(output, Tensor):
            return other
        return type(output)((output[0], other))

    return handler


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
