"""Which attention calls a group can act on: those laid out as the formulas have it, and why the others are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import AttentionCall

_PRODUCTS = {"matmul", "bmm", "baddbmm"}
_EXPONENTIALS = {"exp", "exp2"}


def refused_layout(call: AttentionCall) -> str:
    """Why no group acts on an attention call; empty where one can.

    A group acts where the operands are queries, keys and values [sequence, head, token, channel], with the first two axes in one
    or without heads, and the weights are the softmax of one set of logits [sequence, head, query, key]. Any other order of axes
    would be acted on as if it were this one, so it is refused.
    """
    if call.unreadable is not None:
        return call.unreadable
    if call.is_piece:
        return "its rows are put together of several products"
    if call.turns:
        return "it mixes each sequence by itself, in a loop"
    if call.score is None:
        return "its weights are not the softmax of one set of logits"
    roles = [axis.role for axis in call.lead]
    in_order = roles in (["sequence", "head"], ["sequence"]) or (
        roles == ["sequence-major"] and call.lead[0].inner == "head"
    )
    if not in_order:
        return "its heads and sequences are laid out in an order that no group acts on yet"
    if call.is_fused:
        return ""
    if call.weight_operand is None or not _is_plain(call.product, call.weight_operand, call.value_operand):
        return f"its values are mixed by {_operation(call.product)} in an order of axes that no group acts on yet"
    if call.similarity is not None and not _is_plain(call.similarity, call.query_operand, call.key_operand):
        return f"its logits are made by {_operation(call.similarity)} in an order of axes that no group acts on yet"
    return ""


def is_exponential(call: AttentionCall) -> bool:
    """Whether the softmax is written out, so that its axis shows only when the weights arrive at the values."""
    return call.score is not None and _operation(call.score) in _EXPONENTIALS


def is_over_last_axis(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a softmax, called with these arguments, makes the last axis sum to one."""
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return axis in (-1, next(tensors_in([args, kwargs])).ndim - 1)


def are_rows_of(weights: Tensor, made: Tensor) -> bool:
    """Whether weights [..., query, key] are, row by row and up to a factor of each row, the first columns of what a softmax or
    an exponential made. Else another axis was normalised, or the columns that belong to no key stand in front."""
    if weights.shape[:-1] != made.shape[:-1] or weights.shape[-1] > made.shape[-1]:
        return False
    first = made[..., : weights.shape[-1]].to(weights.dtype)
    left, right = weights * first.sum(-1, keepdim=True), first * weights.sum(-1, keepdim=True)
    eps = torch.finfo(weights.dtype).eps * weights.shape[-1]
    return bool(((left - right).abs() <= 16 * eps * first.sum(-1, keepdim=True)).all())


def _operation(point: Point) -> str:
    return point.operation.partition(" ")[0]


def _is_plain(point: Point, first: int, second: int) -> bool:
    """Whether a product contracts the last axis of its operand `first` with the last but one of `second`."""
    return _operation(point) in _PRODUCTS and first < second
