"""The groups that act on the weights of an attention call: head permutations, the gauges of values and of queries."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from uncollapse.errors import InputError
from uncollapse.measures import heads
from uncollapse.symmetry.channels import Channels
from uncollapse.symmetry.draws import scales, shuffled, well_conditioned
from uncollapse.symmetry.studied_calls import Rows


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


# By role the field of `HeadWeights` that holds its bias.
BIASES = {"queries": "query_bias", "keys": "key_bias", "values": "value_bias"}


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
        refused = refusal(channels, cls.roles)
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
        within = torch.stack([shuffled(size, generator) for _ in range(count)])
        return cls(shuffled(count, generator), within)


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
                    "A shift of the values has to be subtracted after them. Leave the shifts out."
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
        refused = refusal(channels, cls.roles)
        if refused is not None:
            return refused
        count, width = channels.group_count, channels.call.head_width
        words = f"any change of basis of the {width} channels of each of the {_named(channels)}"
        shift = _shifts_values(channels)
        if shift:
            words += ", and a shift of each channel from the value bias to the output bias"
        elif channels.sinks and channels.values is not None and channels.values.bias is not None:
            words += "; no shift of the value bias, which sink columns make visible"
        dimension = heads.gauge_dimension(count, width, value_bias=shift, output_bias=shift)
        return Subgroup(True, words, dimension)

    @classmethod
    def random(cls, generator: torch.Generator, channels: Channels) -> ValueOutputGauge:
        """Matrices of condition below 3, and shifts where they survive. Raises `InputError` where nothing does."""
        _require(cls, channels)
        count, width = channels.group_count, channels.call.head_width
        shifts = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return cls(
            torch.stack([well_conditioned(width, generator) for _ in range(count)]),
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
        refused = refusal(channels, cls.roles)
        if refused is not None:
            return refused
        if "logits" in channels.reasons:
            return Subgroup(False, f"unknown: {channels.reasons['logits']}", None)
        count, groups = channels.call.heads, channels.group_count
        if channels.norm is not None:
            own = f"the scale of each of the {count} heads' queries and of the {_named(channels)}' keys"
            words = own if channels.norm == "head" else "the scale of all queries and that of all keys"
            words += ", up to the epsilon of the norm they pass; the gains of the norm would allow more, but are left unchanged"
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
            queries, keys = (scales(n, generator)[:, None, None] * unit for n in sizes)
            return cls(queries.expand(count, width, width), keys.expand(groups, width, width))
        matrices = torch.zeros(groups, width, width, dtype=torch.float64)
        free = torch.tensor(channels.free, dtype=torch.long)
        for matrix in matrices:
            matrix[free[:, None], free] = well_conditioned(len(free), generator)
            for (i, j), scale in zip(channels.pairs or (), scales(width, generator), strict=False):
                angle = 2 * math.pi * torch.rand((), generator=generator, dtype=torch.float64)
                matrix[i, i] = matrix[j, j] = scale * angle.cos()
                matrix[i, j] = scale * angle.sin()
                matrix[j, i] = -matrix[i, j]
        shifts = None
        if _shifts_keys(channels) and len(free):
            shifts = torch.zeros(groups, width, dtype=torch.float64)
            shifts[:, free] = torch.randn(groups, len(free), generator=generator, dtype=torch.float64)
        return cls.of(matrices, channels, shifts)


def rows_of(channels: Channels, role: str) -> Rows:
    rows = getattr(channels, role)
    assert isinstance(rows, Rows)
    return rows


def refusal(channels: Channels, roles: Collection[str]) -> Subgroup | None:
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
    return len(rows_of(channels, "queries").features[0])


def _shifts_values(channels: Channels) -> bool:
    biases = rows_of(channels, "values").bias is not None and rows_of(channels, "projection").bias is not None
    return biases and not channels.sinks


def _shifts_keys(channels: Channels) -> bool:
    free = bool(channels.free) and channels.norm is None
    return rows_of(channels, "keys").bias is not None and free and not channels.sinks


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
