"""Which parameter a projection's weight and bias are, and along which of its axes the output lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.sharded_weights import is_part
from uncollapse.anatomy.vocabulary import ModuleCall
from uncollapse.symmetry.studied_calls import ROLES, Place, Rows, StudiedCall

Operands = Mapping[Point, tuple[str, list[Tensor]]]


@dataclass(frozen=True)
class Parameters:
    """A learned product's parameters by their qualified names. Feature `j` of its output is number `offset + j` along `out`."""

    weight: str
    bias: str | None
    out: int
    offset: int = 0


def is_part_of(operand: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter, a cut of it, or its transpose."""
    if parameter.device.type == "meta" or operand.dtype != parameter.dtype:
        return False
    same = operand.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    inside = operand.ndim == parameter.ndim and set(operand.stride()) == set(parameter.stride())
    return same and inside and operand.numel() <= parameter.numel()


def output_axis(module: nn.Module, weight: Tensor, bias: Tensor | None) -> int | None:
    """Along which axis of its weight a linear map keeps its outputs, told by what it does; None if it does something else."""
    generator = torch.Generator().manual_seed(0)
    for axis in (0, 1):
        given = torch.randn(1, 3, weight.shape[1 - axis], generator=generator).to(weight)
        if bias is not None and len(bias) != weight.shape[axis]:
            continue
        expected = given.double() @ weight.double().movedim(axis, 1) + (0 if bias is None else bias.double())
        try:
            got = module.forward(given)  # `forward`: no hook on this module should meet these numbers
        except Exception:  # the other shape
            continue
        eps = torch.finfo(weight.dtype).eps * weight.shape[1 - axis] ** 0.5
        if got.shape == expected.shape and bool((got - expected).abs().max() <= 16 * eps * expected.abs().max()):
            return axis
    return None


def rows_of(model: nn.Module, site: StudiedCall, operands: Operands) -> dict[str, Rows]:
    """Where the channels that were found of each role lie in the model's parameters. `operands`: of the learned products that
    are written in a model's own code."""
    rows: dict[str, Rows] = {}
    for role in (*ROLES, "projection"):
        place = site.source(role)
        if role not in site.where or place is None or role in site.reasons:
            continue
        found = _parameters(model, place, operands)
        if isinstance(found, str):
            site.refuse(role, found)
            continue
        feature = site.where[role] + (0 if role == "projection" else found.offset)
        axis = 1 - found.out if role == "projection" else found.out
        module, _, weight = found.weight.rpartition(".")
        bias = None
        if found.bias is not None:
            other, _, bias = found.bias.rpartition(".")
            if other != module:
                site.refuse(role, f"its weight and bias belong to two modules, {module} and {other}")
                continue
        rows[role] = Rows(module, weight, bias, axis, tuple(tuple(r) for r in feature.tolist()))
    return rows


def _parameters(model: nn.Module, place: Place, met: Operands) -> Parameters | str:
    """The parameters of a learned product, or why they cannot be changed."""
    if isinstance(place, ModuleCall):
        return _parameters_of_module(model, place.name)
    operation, operands = met[place]
    named = dict(model.named_parameters())
    found: dict[int, list[tuple[str, int, int]]] = {1: [], 2: []}
    for operand in operands:
        for name, parameter in named.items():
            if operand.ndim in found and not is_part(parameter) and is_part_of(operand, parameter):
                out = 0 if operation == "linear" else operand.ndim - 1
                strides = parameter.stride()
                axis = strides.index(operand.stride(0 if operand.ndim == 1 else out))
                offset = (operand.storage_offset() - parameter.storage_offset()) // strides[axis]
                found[operand.ndim].append((name, axis, offset))
    if len(found[2]) != 1 or len(found[1]) > 1:
        return f"the weight of {place} is not a parameter of the model"
    (weight, axis, offset) = found[2][0]
    if found[1] and found[1][0][2] != offset:
        return f"weight and bias of {place} are cut differently from their parameters"
    return Parameters(weight, found[1][0][0] if found[1] else None, axis, offset)


def _parameters_of_module(model: nn.Module, name: str) -> Parameters | str:
    module = model.get_submodule(name)
    own = dict(module.named_parameters(recurse=False))
    matrices = [n for n, p in own.items() if p.ndim == 2]
    vectors = [n for n, p in own.items() if p.ndim == 1]
    if len(matrices) != 1 or len(vectors) > 1 or len(matrices) + len(vectors) != len(own):
        return f"{name} has no weight matrix of its own that could be changed; it may be quantised or made of parts"
    weight, bias = own[matrices[0]], own[vectors[0]] if vectors else None
    if is_part(weight):
        return f"the weights of {name} are shared out over several processes"
    if weight.device.type == "meta":
        return f"the weights of {name} are not loaded; they are offloaded"
    if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
        return f"the weights of {name} are quantised ({str(weight.dtype).removeprefix('torch.')})"
    out = output_axis(module, weight.detach(), None if bias is None else bias.detach())
    if out is None:
        return f"{name} does more than its weight and bias say"
    return Parameters(f"{name}.{matrices[0]}", f"{name}.{vectors[0]}" if vectors else None, out)


def refuse_shared(
    model: nn.Module,
    sites: Sequence[StudiedCall],
    usual: Sequence[StudiedCall],
    rows: Sequence[dict[str, Rows]],
    runs: Mapping[str, int],
) -> None:
    """Refuse weights that a change for one attention call would change for somebody else."""
    named = dict(model.named_parameters(remove_duplicate=False))
    storages: dict[int, set[tuple[int, str]]] = {}
    for name, parameter in named.items():
        owner, _, leaf = name.rpartition(".")
        if parameter.device.type != "meta" and not is_part(parameter):
            users = storages.setdefault(parameter.untyped_storage().data_ptr(), set())
            users.add((id(model.get_submodule(owner)), leaf))
    referenced: dict[str, set[int]] = {}
    for site in usual:  # a run in a call that cannot be acted on is one outside of those that can
        for role in (*ROLES, "projection"):
            place = site.source(role)
            if isinstance(place, ModuleCall):
                referenced.setdefault(place.name, set()).add(place.call)
    features: dict[tuple[str, str], set[tuple[tuple[int, ...], ...]]] = {}
    partners: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for found in rows:
        for role, row in found.items():
            features.setdefault((row.place, role), set()).add(row.features)
            partners.setdefault((row.place, role), set()).add(tuple(r.place for r in found.values()))
    for site, found in zip(sites, rows, strict=True):
        for role, row in found.items():
            mine = {f for g in row.features for f in g}
            place = site.source(role)
            parameter = named[row.place]
            if len(storages[parameter.untyped_storage().data_ptr()]) > 1:
                site.refuse(role, f"{row.place} is also the weight of another module")
            if isinstance(place, ModuleCall) and runs.get(place.name, 0) > len(referenced[place.name]):
                site.refuse(role, f"{place.name} also runs outside of the attention")
            for (name, another), sets in features.items():
                theirs = {f for rows_of in sets for g in rows_of for f in g}
                if name == row.place and another != role and mine & theirs:
                    site.refuse(role, f"the same rows of {row.place} make the {role} and the {another}")
            if len(features[row.place, role]) > 1 or len(partners[row.place, role]) > 1:
                site.refuse(role, f"{row.place} is shared by attention calls that do not share everything else")
