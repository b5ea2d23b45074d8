"""Norms as affine maps at the sizes that their inputs have: what "frozen scale" means when effects pass through a norm.

A norm is N(y) = b + g * P y / s(y), row by row: P takes the mean off (layer norm) or does nothing (RMS norm), s(y) is the size of
the row, g and b are gain and shift. With s held at its value on this pass it is affine in y, so that what a sum of vectors does
behind it is the sum of what each of them does.

Nothing is read off a module's attributes. Each norm is given +z and -z for random rows z: b is half the sum of its two answers,
g P z / s(z) half their difference, and one number for each row turns z into y. What comes out must be what the model's own norm
gave on y, within rounding, or the norm is left as it is and is named in `FrozenNorms.left`.

When not to use it: to ask what the model would do without a component. It would scale anew; that is an ablation.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, counted, in_turn, putting_another
from uncollapse.anatomy.operands import replaced
from uncollapse.anatomy.streams import Action, functions_as_found, met, undisturbed
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall, Norm, NormPiece, Place
from uncollapse.restoring import restoring

Where = ModuleCall | NormPiece
Meets = Callable[[Where, Tensor, Tensor], Tensor | None]
LEAST = 0.05  # of a row's size: smaller entries of it say nothing about a gain
ROUNDINGS = 64  # so many units in the last place may lie between a norm and its affine map


@dataclass(frozen=True)
class AffineNorm:
    """N(y) = shift + gain * P y, gain and shift as large as y; `axis` is that of the features."""

    gain: Tensor
    shift: Tensor
    is_centred: bool
    axis: int

    def __call__(self, given: Tensor) -> Tensor:
        return self.shift + self.gain * _centred(given.to(self.gain.dtype), self.is_centred, self.axis)


@dataclass
class FrozenNorms:
    """The affine maps that stand for norms on one batch, and the names of the norms that are left as they are."""

    maps: dict[Where, AffineNorm] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def norms_on_the_way(anatomy: Anatomy) -> dict[Where, Norm | None]:
    """The norms that stand between what a sublayer writes and the model's output on the stream's own way: behind a sublayer, on
    the stream, and outside the blocks (None: what the anatomy knows of these is where they are)."""
    found: dict[Where, Norm | None] = dict.fromkeys(anatomy.outer_norms)
    for block in anatomy.blocks:
        found |= {norm.where: norm for norm in block.norms if norm.role in {"post", "after"}}
    return found


def frozen_norms(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy) -> FrozenNorms:
    """The affine maps of all norms on the way, on this batch. Runs the model three times; within `probing` only."""
    wheres = norms_on_the_way(anatomy)
    if not wheres:
        return FrozenNorms()
    plain = _run(model, batch, anatomy, wheres, None)
    plus = _run(model, batch, anatomy, wheres, 1.0)
    minus = _run(model, batch, anatomy, wheres, -1.0)
    found = FrozenNorms()
    for where, (given, result) in plain.items():
        axes = anatomy.blocks[-1].axes
        axis = axes.width if axes is not None and axes.ndim == given.ndim else given.ndim - 1
        answers = [each[where] for each in (plus, minus) if where in each]
        made = None
        if len(answers) == 2:
            options = [_affine(given, result, *answers[0], *answers[1], centred, axis) for centred in (True, False)]
            made = next((each for each in options if each is not None), None)
        if made is None:
            found.left.append(str(where) if isinstance(where, NormPiece) else where.name)
        else:
            found.maps[where] = made
    return found


def _affine(
    given: Tensor,
    result: Tensor,
    plus: Tensor,
    at_plus: Tensor,
    minus: Tensor,
    at_minus: Tensor,
    is_centred: bool,
    axis: int,
) -> AffineNorm | None:
    """The affine map of a norm from what it made of `plus`, of `minus` and of what it was given; None where it is not such."""
    if not given.shape == result.shape == plus.shape == minus.shape or not torch.equal(plus, -minus):
        return None
    precise = torch.float64 if given.device.type != "mps" else torch.float32
    eps = max(torch.finfo(result.dtype).eps, torch.finfo(given.dtype).eps)
    y, out, z = (t.to(precise) for t in (given, result, plus))
    shift, odd = (at_plus.to(precise) + at_minus.to(precise)) / 2, (at_plus.to(precise) - at_minus.to(precise)) / 2
    centred = _centred(z, is_centred, axis)
    size = centred.square().mean(axis, keepdim=True).sqrt()
    if not bool(((centred.abs() > LEAST * size) & odd.isfinite()).all()):
        return None
    direction = odd / centred * _centred(y, is_centred, axis)
    rest = out - shift
    # A row of zeros is written as its shift, whatever its scale.
    scale = ((rest * direction).sum(axis, keepdim=True) / direction.square().sum(axis, keepdim=True)).nan_to_num(
        0, 0, 0
    )
    gap = (rest - scale * direction).abs()
    most = torch.maximum(rest.abs().amax(axis, keepdim=True), shift.abs().amax(axis, keepdim=True))
    if not bool((gap <= ROUNDINGS * eps * most + 1e-30).all()):
        return None
    kind = torch.promote_types(result.dtype, torch.float32)
    return AffineNorm((odd / centred * scale).to(kind), shift.to(kind), is_centred, axis)


def _centred(rows: Tensor, is_centred: bool, axis: int) -> Tensor:
    return rows - rows.mean(axis, keepdim=True) if is_centred else rows


def poke(like: Tensor, axis: int) -> Tensor:
    """Random rows of size 1, as large as `like`, whose entries all differ clearly from 0 and from the mean of their row."""
    generator = torch.Generator().manual_seed(like.shape[axis])
    rows = like.movedim(axis, -1)
    sizes = torch.rand(rows.shape, generator=generator, dtype=torch.float64) / 2 + 0.75
    signs = torch.where(torch.arange(rows.shape[-1]) % 2 == 0, 1.0, -1.0)
    order = torch.randperm(rows.shape[-1], generator=generator)
    return (sizes * signs[order]).to(like).movedim(-1, axis)


# Met in a pass ---------------------------------------------------------------------------------------------------------


def _run(
    model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy, wheres: Collection[Where], sign: float | None
) -> dict[Where, tuple[Tensor, Tensor]]:
    """What each norm is given and makes of it: in the plain pass, or with random rows times `sign` in the place of its input. Of
    norms that are no modules these are put where the stream, or what a sublayer writes, comes from."""
    found: dict[Where, tuple[Tensor, Tensor]] = {}

    def meets(where: Where, given: Tensor, result: Tensor) -> None:
        found[where] = given.detach().clone(), result.detach().clone()

    def gives(given: Tensor) -> Tensor:
        return (sign or 1.0) * poke(given, given.ndim - 1)

    standing = NormHandlers(wheres, meets, None if sign is None else lambda _, given: gives(given))
    handlers, actions = standing.handlers, list[tuple[Place, Action]]()
    if sign is not None and any(isinstance(where, NormPiece) for where in wheres):
        before: dict[Point, Handler] = {}
        for block in anatomy.blocks:
            before |= _giving_instead(block, gives)
            actions.append((block.exit, gives))
        for point, handler in before.items():
            handlers[point] = in_turn(handlers[point], handler) if point in handlers else handler
    with contextlib.ExitStack() as stack:
        stack.enter_context(met(model, actions, handlers=handlers))
        stack.enter_context(standing.at_modules(model))
        with contextlib.suppress(Exception) if sign is not None else contextlib.nullcontext():
            model(**batch)  # on random rows it may run into anything: what was met by then counts
    return found


def _giving_instead(block: Block, gives: Callable[[Tensor], Tensor]) -> dict[Point, Handler]:
    """Let a block's additions, and its attentions' writing, give random rows."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            return gives(result)
        return result

    points = [residual.additions[-1].point for residual in block.residuals]
    points += [part.written for part in block.parts if part.written is not None]
    return {point: handler for point in points if point.operation.split(" ")[0] != "stack"}


class _Given(threading.local):
    def __init__(self) -> None:
        self.tensors: dict[Where, Tensor] = {}


class NormHandlers:
    """Stand at norms, modules or not: `meets` is told what each was given and what it made, and may return another result;
    `gives` may return another input, of modules alone. `handlers` are for those that are operations, `at_modules` for the rest."""

    def __init__(
        self, wheres: Collection[Where], meets: Meets, gives: Callable[[Where, Tensor], Tensor | None] | None = None
    ) -> None:
        self.meets, self.gives, self._given = meets, gives, _Given()
        self.modules: dict[str, dict[int, ModuleCall]] = {}
        self.handlers: dict[Point, Handler] = {}
        for where in wheres:
            if isinstance(where, ModuleCall):
                self.modules.setdefault(where.name, {})[where.call] = where
                continue
            for point, handler in self._of_piece(where).items():
                self.handlers[point] = in_turn(self.handlers[point], handler) if point in self.handlers else handler

    def _of_piece(self, piece: NormPiece) -> dict[Point, Handler]:
        def reading(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._given.tensors[piece] = list(tensors_in([args, kwargs]))[piece.operand]
            return function(*args, **kwargs)

        def giving(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if piece.reads == piece.gives:
                self._given.tensors[piece] = list(tensors_in([args, kwargs]))[piece.operand]
            output = function(*args, **kwargs)
            given = self._given.tensors.pop(piece, None)
            made = None if given is None else self.meets(piece, given, piece.result(output))
            if made is None or piece.obstacle:
                return output
            return made if piece.member is None else (*output[: piece.member], made, *output[piece.member + 1 :])

        return {piece.reads: reading, piece.gives: putting_another(giving)}

    @contextlib.contextmanager
    def at_modules(self, model: nn.Module) -> Iterator[None]:
        thread = threading.get_ident()
        with restoring() as changes:
            changes.undo(functions_as_found())
            runs = changes.enter(counted(model, self.modules))
            for name, by_call in self.modules.items():

                def enter(
                    _: nn.Module, args: Any, kwargs: Any, name: str = name, by_call: Mapping[int, ModuleCall] = by_call
                ) -> Any:
                    where = by_call.get(runs.begin(name)) if threading.get_ident() == thread else None
                    if where is None:
                        return None
                    given = next(tensors_in([args, kwargs]))
                    gives = self.gives
                    other = None if gives is None else undisturbed(lambda t: gives(where, t), given)
                    self._given.tensors[where] = given if other is None else other
                    return None if other is None else tuple(replaced([args, kwargs], given, other))

                def leave(
                    _: nn.Module,
                    args: Any,
                    kwargs: Any,
                    output: Any,
                    name: str = name,
                    by_call: Mapping[int, ModuleCall] = by_call,
                ) -> Any:
                    where = by_call.get(runs.counts.get(name, 0) - 1) if threading.get_ident() == thread else None
                    given = None if where is None else self._given.tensors.pop(where, None)
                    if where is None or given is None or not isinstance(output, Tensor):
                        return None
                    return undisturbed(lambda t: self.meets(where, given, t), output)

                module = model.get_submodule(name)
                changes.hook(module, "forward_pre", enter, with_kwargs=True)
                changes.hook(module, "forward", leave, with_kwargs=True)
            yield
