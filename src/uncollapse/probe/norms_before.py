"""Which layer norm stands before an attention's queries, keys and values: found by comparing what was made with what was read.

A learned product reads a norm's output *alone* if in every one of its runs its input is, bit for bit, what a norm has just given.
What the norm does to other tokens is `norm_law`, which runs it; its gains are taken from the module where it holds them, so that
they are exact. Whatever is not shown is given as a reason: a norm that is written out in a model's own code, RMS norms (which
hide nothing), gains with zeros, several norms with different gains in front of shared weights.

When not to use it: for what a norm does to ranks; that is `norm_law`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.vocabulary import Anatomy, ModuleCall
from uncollapse.probe.norm_law import NormLaw, proved_law
from uncollapse.restoring import restoring
from uncollapse.symmetry.channels import Channels, NormBefore

_EPS_64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Run:
    """What one run of a norm was given and gave."""

    name: str
    given: Tensor
    output: Tensor


def with_norms_before(
    model: nn.Module, anatomy: Anatomy, channels: Sequence[Channels], batch: Mapping[str, Any]
) -> list[Channels]:
    """The channels with `norms_before` of each role whose input is shown to be a layer norm's output alone; else a reason."""
    runs, read = _observed(model, anatomy, channels, batch)
    laws: dict[str, NormLaw | str] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for one in channels:
        before: dict[str, NormBefore] = {}
        reasons = dict(one.reasons)
        for role in ("queries", "keys", "values"):
            rows = getattr(one, role)
            if rows is None:
                continue
            answer = _before(model, read.get(rows.module, []), runs, laws)
            if isinstance(answer, str):
                reasons[f"norm before {role}"] = f"the {role} read {answer}"
                continue
            size = float(weights[rows.place].detach().double().square().mean().sqrt())
            normal = 1 / answer.gamma
            normal = normal / normal.square().mean().sqrt()
            shift = float((normal * answer.beta).sum())
            rounding = 8 * _EPS_64 * float((normal * answer.beta).abs().sum())
            before[role] = NormBefore(normal, 0.0 if abs(shift) <= rounding else shift, size)
        found.append(replace(one, norms_before=before, reasons=reasons))
    return found


def _observed(
    model: nn.Module, anatomy: Anatomy, channels: Sequence[Channels], batch: Mapping[str, Any]
) -> tuple[list[_Run], dict[str, list[Tensor]]]:
    """Every run of every norm that is a module, and what the projections of queries, keys and values were given."""
    places = [n.where for b in anatomy.blocks for n in b.norms if n.role != "inner"] + list(anatomy.outer_norms)
    names = dict.fromkeys(p.name for p in places if isinstance(p, ModuleCall))
    readers = {rows.module for c in channels for rows in (c.queries, c.keys, c.values) if rows is not None}
    runs: list[_Run] = []
    read: dict[str, list[Tensor]] = {}

    def met(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                runs.append(_Run(name, args[0].detach().clone(), output.detach().clone()))

        return hook

    def reading(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                read.setdefault(name, []).append(args[0].detach().clone())

        return hook

    with probing(model), restoring() as changes:
        for name in names:
            changes.hook(model.get_submodule(name), "forward", met(name))
        for name in readers:
            if name:
                changes.hook(model.get_submodule(name), "forward_pre", reading(name))
        model(**batch)
    return runs, read


def _before(
    model: nn.Module, inputs: Sequence[Tensor], runs: Sequence[_Run], laws: dict[str, NormLaw | str]
) -> NormLaw | str:
    """The one law of the norms before a projection, or what it reads instead, in words."""
    if not inputs:
        return "what could not be met: they are made in the model's own code"
    found: list[NormLaw] = []
    for given in inputs:
        run = next((r for r in runs if r.output.shape == given.shape and torch.equal(r.output, given)), None)
        if run is None:
            return "something else than the output of a norm alone"
        if run.name not in laws:
            laws[run.name] = _law(model.get_submodule(run.name), run)
        law = laws[run.name]
        if isinstance(law, str):
            return law
        found.append(law)
    first = found[0]
    if any(not torch.equal(l.gamma, first.gamma) or not torch.equal(l.beta, first.beta) for l in found):
        return "several norms with different gains"
    return first


def _law(norm: nn.Module, run: _Run) -> NormLaw | str:
    precision = max(run.given.dtype, run.output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    law, width = proved_law(norm, "layer", run.given, run.output), run.given.shape[-1]
    if law is None and proved_law(norm, "rms", run.given, run.output) is not None:
        return "the output of a norm that subtracts no mean, which hides nothing"
    if law is None:
        return "the output of a norm that cannot be run by itself, or is not gamma (x - mean) / deviation + beta"
    held = [p.detach().double().cpu() for p in norm.parameters() if p.shape == (width,)]
    gamma, beta = _held(law.gamma, [*held, *(1 + p for p in held)], precision), _held(law.beta, held, precision)
    if not bool((gamma != 0).all()):
        return "a layer norm whose gains have zeros, which hides other directions"
    return NormLaw("layer", gamma, beta, law.eps)


def _held(found: Tensor, held: Sequence[Tensor], precision: torch.dtype) -> Tensor:
    """The parameter that was found by running the norm, where one agrees; zeros and ones where it is these."""
    near = 64 * max(torch.finfo(precision).eps, 1e-7)
    for each in (*held, torch.zeros_like(found), torch.ones_like(found)):
        if bool((each - found).abs().max() <= near * (1 + found.abs().max())):
            return each
    return found
