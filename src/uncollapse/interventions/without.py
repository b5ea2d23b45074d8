"""Take a component away from a live model, and put it back bit for bit.

    with uc.without(model, "residual", "mlp", blocks=[3, 4]):
        ...

What is left of a block, at the additions themselves (nothing is subtracted, so nothing is rounded twice):

* a removed sublayer (`"mlp"`, `"attention"`; `"block"` is all of them) is skipped with its own norm and residual: the stream
  passes. Instead its mean over a batch, or what it adds in another sequence, can be added (`parts_as`);
* a removed `"residual"` lets the sublayer's output alone go on, where the sublayer is still there; `"attention-residual"` and
  `"mlp-residual"` do so around that sublayer only (the former is the skip that Dong et al. 2021 remove);
* a removed `"norm"` is the identity: the norms on the way into, out of and behind a sublayer. Query-key norms inside the
  attention bound its logits and stay. The embedding's and the final norm stay too, unless `blocks="all+outer"`;
* where an addition scales what it adds, a x + b f(x), the scales stay: without the sublayer a x is left, without the residual
  b f(x). `torch.lerp(x, f, w)` is (1 - w) x + w f. What a condition adds to an update alone belongs to the update, and to the
  norm behind which it stands;
* without a `"head"` its mixed values are replaced before the output projection (`single_heads`): `"head:5.3"` is head 3 of block
  5, and so is `"attention"` with `heads={5: [3]}`; `"head"` by itself means all heads of the blocks. The projection's bias stays;
* without the `"mask"` every real token may attend to every real token (padding stays hidden);
* without `"positions"` every token stands at position 0, in all blocks. Where a model knows positions in another way as well, it
  is refused (`token_order`).

Contexts nest, and may be left in any order: what is missing is the union of those in force. On leaving, also by an exception or
Ctrl-C at whatever line, the model's outputs are what they were, bit for bit. A removal acts in every thread that runs the model; a
thread that is running it when the context is entered makes it refuse. A copy of the model made meanwhile, or a pickle, is one of
the whole model. Under gradient checkpointing a removed part would give silently wrong gradients, so it is refused.

When not to use this: to claim what a model *trained without* the part would do. This one was trained with it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.interception import (
    ChangedPath,
    Handler,
    Point,
    counted,
    device_of,
    in_turn,
    intercepted,
    putting_another,
)
from uncollapse.anatomy.probing import going_as_steered, hidden, in_the_open, probing
from uncollapse.anatomy.proof import known_anatomy, known_example, proved_anatomy
from uncollapse.anatomy.sharded_weights import gathered_weights
from uncollapse.anatomy.situations import held
from uncollapse.anatomy.torch_calls import tensors_in, writes_in_place
from uncollapse.anatomy.turns import closed_to_others, refuse_running
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall, NormPiece, removal
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.interventions import single_heads, unseen_runs, whole_sublayers
from uncollapse.interventions.overlooked_norms import require_no_norm_left, require_no_output_norm_left
from uncollapse.interventions.single_heads import Filling, Heads, HeadsAs
from uncollapse.interventions.token_order import (
    mask_removed,
    positions_removed,
    require_no_mask_left,
    require_order_blind,
)
from uncollapse.restoring import Changes, in_this_thread, reduced_as_found, restoring, turn
from uncollapse.wrappers import module_of, seen_through

Component = Literal[
    "mlp", "attention", "block", "head", "residual", "attention-residual", "mlp-residual", "norm", "positions", "mask"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
_PARTS = {"mlp": {"mlp", "mixer"}, "attention": {"attention", "cross"}}
_RESIDUALS = {f"{name}-residual": kinds for name, kinds in _PARTS.items()}
_RESIDUALS["residual"] = _PARTS["block"] = {kind for kinds in _PARTS.values() for kind in kinds}


@dataclass(frozen=True, eq=False)
class _Removal:
    """One `without` in force: components, block numbers, whether the outer norms go too, and single heads by block."""

    components: frozenset[str]
    blocks: frozenset[int]
    outer: bool
    everywhere: bool = False  # in whatever thread runs the model, not only in the one that took it away
    inner: bool = False  # the norms inside sublayers too, where they can be: to look at what is left without any
    heads: Mapping[int, frozenset[int]] = field(default_factory=dict)
    filling: Filling = field(default_factory=Filling)
    parts_filling: Filling = field(default_factory=Filling)
    further: unseen_runs.Further = field(default_factory=unseen_runs.Further)  # norms of experts that did not run

    @property
    def names(self) -> str:
        """What is removed, for messages."""
        single = [f"head:{number}.{head}" for number in sorted(self.heads) for head in sorted(self.heads[number])]
        return " and ".join(repr(name) for name in [*sorted(self.components), *single])


@dataclass
class _InForce:
    """What is away from one model: the removals, what their union put up, and what holds from the first of them to the last."""

    removals: list[_Removal] = field(default_factory=list)
    installed: Changes = field(default_factory=Changes)
    throughout: Changes = field(default_factory=Changes)


_in_force: weakref.WeakKeyDictionary[nn.Module, _InForce] = weakref.WeakKeyDictionary()


def _removals(model: nn.Module) -> list[_Removal]:
    return list(_in_force[model].removals) if model in _in_force else []


@contextlib.contextmanager
def without(
    model: nn.Module,
    *components: str,
    blocks: Collection[int] | Literal["all", "all+outer"] | None = None,
    heads: Heads | None = None,
    key_value_heads: Heads | None = None,
    heads_as: HeadsAs = "zero",
    parts_as: HeadsAs = "zero",
    batch: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Within the block, `model` runs without the named components in the given blocks (all of them by default).

    components: see the module, or `COMPONENTS`. blocks: block numbers from 0, `"all"`, or `"all+outer"` to take the norms
    outside the blocks as well. batch: a batch to prove the anatomy on, for a model that was not diagnosed before, has no dummy
    inputs of its own, and is not given token numbers alone.

    heads: with `"attention"`, only these heads, by block: `heads={5: [3]}`. Of a block with self- and cross-attention, those of the
    self-attention. key_value_heads: the same for grouped queries: all heads that read this key-value head. heads_as: what comes in
    the place of a head's mixed values: `"zero"`, `"mean"` (over the real tokens of `batch`, in the whole model) or `"resample"`
    (those of another sequence of the batch that is running, drawn by `seed`). parts_as: the same for what whole sublayers add,
    those of `"mlp"`, `"attention"` and `"block"`; with `"zero"` they are skipped.

    Raises `InputError` for an unknown component, block or head, `UnsupportedModel` where the anatomy cannot be proved, where
    there is nothing of the kind to remove or the output would be the same in every bit, where a head cannot be told from others,
    or where gradient checkpointing is on.
    """
    model = module_of(model)
    require_components(components)
    single_heads.require_filling(heads_as)
    single_heads.require_filling(parts_as, "parts_as")
    _refuse_checkpointing(model)
    with restoring() as changes:
        with turn, restoring(gathers=True):
            refuse_running("without", model)
            anatomy = anatomy_for(model, batch)
            wanted = _wanted(model, anatomy, components, blocks, heads, key_value_heads, everywhere=True)
            if heads_as != "zero" and not wanted.heads:
                raise InputError(
                    f"without: expected heads to put the {heads_as!r} in the place of, got none. "
                    "Pass 'attention' and heads={block: [head]}, or leave heads_as out."
                )
            if "positions" in components:
                require_order_blind(model, anatomy, known_example(model) or {})
            if parts_as != "zero" and not wanted.components & _PARTS.keys():
                raise InputError(
                    f"without: expected a whole sublayer to put the {parts_as!r} in the place of, got {wanted.names}. "
                    "Pass 'mlp', 'attention' or 'block', or leave parts_as out."
                )
            wanted = _with_every_expert(model, anatomy, wanted)
            _require_effect(model, anatomy, wanted, heads_as)
            wanted = _filled(model, anatomy, wanted, heads_as, parts_as, batch, seed)
        if wanted.heads:  # no process of a tensor-parallel model sees all of them
            changes.enter(gathered_weights(model))
        changes.enter(_away(model, anatomy, wanted))
        yield model


@contextlib.contextmanager
def removed(
    model: nn.Module,
    *components: str,
    blocks: Collection[int] | Literal["all", "all+outer"] | None = None,
    heads: Heads | None = None,
    filling: Filling | None = None,
    batch: Mapping[str, Any] | None = None,
    everywhere: bool = False,
) -> Iterator[nn.Module]:
    """`without`, also where there is nothing to remove: for those who ask of any model what holds without a component. Passes
    of other threads are whole, unless it is removed `everywhere`. `filling`: of heads, or of whole sublayers; whether heads can be
    told apart was asked before (`single_heads.not_apart`)."""
    require_components(components)
    _refuse_checkpointing(model)
    anatomy = anatomy_for(model, batch)
    if "positions" in components:
        require_order_blind(model, anatomy, known_example(model) or {})
    wanted = _wanted(model, anatomy, components, blocks, heads, everywhere=everywhere)
    if filling is not None:
        wanted = replace(wanted, filling=filling) if wanted.heads else replace(wanted, parts_filling=filling)
    with restoring() as changes:
        changes.enter(_away(model, anatomy, _with_every_expert(model, anatomy, wanted)))
        yield model


@contextlib.contextmanager
def _away(model: nn.Module, anatomy: Anatomy, wanted: _Removal) -> Iterator[None]:
    """Within the block what is wanted away from the model is away."""
    with restoring() as changes:
        with turn:
            refuse_running("without", model)
            changes.undo(functools.partial(_give_back, model, anatomy, wanted))
            force = _in_force.setdefault(model, _InForce())
            if not force.removals:
                force.throughout.enter(held(model))
                force.throughout.enter(going_as_steered(model))
                _copied_whole(model, force.throughout)
            force.removals.append(wanted)
            _install(model, anatomy, force.removals)
        yield


def _wanted(
    model: nn.Module,
    anatomy: Anatomy,
    components: Collection[str],
    blocks: Collection[int] | Literal["all", "all+outer"] | None,
    heads: Heads | None = None,
    key_value_heads: Heads | None = None,
    *,
    everywhere: bool = False,
) -> _Removal:
    """What is meant: whole components in blocks, and single heads. Raises `InputError` for a block or head that does not exist."""
    numbers = require_blocks(blocks, anatomy)
    single: dict[int, set[int]] = {}
    whole = {name for name in components if name != "head" and single_heads.spelled_head(name) is None}
    named: dict[int, set[int]] = {}
    for number, head in filter(None, map(single_heads.spelled_head, components)):
        named.setdefault(number, set()).add(head)
    found = [single_heads.require_heads(named, anatomy)] if named else []
    if heads is not None or key_value_heads is not None:
        if not {"attention", "head"} & set(components):
            raise InputError(
                "without: expected 'attention' beside heads, got heads of nothing that is removed. "
                "Pass without(model, 'attention', heads={block: [head]})."
            )
        whole.discard("attention")
        found += [single_heads.require_heads(heads, anatomy)] if heads is not None else []
        if key_value_heads is not None:
            groups = single_heads.require_heads(key_value_heads, anatomy, "key_value_heads")
            with restoring() as changes:
                _set_aside(model, anatomy, changes)
                found.append(single_heads.heads_of_groups(model, anatomy, groups, known_example(model) or {}))
    elif "head" in components:
        every = {number: single_heads.heads_of(number, anatomy) for number in numbers}
        found.append({number: own for number, own in every.items() if own})
        if not found[-1]:
            whole.add("head")  # there is none to remove
    for each in found:
        for number, own in each.items():
            if blocks is not None and number not in numbers:
                raise InputError(
                    f"without: expected heads of the given blocks {sorted(numbers)}, got block {number}. "
                    "A head names its own block. Leave blocks out."
                )
            single.setdefault(number, set()).update(own)
    return _Removal(
        frozenset(whole),
        numbers,
        blocks == "all+outer",
        everywhere,
        heads={number: frozenset(own) for number, own in single.items()},
    )


def _filled(
    model: nn.Module,
    anatomy: Anatomy,
    wanted: _Removal,
    heads_as: HeadsAs,
    parts_as: HeadsAs,
    batch: Mapping[str, Any] | None,
    seed: int,
) -> _Removal:
    """The removal with what comes in the place of heads and of whole sublayers; means are of the whole model."""
    for option, chosen in (("heads_as", heads_as), ("parts_as", parts_as)):
        if chosen == "mean" and batch is None:
            raise InputError(
                f"without: expected a batch to take the mean over, got none. Pass batch={{...}}, or {option}='zero'."
            )
    with restoring() as changes:
        _set_aside(model, anatomy, changes)
        if heads_as != "zero":
            wanted = replace(wanted, filling=filling_of_heads(model, anatomy, wanted.heads, heads_as, batch, seed))
        if parts_as != "zero":
            parts = {
                number: _parts(anatomy.blocks[number], wanted.components, _PARTS) for number in sorted(wanted.blocks)
            }
            wanted = replace(wanted, parts_filling=filling_of_parts(model, anatomy, parts, parts_as, batch, seed))
    return wanted


def _with_every_expert(model: nn.Module, anatomy: Anatomy, wanted: _Removal) -> _Removal:
    """A removal of norms with those of the experts that did not run when the model was read."""
    example = known_example(model) if "norm" in wanted.components else None
    if example is None:
        return wanted
    with restoring() as changes:
        _set_aside(model, anatomy, changes)
        return replace(wanted, further=unseen_runs.norms_of_every_expert(model, anatomy, example))


def filling_of_heads(
    model: nn.Module,
    anatomy: Anatomy,
    heads: Heads,
    heads_as: HeadsAs,
    batch: Mapping[str, Any] | None,
    seed: int = 0,
) -> Filling:
    """What comes in the place of some heads' mixed values."""
    if heads_as != "zero":
        single_heads.require_sequences_apart(model, anatomy, heads)
    means = single_heads.means_of(model, anatomy, heads, batch or {}) if heads_as == "mean" else {}
    return Filling(heads_as, seed, means)


def filling_of_parts(
    model: nn.Module,
    anatomy: Anatomy,
    parts: Mapping[int, Collection[int]],
    parts_as: HeadsAs,
    batch: Mapping[str, Any] | None,
    seed: int = 0,
) -> Filling:
    """What comes in the place of what some parts add, by block. Raises `UnsupportedModel` where tokens cannot be told there."""
    for number, own in parts.items():
        if parts_as != "zero":
            whole_sublayers.standing(anatomy.blocks[number], number, own, Filling(parts_as, seed), None)
    means = whole_sublayers.means_of(model, anatomy, parts, batch or {}) if parts_as == "mean" else {}
    return Filling(parts_as, seed, means)


def _give_back(model: nn.Module, anatomy: Anatomy, removal: _Removal) -> None:
    """End one removal, whichever was begun last."""
    with turn:
        force = _in_force.get(model)
        if force is None:
            return
        force.removals[:] = [each for each in force.removals if each is not removal]
        _install(model, anatomy, force.removals)
        if not force.removals:
            force.throughout.put_back()
            _in_force.pop(model, None)


def _copied_whole(model: nn.Module, changes: Changes) -> None:
    """Let a copy that is made meanwhile, or a pickle, be one of the whole model: what is put up here would go on acting on this
    model, and not on the copy."""
    reduced = _refuse_copy if hidden(model) else reduced_as_found  # a configuration is changed as well
    for module in model.modules():
        if hasattr(type(module), "__deepcopy__"):
            changes.place(vars(module), "__deepcopy__", functools.partial(_refuse_copy, weakref.ref(module)))
        changes.place(vars(module), "__reduce_ex__", functools.partial(reduced, weakref.ref(module)))


def _refuse_copy(reference: weakref.ref[nn.Module], _: object) -> NoReturn:
    name = type(reference()).__name__
    raise UnsupportedModel(
        f"without: expected a model that is copied whole, got {name} while something is away from it that a copy would keep. "
        "Its code says how it is copied, or a configuration is changed. Copy the model outside the context."
    )


def is_ablated(model: nn.Module) -> bool:
    """Whether the model is inside a `without` right now."""
    return bool(_removals(model))


def anatomy_for(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Anatomy:
    """The proved anatomy: the remembered one, else proved on `batch`, on the model's own dummy inputs, or on token numbers."""
    known = known_anatomy(model, batch)
    if known is not None:
        return known
    if batch is None:
        batch = getattr(seen_through(model), "dummy_inputs", None)
    if batch is None and (numbers := _token_numbers(model)) is not None:
        with contextlib.suppress(UncollapseError):  # it may want another input: the user's own will do
            return proved_anatomy(model, numbers)
    if batch is None:
        raise InputError(
            f"without: expected a model whose anatomy is known, got a {type(model).__name__} that was never diagnosed and "
            "brings no dummy inputs. Pass batch={...}, a small input of the model."
        )
    return proved_anatomy(model, batch)


def _token_numbers(model: nn.Module) -> dict[str, Tensor] | None:
    """Random token numbers as the one input that a model with an embedding needs; None where it needs more. Whether it takes them
    shows when it is run on them, and an input of another kind that leads it another way is noticed in the pass."""
    given = inspect.signature(seen_through(model).forward).parameters.values()
    plain = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    needed = [each for each in given if each.default is each.empty and each.kind in plain]
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(needed) != 1 or not sizes:
        return None
    generator = torch.Generator().manual_seed(0)
    return {needed[0].name: torch.randint(min(sizes), (3, 7), generator=generator).to(device_of(model))}


def require_effect(
    model: nn.Module,
    components: Collection[str],
    blocks: Collection[int] | Literal["all", "all+outer"] | None,
    batch: Mapping[str, Any] | None = None,
) -> None:
    """Raise `UnsupportedModel` where one of the components is not there to be removed, or removing it leaves the model's
    output the same in every bit. Runs the model a few times on the example that its anatomy was proved on; batch: see `without`."""
    anatomy = anatomy_for(model, batch)
    wanted = _with_every_expert(model, anatomy, _wanted(model, anatomy, components, blocks))
    _require_effect(model, anatomy, wanted, thorough=True)


def _require_effect(
    model: nn.Module, anatomy: Anatomy, wanted: _Removal, heads_as: HeadsAs = "zero", *, thorough: bool = False
) -> None:
    """Raise where a component is not there, or where removing it changes nothing: the mask and positions, `thorough` all."""
    blocks = [anatomy.blocks[number] for number in sorted(wanted.blocks)]
    for component in sorted(wanted.components):
        if component in {"positions", "mask"} or _holds(component, blocks, anatomy, wanted.outer):
            continue
        where = f"its {len(blocks)} blocks" if len(blocks) == len(anatomy.blocks) else f"blocks {sorted(wanted.blocks)}"
        outside = component == "norm" and anatomy.outer_norms
        raise UnsupportedModel(
            f"without: expected a model with a component {component!r} to remove, got {type(model).__name__}: nothing of the "
            f"kind was found in {where}. "
            + ("Norms stand outside: pass blocks='all+outer'." if outside else "Remove another component."),
            found=anatomy.describe(),
        )
    example = known_example(model)
    if wanted.heads and example is not None:
        with restoring() as changes:
            _set_aside(model, anatomy, changes)
            single_heads.require_apart(model, anatomy, wanted.heads, example, heads_as)
    # A removal acts at proved places and says so where it misses one. What mask and positions do shows on a run only, and so
    # does a norm or a mask that was overlooked.
    if example is not None and "norm" in wanted.components:
        everything = replace(
            _Removal(frozenset({"norm", "mlp", "attention"}), wanted.blocks, False, inner=True), further=wanted.further
        )
        with restoring() as changes:
            _set_aside(model, anatomy, changes)
            _put_up(model, anatomy, [everything], changes)
            require_no_norm_left(model, anatomy, wanted.blocks, example)
        norms = replace(everything, components=frozenset({"norm"}))
        with restoring() as changes:
            _set_aside(model, anatomy, changes)
            _put_up(model, anatomy, [norms], changes)
            require_no_output_norm_left(model, anatomy, wanted.blocks, example)
    if example is not None and "mask" in wanted.components:
        with restoring() as changes:
            _set_aside(model, anatomy, changes)
            require_no_mask_left(model, anatomy, wanted.blocks, example)
    if example is None or not (thorough or wanted.components & {"mask", "positions"}):
        return
    with probing(model), restoring() as changes:
        _set_aside(model, anatomy, changes)
        if _changes(model, anatomy, wanted, example):
            return
        with without_zeros(model):
            if _changes(model, anatomy, wanted, example):
                return
    raise UnsupportedModel(
        f"without: expected the output of {type(model).__name__} to depend on its {wanted.names}, got the same in every bit "
        "without. On the example it was proved on, nothing is removed. Remove another component."
    )


def _set_aside(model: nn.Module, anatomy: Anatomy, changes: Changes) -> None:
    """Take down what is in force, until `changes` are undone."""
    if _removals(model):
        changes.enter(closed_to_others())
        changes.undo(lambda: _install(model, anatomy, _removals(model)))
        _install(model, anatomy, [])


def _holds(component: str, blocks: Collection[Block], anatomy: Anatomy, outer: bool) -> bool:
    """Whether the blocks hold something of the kind."""
    if component == "norm":
        inside = any(norm.role != "inner" for block in blocks for norm in block.norms)
        return inside or (outer and bool(anatomy.outer_norms))
    if component == "head":
        return any(single_heads.attention_of(block) is not None for block in blocks)
    kinds = _PARTS.get(component) or _RESIDUALS[component]
    return any(part.kind in kinds for block in blocks for part in block.parts)


def _changes(model: nn.Module, anatomy: Anatomy, removal: _Removal, example: Mapping[str, Any]) -> bool:
    """Whether a removal changes a bit of the model's output on the example. NaN in the same places is no change (padded sequences
    may come to that); it counts as one where NaN would hide it everywhere, and where the component goes only together with
    others."""
    found = []
    for removals in ([], [removal]):
        with restoring() as changes:
            try:
                _put_up(model, anatomy, removals, changes)
            except InputError:
                return True
            torch.manual_seed(0)
            found.append([t.detach().clone() for t in tensors_in(model(**example)) if t.is_floating_point()])
    plain, changed = found
    if len(plain) != len(changed) or any(a.shape != b.shape for a, b in zip(plain, changed, strict=True)):
        return True
    if not any(bool(t.isfinite().any()) for t in plain):
        return True
    return not all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(plain, changed, strict=True))


def _install(model: nn.Module, anatomy: Anatomy, removals: list[_Removal]) -> None:
    """Take down what is in force and put up the union of `removals`."""
    installed = _in_force[model].installed
    installed.put_back()
    try:
        everywhere = all(each.everywhere for each in removals)
        _put_up(model, anatomy, removals, installed, everywhere=everywhere, is_watched=True)
    except BaseException:  # Ctrl-C, too: the half that is up comes down
        installed.put_back()
        raise


def _put_up(
    model: nn.Module,
    anatomy: Anatomy,
    removals: list[_Removal],
    changes: Changes,
    *,
    everywhere: bool = False,
    is_watched: bool = False,
) -> None:
    """Put up the union of `removals`, in this thread or `everywhere`. is_watched: passes that go where the model was never looked
    at are refused if something would stay there; one of noise, to ask a question, may go anywhere."""
    if not removals:
        return
    changes.enter(in_the_open(model))
    handlers: dict[Point, Handler] = {}
    norms: set[ModuleCall | NormPiece] = set()
    paths = {run: path for r in removals for run, path in r.further.paths.items()} | dict(anatomy.paths)
    for number, block in enumerate(anatomy.blocks):
        gone = {c for r in removals if number in r.blocks for c in r.components}
        skips = {c for r in removals if number in r.blocks and r.parts_filling.kind == "zero" for c in r.components}
        parts, alone = _parts(block, skips, _PARTS), _parts(block, gone, _RESIDUALS)
        _refuse_shared(block, parts, alone)
        handlers |= removal(block, parts, residual=alone)
        others = {norm for r in removals for i, norm in r.further.norms if i == number}
        for norm in (*block.norms, *others):
            skipped = norm.role == "post" and parts >= set(block.residuals[norm.place or 0].parts)
            fixed = isinstance(norm.where, NormPiece) and norm.where.obstacle
            inside = norm.role == "inner" and (fixed or not any(r.inner and number in r.blocks for r in removals))
            if skipped or ("norm" in gone and not inside):
                norms.add(norm.where)
    if any(r.outer and "norm" in r.components for r in removals):
        norms |= set(anatomy.outer_norms)
    runs: dict[str, set[int]] = {}
    for where in norms:
        if isinstance(where, NormPiece):
            for point, handler in _identity_of_piece(where).items():  # norms may begin at one operation
                handlers[point] = in_turn(handlers[point], handler) if point in handlers else handler
        else:
            runs.setdefault(where.name, set()).add(where.call)
    for name, calls in runs.items():
        changes.enter(_identity(model, name, calls, {run for of, run in paths if of == name}, everywhere))
    unmasked = frozenset(b for r in removals if "mask" in r.components for b in r.blocks)
    if unmasked:
        changes.enter(mask_removed(model, anatomy, unmasked, everywhere=everywhere))
    if any("positions" in r.components for r in removals):
        changes.enter(positions_removed(model, everywhere=everywhere))
    real = None
    if any("resample" in {r.filling.kind, r.parts_filling.kind} for r in removals):
        real = single_heads.real_tokens(model, anatomy, changes, everywhere=everywhere)
    for each in removals:
        for number in sorted(each.blocks) if each.parts_filling.kind != "zero" else ():
            filled_parts = _parts(anatomy.blocks[number], each.components, _PARTS)
            told = None if real is None else real(number)
            at = whole_sublayers.standing(anatomy.blocks[number], number, filled_parts, each.parts_filling, told)
            for point, handler in at.items():
                handlers[point] = in_turn(handler, handlers[point]) if point in handlers else handler
        for number, own in each.heads.items():
            told = None if real is None else real(number)
            away = single_heads.standing(anatomy.blocks[number], own, each.filling, told, number)
            for point, handler in away.handlers.items():  # of one head the latest removal holds
                handlers[point] = in_turn(handler, handlers[point]) if point in handlers else handler
            for where, read in away.reads.items():
                changes.enter(single_heads.reading(model, where.name, {where.call: read}, everywhere=everywhere))
    affected = {
        "norm": {number for r in removals if "norm" in r.components for number in r.blocks},
        "attention": {*unmasked, *(number for r in removals for number in r.heads)},
    }
    if is_watched:
        outside = any(len(r.blocks) == len(anatomy.blocks) and r.components for r in removals)
        changes.enter(unseen_runs.watched(model, anatomy, affected, norms, outside=outside, everywhere=everywhere))
    changes.enter(intercepted(model, handlers, everywhere=everywhere, paths=paths if is_watched and paths else None))


def _parts(block: Block, gone: Collection[str], meant: Mapping[str, Collection[str]]) -> set[int]:
    """The numbers of the parts that the components `gone` are about; `meant` gives the kinds for each component."""
    return {i for i, p in enumerate(block.parts) for name, kinds in meant.items() if name in gone and p.kind in kinds}


def _refuse_shared(block: Block, parts: Collection[int], alone: Collection[int]) -> None:
    """Refuse to take the stream from some of the parts that one addition joins to it, and to leave it to the others."""
    for addition in block.residuals:
        left = set(addition.parts) - set(parts)
        if left & set(alone) and not left <= set(alone):
            kinds = " and ".join(block.parts[i].kind for i in sorted(left))
            raise InputError(
                f"without: expected a residual for each sublayer alone, got {block.name} with one addition for its {kinds}. "
                "They run in parallel and share the residual. Remove 'residual', or one of them and the other's residual."
            )


@contextlib.contextmanager
def _identity(model: nn.Module, name: str, calls: set[int], known: set[int], everywhere: bool) -> Iterator[None]:
    """Let the given runs of a norm return their input, in the dtype the norm would have returned. Where these are all the runs that
    are `known`, so does every other; where they are some, which of them another would be cannot be told."""
    are_all = bool(known) and known <= calls
    with restoring() as changes:
        runs = changes.enter(counted(model, [name]))

        def passing(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            run = runs.begin(name)
            if known and run not in known and not are_all:
                raise ChangedPath(
                    f"without: expected {len(known)} runs of the norm {name} in a pass, got one more. Which of them are to be "
                    "taken out is not known. Run the model on inputs of one kind."
                )
            if run not in calls and not are_all:
                return None
            (given, *_rest) = tensors_in([args, kwargs])
            return given.to(output.dtype) if isinstance(output, Tensor) else None

        hook = passing if everywhere else in_this_thread(passing)
        changes.hook(model.get_submodule(name), "forward", hook, with_kwargs=True)
        yield


class _Given(threading.local):
    """What a norm that is no module was given, in the pass that this thread is in."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


def _identity_of_piece(piece: NormPiece) -> dict[Point, Handler]:
    """Handlers that let a norm which is no module return its input, in the dtype it would have returned."""
    if piece.obstacle:
        raise UnsupportedModel(
            f"without: expected a norm that can be taken out, got {piece}: {piece.obstacle}. "
            "It is measured where it stands. Remove another component, or leave its block out with blocks=[...]."
        )
    met = _Given()  # each thread's own

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        met.tensors[:] = [list(tensors_in([args, kwargs]))[piece.operand].clone()]  # the norm may overwrite it

    def reading(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        keep(args, kwargs)
        return function(*args, **kwargs)

    def giving(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if piece.reads == piece.gives:
            keep(args, kwargs)
        output = function(*args, **kwargs)
        if writes_in_place(function):
            args[0].copy_(met.tensors.pop())
            return output
        passed = met.tensors.pop().to(piece.result(output).dtype)
        return passed if piece.member is None else (*output[: piece.member], passed, *output[piece.member + 1 :])

    return {piece.reads: reading, piece.gives: putting_another(giving)}


def require_components(components: tuple[str, ...]) -> None:
    """Raise `InputError` unless each is a component that can be removed."""
    if not components:
        raise InputError(f"without: expected one or more of {', '.join(COMPONENTS)}, got none. Name what to remove.")
    for component in components:
        if component not in COMPONENTS and single_heads.spelled_head(component) is None:
            among = f"{', '.join(COMPONENTS)}, or a head such as head:5.3 (block 5, head 3)"
            raise InputError(f"without: expected components among {among}, got {component!r}. Check the spelling.")


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules()):
        raise UnsupportedModel(
            f"without: expected a model without gradient checkpointing, got {type(model).__name__} with it switched on. "
            "The blocks would be run again outside this context and give wrong gradients. "
            "Switch it off, or put the model into evaluation mode, first."
        )


def require_blocks(blocks: Collection[int] | str | None, anatomy: Anatomy) -> frozenset[int]:
    """The block numbers that `blocks` means. Raises `InputError` for a block that does not exist."""
    count = len(anatomy.blocks)
    if blocks is None or (isinstance(blocks, str) and blocks in {"all", "all+outer"}):
        return frozenset(range(count))
    if isinstance(blocks, str) or not all(isinstance(b, int) and 0 <= b < count for b in blocks):
        raise InputError(
            f"without: expected block numbers from 0 to {count - 1}, got {blocks!r}. "
            "Blocks are counted from 0, encoder first. Pass for example blocks=range(2, 4)."
        )
    return frozenset(blocks)
