"""W_O as a map that is met at work: what an attention adds for patterns that stand in place of its mixed values.

The block runs by itself. Each product that mixes values gives a pattern of ours instead of its result, laid out as the product
would have laid it, whichever axes hold sequences, heads and tokens; and what the heads write together is read. Unit vectors
give the rows of W_O, zeros its bias. A pattern of random numbers, another one at every token, must then be written as those rows
say: then the map is affine, each token is written by itself, and all tokens by the same map. How the model writes it down (a
module or an einsum, a product a head, adapters, weights fused with the values) makes no difference.

Where factors from elsewhere in the data act on the mixed values (gates), they are ones meanwhile: the map is that of the gated
values, and how each factor lies on these is told by numbers that the products give instead of their results.

When not to use it: something else that comes from the data acts between the heads and what they write (norms). There is no one
map then; the output projection's own weights may say more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uncollapse.anatomy.interception import Handler, Point, putting_another
from uncollapse.anatomy.operands import UnreadableError, arranged, product_operands
from uncollapse.anatomy.summands import with_operands
from uncollapse.anatomy.torch_calls import operands_of, operation_name, tensors_in, writes_in_place
from uncollapse.anatomy.vocabulary import AttentionCall, Gate, Part

SCALE = 256.0  # of the unit vectors, a power of two: f(s e) - f(0) then loses no digits of the weights to the bias
SAME_RATIO = 0.02  # of numbers that lie elsewhere by more: half precision rounds each by less
Written = Callable[
    [Tensor], Tensor
]  # mixed values [sequence, head, token, width] to what is written [sequence, token, width]


def giving(pattern: Tensor, call: AttentionCall, sequences: int, answered: list[int] | None = None) -> Handler:
    """Let a product that mixes values give `pattern` [sequence, head, token, width] instead of its result. Where several answer for
    the tokens in turn, `answered` holds how many were answered for, and is kept up to date.

    Raises `UnreadableError` where its axes do not hold that.
    """

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        seen = product_operands(function, args, kwargs, _places(output), call.weight_operand or 0, call.pair)
        places = _without_windows(arranged(seen.mixed, call.lead, sequences)).long()
        own = pattern
        if answered is not None:
            own = pattern[:, :, answered[0] : answered[0] + places.shape[2]]
            answered[0] += places.shape[2]
        if places.shape != own.shape or (places.numel() != output.numel() and not seen.summed):
            raise UnreadableError(f"its result is {tuple(output.shape)}, which does not hold {tuple(own.shape)}")
        flat = torch.zeros(output.numel(), dtype=output.dtype, device=output.device)
        if seen.summed:
            flat.index_add_(0, places.flatten(), own.to(flat).flatten())
        else:
            flat[places.flatten()] = own.to(flat).flatten()
        return flat.reshape(output.shape)

    return handler


def giving_in_turn(patterns: Sequence[Tensor], call: AttentionCall) -> Handler:
    """The same for a product that mixes one sequence at a time: `patterns` [1, head, token, width] of each turn, in order. What
    comes after them is left as it is."""
    left = iter(patterns)

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pattern = next(left, None)
        return function(*args, **kwargs) if pattern is None else giving(pattern, call, 1)(function, args, kwargs)

    return handler


def opening(gate: Gate) -> Handler:
    """Let an operation run with ones in place of a gate."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = with_operands(args, kwargs, {gate.operand: torch.ones_like})
        return function(*given, **named)

    return handler


def axes_order(numbered: Tensor, pattern: Tensor) -> tuple[int, ...] | None:
    """In which order the axes of `pattern` [sequence, head, token, width], entries that all differ, lie in a tensor that holds them
    times one number; None where it holds something else."""
    if numbered.numel() != pattern.numel():
        return None
    flat = numbered.double().flatten()
    for order in itertools.permutations(range(4)):
        ratio = flat / pattern.double().permute(order).flatten()
        if bool(((ratio - ratio[0]).abs() <= SAME_RATIO * ratio[0].abs()).all()) and bool(ratio[0]):
            return order
    return None


def gated(mixed: Tensor, part: Part, factors: Mapping[Point, Tensor | None]) -> Tensor:
    """The mixed values of all heads [sequence, head, token, width] behind the gates of their part. `factors`: what each gate was in
    this pass, as large as the result of its operation.

    Raises `UnreadableError` where one was not met, or has another size than the mixed values."""
    for gate in part.gates:
        factor = factors.get(gate.point)
        sizes = [mixed.shape[1]] if len(gate.orders) == 1 else [call.heads for call in part.attention]
        some = list(mixed.split(sizes, 1))
        if factor is None or any(each.numel() != factor.numel() for each in some):
            raise UnreadableError("a gate on its mixed values is not laid out as it was on the example")
        for number, order in enumerate(gate.orders):
            each = some[number]
            laid = factor.reshape([each.shape[axis] for axis in order])
            some[number] = each * laid.permute([order.index(axis) for axis in range(4)])
        mixed = torch.cat(some, 1)
    return mixed


def gate_noted(gate: Gate, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    """What a gate was in this run of its operation, as large as the result; None where another operation stands there than on the
    example: how many come before it may depend on the input (queries in chunks)."""
    operands = list(tensors_in([args, kwargs]))
    return operands[gate.operand].detach().expand(output.shape).clone() if gate.operand < len(operands) else None


def sounding(speaking: Tensor, call: AttentionCall, sequences: int) -> Handler:
    """Let a product that mixes values give noise for the heads that are `speaking` [head], and zeros for the others; attention
    within windows included. Raises `UnreadableError` where its axes were not understood."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        seen = product_operands(function, args, kwargs, _places(output), call.weight_operand or 0, call.pair)
        places = arranged(seen.mixed, call.lead, sequences).long()
        if places.numel() != output.numel() or places.shape[1] != len(speaking):
            raise UnreadableError(f"its result is {tuple(output.shape)}, which does not hold {len(speaking)} heads")
        loud = speaking.to(output.device).view(1, -1, 1, 1, 1).expand(places.shape)
        mask = torch.empty(output.numel(), dtype=torch.bool, device=output.device)
        mask[places.flatten()] = loud.flatten()
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return torch.where(mask.reshape(output.shape), noise, 0)

    return handler


def replacing(
    call: AttentionCall, heads: Sequence[int], made: Callable[[Tensor], Tensor], *, strict: bool = True
) -> Handler:
    """Let a product that mixes values give what `made` makes of the mixed values [sequence, head, token, width] of some of its
    heads in place of them, windows one after the other along the tokens. What other heads mix stays, bit for bit.

    Where its axes do not hold that, it raises `UnreadableError` if it is `strict`, and else changes nothing."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        # Laid out in memory as the product's own result: some models go on with `view`.
        result = torch.empty_like(output).copy_(output)
        try:
            laid = _heads_apart(call, function, args, kwargs, result)
            if laid.untyped_storage().data_ptr() == result.untyped_storage().data_ptr():
                own = laid[:, list(heads)]
                laid[:, list(heads)] = made(own.flatten(2, 3)).to(own).reshape(own.shape)
            else:  # laying it out takes a copy: the places of the entries go there instead
                places = (
                    _heads_apart(call, function, args, kwargs, _places(output))[:, list(heads)].flatten(2, 3).long()
                )
                flat = output.flatten()
                filled = flat.scatter(0, places.flatten(), made(flat[places]).to(flat).flatten())
                result.copy_(filled.reshape(output.shape))
        except UnreadableError:
            if strict:
                raise
            return output
        if writes_in_place(function):
            return output.copy_(result)
        _before[result] = output
        return result

    return putting_another(handler)


def _heads_apart(
    call: AttentionCall, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> Tensor:
    """The result of a product that mixes values, or what is laid out as it is, as [sequence, head, window, token, width]."""
    seen = product_operands(function, args, kwargs, result, call.weight_operand or 0, call.pair)
    if seen.summed:
        raise UnreadableError("the product that mixes its values adds the heads up in the same step")
    laid = arranged(seen.mixed, call.lead, _sequences(seen.mixed, call))
    if laid.numel() != result.numel() or laid.shape[1] != call.heads:
        raise UnreadableError(f"its result is {tuple(result.shape)}, which does not hold {call.heads} heads")
    return laid


def unreplaced(result: Tensor) -> Tensor:
    """What a product gave before `replacing` put other values in the place of some of its heads'; else `result` itself."""
    return _before.get(result, result)


_before = WeakTensorKeyDictionary()


def _sequences(mixed: Tensor, call: AttentionCall) -> int:
    """The sequences that a product's leading axes hold. Where they are folded together with windows, whose number the example does
    not tell, 1: heads are apart all the same."""
    sizes = list(zip(mixed.shape, call.lead, strict=False))
    apart = math.prod(size for size, axis in sizes if axis.role == "head")
    for size, axis in sizes:
        if axis.role == "sequence":
            return size
        if axis.role in {"sequence-major", "sequence-minor"} and axis.inner == "head":
            return size * apart // call.heads
    return 1


def laid_out(
    result: Tensor,
    call: AttentionCall,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sequences: int | None = None,
) -> Tensor:
    """The result of a product that mixes values as [sequence, head, token, width]. sequences: their number, where it is known.

    Raises `UnreadableError` where its axes do not hold that, as where attention stays within windows.
    """
    seen = product_operands(function, args, kwargs, result, call.weight_operand or 0, call.pair)
    return _without_windows(arranged(seen.by_head, call.lead, sequences or _sequences(seen.mixed, call)))


def _without_windows(found: Tensor) -> Tensor:
    if found.shape[2] != 1:
        raise UnreadableError("its attention stays within windows of the sequence")
    return found[:, :, 0]


def _places(output: Tensor) -> Tensor:
    """The number of every entry, in float64: exact, and a number that products can be laid out with."""
    kind = torch.float64 if output.device.type != "mps" else torch.float32
    return torch.arange(output.numel(), dtype=kind, device=output.device).reshape(output.shape)


def output_map(written: Written, shape: tuple[int, int, int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """W_O [head * width of a head, width], heads one after the other, and the bias [width]. `shape`: sequences, heads, tokens and
    the heads' width that `written` takes. `like`: a tensor of the right number format, on the right device.

    Raises `UnreadableError` where what is written is not one affine map of each token's mixed values.
    """
    sequences, heads, tokens, width = shape
    mixed = heads * width

    def laid(rows: Tensor) -> Tensor:
        return rows.reshape(sequences, tokens, heads, width).transpose(1, 2)

    def answers(rows: Tensor) -> Tensor:
        """What is written for rows [row, mixed], so many at a time as the example has tokens."""
        found = []
        for some in rows.split(sequences * tokens):
            padded = torch.cat([some, some.new_zeros(sequences * tokens - len(some), mixed)])
            found.append(written(laid(padded)).flatten(0, 1)[: len(some)])
        return torch.cat(found)

    zero = answers(torch.zeros(sequences * tokens, mixed, dtype=like.dtype, device=like.device))
    bias = zero[0]
    slack = 16 * torch.finfo(zero.dtype).eps * max(1.0, float(zero.abs().max().nan_to_num()))
    if not bool(((zero - bias).abs() <= slack).all()):
        raise UnreadableError(
            "what it adds holds something that does not come from its heads and differs between tokens"
        )
    units = SCALE * torch.eye(mixed, dtype=like.dtype, device=like.device)
    matrix = (answers(units) - bias) / SCALE
    generator = torch.Generator().manual_seed(0)
    check = torch.randn(sequences * tokens, mixed, generator=generator).to(like)
    gap = answers(check) - bias - check.to(matrix.dtype) @ matrix
    if not bool((gap.abs() <= rounding(check, matrix, bias)).all()):
        raise UnreadableError(
            "what it adds is not one affine map of its heads: a gate, a norm or the like acts between them and the projection"
        )
    return matrix, bias


def rounding(mixed: Tensor, matrix: Tensor, bias: Tensor) -> float:
    """How far what is written for mixed values [row, mixed] may be from `mixed @ matrix + bias`: the rounding of a few products
    one after the other (adapters, 8-bit activations excepted)."""
    eps = max(torch.finfo(t.dtype).eps for t in (mixed, matrix))
    size = float((mixed.double().abs() @ matrix.double().abs()).max()) + float(bias.double().abs().max())
    return 16 * eps * size + 1e-30


@dataclass(frozen=True)
class ProductMap:
    """What a product with a weight reads, and its map: matrix [mixed, width] and bias [width], None where it has none."""

    given: Tensor
    matrix: Tensor
    bias: Tensor | None


def product_map(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProductMap | None:
    """The map of a product written in a model's own code; None where it is no product with one matrix."""
    name = operation_name(function)
    operands = [t.detach() for t in operands_of(name, args, kwargs)]
    if name == "linear":
        return ProductMap(operands[0], operands[1].T, operands[2] if len(operands) > 2 else None)
    if name in {"matmul", "mm"} and operands[1].ndim == 2 and isinstance(args[0], Tensor):
        return ProductMap(operands[0], operands[1], None)
    if name == "addmm" and not {"beta", "alpha"} & kwargs.keys() and operands[0].ndim == 1:
        return ProductMap(operands[1], operands[2], operands[0])
    return None
