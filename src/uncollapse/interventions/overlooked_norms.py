"""Whether a norm is left when the norms of a model's blocks are removed: asked of the live model, not of its picture.

Without its norms, a sublayer reads the stream itself: sixteen times the stream is sixteen times as large for it. With a norm in
between it reads the same. So the stream of every block is replaced by noise of two sizes, with all sublayers left out so that
nothing else happens to it, and what each sublayer's first learned product reads is compared, and what leaves the block.

When not to use it: for output norms, between a sublayer and its addition. What a sublayer gives has no size that is known.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Point, counted
from uncollapse.anatomy.norm_reading import random_input, same
from uncollapse.anatomy.output_maps import product_map
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall, Part, Place
from uncollapse.errors import UnsupportedModel
from uncollapse.restoring import restoring

_Read = dict[tuple[int, str], Tensor]  # by block, and by the place that reads


class _Answered(threading.local):
    """What was asked and found to be without such a norm, while the answer holds; None: it is asked each time."""

    blocks: list[tuple[Anatomy, frozenset[int]]] | None = None


_answered = _Answered()


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within the block, in this thread, nothing changes a model's weights: no norm left of the same blocks is found out once."""
    with restoring() as changes:
        changes.set(_answered, "blocks", [])
        yield


def require_no_norm_left(
    model: nn.Module, anatomy: Anatomy, numbers: frozenset[int], example: Mapping[str, Any]
) -> None:
    """Raise `UnsupportedModel` where something in the blocks `numbers` still gives the stream one size. The model must be running
    without the norms and without the sublayers of these blocks; it runs three times on `example`."""
    answered = _answered.blocks
    if answered is not None and any(known is anatomy and blocks == numbers for known, blocks in answered):
        return
    plain, large, other = (_read(model, anatomy, numbers, example, *how) for how in ((16.0, 0), (256.0, 0), (16.0, 1)))
    for key in sorted(plain.keys() & large.keys() & other.keys()):
        a, b, c = (found[key].double() for found in (plain, large, other))
        if not same(a, b) or a.shape != c.shape or same(a, c):
            continue  # it grows with the stream, or has nothing to do with it
        if not bool(c.isfinite().all()) or same(a.abs(), c.abs()):
            continue  # of one size everywhere: a sign, a saturation
        number, place = key
        raise UnsupportedModel(
            f"without: expected {anatomy.blocks[number].name} of {type(model).__name__} to read its stream as it is when its norms "
            f"are removed, got a norm that was overlooked: {place} reads the same of a stream sixteen times as large. "
            "Remove another component, or leave this block out with blocks=[...]."
        )
    if answered is not None:
        answered.append((anatomy, numbers))


def _read(
    model: nn.Module, anatomy: Anatomy, numbers: frozenset[int], example: Mapping[str, Any], size: float, seed: int
) -> _Read:
    """What is read in one pass in which noise of this size stands for the stream of each block."""
    found: _Read = {}
    handlers: dict[Point, Handler] = {}
    actions: list[tuple[Place, Action]] = []
    modules: dict[str, dict[int, tuple[int, str]]] = {}
    for number in sorted(numbers):
        block = anatomy.blocks[number]
        actions.append((block.entry, _noise(size, seed + 2 * number)))
        actions.append((block.exit, _keeping(found, (number, "what comes behind it"))))
        for place, name in _first_products(block):
            if isinstance(place, ModuleCall):
                modules.setdefault(place.name, {})[place.call] = (number, name)
            else:
                handlers[place] = _noting(found, (number, name))
    with probing(model), met(model, actions, handlers=handlers, strict=False), _entering(model, modules, found):
        torch.manual_seed(0)
        model(**example)
    return found


def _noise(size: float, seed: int) -> Action:
    return lambda stream: (size * random_input(tuple(stream.shape), seed)).to(stream)


def _keeping(found: _Read, key: tuple[int, str]) -> Action:
    def keep(stream: Tensor) -> None:
        found[key] = stream.detach().clone()

    return keep


def _noting(found: _Read, key: tuple[int, str]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = product_map(function, args, kwargs)
        if given is not None:
            found[key] = given.given.detach().clone()
        return function(*args, **kwargs)

    return handler


@contextlib.contextmanager
def _entering(model: nn.Module, modules: Mapping[str, Mapping[int, tuple[int, str]]], found: _Read) -> Iterator[None]:
    """Within the block what the given runs of modules are given is kept."""
    with restoring() as changes:
        runs = changes.enter(counted(model, modules))
        for name, by_call in modules.items():

            def enter(
                _: nn.Module,
                args: Any,
                kwargs: Any,
                name: str = name,
                by_call: Mapping[int, tuple[int, str]] = by_call,
            ) -> None:
                key = by_call.get(runs.begin(name))
                if key is not None:
                    found[key] = next(tensors_in([args, kwargs])).detach().clone()

            changes.hook(model.get_submodule(name), "forward_pre", enter, with_kwargs=True)
        yield


def _first_products(block: Block) -> list[tuple[ModuleCall | Point, str]]:
    """The first learned products of the block's sublayers that read its stream, with their names."""
    found: dict[ModuleCall | Point, str] = {}
    for part in block.parts:
        for place in _of_part(part):
            if place is not None:
                found[place] = place.name if isinstance(place, ModuleCall) else str(place)
    return list(found.items())


def _of_part(part: Part) -> list[ModuleCall | Point | None]:
    if part.kind == "cross":
        return [call.queries for call in part.attention]
    return [part.reads, *(place for c in part.attention for place in (c.queries, c.keys, c.values))]
