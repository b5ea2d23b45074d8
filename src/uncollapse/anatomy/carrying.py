"""Carry what is known of the pairs of queries and keys along the operations that lead from the logits to the weights.

A mask forbids pairs in the order of axes that the logits have; the weights may arrive at the values in another. Every operation
on the way either moves entries (then what is known moves with them, by the very same call) or works on each by itself (then it
stays). A product that mixes heads behind the softmax leaves the pairs where they are, but its results follow from the logits of
several. Whatever does something else loses what is known, and nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.masking import BY_RESULT, forbidden_by_step
from uncollapse.anatomy.torch_calls import MATRIX_PRODUCTS, operands_of, operation_name, tensors_in, writes_in_place
from uncollapse.anatomy.vocabulary import AttentionCall, MaskingStep

Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any], None]  # function, operands, result

# An operation that moves values and changes none: what is known of the pairs moves with them.
_MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "expand",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "cat",
        "concat",
        "stack",
        "getitem",
        "narrow",
        "select",
        "split",
        "chunk",
        "unbind",
        "pad",
        "repeat_interleave",
        "repeat",
        "contiguous",
        "clone",
        "t",
        "mT",
        "get",
        "roll",
        "flip",
        "index_select",
        "view_as",
        "reshape_as",
        "expand_as",
    ]
)


@dataclass
class _Known:
    """What is known of the pairs of one tensor on the way to the weights: the pairs that are forbidden (broadcastable to it, or
    None), and its logits. `holder` keeps the tensor alive, so that its identity stays its own."""

    holder: Tensor
    forbidden: Tensor | None
    logits: Tensor | None


class Way:
    """Carries masks and logits from where they are met to the weights of one call. With `numbered`, instead of logits, the
    numbers of the entries at that masking step: where they arrive says what the step's axes are."""

    def __init__(self, call: AttentionCall, numbered: MaskingStep | None = None) -> None:
        self.call, self.numbered = call, numbered
        self.known: dict[int, _Known] = {}
        self.forbade: list[MaskingStep] = []  # the steps that forbade a pair in this pass, in order
        self.masking: dict[Point, list[MaskingStep]] = {}
        for step in call.masking:
            self.masking.setdefault(step.point, []).append(step)

    def observers(self) -> dict[Point, Observer]:
        found: dict[Point, Observer] = {}
        for point in self.call.way:
            found[point] = self._at(point)
        return found

    def _at(self, point: Point) -> Observer:
        def observe(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            name = operation_name(function)
            operands = operands_of(name, args, kwargs)
            if self.numbered is None and self.call.logits is not None and point == self.call.logits[0]:
                logits = operands[self.call.logits[1]]
                self.known[id(logits)] = _Known(logits, self._forbidden_of(logits), logits)
            tracked = [self.known[id(t)] for t in operands if id(t) in self.known]
            if name in _MOVES:
                if tracked:
                    self._move(function, args, kwargs, output)
                return
            results = [output] if isinstance(output, Tensor) else [args[0]] if name == "setitem" else []
            if self.numbered is None and name in BY_RESULT and writes_in_place(function):
                for result in results:  # what it did is told by what was there before, and that is gone
                    self.known.pop(id(result), None)
                return
            for result in results:
                kept = [k for k in tracked if _fits(k, result)]
                forbidden = logits_of = None
                for known in kept:
                    forbidden = _either(forbidden, known.forbidden)
                    if logits_of is None and (self.numbered is not None or name not in MATRIX_PRODUCTS):
                        logits_of = known.logits
                for step in self.masking.get(point, ()):
                    barred = forbidden_by_step(function, args, kwargs, step.operand, result, step.after_softmax)
                    if barred is not None:
                        self.forbade.append(step)
                    forbidden = _either(forbidden, barred)
                if self.numbered is not None and point == self.numbered.point:
                    numbers = torch.arange(result.numel(), dtype=torch.float64, device=result.device)
                    logits_of = numbers.reshape(result.shape)
                if kept or forbidden is not None or logits_of is not None:
                    self.known[id(result)] = _Known(result, forbidden, logits_of)

        return observe

    def _forbidden_of(self, tensor: Tensor) -> Tensor | None:
        known = self.known.get(id(tensor))
        return None if known is None else known.forbidden

    def _move(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        def moved(pick: Callable[[_Known], Tensor | None], fill: Callable[[Tensor], Tensor]) -> list[Tensor] | None:
            def replaced(value: Any) -> Any:
                if isinstance(value, Tensor):
                    known = self.known.get(id(value))
                    if known is None:
                        return fill(value) if value.is_floating_point() else value
                    held = pick(known)
                    return fill(value) if held is None else held.expand(value.shape)
                if type(value) in (list, tuple):
                    return type(value)(replaced(v) for v in value)
                return value

            try:
                return list(tensors_in(function(*replaced(args), **{k: replaced(v) for k, v in kwargs.items()})))
            except (RuntimeError, TypeError):  # such as a pad with a number that a boolean cannot be
                return None

        given = [self.known[id(t)] for t in tensors_in([args, kwargs]) if id(t) in self.known]
        forbidden = (
            moved(lambda k: k.forbidden, lambda t: torch.zeros_like(t, dtype=torch.bool))
            if any(k.forbidden is not None for k in given)
            else None
        )
        logits = moved(lambda k: k.logits, lambda t: t) if all(k.logits is not None for k in given) else None
        for number, result in enumerate(tensors_in(output)):
            self.known[id(result)] = _Known(
                result, None if forbidden is None else forbidden[number], None if logits is None else logits[number]
            )

    def end(self, weights: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What arrived at the weights: forbidden pairs and logits in the order of its axes. Everything else is let go."""
        known = self.known.get(id(weights))
        self.known.clear()
        return (None, None) if known is None else (known.forbidden, known.logits)


def _fits(known: _Known, result: Tensor) -> bool:
    return known.holder.shape == result.shape


def _either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first | second
