"""The groups of the symmetry framework as code that acts on a live model, composes and inverts.

Four groups act on the weights of attention. As far as they survive in the architecture, the function does not change:

* `HeadPermutation`: key-value heads, and the heads within each, change places;
* `ValueOutputGauge`: W_V,g -> W_V,g M_g, W_h -> M_g^-1 W_h for the heads h of group g;
* `QueryKeyGauge`: W_Q,h -> W_Q,h T_g, W_K,g -> W_K,g T_g^-T with T_g commuting with the rotary embedding;
* `NormGauge`: W -> W + u c^T for queries, keys and values that read a layer norm, u = 1/gamma.

Four act on what passes through the model: `TokenPermutation` on a batch and on outputs, `KeyPermutation`, `LogitShift` and
`LogitScaling` inside the attention calls. The last is not a symmetry; its elements are temperatures.

`a.compose(b)` is `a` first, then `b`. `surviving(channels)` of a weight group says which subgroup survives on one attention
call. `transformed` acts on weights and `acting` on attention calls. Both restore everything, also after an exception, the
weights bit for bit. What a group does to weights is computed in float64 and rounded once.

    elements = drawn(ValueOutputGauge, channels_of(model, anatomy, batch), generator)
    with transformed(model, elements):
        model(**batch)

When not to use it: in training. Gradients computed inside `transformed` belong to other weights.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, intercepted
from uncollapse.anatomy.turns import closed_to_others, refuse_running
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.errors import InputError
from uncollapse.restoring import restoring, turn
from uncollapse.symmetry.channels import Channels
from uncollapse.symmetry.pass_groups import PassElement
from uncollapse.symmetry.studied_calls import Rows
from uncollapse.symmetry.weight_groups import BIASES, HeadWeights, WeightElement, refusal, rows_of

Group = TypeVar("Group", bound=WeightElement)


@contextlib.contextmanager
def transformed(model: nn.Module, elements: Sequence[tuple[Channels, WeightElement]]) -> Iterator[nn.Module]:
    """Within the context the elements have acted on the weights of their attention calls, one after the other.

    Parameters keep their identity and their storage; on leaving, also by an exception, they have their bits again. Contexts
    nest, and may be left in any order. Of calls that share their weights, as in ALBERT, name one only, as `drawn` does: the
    element acts on all of them.

    Raises `InputError` where an element needs weights that were not found, or that are not of its size.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mine = (list(elements),)
    with restoring() as changes:
        with turn:
            refuse_running("transformed", model)
            changes.enter(closed_to_others())
            changes.undo(functools.partial(_taken_off, model, parameters, mine))
            _in_force.setdefault(model, _InForce()).elements.append(mine)
            _transform(parameters, _in_force[model].originals, elements)
        yield model


@dataclass
class _InForce:
    """What has acted on the weights of one model, in turn, and the parameters as they were before."""

    elements: list[tuple[list[tuple[Channels, WeightElement]]]] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)


_in_force: weakref.WeakKeyDictionary[nn.Module, _InForce] = weakref.WeakKeyDictionary()


def _transform(
    parameters: Mapping[str, Tensor], originals: dict[str, Tensor], elements: Sequence[tuple[Channels, WeightElement]]
) -> None:
    with torch.no_grad():
        for channels, element in elements:
            for name, data in _changed(parameters, channels, element).items():
                if name not in originals:
                    originals[name] = parameters[name].detach().clone()
                parameters[name].copy_(data)


def _taken_off(
    model: nn.Module, parameters: Mapping[str, Tensor], mine: tuple[list[tuple[Channels, WeightElement]]]
) -> None:
    """End one transformation, whichever was begun last: the weights have their bits again, then the others act anew."""
    with turn:
        force = _in_force.get(model)
        if force is None:
            return
        force.elements[:] = [each for each in force.elements if each is not mine]
        with torch.no_grad():
            for name, original in force.originals.items():
                parameters[name].copy_(original)
        if not force.elements:
            _in_force.pop(model, None)
        for (elements,) in force.elements:
            _transform(parameters, force.originals, elements)


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
    with restoring() as changes:
        changes.enter(intercepted(model, handlers))
        yield model


def drawn(group: type[Group], channels: Sequence[Channels], generator: torch.Generator) -> list[tuple[Channels, Group]]:
    """A random element of what survives of a group on each attention call where something does; calls that share their
    weights, as in ALBERT, are drawn for once. What `transformed` takes."""
    seen: set[str] = set()
    elements = []
    for one in channels:
        if not group.surviving(one).survives:
            continue
        place = rows_of(one, group.roles[0]).place
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
    refused = refusal(channels, roles)
    if refused is not None:
        raise InputError(
            f"head_weights: expected an attention call whose {' and '.join(roles)} were found, got block {channels.block}. "
            f"{refused.surviving.capitalize()}. Ask for other roles, or leave this block out."
        )
    return _read(dict(model.named_parameters(remove_duplicate=False)), channels, roles)


# Weights --------------------------------------------------------------------------------------------------------------


def _read(parameters: Mapping[str, Tensor], channels: Channels, roles: Collection[str]) -> HeadWeights:
    found: dict[str, Tensor] = {}
    for role in roles:
        rows = rows_of(channels, role)
        blocks = _double(parameters[rows.place]).movedim(rows.axis, 0)[rows.index()]
        found[role] = blocks if role == "projection" else blocks.mT
        if rows.bias is not None:
            bias = _double(parameters[_bias_place(rows)])
            if role == "projection":
                found["output_bias"] = bias
            else:
                found[BIASES[role]] = bias[rows.index()]
    return HeadWeights(channels.groups, **found)


def _changed(parameters: Mapping[str, Tensor], channels: Channels, element: WeightElement) -> dict[str, Tensor]:
    """The whole parameters, by name, after the element has acted: float64, rounded when they are copied back."""
    refused = refusal(channels, element.roles)
    if refused is not None:
        raise InputError(
            f"transformed: expected weights that {type(element).__name__} can act on, got block {channels.block}. "
            f"{refused.surviving.capitalize()}. Leave this block out."
        )
    weights = element.on(_read(parameters, channels, element.roles))
    changed: dict[str, Tensor] = {}
    for role in element.roles:
        rows = rows_of(channels, role)
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
            changed.setdefault(place, _double(parameters[place]))[rows.index()] = getattr(weights, BIASES[role])
    return changed


def _double(parameter: Tensor) -> Tensor:
    """A copy in float64 on the CPU: not every accelerator has it."""
    return parameter.detach().to("cpu", torch.float64, copy=True)


def _bias_place(rows: Rows) -> str:
    return f"{rows.module}.{rows.bias}" if rows.module else f"{rows.bias}"
