"""What runs in a pass from which something is taken away, and never ran where the model was looked at.

A removal acts where the example showed what to remove. Another batch sends its tokens to other experts, or goes through another
branch: a norm there, or an attention with its mask and heads, would stay without a word. Two things are done about it:

* *Norms of experts.* Where a router was found, the example is run again with its tokens sent to all experts in turn, and their
  norms are read off these passes (`norms_of_every_expert`). They go with the others.
* *Everything else.* A module of the affected blocks that did not run when they were read is looked at when it does: its run is
  recorded by itself. Where it holds what was to be removed, the pass is refused, and names it (`watched`).

When not to use it: for another branch in the code of a module that did run. Where something is taken away in that very code,
`intercepted` counts its operations; elsewhere nothing is seen of it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.attention_graph import mixing_products
from uncollapse.anatomy.interception import Handler, Paths, Point, aside, intercepted
from uncollapse.anatomy.module_states import ModuleStates
from uncollapse.anatomy.norm_reading import next_products, pieces_between
from uncollapse.anatomy.operands import FUSED
from uncollapse.anatomy.probing import own_random_numbers, probing, seed_all
from uncollapse.anatomy.reading import read
from uncollapse.anatomy.reading_norms import behaves_as_norm
from uncollapse.anatomy.routers import chosen_in
from uncollapse.anatomy.snapshots import copied
from uncollapse.anatomy.tracing import Trace, trace
from uncollapse.anatomy.vocabulary import Anatomy, ModuleCall, Norm, NormPiece
from uncollapse.errors import UncollapseError, UnsupportedModel
from uncollapse.restoring import in_this_thread, restoring

_MOST_PASSES = 16  # in which all experts are to run once


@dataclass(frozen=True)
class Further:
    """Norms, each with the number of its block, in runs of modules that the anatomy knows nothing of; `paths` are those of these
    runs."""

    norms: tuple[tuple[int, Norm], ...] = ()
    paths: Paths = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Anatomy, Further]] = weakref.WeakKeyDictionary()


def unseen_in(model: nn.Module, anatomy: Anatomy, numbers: Iterable[int]) -> dict[int, list[str]]:
    """By number of a block the names of the modules in it that did not run when it was read."""
    ran = {name for name, _ in anatomy.paths}
    found: dict[int, list[str]] = {}
    for number in numbers if ran else ():
        own = anatomy.blocks[number].module.name
        inside = (f"{own}.{name}" if own else name for name, _ in model.get_submodule(own).named_modules() if name)
        found[number] = [name for name in inside if name not in ran]
    return found


# Norms of experts -----------------------------------------------------------------------------------------------------


def norms_of_every_expert(model: nn.Module, anatomy: Anatomy, example: Mapping[str, Any]) -> Further:
    """The norms of experts that did not run when the model was read, told in passes over `example` whose routers choose all of
    them in turn. Nothing where there is no such expert, or where the model does not run so."""
    known = _known.get(model)
    if known is None or known[0] is not anatomy:
        known = _known[model] = anatomy, _read_with_every_expert(model, anatomy, example)
    return known[1]


def _read_with_every_expert(model: nn.Module, anatomy: Anatomy, example: Mapping[str, Any]) -> Further:
    routers = {
        part.router.point: part.router.experts for block in anatomy.blocks for part in block.parts if part.router
    }
    of_blocks = unseen_in(model, anatomy, range(len(anatomy.blocks)) if routers else ())
    missing = {name for names in of_blocks.values() for name in names}
    norms: list[tuple[int, Norm]] = []
    paths: dict[tuple[str, int], Mapping[str, int]] = {}
    first = dict.fromkeys(routers, 0)
    handlers = {point: _in_turn(point, first, experts) for point, experts in routers.items()}
    for _ in range(_MOST_PASSES):
        if not missing or min(first[point] - routers[point] for point in routers) >= 0:
            break
        try:
            with probing(model), intercepted(model, handlers, strict=False):
                seed_all(0)
                recorded = trace(model, example)
                found = read(model, recorded)
                recorded.tape.clear()
        # The model's own code, sent where it may not go, or a picture that cannot be read: nothing is known.
        except Exception:
            break
        new = {run: path for run, path in recorded.paths().items() if run[0] in missing}
        shapes = [[(b.module, [p.kind for p in b.parts]) for b in each.blocks] for each in (found, anatomy)]
        if not new or [s for s, _ in shapes[0]] != [s for s, _ in shapes[1]]:
            break
        norms += [(i, n) for i, block in enumerate(found.blocks) for n in block.norms if _owner(n.where) in new]
        paths |= new
        missing -= {name for name, _ in new}
    return Further(tuple(norms), paths)


def _owner(where: ModuleCall | NormPiece) -> tuple[str, int | None]:
    """The run of a module in which a norm stands."""
    return (where.name, where.call) if isinstance(where, ModuleCall) else (where.gives.owner, where.gives.call)


def _in_turn(point: Point, first: dict[Point, int], experts: int) -> Handler:
    """Choose one expert after the other, for one token after the other, and go on there in the next pass."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        chosen = chosen_in(output)
        if chosen is None:
            first[point] = experts
            return output
        with torch._C.DisableTorchFunction():
            numbers = torch.arange(chosen.numel(), device=chosen.device) + first[point]
            other = (numbers % experts).to(chosen.dtype).view(chosen.shape)
        first[point] += chosen.numel()
        return other if isinstance(output, Tensor) else type(output)((output[0], other))

    return handler


# Everything else --------------------------------------------------------------------------------------------------------


class _Looking(threading.local):
    """Whether this thread runs a module to look at it, and in how many unseen modules it is; what they were given."""

    def __init__(self) -> None:
        self.is_on = False
        self.given: list[tuple[Any, Any] | None] = []


@contextlib.contextmanager
def watched(
    model: nn.Module,
    anatomy: Anatomy,
    away: Mapping[str, Collection[int]],
    norms: Collection[ModuleCall | NormPiece],
    *,
    outside: bool,
    everywhere: bool,
) -> Iterator[None]:
    """Within the block `UnsupportedModel` is raised where a module runs that was never looked at and holds what is away: `away`
    says of `"norm"`, and of `"attention"` for masks and heads, in which blocks. `norms` are those that are away. outside: something
    is away from all blocks, and a module outside of them that holds an attention would be one more."""
    wanted: dict[str, set[str]] = {name: {"attention"} for name in anatomy.unseen_outside(model) if outside}
    unseen = unseen_in(model, anatomy, {number for numbers in away.values() for number in numbers})
    for component, numbers in away.items():
        for name in (name for number in numbers for name in unseen.get(number, ())):
            wanted.setdefault(name, set()).add(component)
    covered = {name for name, _ in map(_owner, norms)}
    clear: set[str] = set()
    looking = _Looking()

    def enter(_: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        if not looking.is_on:
            is_new = name not in clear and not looking.given
            looking.given.append((copied(args, model), copied(kwargs, model)) if is_new else None)

    def leave(module: nn.Module, _args: Any, _kwargs: Any, output: Any, name: str) -> None:
        given = looking.given.pop() if looking.given and not looking.is_on else None
        if given is None or output is None:
            return
        looking.is_on = True
        try:
            held = _held(module, name, given, wanted[name], covered)
        finally:
            looking.is_on = False
        if held:
            raise UnsupportedModel(
                f"without: expected all that runs in {type(model).__name__} to be known where something is taken away, got "
                f"{name}: it did not run when the model was read, and {held}. Run the model on inputs on which it does not run, "
                "leave its block out with blocks=[...], or remove another component."
            )
        clear.add(name)

    def afresh(*_: Any) -> None:
        looking.given.clear()  # Ctrl-C skips the hooks on the way out

    with restoring() as changes:
        if wanted:
            changes.hook(model, "forward_pre", afresh if everywhere else in_this_thread(afresh))
        for name in wanted:
            before, behind = (functools.partial(each, name=name) for each in (enter, leave))
            module = model.get_submodule(name)
            hooks = (before, behind) if everywhere else (in_this_thread(before), in_this_thread(behind))
            changes.hook(module, "forward_pre", hooks[0], with_kwargs=True)
            changes.hook(module, "forward", hooks[1], with_kwargs=True, always_call=True)
        yield


class _Run(nn.Module):
    """One run of a module, on arguments that are the only data."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _held(module: nn.Module, name: str, given: tuple[Any, Any], wanted: Collection[str], covered: set[str]) -> str:
    """What a run of a module holds of what is away, in words; empty where it holds nothing of it."""
    with restoring() as changes:
        changes.undo(ModuleStates(module).put_back)
        changes.enter(own_random_numbers())
        changes.enter(aside())
        run = _Run(module)
        try:
            recorded = trace(run, {"args": given[0], "kwargs": given[1]})
        except UncollapseError:
            raise
        except Exception as error:  # the model's own code, run by itself: whatever it raises, it cannot be looked at
            return f"cannot be looked at by itself ({type(error).__name__}: {error})"
    if "attention" in wanted and mixing_products(recorded):
        return "holds an attention"
    if "norm" in wanted and any(not _is_covered(recorded, at, name, covered) for at in _norms_in(recorded, run)):
        return "holds a norm"
    return ""


def _norms_in(recorded: Trace, run: nn.Module) -> Iterator[int]:
    """The calls in whose code a norm stands that is not between two learned products of the run: those stay."""
    t = recorded
    given = [n.index for n in t.nodes if n.operation == "batch" and n.is_floating]
    products = [n.index for n in t.nodes if n.is_data and (t.is_matrix_product(n.index) or n.operation == FUSED)]
    ends = [i for i in t.results if t.nodes[i].is_floating]
    for source in [*given, *products]:
        targets = [end for end in ends if end != source]
        if source in given:
            targets += next_products(t, source, ends)
        for piece in pieces_between(t, source, targets):
            yield t.nodes[piece.bare].call
    for call in t.calls:  # one that hides what it does from tracing is asked itself
        if call.name and not call.children and call.inputs and None in call.outputs:
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            if source != result and not t.depends(result, source):
                shape = t.nodes[source].shape
                if behaves_as_norm(run.get_submodule(call.name), shape) is not None:
                    yield call.index


def _is_covered(recorded: Trace, call: int, name: str, covered: Collection[str]) -> bool:
    """Whether a norm in the code of a call is among those that are away. `name` is that of the module that ran."""
    around = (recorded.calls[i].name for i in recorded.call_path(call))
    return any(name + one.removeprefix("module") in covered for one in around)
