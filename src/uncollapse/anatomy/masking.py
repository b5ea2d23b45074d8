"""Pairs that may not look at each other: which operand of an operation forbids them, and the operation without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.operands import ADDING_PRODUCTS, UnreadableError, replaced
from uncollapse.anatomy.torch_calls import operands_of, operation_name, writes_in_place

_ADDITIONS = {"add", "sub"} | ADDING_PRODUCTS  # the first operand of an adding product may be a mask on its logits
# What these do to the pairs is told by their result: the operand that takes part is the logits' or the weights' own.
BY_RESULT = frozenset(
    ["tril", "triu", "minimum", "fmin", "addcmul", "lerp", "einsum", "scatter", "index_fill", "masked_scatter"]
)
LEAST_SHARE = 1e-30  # a weight below this share of its row's largest is the weight of a forbidden pair
FAR_BELOW = math.log(LEAST_SHARE)  # of a logit: 69 nats below the row's best


def forbidden_by_addition(operand: Tensor) -> tuple[Tensor | None, bool]:
    """Which pairs an operand that is added to the logits forbids, and whether it also shifts logits of allowed pairs.

    It forbids where it takes one negative number and is 0 elsewhere, whatever that number is (sums of such masks hold a few
    multiples of it, or minus infinity). An operand of many values is a bias; of that only what leaves a pair below
    `LEAST_SHARE` of the row in every head is forbidden.
    """
    if operand.numel() <= 1 or not operand.is_floating_point():
        return None, bool(operand.numel() and (operand != 0).any())
    marked = operand != 0
    if not bool(marked.any()):
        return None, False
    values = operand[marked]
    if bool((values > 0).any()) or bool(values.isnan().any()):
        return _far_below(operand), True
    nearest = float(values.max())
    if bool((values == nearest).all()):
        return marked, False
    multiples = (values / nearest).round()
    with_infinity = values.isinf() | (values == torch.finfo(operand.dtype).min)
    is_sum = ((values == multiples * nearest) & (multiples <= 4)) | with_infinity
    # The distances of a few tokens are multiples of one number, too: a sum of masks forbids with the least of its values.
    if nearest <= FAR_BELOW and bool(is_sum.all()):
        return marked, False
    return _far_below(operand), True


def forbids_and_shifts(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], operand: int
) -> bool:
    """Whether what an operation adds to the logits by its operand number `operand` is a mask and a bias in one: what the bias is
    at a forbidden pair cannot be told from it."""
    name = operation_name(function)
    if name not in _ADDITIONS:
        return False
    mask = operands_of(name, tuple(args), kwargs)[operand]
    forbidden, shifts = forbidden_by_addition(_times(mask, factor_of(function, kwargs, operand)))
    return forbidden is not None and shifts


def factor_of(function: Callable[..., Any], kwargs: Mapping[str, Any], operand: int) -> float:
    """By what an operation multiplies the mask, its operand number `operand`, that it adds to the logits: -1 where it subtracts
    it. What logits are added to, or subtracted from, stays as it is."""
    name = operation_name(function)
    if name in ADDING_PRODUCTS:
        return float(kwargs.get("beta", 1))
    factor = float(kwargs.get("alpha", 1)) if operand else 1.0
    return -factor if name == "sub" and operand else factor


def _times(mask: Tensor, factor: float) -> Tensor:
    return mask if factor == 1 or not mask.is_floating_point() else mask * factor


def out_of_reach(dtype: torch.dtype, factor: float) -> float:
    """What an operation adds `factor` times to a logit to put its pair out of reach."""
    bounds = torch.finfo(dtype)
    return min(max(bounds.min / factor, bounds.min), bounds.max)


def _far_below(operand: Tensor) -> Tensor | None:
    """Pairs that a bias of many values puts out of reach: 69 nats below the row's best, in every head."""
    if operand.ndim < 2 or operand.shape[-1] < 2:
        return None
    below = far_below(operand)
    if operand.ndim >= 3:
        below = below.all(-3, keepdim=True)
    return below if bool(below.any()) else None


def far_below(operand: Tensor) -> Tensor:
    """Which elements of a bias lie 69 nats below the best of their own row, whatever other heads and sequences hold."""
    best = operand.amax(-1, keepdim=True)
    return (operand - best.nan_to_num(neginf=0.0)) <= FAR_BELOW


def forbidden_by_step(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    operand: int,
    result: Tensor,
    after_softmax: bool | None,
) -> Tensor | None:
    """The pairs, broadcastable to `result`, that an operation between logits and weights forbids by its operand number `operand`:
    an addition of 0 and one negative number, a replacement by a negative logit or by no weight, a product with 0 and 1, and what
    `BY_RESULT` names, told by operand and result. None where it forbids none. `after_softmax` is None where no softmax makes the
    weights: then it may be either."""
    name = operation_name(function)
    mask = operands_of(name, tuple(args), kwargs)[operand]
    found: Tensor | None = None
    if name in BY_RESULT:
        found = _forbidden_by_result(mask, result, after_softmax)
    elif name in _ADDITIONS and after_softmax is not True:
        found, _ = forbidden_by_addition(_times(mask, factor_of(function, kwargs, operand)))
    elif name == "mul":
        if after_softmax is not False and mask.numel() > 1 and bool(((mask == 0) | (mask == 1)).all()):
            found = mask == 0
    elif name in {"masked_fill", "setitem"} and mask.dtype == torch.bool:
        if _forbids(args[2] if len(args) > 2 else kwargs.get("value"), after_softmax):
            found = mask
    elif name == "where" and mask.dtype == torch.bool:
        first, second = _alternatives(args, kwargs)
        if isinstance(first, Tensor) and first.shape == result.shape and _forbids(second, after_softmax):
            found = ~mask
        elif isinstance(second, Tensor) and second.shape == result.shape and _forbids(first, after_softmax):
            found = mask
    if found is None or found.ndim > result.ndim or not bool(found.any()):
        return None
    fits = all(a in {1, b} for a, b in zip(found.shape[::-1], result.shape[::-1], strict=False))
    return found if fits else None


def _forbidden_by_result(given: Tensor, result: Tensor, after_softmax: bool | None) -> Tensor | None:
    """The pairs that an operation put out of reach, as told by logits or weights before and after it: all others stay what they
    were. None where it does anything else."""
    if given.shape != result.shape or not result.is_floating_point():
        return None
    gone = torch.zeros_like(result, dtype=torch.bool)
    if after_softmax is not False:
        gone |= (result == 0) & (given != 0)
    if after_softmax is not True:
        gone |= result <= given + FAR_BELOW
    return gone if bool(((given == result) | gone).all()) else None


def result_shape(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of what an operation between logits and weights will return."""
    name = operation_name(function)
    given = operands_of(name, args, kwargs)
    if name in ADDING_PRODUCTS:
        return (*given[1].shape[:-1], given[2].shape[-1])
    if name == "setitem":
        return tuple(given[0].shape)
    if name in BY_RESULT:
        return max((tuple(t.shape) for t in given), key=lambda shape: (len(shape), math.prod(shape)))
    return tuple(torch.broadcast_shapes(*(t.shape for t in given)))


def step_without(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    operand: int,
    after_softmax: bool | None,
    hidden: Tensor | None,
) -> Any:
    """The result of the same operation when it forbids nothing but the `hidden` pairs (None: nothing at all). Not for what adds a
    mask and a bias in one: see `forbids_and_shifts`."""
    name = operation_name(function)
    given = dict(kwargs)
    mask = operands_of(name, args, given)[operand]
    if name in BY_RESULT:
        before = mask.clone() if writes_in_place(function) else mask
        result = function(*args, **given)
        forbidden = _forbidden_by_result(before, result, after_softmax)
        if forbidden is None:
            return result
        found = torch.where(forbidden, before, result)
        least = torch.finfo(result.dtype).min if after_softmax is False else 0.0
        found = found if hidden is None else torch.where(hidden, least, found)
        return result.copy_(found) if writes_in_place(function) else laid_like(found, result)
    if name in _ADDITIONS:
        factor = factor_of(function, given, operand)
        forbidden, _ = forbidden_by_addition(_times(mask, factor))
        if forbidden is None:
            return function(*args, **given)
        open_mask = mask.masked_fill(forbidden, 0)
        if hidden is not None:
            open_mask = torch.where(hidden, out_of_reach(open_mask.dtype, factor), open_mask)
        return _with(function, args, given, mask, laid_like(open_mask, mask))
    if name == "mul":
        if not bool(((mask == 0) | (mask == 1)).all()):
            return function(*args, **given)
        kept = torch.ones_like(mask)
        if hidden is not None and after_softmax is not False:
            kept = laid_like(torch.where(hidden, torch.zeros((), dtype=kept.dtype), kept), mask)
        return _with(function, args, given, mask, kept)
    nothing = torch.zeros(1, dtype=torch.bool, device=mask.device) if hidden is None else hidden
    if name == "masked_fill":
        if not _forbids(args[2] if len(args) > 2 else given.get("value"), after_softmax):
            return function(*args, **given)
        return function(args[0], laid_like(nothing, mask), args[2] if len(args) > 2 else given["value"])
    if name == "setitem":
        if not _forbids(args[2], after_softmax) or mask.dtype != torch.bool:
            return function(*args, **given)
        return function(args[0], nothing.expand_as(args[0]), args[2])
    if name == "where":
        first, second = _alternatives(args, given)
        keeps_first = _forbids(second, after_softmax)
        if not keeps_first and not _forbids(first, after_softmax):
            return function(*args, **given)
        return _with(function, args, given, mask, laid_like(~nothing if keeps_first else nothing, mask))
    return function(*args, **given)


def without_what_forbids(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[bool, Any]:
    """Whether an operation, on the way to an operand of the logits, puts a mask into it, and its result without: of an addition
    whatever operand is a mask, and surely no bias; of a filling or a choice the number that forbids. Runs nothing where it puts in
    none. What is written in place is written into the first operand."""
    name = operation_name(function)
    operands = operands_of(name, args, kwargs)
    if name in {"add", "sub"}:
        opened, given, named = False, args, dict(kwargs)
        for number, operand in enumerate(operands):
            if _only_forbids(_times(operand, factor_of(function, kwargs, number))):
                opened = True
                if writes_in_place(function) and number == 0:
                    operand.zero_()
                else:
                    given = replaced(given, operand, torch.zeros_like(operand))
                    named = replaced(named, operand, torch.zeros_like(operand))
        return opened, function(*given, **named) if opened else None
    if name == "masked_fill":
        value = args[2] if len(args) > 2 else kwargs.get("value")
        if not _is_out_of_reach(value):
            return False, None
        return True, function(operands[0], torch.zeros_like(operands[1]), value)
    if name == "setitem":
        return _is_out_of_reach(args[2]), None
    if name == "where" and operands and operands[0].dtype == torch.bool and len([*args, *kwargs]) == 3:
        first, second = _alternatives(args, kwargs)
        for chosen, other in ((True, second), (False, first)):
            if _is_out_of_reach(other):
                return True, torch.where(torch.full_like(operands[0], chosen), first, second)
    return False, None


def _only_forbids(operand: Tensor) -> bool:
    """Whether an operand is a mask, and surely no bias: a bias over very few tokens may be one number beside zero, too."""
    forbidden, shifts = forbidden_by_addition(operand)
    return forbidden is not None and not shifts and bool((operand[forbidden.expand(operand.shape)] <= FAR_BELOW).all())


def _is_out_of_reach(value: Any) -> bool:
    """Whether a value is one number that puts any pair out of reach, whatever its bias."""
    number = _one_number(value)
    return number is not None and number <= FAR_BELOW


def step_with(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], operand: int, other: Tensor
) -> Any:
    """The result of an operation that adds `other` to the logits in the place of its operand number `operand`."""
    mask = operands_of(operation_name(function), args, kwargs)[operand]
    return _with(function, args, dict(kwargs), mask, laid_like(other, mask))


def laid_like(other: Tensor, mask: Tensor) -> Tensor:
    """What takes the place of a mask, in memory as that is where it can be: the order in which a sum is added up, and with it the
    last digit, follows from how its operands lie. Where nothing was forbidden, no bit is to change."""
    if torch.broadcast_shapes(other.shape, mask.shape) != mask.shape:
        return other
    return torch.empty_like(mask, dtype=other.dtype).copy_(other)


def _with(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], one: Tensor, other: Tensor
) -> Any:
    """The result of an operation with another tensor in the place of `one`. What it writes into the other it writes into `one` as
    well: the model may go on with that."""
    result = function(*replaced(args, one, other), **replaced(dict(kwargs), one, other))
    return one.copy_(result) if args and args[0] is one and writes_in_place(function) else result


def _alternatives(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a `where` chooses from. Of `x.where(condition, other)` the first is x itself."""
    if len(args) and isinstance(args[0], Tensor) and args[0].dtype != torch.bool:
        return args[0], args[2] if len(args) > 2 else kwargs.get("other")
    first = args[1] if len(args) > 1 else kwargs.get("input", kwargs.get("self"))
    return first, args[2] if len(args) > 2 else kwargs.get("other")


def _forbids(value: Any, after_softmax: bool | None) -> bool:
    """Whether a pair that is given this value is meant to be left out: a negative logit, or no weight."""
    number = _one_number(value)
    if number is None:
        return False
    return (number == 0 and after_softmax is not False) or (number < 0 and after_softmax is not True)


def _one_number(value: Any) -> float | None:
    """The number that a value is, everywhere where it is a tensor; None where it is none, or several."""
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if not tensor.numel() or tensor.is_complex():
        return None
    first = tensor.flatten()[0] if tensor.numel() > 1 else tensor
    return float(first) if tensor.numel() == 1 or bool((tensor == first).all()) else None


def spread_out(mask: Tensor, axes: Sequence[str | None], shape: Sequence[int]) -> Tensor:
    """mask [sequence, key] laid out over a tensor whose axes are known: broadcastable to `shape`. `axes` says of each axis what it
    holds (None: something else, or nothing).

    Raises `UnreadableError` where sequences or keys have no axis of their own.
    """
    sequences = mask.shape[0]
    key = [i for i, role in enumerate(axes) if role == "key"]
    held = [i for i, role in enumerate(axes) if role is not None and role.startswith("sequence")]
    if len(key) != 1 or (len(held) != 1 and sequences > 1) or shape[key[0]] != mask.shape[1]:
        raise UnreadableError("where padded keys stand among the masked pairs was not found")
    if not held:
        laid = mask[0]
        return laid.reshape([mask.shape[1] if i == key[0] else 1 for i in range(len(shape))])
    size, role = shape[held[0]], axes[held[0]]
    if role == "sequence-major":
        mask = mask.repeat_interleave(size // sequences, 0)
    elif role == "sequence-minor":
        mask = mask.repeat(size // sequences, 1)
    if mask.shape[0] != size:
        raise UnreadableError("where padded keys stand among the masked pairs was not found")
    if held[0] > key[0]:
        mask = mask.T
    return mask.reshape([size if i == held[0] else shape[key[0]] if i == key[0] else 1 for i in range(len(shape))])
