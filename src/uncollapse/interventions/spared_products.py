"""What a removed MLP would compute, and nobody would see, is not computed.

A removal acts at the addition: the MLP runs, and what it makes is left out there. Its matrix products are half of a pass or more.
While it is away they may as well give NaN. That nothing else reads them is not taken for granted: on the example that the model was
proved on they give their own numbers, then infinity of either sign, then NaN. Where every block's stream and the model's output are
the same in every bit, nothing that is made of them gets there. Another text may send the model another way. Then what it reads of
them is NaN, and so is what is made of that: whoever measures looks for it, and measures again without sparing.

Not spared are MLPs that choose experts, those in blocks with hooks of somebody else's, which would see the NaN, and weights that
are no plain tensors. Nor are those of a model whose weights are kept elsewhere: to ask would take four readings.

When not to use it: where what the MLP makes is looked at, or an attention is away as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import observe_blocks
from uncollapse.anatomy.interception import Handler, Paths, Point, intercepted
from uncollapse.anatomy.offloaded_weights import is_kept_elsewhere
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.reading_refusals import has_own_hooks
from uncollapse.anatomy.torch_calls import MATRIX_PRODUCTS, plain_name, tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Block, ModuleCall, Part
from uncollapse.restoring import restoring


class SparedProducts:
    """The products of the MLPs of some blocks. example: the few tokens that the anatomy was proved on; None: nothing is spared."""

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, blocks: Collection[int], example: Mapping[str, Any] | None
    ) -> None:
        self.anatomy = anatomy
        self._model, self._example = model, example
        is_here = not any(map(is_kept_elsewhere, model.modules()))
        able = sorted(blocks) if is_here and example is not None else ()
        self._points = [point for number in able for point in _points(model, anatomy.blocks[number], anatomy.paths)]
        self._are_unseen: bool | None = None  # asked the first time that they are away

    @contextlib.contextmanager
    def away(self) -> Iterator[bool]:
        """Within the block, and in this thread, they give NaN where nobody would see more; it is told whether they do. The MLPs are
        away from the model."""
        if self._are_unseen is None:
            self._are_unseen = bool(self._points) and _are_unseen(
                self._model, self.anatomy, self._points, self._example or {}
            )
        with restoring() as changes:
            if self._are_unseen:
                changes.enter(_giving(self._model, self._points, torch.nan))
            yield self._are_unseen


def _are_unseen(model: nn.Module, anatomy: Anatomy, points: Collection[Point], example: Mapping[str, Any]) -> bool:
    """Whether it is all the same to the streams and to the output what these products give."""
    try:
        own = _seen(model, anatomy, example)
        return all(
            _are_same(own, _seen(model, anatomy, example, points, value))
            for value in (torch.inf, -torch.inf, torch.nan)
        )
    except Exception:  # whatever it is: the model's own code, on numbers it may not take
        return False


def _seen(
    model: nn.Module,
    anatomy: Anatomy,
    example: Mapping[str, Any],
    points: Collection[Point] = (),
    value: float = torch.nan,
) -> list[Tensor]:
    """The streams between the blocks, and the model's output, where these products give nothing but one value."""
    output: list[Tensor] = []
    with probing(model), restoring() as changes:
        changes.hook(model, "forward", lambda _module, _args, made: output.extend(tensors_in(made)))
        changes.enter(_giving(model, points, value))
        runs = observe_blocks(model, example, anatomy)
    return [t for run in runs for t in (run.stream, run.output) if t is not None] + [t.clone() for t in output]


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(some, others, strict=True)
    )


@contextlib.contextmanager
def _giving(model: nn.Module, points: Collection[Point], value: float) -> Iterator[None]:
    handlers: dict[Point, Handler] = {point: functools.partial(_filled, value) for point in points}
    with intercepted(model, handlers):
        yield


def _filled(value: float, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In the place of a product a tensor of its shape. Where that is not known at once, the product."""
    plain = all(type(each) in {Tensor, nn.Parameter} for each in args[-3:] if each is not None)
    if kwargs or not plain or len(args) != 3 or torch.is_autocast_enabled(args[0].device.type):
        return function(*args, **kwargs)
    if function.__name__ == "linear":
        given, weight, _ = args
        return given.new_full((*given.shape[:-1], len(weight)), value)
    _, given, weight = args
    return given.new_full((len(given), weight.shape[1]), value)


# Which products -----------------------------------------------------------------------------------------------------


def _points(model: nn.Module, block: Block, paths: Paths) -> list[Point]:
    """The products of the block's MLPs that modules of their own make."""
    if any(map(has_own_hooks, model.get_submodule(block.module.name).modules())):
        return []
    mlps = [part for part in block.parts if part.kind == "mlp" and part.router is None]
    return [point for part in mlps for run in _runs(block, part, paths) for point in _product(run, paths)]


def _runs(block: Block, part: Part, paths: Paths) -> set[ModuleCall]:
    """The runs that make its first and its last product, and whatever runs beside them in a module that is theirs alone."""
    if part.reads is None or part.writes is None or part.reads.call != part.writes.call:
        return set()
    ends = part.reads.name.split("."), part.writes.name.split(".")
    shared = []
    for one, other in zip(*ends, strict=False):
        if one != other:
            break
        shared.append(one)
    found = {part.reads, part.writes}
    home = ".".join(shared)
    if home.startswith(f"{block.module.name}."):
        found |= {
            ModuleCall(name, call) for name, call in paths if call == part.reads.call and name.startswith(f"{home}.")
        }
    return found


def _product(run: ModuleCall, paths: Paths) -> list[Point]:
    """The one product of a run that makes no other."""
    products = {
        name: count
        for name, count in paths.get((run.name, run.call), {}).items()
        if plain_name(name) in MATRIX_PRODUCTS
    }
    is_one = list(products.values()) == [1] and products.keys() <= {"linear", "addmm"}
    return [Point(run.name, run.call, next(iter(products)), 0)] if is_one else []
