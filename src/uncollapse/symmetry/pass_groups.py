"""The groups that act on a forward pass: permutations of tokens and of keys, shifts and scalings of the logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.operands import fused_arguments
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import AttentionCall
from uncollapse.errors import InputError
from uncollapse.symmetry.draws import scales, shuffled, signs
from uncollapse.symmetry.layouts import are_rows_of, is_exponential, is_over_last_axis, refused_layout

_PLACES = {"position_ids", "decoder_position_ids", "cache_position", "attention_mask", "decoder_attention_mask"}


@dataclass(frozen=True)
class _TokenOrder:
    """For each sequence of a batch, which token comes to each place: `order` [sequence, token]. Padded places keep theirs."""

    order: Int[Tensor, "sequence token"]

    def compose(self, other: Self) -> Self:
        """This permutation first, then `other`."""
        return type(self)(self.order.gather(1, other.order))

    def inverse(self) -> Self:
        """The permutation that undoes this one."""
        return type(self)(self.order.argsort(1))

    @classmethod
    def identity(cls, mask: Bool[Tensor, "sequence token"]) -> Self:
        """Every token stays where it is."""
        return cls(torch.arange(mask.shape[1], device=mask.device).repeat(mask.shape[0], 1))

    @classmethod
    def random(cls, generator: torch.Generator, mask: Bool[Tensor, "sequence token"]) -> Self:
        """For each sequence another permutation of its real tokens (True in `mask`), none of them the identity where there
        are two."""
        order = cls.identity(mask).order
        for row, real in zip(order, mask, strict=True):
            places = real.nonzero().flatten()
            row[places] = places[shuffled(len(places), generator).to(places.device)]
        return cls(order)


@dataclass(frozen=True)
class TokenPermutation(_TokenOrder):
    """The tokens of every sequence in another order: S_n, f(Pi X) = Pi f(X). A symmetry without positions and causal mask.

    It moves token numbers, types, embeddings and labels. Positions and masks belong to the places and stay.
    """

    def batch(self, batch: Mapping[str, Any], stack: str = "") -> dict[str, Any]:
        """The batch with its tokens in the new order: those of the decoder with `stack="decoder_"`, else the others.

        Raises `InputError` where no tensor of the batch has the axes sequence and token of this permutation.
        """
        moved = {}
        for name, value in batch.items():
            decoder = name.startswith("decoder_") or (name == "labels" and "decoder_input_ids" in batch)
            aligned = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == self.order.shape
            if aligned and name not in _PLACES and decoder == (stack == "decoder_"):
                moved[name] = self.tokens(value)
        if not moved:
            raise InputError(
                f"TokenPermutation: expected a batch with tokens [{self.order.shape[0]}, {self.order.shape[1]}, ...], got "
                f"{', '.join(batch)}. Images and sounds become tokens only inside the model. Pass token numbers or embeddings."
            )
        return {**batch, **moved}

    def tokens(self, tensor: Tensor) -> Tensor:
        """A tensor [sequence, token, ...] with its tokens in the new order: outputs, hidden states."""
        if tensor.shape[:2] != self.order.shape:
            raise InputError(
                f"TokenPermutation: expected a tensor with the axes sequence and token {tuple(self.order.shape)}, got "
                f"{tuple(tensor.shape)}. The model may pool its tokens. Pass its last hidden state."
            )
        return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], self.order.to(tensor.device)]


class PassElement(Protocol):
    """An element of a group that acts inside the attention calls."""

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """What it does at the points of one attention call, of kind "attention" or "cross".

        Raises `InputError` for a call that it cannot act on: nothing is left out in silence.
        """


@dataclass(frozen=True)
class KeyPermutation(_TokenOrder):
    """The keys alone in another order, A -> A Pi: the values of self-attention permuted among the real tokens.

    Not a symmetry of a model at any length. It becomes one in the limit of long sequences at initialisation, where attention is
    uniform: that is rank collapse in width.
    """

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the values of self-attention. Raises `InputError` where they are laid out in another order."""
        if kind != "attention":
            return {}
        _require_layout("KeyPermutation", call)
        if call.is_fused:
            return {call.product: _at_fused(lambda given: {**given, "value": self._permuted(given["value"])})}
        operand = call.value_operand

        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            values = list(tensors_in([args, kwargs]))[operand]
            args, kwargs = _with_operand(args, kwargs, operand, self._permuted(values))
            return function(*args, **kwargs)

        return {call.product: handler}

    def _permuted(self, values: Tensor) -> Tensor:
        sequences, tokens = self.order.shape
        if values.ndim not in (3, 4) or values.shape[0] % sequences or values.shape[-2] != tokens:
            raise InputError(
                f"KeyPermutation: expected values of {sequences} sequences of {tokens} tokens, got {tuple(values.shape)}. "
                "The model changes the number of tokens, or another batch came. Make the order from this batch's mask."
            )
        order = self.order.to(values.device).repeat_interleave(values.shape[0] // sequences, 0)
        index = order.view(len(order), *(1,) * (values.ndim - 3), tokens, 1).expand_as(values)
        return values.gather(-2, index)


@dataclass(frozen=True)
class LogitShift:
    """The same number added to all logits of a row: row i gets `amounts[i mod len(amounts)]`. An exact symmetry of the softmax.

    Added at the softmax, behind all masks, which it respects. Columns beyond the keys are no logits of keys and are not
    shifted: sink columns break the symmetry. A group under addition.
    """

    amounts: Float[Tensor, " row"]

    def compose(self, other: LogitShift) -> LogitShift:
        """Both shifts. Raises `InputError` for amounts of different number."""
        if self.amounts.shape != other.amounts.shape:
            raise InputError(
                f"LogitShift: expected two shifts of as many amounts, got {len(self.amounts)} and {len(other.amounts)}. "
                "Draw both with the same number of rows."
            )
        return LogitShift(self.amounts + other.amounts)

    def inverse(self) -> LogitShift:
        """The shift back."""
        return LogitShift(-self.amounts)

    @classmethod
    def identity(cls, rows: int = 7) -> LogitShift:
        """No shift."""
        return cls(torch.zeros(rows, dtype=torch.float64))

    @classmethod
    def random(cls, generator: torch.Generator, rows: int = 7) -> LogitShift:
        """Amounts between 1 and 3 of either sign."""
        amounts = 1 + 2 * torch.rand(rows, generator=generator, dtype=torch.float64)
        return cls(amounts * signs(rows, generator))

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the logits of every attention. Raises `InputError` where they are laid out in another order."""
        return _at_logits("LogitShift", call, self._fused, self._logits)

    def _rows(self, like: Tensor, rows: int) -> Tensor:
        """The amount of every row [row, 1]."""
        return self.amounts[torch.arange(rows) % len(self.amounts)].to(like)[:, None]

    def _logits(self, logits: Tensor) -> Tensor:
        return logits + self._rows(logits, logits.shape[-2])

    def _fused(self, given: dict[str, Any]) -> dict[str, Any]:
        mask = _additive_mask(given)
        rows = self._rows(given["query"], given["query"].shape[-2])
        return {**given, "attn_mask": mask + rows, "is_causal": False}


@dataclass(frozen=True)
class LogitScaling:
    """All logits times `factor` > 0, masks apart: the temperature. Not a symmetry but the group whose attracting fixed points,
    rows uniform on the keys of largest logit, are entropy collapse. A group under multiplication.

    Columns beyond the keys, sink columns, are left as they are.
    """

    factor: float

    def __post_init__(self) -> None:
        if not (0 < self.factor < math.inf):
            raise InputError(
                f"LogitScaling: expected a factor above 0, got {self.factor}. Pass 2.0 to halve the temperature."
            )

    def compose(self, other: LogitScaling) -> LogitScaling:
        """Both scalings."""
        return LogitScaling(self.factor * other.factor)

    def inverse(self) -> LogitScaling:
        """The scaling back."""
        return LogitScaling(1 / self.factor)

    @classmethod
    def identity(cls) -> LogitScaling:
        """A factor of one."""
        return cls(1.0)

    @classmethod
    def random(cls, generator: torch.Generator) -> LogitScaling:
        """A factor between 1.25 and 1.7, or its inverse."""
        return cls(float(scales(1, generator)))

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the logits of every attention. Raises `InputError` where they are laid out in another order."""
        return _at_logits("LogitScaling", call, self._fused, self._logits)

    def _logits(self, logits: Tensor) -> Tensor:
        return torch.where(_forbidden(logits), logits, logits * self.factor)

    def _fused(self, given: dict[str, Any]) -> dict[str, Any]:
        scale = given.get("scale")
        scale = given["query"].shape[-1] ** -0.5 if scale is None else scale
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            mask = self._logits(mask)
        return {**given, "attn_mask": mask, "scale": scale * self.factor}


# Operands -------------------------------------------------------------------------------------------------------------
def _with_operand(
    args: tuple[Any, ...], kwargs: dict[str, Any], number: int, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a torch call with its tensor operand `number`, counted as by `tensors_in`, replaced."""
    counter = iter(range(number + 1))

    def walked(value: Any) -> Any:
        if isinstance(value, Tensor):
            return new if next(counter, None) == number else value
        if isinstance(value, (list, tuple)):
            return type(value)(walked(v) for v in value)
        return value

    return tuple(walked(a) for a in args), {k: walked(v) for k, v in kwargs.items()}


def _at_logits(
    name: str,
    call: AttentionCall,
    fused: Callable[[dict[str, Any]], dict[str, Any]],
    changed: Callable[[Tensor], Tensor],
) -> dict[Point, Handler]:
    """Handlers that change the logits of one attention call: the arguments of a fused call, or the operand of the softmax
    as far as it belongs to keys. The pass itself must show that rows run along the last axis, else `InputError` is raised."""
    _require_layout(name, call)
    if call.is_fused:
        return {call.product: _at_fused(fused)}
    assert call.score is not None
    keys: list[int] = []
    made: list[Tensor] = []

    def counting(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        keys[:] = [output.shape[-1]]
        return output

    def softmax(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logits = next(tensors_in([args, kwargs]))
        if not is_exponential(call) and not is_over_last_axis(args, kwargs):
            raise _layout_error(name, "a softmax over another axis than the last")
        if call.similarity is not None and not keys:
            raise _layout_error(name, "a product of queries and keys that two attention calls share")
        own = keys[0] if keys else logits.shape[-1]
        new = torch.cat([changed(logits[..., :own]), logits[..., own:]], -1)
        args, kwargs = _with_operand(args, kwargs, 0, new)
        output = function(*args, **kwargs)
        made[:] = [output] if is_exponential(call) or not keys or logits.shape[-1] > own else []
        return output

    def mixing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert call.weight_operand is not None
        weights = list(tensors_in([args, kwargs]))[call.weight_operand]
        of = made.pop() if made else None
        if of is not None and not keys and weights.shape[-1] != of.shape[-1]:
            raise _layout_error(name, "columns of the softmax that belong to no key, among sums of several products")
        if of is not None and (keys or is_exponential(call)) and not are_rows_of(weights, of):
            raise _layout_error(name, "weights that are not the softmax of these logits, row by row, with sinks behind")
        return function(*args, **kwargs)

    handlers: dict[Point, Handler] = {call.score: softmax, call.product: mixing}
    return handlers | ({} if call.similarity is None else {call.similarity: counting})


def _require_layout(name: str, call: AttentionCall) -> None:
    reason = refused_layout(call)
    if reason:
        raise _layout_error(name, f"{call.product}: {reason}")


def _layout_error(name: str, got: str) -> InputError:
    return InputError(
        f"{name}: expected attention laid out as [sequence, head, query, key], got {got}. It cannot be acted on. "
        "Choose other blocks with acting(..., blocks=...)."
    )


def _at_fused(changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = changed(fused_arguments(args, kwargs))
        return function(given.pop("query"), given.pop("key"), given.pop("value"), **given)

    return handler


def _additive_mask(given: Mapping[str, Any]) -> Tensor:
    """The mask of a fused call as what it adds to the logits, minus infinity for a forbidden pair."""
    query, mask = given["query"], given.get("attn_mask")
    if mask is None:
        mask = torch.ones(query.shape[-2], given["key"].shape[-2], dtype=torch.bool, device=query.device)
        mask = mask.tril() if given.get("is_causal", False) else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)


def _forbidden(logits: Tensor) -> Tensor:
    """Which logits stand for forbidden pairs: minus infinity, or near the smallest number there is."""
    return logits <= torch.finfo(logits.dtype).min / 2
