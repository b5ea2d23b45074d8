"""Whether a norm is left when the norms of a model's blocks are removed: asked of the live model, not of its picture.

Without its norms, a sublayer reads the stream itself: sixteen times the stream is sixteen times as large for it. With a norm in
between it reads the same. So the stream of every block is replaced by noise of two sizes, with all sublayers left out so that
nothing else happens to it, and what each sublayer's first learned product reads is compared, and what leaves the block.

Behind a sublayer it is the other way round: noise stands for the results of its last products, and what it adds is compared.
Sixteen times the noise must be sixteen times as much. Where it is not, what a norm leaves is looked for: something that stays the
same however large the noise becomes, turns round with it, and is other with other noise. It may be a summand, one expert's.

When not to use it: in half precision, for the norms of some experts beside others without. Rounding hides them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import BlockRun, recorders
from uncollapse.anatomy.influence import without_zeros
from uncollapse.anatomy.interception import Handler, Point, counted, in_turn
from uncollapse.anatomy.norm_reading import kind_of, random_input, same
from uncollapse.anatomy.output_maps import product_map
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import STREAM, Anatomy, Block, ModuleCall, Part, Place, removal
from uncollapse.errors import UnsupportedModel
from uncollapse.restoring import restoring

_Read = dict[tuple[int, str], Tensor]  # by block, and by the place that reads
_Added = dict[tuple[int, int], Tensor]  # by block, and by part
_LEAST_LEFT = 1e-2  # of what is added at the smallest noise: a norm leaves about as much as that itself


class _Answered(threading.local):
    """What was asked and found to be without such a norm, while the answer holds; None: it is asked each time."""

    blocks: list[tuple[Anatomy, frozenset[int]]] | None = None
    blocks_behind: list[tuple[Anatomy, frozenset[int]]] | None = None


_answered = _Answered()


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within the block, in this thread, nothing changes a model's weights: no norm left of the same blocks is found out once."""
    with restoring() as changes:
        changes.set(_answered, "blocks", [])
        changes.set(_answered, "blocks_behind", [])
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


def require_no_output_norm_left(
    model: nn.Module, anatomy: Anatomy, numbers: frozenset[int], example: Mapping[str, Any]
) -> None:
    """Raise `UnsupportedModel` where something behind the last products of a sublayer in the blocks `numbers` still gives what it
    adds one size. The model must be running without the norms of these blocks; it runs three times on `example`, or ten times
    where a sublayer does something else behind its last products as well."""
    answered = _answered.blocks_behind
    if answered is not None and any(known is anatomy and blocks == numbers for known, blocks in answered):
        return

    def added(size: float, seed: int = 0) -> _Added:
        return _added(model, anatomy, numbers, example, size, seed)

    none, small, large = (added(size) for size in (0.0, 4.0, 64.0))
    none = {key: update.nan_to_num(0.0) for key, update in none.items()}  # x / |x|
    told = none.keys() & small.keys() & large.keys()
    bent = sorted(key for key in told if not _is_linear(*(found[key] for found in (none, small, large))))
    if bent:
        largest, minus, minus_large = added(1024.0), added(-4.0), added(-64.0)
        other, other_large, other_minus, other_minus_large = (added(size, 1) for size in (4.0, 64.0, -4.0, -64.0))
        for key in bent:
            plain, turned, another, another_turned = (
                _left(found[key], larger[key])
                for found, larger in (
                    (small, large),
                    (minus, minus_large),
                    (other, other_large),
                    (other_minus, other_minus_large),
                )
            )
            if not _goes_on(small[key], large[key], largest[key]):
                continue
            if float((plain - none[key].double()).abs().max()) <= _LEAST_LEFT * float(small[key].double().abs().max()):
                continue
            if kind_of(plain, turned, another, another_turned, plain) is None:
                continue
            block, part = anatomy.blocks[key[0]], anatomy.blocks[key[0]].parts[key[1]]
            raise UnsupportedModel(
                f"without: expected what the {part.kind} ({part.module}) of {type(model).__name__} adds in {block.name} to grow "
                "with its last products when its norms are removed, got a norm that was overlooked: some of it stays the same when "
                "they become sixteen times as large. Remove another component, or leave this block out with blocks=[...]."
            )
    if answered is not None:
        answered.append((anatomy, numbers))


def _is_linear(none: Tensor, small: Tensor, large: Tensor) -> bool:
    """Whether what is added at noise of size 0, 4 and 64 grows with it, or cannot be told."""
    a, b, c = (t.double() for t in (none, small, large))
    if (
        a.shape != b.shape
        or b.shape != c.shape
        or not bool(a.isfinite().all() & b.isfinite().all() & c.isfinite().all())
    ):
        return True
    return float((c - a - 16 * (b - a)).abs().max()) <= _tolerance(small) * float(c.abs().max())


def _left(small: Tensor, large: Tensor) -> Tensor:
    """What is left of a sum at noise of size 0, as the sizes 4 and 64 say: a norm in it stays."""
    a, b = small.double(), large.double()
    return a - (b - a) / 15


def _goes_on(small: Tensor, large: Tensor, largest: Tensor) -> bool:
    """Whether what is added lies on one line at noise of sizes 4, 64 and 1024."""
    a, b, c = (t.double() for t in (small, large, largest))
    if not bool(c.isfinite().all()):
        return False
    return float((c - b - 16 * (b - a)).abs().max()) <= _tolerance(small) * float(c.abs().max())


def _tolerance(tensor: Tensor) -> float:
    return max(1e-3, 16 * torch.finfo(tensor.dtype).eps)


def _added(
    model: nn.Module, anatomy: Anatomy, numbers: frozenset[int], example: Mapping[str, Any], size: float, seed: int
) -> _Added:
    """What each sublayer adds in a pass in which noise of this size stands for the results of its last products; nothing of it
    reaches the stream, which is the same noise all along."""
    runs = {number: BlockRun() for number in sorted(numbers)}
    handlers: dict[Point, list[Handler]] = {}
    actions: list[tuple[Place, Action]] = []
    for number, run in runs.items():
        block = anatomy.blocks[number]
        actions.append((block.entry, _noise(1.0, 2 * number)))
        for layer in (recorders(block, run), removal(block, range(len(block.parts)))):
            for point, handler in layer.items():
                handlers.setdefault(point, []).append(handler)
        for point in dict.fromkeys(point for part in block.parts for point in part.last_products):
            handlers.setdefault(point, []).append(_noisy(size, seed + 2 * len(handlers)))
    together = {point: in_turn(*several) for point, several in handlers.items()}
    with probing(model), without_zeros(model), met(model, actions, handlers=together, strict=False):
        torch.manual_seed(0)
        model(**example)
    found: _Added = {}
    for number, run in runs.items():
        block = anatomy.blocks[number]
        for node in (node for residual in block.residuals for node in residual.additions if node.point in run.sums):
            for operand, leaves in enumerate(node.leaves):
                if len(leaves) == 1 and STREAM not in leaves:
                    found[number, next(iter(leaves))] = run.sums[node.point].summands[operand]
    return found


def _noisy(size: float, seed: int) -> Handler:
    """Put noise in the place of what a product gives."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        return size * random_input(tuple(result.shape), seed).to(result)

    return handler


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
