"""The groups of the symmetry framework as code that acts on a live model, composes and inverts.

Three groups act on the weights of attention and leave the function alone, as far as they survive in the architecture:

* `HeadPermutation`: key-value heads, and the heads within each, change places;
* `ValueOutputGauge`: W_V,g -> W_V,g M_g, W_h -> M_g^-1 W_h for the heads h of group g;
* `QueryKeyGauge`: W_Q,h -> W_Q,h T_g, W_K,g -> W_K,g T_g^-T with T_g commuting with the rotary embedding.

Four act on what passes through the model: `TokenPermutation` on a batch and on outputs, `KeyPermutation`, `LogitShift` and
`LogitScaling` inside the attention calls. The last is no symmetry: temperature is the group element.

`a.compose(b)` is `a` first, then `b`. `surviving(channels)` of a weight group says which subgroup survives on one attention
call. Weights are acted on with `transformed`, attention calls with `acting`; both put everything back, also after an
exception, the weights bit for bit. What a group does to weights is computed in float64 and rounded once.

    elements = drawn(ValueOutputGauge, channels_of(model, anatomy, batch), generator)
    with transformed(model, elements):
        model(**batch)

When not to use it: to train under. Gradients taken inside `transformed` are those of other weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.tracing import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall
from uncollapse.channels import Channels, Rows
from uncollapse.errors import InputError
from uncollapse.measures import heads

LARGEST_SCALE = 1.7  # of a random element, and 1/1.7 the smallest: condition at most 2.9
_PLACES = {"position_ids", "decoder_position_ids", "cache_position", "attention_mask", "decoder_attention_mask"}


@dataclass(frozen=True)
class Subgroup:
    """What is left of a group on one attention call. `surviving` says it in words, or why nothing is; `survives` whether there
    is more than the identity to draw from. `dimension` counts its continuous directions: 0 for a finite group, None where it is
    not known because the call cannot be acted on."""

    survives: bool
    surviving: str
    dimension: int | None


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one attention call head by head, in float64, as in the formulas: `queries` W_Q,h [head, input, channel],
    `keys` W_K,g and `values` W_V,g [group, input, channel], `projection` W_h [head, channel, width], the biases
    [head or group, channel] and `output_bias` [width]. `groups[h]` is the key-value head of head `h`. None: not read, or no bias.
    """

    groups: tuple[int, ...]
    queries: Float[Tensor, "head input channel"] | None = None
    query_bias: Float[Tensor, "head channel"] | None = None
    keys: Float[Tensor, "group input channel"] | None = None
    key_bias: Float[Tensor, "group channel"] | None = None
    values: Float[Tensor, "group input channel"] | None = None
    value_bias: Float[Tensor, "group channel"] | None = None
    projection: Float[Tensor, "head channel width"] | None = None
    output_bias: Float[Tensor, " width"] | None = None


class WeightElement(Protocol):
    """An element of a group that acts on weights."""

    roles: ClassVar[tuple[str, ...]]

    def on(self, weights: HeadWeights) -> HeadWeights:
        """The weights after the element has acted; the given ones are left alone."""

    def compose(self, other: Self) -> Self:
        """This element first, then `other`."""

    def inverse(self) -> Self:
        """The element that undoes this one."""

    @classmethod
    def identity(cls, channels: Channels) -> Self:
        """The element that changes nothing."""

    @classmethod
    def surviving(cls, channels: Channels) -> Subgroup:
        """The subgroup under which the function does not change."""

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> Self:
        """An element of the surviving subgroup, well conditioned and away from the identity."""


Group = TypeVar("Group", bound=WeightElement)


@dataclass(frozen=True)
class HeadPermutation:
    """Heads change places: key-value head `g` becomes that which was `groups[g]`, and the `i`-th of its heads that which was the
    `within[g, i]`-th of those. The group S_{H/G} wr S_G, G! (H/G)!^G elements.

    Rows of W_Q, W_K, W_V with their biases and the blocks of W_O move together. A symmetry where all heads are treated alike:
    not with a position bias, a slope, a sink or a norm gain for each head.
    """

    groups: Int[Tensor, " group"]
    within: Int[Tensor, "group member"]
    roles: ClassVar[tuple[str, ...]] = ("queries", "keys", "values", "projection")

    def on(self, weights: HeadWeights) -> HeadWeights:
        """The weights with the heads in their new places."""
        order = self._head_order(weights.groups)

        def moved(tensor: Tensor | None, places: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[places]

        return replace(
            weights,
            queries=moved(weights.queries, order),
            query_bias=moved(weights.query_bias, order),
            keys=moved(weights.keys, self.groups),
            key_bias=moved(weights.key_bias, self.groups),
            values=moved(weights.values, self.groups),
            value_bias=moved(weights.value_bias, self.groups),
            projection=moved(weights.projection, order),
        )

    def _head_order(self, groups: tuple[int, ...]) -> Tensor:
        """Which head comes to each head's place."""
        members = _members(groups)
        if members.shape != self.within.shape:
            raise InputError(
                f"HeadPermutation: expected {members.shape[0]} key-value heads of {members.shape[1]} heads, got "
                f"{self.within.shape[0]} of {self.within.shape[1]}. It belongs to another model. "
                "Draw one with HeadPermutation.random(generator, channels)."
            )
        order = torch.empty(members.numel(), dtype=torch.long)
        order[members] = members[self.groups[:, None], self.within]
        return order

    def compose(self, other: HeadPermutation) -> HeadPermutation:
        """This permutation first, then `other`."""
        within = self.within[other.groups].gather(1, other.within)
        return HeadPermutation(self.groups[other.groups], within)

    def inverse(self) -> HeadPermutation:
        """The permutation that undoes this one."""
        groups = self.groups.argsort()
        return HeadPermutation(groups, self.within[groups].argsort(1))

    @classmethod
    def identity(cls, channels: Channels) -> HeadPermutation:
        """Every head stays where it is."""
        count, size = _members(channels.groups).shape
        return cls(torch.arange(count), torch.arange(size).repeat(count, 1))

    @classmethod
    def surviving(cls, channels: Channels) -> Subgroup:
        """All of the group where heads are treated alike, else nothing."""
        refused = _refusal(channels, cls.roles)
        if refused is not None:
            return refused
        if not channels.heads_alike:
            return Subgroup(False, f"nothing: {channels.reasons['heads']}", 0)
        count, size = _members(channels.groups).shape
        elements = math.factorial(count) * math.factorial(size) ** count
        words = [f"the order of the {count} key-value heads"] if count > 1 and size > 1 else []
        words += [f"the order of the {count} heads"] if count > 1 and size == 1 else []
        words += [f"the order of the {size} heads that share a key-value head"] if size > 1 else []
        if elements == 1:
            return Subgroup(False, "nothing: there is one head", 0)
        return Subgroup(True, f"{' and '.join(words)} ({_count(elements)} permutations)", 0)

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> HeadPermutation:
        """A permutation that is not the identity. Raises `InputError` where nothing survives."""
        _require(cls, channels)
        count, size = _members(channels.groups).shape
        within = torch.stack([_shuffled(size, generator) for _ in range(count)])
        return cls(_shuffled(count, generator), within)


@dataclass(frozen=True)
class ValueOutputGauge:
    """A change of basis of every key-value head's channels between values and output projection.

    W_V,g -> W_V,g M_g, b_V,g -> b_V,g M_g + delta_g, W_h -> M_g(h)^-1 W_h, b_O -> b_O - sum_h delta_g(h) M_g(h)^-1 W_h, with
    `matrices` M [group, channel, channel] and `shifts` delta [group, channel]. The affine group of every key-value head,
    G d_k^2 + G d_k dimensions. A shift takes both biases, and attention rows that sum to one: no sinks.
    """

    matrices: Float[Tensor, "group channel channel"]
    shifts: Float[Tensor, "group channel"] | None = None
    roles: ClassVar[tuple[str, ...]] = ("values", "projection")

    def on(self, weights: HeadWeights) -> HeadWeights:
        """The weights in the new basis. Raises `InputError` for a shift without both biases."""
        assert weights.values is not None
        assert weights.projection is not None
        _require_sizes("ValueOutputGauge", self.matrices, weights.values)
        own = list(weights.groups)
        projection = torch.linalg.solve(self.matrices[own], weights.projection)
        value_bias, output_bias = weights.value_bias, weights.output_bias
        if value_bias is not None:
            value_bias = _times(value_bias, self.matrices)
        if self.shifts is not None:
            if value_bias is None or output_bias is None:
                raise InputError(
                    "ValueOutputGauge: expected a value bias and an output bias to shift, got weights without one of them. "
                    "What the values are shifted by must be taken off behind them. Leave the shifts out."
                )
            value_bias = value_bias + self.shifts
            output_bias = output_bias - torch.einsum("hc,hcw->w", self.shifts[own], projection)
        return replace(
            weights,
            values=weights.values @ self.matrices,
            value_bias=value_bias,
            projection=projection,
            output_bias=output_bias,
        )

    def compose(self, other: ValueOutputGauge) -> ValueOutputGauge:
        """This change first, then `other`."""
        return ValueOutputGauge(self.matrices @ other.matrices, _shifted(self.shifts, other.matrices, other.shifts))

    def inverse(self) -> ValueOutputGauge:
        """The change that undoes this one."""
        inverted = torch.linalg.inv(self.matrices)
        return ValueOutputGauge(inverted, None if self.shifts is None else -_times(self.shifts, inverted))

    @classmethod
    def identity(cls, channels: Channels) -> ValueOutputGauge:
        """Unit matrices and no shift."""
        return cls(_units(channels.group_count, channels.call.head_width))

    @classmethod
    def surviving(cls, channels: Channels) -> Subgroup:
        """GL(d_k) for each key-value head, with shifts where both biases are there."""
        refused = _refusal(channels, cls.roles)
        if refused is not None:
            return refused
        count, width = channels.group_count, channels.call.head_width
        words = f"any change of basis of the {width} channels of each of the {_named(channels)}"
        shift = _shifts_values(channels)
        if shift:
            words += ", and a shift of each channel from the value bias to the output bias"
        elif channels.sinks and channels.values is not None and channels.values.bias is not None:
            words += "; no shift of the value bias, which attention sinks let be seen"
        dimension = heads.gauge_dimension(count, width, value_bias=shift, output_bias=shift)
        return Subgroup(True, words, dimension)

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> ValueOutputGauge:
        """Matrices of condition below 3, and shifts where they survive. Raises `InputError` where nothing does."""
        _require(cls, channels)
        count, width = channels.group_count, channels.call.head_width
        shifts = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return cls(
            torch.stack([_well_conditioned(width, generator) for _ in range(count)]),
            shifts if _shifts_values(channels) else None,
        )


@dataclass(frozen=True)
class QueryKeyGauge:
    """A change of basis of queries and keys that their products do not show.

    W_Q,h -> W_Q,h Q_h and W_K,g -> W_K,g K_g with their biases, b_K,g + shift_g: `queries` Q [head, channel, channel], `keys`
    K [group, channel, channel], `shifts` [group, channel]. All such triples are a group; a symmetry are

    * without a norm Q_h = T_g(h), K_g = T_g^-T (`of`), T_g commuting with the rotations: any matrix on the channels that do
      not turn, a + bJ on each pair that does. T = a is the exact gauge (a W_Q, W_K / a) of entropy scaling;
    * with a norm on queries and keys only scales: of each head's queries and each key-value head's keys, or of all together
      where the norm runs over the whole layer. Exact up to the epsilon of the norm;
    * shifts of the key bias on channels that do not turn: they add the same to all logits of a row. Not with sinks.
    """

    queries: Float[Tensor, "head channel channel"]
    keys: Float[Tensor, "group channel channel"]
    shifts: Float[Tensor, "group channel"] | None = None
    roles: ClassVar[tuple[str, ...]] = ("queries", "keys")

    @classmethod
    def of(
        cls,
        matrices: Float[Tensor, "group channel channel"],
        channels: Channels,
        shifts: Float[Tensor, "group channel"] | None = None,
    ) -> QueryKeyGauge:
        """The element of T_g = `matrices`: queries times T, keys times its inverse transpose."""
        return cls(matrices[list(channels.groups)], torch.linalg.inv(matrices).mT, shifts)

    @classmethod
    def entropy_scaling(cls, scale: float, channels: Channels) -> QueryKeyGauge:
        """(W_Q, W_K) -> (a W_Q, W_K / a): what makes the entropy of attention no property of W_Q or W_K alone."""
        return cls.of(scale * _units(channels.group_count, _query_width(channels)), channels)

    def on(self, weights: HeadWeights) -> HeadWeights:
        """The weights in the new basis. Raises `InputError` for a shift without a key bias."""
        assert weights.queries is not None
        assert weights.keys is not None
        _require_sizes("QueryKeyGauge", self.queries, weights.queries)
        _require_sizes("QueryKeyGauge", self.keys, weights.keys)
        query_bias, key_bias = weights.query_bias, weights.key_bias
        if query_bias is not None:
            query_bias = _times(query_bias, self.queries)
        if key_bias is not None:
            key_bias = _times(key_bias, self.keys)
        if self.shifts is not None:
            if key_bias is None:
                raise InputError(
                    "QueryKeyGauge: expected a key bias to shift, got keys without one. Leave the shifts out."
                )
            key_bias = key_bias + self.shifts
        return replace(
            weights,
            queries=weights.queries @ self.queries,
            query_bias=query_bias,
            keys=weights.keys @ self.keys,
            key_bias=key_bias,
        )

    def compose(self, other: QueryKeyGauge) -> QueryKeyGauge:
        """This change first, then `other`."""
        shifts = _shifted(self.shifts, other.keys, other.shifts)
        return QueryKeyGauge(self.queries @ other.queries, self.keys @ other.keys, shifts)

    def inverse(self) -> QueryKeyGauge:
        """The change that undoes this one."""
        keys = torch.linalg.inv(self.keys)
        shifts = None if self.shifts is None else -_times(self.shifts, keys)
        return QueryKeyGauge(torch.linalg.inv(self.queries), keys, shifts)

    @classmethod
    def identity(cls, channels: Channels) -> QueryKeyGauge:
        """Unit matrices and no shift."""
        width = _query_width(channels)
        return cls(_units(channels.call.heads, width), _units(channels.group_count, width))

    @classmethod
    def surviving(cls, channels: Channels) -> Subgroup:
        """What the measured rotary width, norms and biases leave of it."""
        refused = _refusal(channels, cls.roles)
        if refused is not None:
            return refused
        if "logits" in channels.reasons:
            return Subgroup(False, f"unknown: {channels.reasons['logits']}", None)
        count, groups = channels.call.heads, channels.group_count
        if channels.norm is not None:
            own = f"the scale of each of the {count} heads' queries and of the {_named(channels)}' keys"
            words = own if channels.norm == "head" else "the scale of all queries and that of all keys"
            words += (
                ", up to the epsilon of the norm they pass; the gains of the norm could trade more and are left alone"
            )
            return Subgroup(True, words, count + groups if channels.norm == "head" else 2)
        if channels.pairs is None:
            return Subgroup(False, f"unknown: {channels.reasons['rotary']}", None)
        free, pairs, shift = len(channels.free), len(channels.pairs), _shifts_keys(channels)
        parts = [f"any change of basis of the {free} channels that positions do not rotate"] if free and pairs else []
        parts += [f"any change of basis of the {free} channels"] if free and not pairs else []
        parts += [f"a scale and a turn of each of the {pairs} pairs of channels that positions rotate"] if pairs else []
        words = f"{' and '.join(parts)}, in each of the {_named(channels)}"
        if shift:
            words += f", and a shift of the key bias on {free} channels of each"
        dimension = heads.query_key_gauge_dimension(
            count, groups, _query_width(channels), bias=shift, rotary_width=2 * pairs
        )
        return Subgroup(True, words, dimension)

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> QueryKeyGauge:
        """Matrices of condition below 3, and shifts where they survive. Raises `InputError` where nothing does."""
        _require(cls, channels)
        count, groups, width = channels.call.heads, channels.group_count, _query_width(channels)
        unit = torch.eye(width, dtype=torch.float64)
        if channels.norm is not None:
            sizes = (count, groups) if channels.norm == "head" else (1, 1)
            queries, keys = (_scales(n, generator)[:, None, None] * unit for n in sizes)
            return cls(queries.expand(count, width, width), keys.expand(groups, width, width))
        matrices = torch.zeros(groups, width, width, dtype=torch.float64)
        free = torch.tensor(channels.free, dtype=torch.long)
        for matrix in matrices:
            matrix[free[:, None], free] = _well_conditioned(len(free), generator)
            for (i, j), scale in zip(channels.pairs or (), _scales(width, generator), strict=False):
                angle = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)
                matrix[i, i] = matrix[j, j] = scale * angle.cos()
                matrix[i, j] = scale * angle.sin()
                matrix[j, i] = -matrix[i, j]
        shifts = None
        if _shifts_keys(channels) and len(free):
            shifts = torch.zeros(groups, width, dtype=torch.float64)
            shifts[:, free] = torch.randn(groups, len(free), generator=generator, dtype=torch.float64)
        return cls.of(matrices, channels, shifts)


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
            row[places] = places[_shuffled(len(places), generator).to(places.device)]
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
                f"{', '.join(batch)}. Images and sounds become tokens inside the model only. Pass token numbers or embeddings."
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
        """What it does at the points of one attention call, of kind "attention" or "cross"."""


@dataclass(frozen=True)
class KeyPermutation(_TokenOrder):
    """The keys alone in another order, A -> A Pi: the values of self-attention permuted among the real tokens.

    No symmetry of a model at any length. In the limit of long sequences at initialisation, where attention is uniform, it
    becomes one: that is rank collapse in width.
    """

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the values of self-attention."""
        return {call.product: self._permuting(call.value_operand)} if kind == "attention" else {}

    def _permuting(self, operand: int) -> Handler:
        def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            values = list(tensors_in([args, kwargs]))[operand]
            sequences, tokens = self.order.shape
            if values.ndim not in (3, 4) or values.shape[0] % sequences or values.shape[-2] != tokens:
                raise InputError(
                    f"KeyPermutation: expected values of {sequences} sequences of {tokens} tokens, got {tuple(values.shape)}. "
                    "The model changes the number of tokens, or another batch came. Make the order from this batch's mask."
                )
            order = self.order.to(values.device).repeat_interleave(values.shape[0] // sequences, 0)
            index = order.view(len(order), *(1,) * (values.ndim - 3), tokens, 1).expand_as(values)
            args, kwargs = _with_operand(args, kwargs, operand, values.gather(-2, index))
            return function(*args, **kwargs)

        return handler


@dataclass(frozen=True)
class LogitShift:
    """The same number added to all logits of a row: row i gets `amounts[i mod len(amounts)]`. An exact symmetry of the softmax.

    Added at the softmax, behind all masks, which it respects. Columns beyond the keys are no logits of keys and are not
    shifted: attention sinks break the symmetry. A group under addition.
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
        return cls(amounts * _signs(rows, generator))

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the logits of every attention."""
        return _at_logits(call, self._fused, self._logits)

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

    Columns beyond the keys, attention sinks, are left as they are.
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
        return cls(float(_scales(1, generator)))

    def handlers(self, call: AttentionCall, kind: str) -> dict[Point, Handler]:
        """Acts on the logits of every attention."""
        return _at_logits(call, self._fused, self._logits)

    def _logits(self, logits: Tensor) -> Tensor:
        return torch.where(_forbidden(logits), logits, logits * self.factor)

    def _fused(self, given: dict[str, Any]) -> dict[str, Any]:
        scale = given.get("scale")
        scale = given["query"].shape[-1] ** -0.5 if scale is None else scale
        mask = given.get("attn_mask")
        if mask is not None and mask.dtype != torch.bool:
            mask = self._logits(mask)
        return {**given, "attn_mask": mask, "scale": scale * self.factor}


@contextlib.contextmanager
def transformed(model: nn.Module, elements: Sequence[tuple[Channels, WeightElement]]) -> Iterator[nn.Module]:
    """Within the context the elements have acted on the weights of their attention calls, one after the other.

    Parameters keep their identity and their storage; on leaving, also by an exception, they have their bits again. Contexts
    nest. Of calls that share their weights, as in ALBERT, name one only, as `drawn` does: the element acts on all of them.

    Raises `InputError` where an element needs weights that were not found, or that are not of its size.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    originals: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for channels, element in elements:
                for name, data in _changed(parameters, channels, element).items():
                    originals.setdefault(name, parameters[name].detach().clone())
                    parameters[name].copy_(data)
        yield model
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                parameters[name].copy_(original)


@contextlib.contextmanager
def acting(
    model: nn.Module, anatomy: Anatomy, element: PassElement, blocks: Collection[int] | None = None
) -> Iterator[nn.Module]:
    """Within the context `element` acts inside the attention calls of the given blocks, all of them by default.

    Raises `InputError` for a block that does not exist.
    """
    count = len(anatomy.blocks)
    chosen = range(count) if blocks is None else blocks
    if not all(0 <= b < count for b in chosen):
        raise InputError(
            f"acting: expected block numbers from 0 to {count - 1}, got {sorted(chosen)}. Blocks are counted from 0, encoder "
            "first. Pass for example blocks=range(2, 4)."
        )
    handlers: dict[Point, Handler] = {}
    for number in chosen:
        for part in anatomy.blocks[number].parts:
            for call in part.attention:
                handlers |= element.handlers(call, part.kind)
    with intercepted(model, handlers):
        yield model


def drawn(group: type[Group], channels: Sequence[Channels], generator: torch.Generator) -> list[tuple[Channels, Group]]:
    """A random element of what survives of a group on each attention call where something does; calls that share their
    weights, as in ALBERT, are drawn for once. What `transformed` takes."""
    seen: set[str] = set()
    elements = []
    for one in channels:
        if not group.surviving(one).survives:
            continue
        place = _rows(one, group.roles[0]).place
        if place not in seen:
            seen.add(place)
            elements.append((one, group.random(generator, one)))
    return elements


def head_weights(
    model: nn.Module,
    channels: Channels,
    roles: Collection[str] = ("queries", "keys", "values", "projection"),
) -> HeadWeights:
    """The weights of one attention call head by head, as copies in float64 on the CPU.

    Raises `InputError` for a role that was not found.
    """
    refused = _refusal(channels, roles)
    if refused is not None:
        raise InputError(
            f"head_weights: expected an attention call whose {' and '.join(roles)} were found, got block {channels.block}. "
            f"{refused.surviving.capitalize()}. Ask for other roles, or leave this block out."
        )
    return _read(dict(model.named_parameters(remove_duplicate=False)), channels, roles)


# Weights --------------------------------------------------------------------------------------------------------------
_BIASES = {"queries": "query_bias", "keys": "key_bias", "values": "value_bias"}


def _read(parameters: Mapping[str, Tensor], channels: Channels, roles: Collection[str]) -> HeadWeights:
    found: dict[str, Tensor] = {}
    for role in roles:
        rows = _rows(channels, role)
        blocks = _double(parameters[rows.place]).movedim(rows.axis, 0)[rows.index()]
        found[role] = blocks if role == "projection" else blocks.mT
        if rows.bias is not None:
            bias = _double(parameters[_bias_place(rows)])
            if role == "projection":
                found["output_bias"] = bias
            else:
                found[_BIASES[role]] = bias[rows.index()]
    return HeadWeights(channels.groups, **found)


def _changed(parameters: Mapping[str, Tensor], channels: Channels, element: WeightElement) -> dict[str, Tensor]:
    """The whole parameters, by name, after the element has acted: float64, rounded when they are copied back."""
    refused = _refusal(channels, element.roles)
    if refused is not None:
        raise InputError(
            f"transformed: expected weights that {type(element).__name__} can act on, got block {channels.block}. "
            f"{refused.surviving.capitalize()}. Leave this block out."
        )
    weights = element.on(_read(parameters, channels, element.roles))
    changed: dict[str, Tensor] = {}
    for role in element.roles:
        rows = _rows(channels, role)
        whole = changed.setdefault(rows.place, _double(parameters[rows.place]))
        blocks = getattr(weights, role)
        whole.movedim(rows.axis, 0)[rows.index()] = blocks if role == "projection" else blocks.mT
        if rows.bias is None:
            continue
        place = _bias_place(rows)
        if role == "projection":
            assert weights.output_bias is not None
            changed[place] = weights.output_bias
        else:
            changed.setdefault(place, _double(parameters[place]))[rows.index()] = getattr(weights, _BIASES[role])
    return changed


def _double(parameter: Tensor) -> Tensor:
    """A copy in float64 on the CPU: not every accelerator has it."""
    return parameter.detach().to("cpu", torch.float64, copy=True)


def _rows(channels: Channels, role: str) -> Rows:
    rows = getattr(channels, role)
    assert isinstance(rows, Rows)
    return rows


def _bias_place(rows: Rows) -> str:
    return f"{rows.module}.{rows.bias}" if rows.module else f"{rows.bias}"


def _refusal(channels: Channels, roles: Collection[str]) -> Subgroup | None:
    """Why the weights of these roles cannot be acted on, if they cannot."""
    for role in roles:
        if getattr(channels, role) is None:
            return Subgroup(False, f"unknown: {channels.reasons.get(role, f'the {role} were not found')}", None)
    return None


def _require(group: type[WeightElement], channels: Channels) -> None:
    found = group.surviving(channels)
    if not found.survives:
        raise InputError(
            f"{group.__name__}.random: expected an attention call on which some of the group survives, got block "
            f"{channels.block}: {found.surviving}. Use drawn, which leaves such calls out."
        )


def _require_sizes(name: str, matrices: Tensor, weights: Tensor) -> None:
    expected = (weights.shape[0], weights.shape[2], weights.shape[2])
    if matrices.shape != expected:
        raise InputError(
            f"{name}: expected matrices [head or group, channel, channel] = {list(expected)}, got {list(matrices.shape)}. "
            f"The element belongs to another model. Draw one with {name}.random(generator, channels)."
        )


def _members(groups: tuple[int, ...]) -> Tensor:
    """The heads of every key-value head [group, member]."""
    return torch.tensor([[h for h, own in enumerate(groups) if own == g] for g in range(len(set(groups)))])


def _query_width(channels: Channels) -> int:
    return len(_rows(channels, "queries").features[0])


def _shifts_values(channels: Channels) -> bool:
    biases = _rows(channels, "values").bias is not None and _rows(channels, "projection").bias is not None
    return biases and not channels.sinks


def _shifts_keys(channels: Channels) -> bool:
    free = bool(channels.free) and channels.norm is None
    return _rows(channels, "keys").bias is not None and free and not channels.sinks


def _named(channels: Channels) -> str:
    """What has channels of its own: key-value heads, where several heads share one."""
    count = channels.group_count
    return f"{count} {'heads' if count == channels.call.heads else 'key-value heads'}"


def _count(elements: int) -> str:
    return f"{elements:,}" if elements < 10**6 else f"{float(elements):.1e}"


# Matrices and permutations --------------------------------------------------------------------------------------------
def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Row vectors [head, channel] times matrices [head, channel, channel]."""
    return torch.einsum("hc,hcd->hd", rows, matrices)


def _shifted(first: Tensor | None, matrices: Tensor, second: Tensor | None) -> Tensor | None:
    """The shift of x -> (x A + first) matrices + second."""
    if first is None:
        return second
    moved = _times(first, matrices)
    return moved if second is None else moved + second


def _units(count: int, width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).double() * 2 - 1


def _scales(count: int, generator: torch.Generator) -> Tensor:
    """Positive numbers away from one, between 1.25 and `LARGEST_SCALE` or the inverse of such."""
    low, high = math.log(1.25), math.log(LARGEST_SCALE)
    sizes = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    return (sizes * _signs(count, generator)).exp()


def _well_conditioned(width: int, generator: torch.Generator) -> Tensor:
    """A random matrix with singular values of `_scales`: turned at random before and after."""

    def turned() -> Tensor:
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()

    return turned() @ (_scales(width, generator)[:, None] * turned())


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order that is not the one it was."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


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
    call: AttentionCall,
    fused: Callable[[dict[str, Any]], dict[str, Any]],
    changed: Callable[[Tensor], Tensor],
) -> dict[Point, Handler]:
    """Handlers that change the logits of one attention call: the arguments of a fused call, or the operand of the softmax
    as far as it belongs to keys."""
    if call.score == call.product:
        return {call.score: _at_fused(fused)}
    keys: list[int] = []

    def counting(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        keys[:] = [output.shape[-1]]
        return output

    def softmax(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        logits = next(tensors_in([args, kwargs]))
        own = keys[0] if keys else logits.shape[-1]
        new = torch.cat([changed(logits[..., :own]), logits[..., own:]], -1)
        args, kwargs = _with_operand(args, kwargs, 0, new)
        return function(*args, **kwargs)

    return {call.score: softmax} | ({} if call.similarity is None else {call.similarity: counting})


def _at_fused(changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = changed({**dict(zip(names, args, strict=False)), **kwargs})
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
