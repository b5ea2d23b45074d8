"""The operands of a product that mixes values, in one order of axes, however the call was written.

An attention ends in a product of weights A and values V. It may be a matmul in either order, a bmm with heads folded before or
behind the sequences, an einsum with any letters, or a fused call. The call itself says which axis is contracted (the keys)
and which axis of A survives (the queries). Everything else is a leading axis, and which of those hold sequences, heads or
windows is not decided here: that is found by poking (`proof`) and written down as `Lead`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from uncollapse.anatomy.torch_calls import operands_of, operation_name
from uncollapse.errors import UncollapseError

FUSED = "scaled_dot_product_attention"
_FUSED_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_PLAIN_PRODUCTS = {"matmul", "bmm", "mm", "rmatmul"}
ADDING_PRODUCTS = {"baddbmm", "addmm"}

LeadRole = Literal["sequence", "head", "window", "sequence-major", "sequence-minor"]


class UnreadableError(UncollapseError):
    """A product whose operands cannot be laid out as weights and values; the message is the reason, in words."""


class SeveralChoicesError(UnreadableError):
    """An einsum that leaves open which of its axes are queries or keys: pokes can tell (`chosen_pair`)."""


@dataclass(frozen=True)
class Lead:
    """One leading axis of a product of weights and values.

    `sequence`: one index a sequence. `head`, `window`: the sequence is elsewhere. `sequence-major`: index = sequence · m +
    inner; `sequence-minor`: index = inner · sequences + sequence; `inner` says what the inner index counts.
    """

    role: LeadRole
    inner: Literal["head", "window"] = "head"


@dataclass(frozen=True)
class Mixed:
    """One product as it ran. weights [*lead, query, key] (None for a fused call, which never makes them), values
    [*lead, key, width], mixed [*lead, query, width]: views where that is possible. `summed` are the axes of lead that the
    product sums up, such as those of heads that write into the stream by themselves: along these `mixed` is the sum, expanded."""

    weights: Tensor | None
    values: Tensor
    mixed: Tensor
    summed: tuple[int, ...] = ()

    @property
    def by_head(self) -> Tensor:
        """The mixed values of each slice by itself, also where the product only gives their sum."""
        if not self.summed:
            return self.mixed
        assert self.weights is not None
        dtype = torch.promote_types(self.weights.dtype, self.values.dtype)  # under autocast they may differ
        return self.weights.to(dtype) @ self.values.to(dtype)


def replaced(value: Any, one: Tensor, other: Tensor) -> Any:
    """Nested arguments with one tensor in place of another."""
    if isinstance(value, Tensor):
        return other if value is one else value
    if type(value) in (list, tuple):
        return type(value)(replaced(v, one, other) for v in value)
    if type(value) is dict:
        return {k: replaced(v, one, other) for k, v in value.items()}
    return value


def fused_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name, however they were passed."""
    return {**dict(zip(_FUSED_NAMES, args, strict=False)), **kwargs}


def product_operands(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    weight_operand: int,
    pair: tuple[int, int] | None = None,
) -> Mixed:
    """Weights, values and result of one product. `weight_operand` is the number of the weights among the call's tensors, `pair`
    the axes of these that hold queries and keys, where the call itself leaves that open.

    Raises `UnreadableError` for a call that is no plain product of the two.
    """
    name = operation_name(function)
    tensors = operands_of(name, args, kwargs)
    if name == FUSED:
        given = fused_arguments(args, kwargs)
        return Mixed(None, given["value"], output)
    if name == "einsum":
        equation = args[0] if isinstance(args[0], str) else None
        return _einsum_operands(equation, tensors, output, weight_operand, pair)
    if name in ADDING_PRODUCTS:
        beta = kwargs.get("beta", 1)
        if beta != 0 and bool(tensors[0].any()):
            raise UnreadableError("the product that mixes the values also adds something to them")
        two, weight_operand = tensors[1:3], weight_operand - 1
        scale = kwargs.get("alpha", 1)
        if scale != 1:
            two[weight_operand] = two[weight_operand] * scale
    elif name in _PLAIN_PRODUCTS:
        two = tensors[:2]
        if name == "rmatmul":
            two, weight_operand = two[::-1], 1 - weight_operand
    else:
        raise UnreadableError(f"the values are mixed by {name}, which is no matrix product")
    if min(t.ndim for t in two) < 2:
        raise UnreadableError("the values are mixed by a product with a vector")
    weights, values = two[weight_operand], two[1 - weight_operand]
    if weight_operand == 1:  # V' A': the transposed product
        weights, values, output = weights.mT, values.mT, output.mT
    return _aligned(weights, values, output)


def _aligned(weights: Tensor, values: Tensor, mixed: Tensor) -> Mixed:
    lead = torch.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
    return Mixed(
        weights.expand(*lead, *weights.shape[-2:]),
        values.expand(*lead, *values.shape[-2:]),
        mixed.expand(*lead, *mixed.shape[-2:]),
    )


def _einsum_operands(
    equation: str | None, tensors: list[Tensor], output: Tensor, weight_operand: int, pair: tuple[int, int] | None
) -> Mixed:
    of_weights, of_values, result = _spelled(equation, tensors, output.ndim, weight_operand)
    weights, values = tensors[weight_operand], tensors[1 - weight_operand]
    both = [c for c in result if c in of_weights and c in of_values]
    contracted, only_weights, only_values = _open_axes(of_weights, of_values, result)
    if pair is not None and max(pair) < len(of_weights):
        query, key = (of_weights[axis] for axis in pair)
    elif len(contracted) == len(only_weights) == 1:
        query, key = only_weights[0], contracted[0]
    else:
        raise SeveralChoicesError(f"in the einsum {equation!r} several axes may be the queries or the keys")
    if query not in only_weights or key not in contracted:
        raise UnreadableError(f"the einsum {equation!r} is another one than on the example")
    summed = [c for c in contracted if c != key]
    lead = both + [c for c in only_weights if c != query] + summed
    sizes = dict(zip(of_weights, weights.shape, strict=True)) | dict(zip(of_values, values.shape, strict=True))
    A = _ordered(weights, of_weights, [*lead, query, key], sizes)
    V = _ordered(values, of_values, [*lead, key, *only_values], sizes)
    M = _ordered(output, result, [*lead, query, *only_values], sizes)
    count = len(only_values)
    return Mixed(
        A,
        V.flatten(-count) if count > 1 else V,
        M.flatten(-count) if count > 1 else M,
        tuple(range(len(lead) - len(summed), len(lead))),
    )


def chosen_pair(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    weight_operand: int,
    moved: tuple[set[int], set[int]],
) -> tuple[int, int] | None:
    """Which axes of the weights of an einsum hold queries and keys, from the axes along which one token moves a single place: of
    the weights (only the token's query changed) and of the values. None where that leaves several, or none."""
    tensors = operands_of("einsum", args, kwargs)
    of_weights, of_values, result = _spelled(
        args[0] if isinstance(args[0], str) else None, tensors, output.ndim, weight_operand
    )
    contracted, only_weights, _ = _open_axes(of_weights, of_values, result)
    queries = [c for c in only_weights if of_weights.index(c) in moved[0]]
    keys = [c for c in contracted if of_values.index(c) in moved[1]]
    if len(queries) != 1 or len(keys) != 1:
        return None
    return of_weights.index(queries[0]), of_weights.index(keys[0])


def any_pair(args: tuple[Any, ...], output: Tensor, weight_operand: int) -> tuple[int, int] | None:
    """The last of the axes that only the weights of an einsum have, and the contracted one: queries and keys, where it is known of
    each slice where it stands. None where several axes are contracted."""
    tensors = operands_of("einsum", args, {})
    equation = args[0] if isinstance(args[0], str) else None
    of_weights, of_values, result = _spelled(equation, tensors, output.ndim, weight_operand)
    contracted, only_weights, _ = _open_axes(of_weights, of_values, result)
    if len(contracted) != 1:
        return None
    return of_weights.index(only_weights[-1]), of_weights.index(contracted[0])


def _open_axes(of_weights: str, of_values: str, result: str) -> tuple[list[str], list[str], list[str]]:
    """The axes that an einsum contracts, those of the weights alone, and those of the values alone."""
    contracted = [c for c in of_weights if c in of_values and c not in result]
    only_weights = [c for c in result if c in of_weights and c not in of_values]
    only_values = [c for c in result if c in of_values and c not in of_weights]
    lost = [c for c in of_weights + of_values if c not in result and c not in contracted]
    if not contracted or lost or not only_weights or not only_values:
        raise UnreadableError(
            f"the values are mixed by the einsum '{of_weights},{of_values}->{result}', which is no product of weights and values"
        )
    return contracted, only_weights, only_values


def _spelled(equation: str | None, tensors: list[Tensor], axes: int, weight_operand: int) -> tuple[str, str, str]:
    """The letters of weights, values and the result, with its `axes`; axes that the equation leaves out are given letters."""
    if equation is None or len(tensors) != 2:
        raise UnreadableError("the values are mixed by an einsum of more than two operands, or one written with lists")
    equation = equation.replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if "." in equation:  # "..." stands for axes that both operands and the result share: name them
        spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
        hidden = max(t.ndim - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True))

        def spelled(term: str, axes: int) -> str:
            own = axes - len(term.replace("...", ""))
            return term.replace("...", "".join(spare[hidden - own : hidden]))

        terms = [spelled(term, t.ndim) for term, t in zip(terms, tensors, strict=True)]
        result = spelled(result, axes)
    if not arrow:
        letters = "".join(terms)
        result = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    of_weights, of_values = terms[weight_operand], terms[1 - weight_operand]
    if any(len(set(term)) != len(term) for term in (of_weights, of_values)):
        raise UnreadableError("the values are mixed by an einsum that takes a diagonal")
    return of_weights, of_values, result


def _ordered(tensor: Tensor, letters: str, wanted: Sequence[str], sizes: Mapping[str, int]) -> Tensor:
    """`tensor` with its axes in the wanted order; an axis that it lacks is expanded to its size."""
    present = [c for c in wanted if c in letters]
    moved = tensor.permute([letters.index(c) for c in present])
    for position, letter in enumerate(wanted):
        if letter not in letters:
            moved = moved.unsqueeze(position)
    return moved.expand([sizes[c] if c not in letters else -1 for c in wanted])


def arranged(tensor: Tensor, lead: Sequence[Lead], sequences: int) -> Tensor:
    """[*lead, ·, ·] as [sequence, head, window, ·, ·]. `sequences` is their number in this batch.

    Raises `UnreadableError` where the sizes do not allow it.
    """
    axes = tensor.ndim - 2
    if axes != len(lead):
        raise UnreadableError(f"{axes} leading axes where {len(lead)} were found on the example")
    where: dict[str, list[int]] = {"sequence": [], "head": [], "window": []}
    shape: list[int] = []
    for size, axis in zip(tensor.shape[:-2], lead, strict=True):
        if axis.role in {"head", "window"}:
            where[axis.role].append(len(shape))
            shape.append(size)
        elif axis.role == "sequence":
            if size not in {1, sequences}:
                raise UnreadableError(f"{size} slices for {sequences} sequences")
            where["sequence"].append(len(shape))
            shape.append(size)
        else:
            if size % sequences:
                raise UnreadableError(f"{size} slices for {sequences} sequences")
            is_major = axis.role == "sequence-major"
            where["sequence"].append(len(shape) + (not is_major))
            where[axis.inner].append(len(shape) + is_major)
            shape += [sequences, size // sequences] if is_major else [size // sequences, sequences]
    if not where["sequence"] and sequences > 1:
        raise UnreadableError(f"no axis for {sequences} sequences")
    axes_of = [where[kind] for kind in ("sequence", "head", "window")]
    order = [axis for axes_ in axes_of for axis in axes_]
    split = tensor.reshape(*shape, *tensor.shape[-2:]).permute(*order, len(shape), len(shape) + 1)
    counts = [math.prod(shape[axis] for axis in axes_) for axes_ in axes_of]
    return split.reshape(*counts, *tensor.shape[-2:])


# Pairs that may not look at each other ------------------------------------------------------------------------------
