"""Sums of a model, as operations: which operands are added up, what each brings, and the sum without some of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.torch_calls import operation_name, tensors_in, writes_in_place


def left_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], gone: Collection[int]) -> Any:
    """What a sum returns when the summands `gone` are zero: operands numbered as `tensors_in` meets them. The operation itself
    runs, so shape, dtype and factors are its own, and adding zero rounds nothing.

    An operation in place writes into its first operand, as the original would have written the sum.
    """
    if 0 in gone and writes_in_place(function):
        next(tensors_in([args, kwargs])).zero_()
        gone = set(gone) - {0}
    given, named = with_operands(args, kwargs, dict.fromkeys(gone, torch.zeros_like))
    return function(*given, **named)


def summand(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Tensor:
    """What operand `number` brings to a sum, with the factors that the operation itself puts on it; nothing is written."""
    operands = list(tensors_in([args, kwargs]))
    name = operation_name(function)
    if name == "stack" or (name == "add" and "alpha" not in kwargs):
        return operands[number]
    others = [i for i in summands_of(name, len(operands)) if i != number and not same_term(name, i, number)]
    args, kwargs = with_operands(args, kwargs, {0: torch.clone} if writes_in_place(function) else {})
    result = left_of(function, args, kwargs, others)
    assert isinstance(result, Tensor)
    return result


def summands_of(operation: str, operands: int) -> tuple[int, ...]:
    """Which tensor operands of an operation are added up in it; none where it is no sum. Of a product inside it, both."""
    if operation in {"add", "sub", "lerp"}:
        return (0, 1) if operands >= 2 else ()
    if operation in {"addcmul"}:
        return (0, 1, 2) if operands >= 3 else ()
    return tuple(range(operands)) if operation == "stack" else ()


def same_term(operation: str, first: int, second: int) -> bool:
    """Whether two operands of a sum are factors of one and the same summand."""
    return operation == "addcmul" and {first, second} <= {1, 2}


def with_operands(
    args: tuple[Any, ...], kwargs: dict[str, Any], changed: Mapping[int, Callable[[Tensor], Tensor]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a torch call with some of its tensor operands changed; they are counted as by `tensors_in`."""
    met = itertools.count()
    return _changed(args, changed, met), _changed(kwargs, changed, met)


def _changed(value: Any, changed: Mapping[int, Callable[[Tensor], Tensor]], met: Iterator[int]) -> Any:
    """No closure that calls itself: it would be a cycle that keeps tensors, and the model, alive."""
    if isinstance(value, Tensor):
        number = next(met)
        return changed[number](value) if number in changed else value
    if type(value) in (list, tuple):
        return type(value)(_changed(item, changed, met) for item in value)
    if type(value) is dict:
        return {key: _changed(item, changed, met) for key, item in value.items()}
    return value
