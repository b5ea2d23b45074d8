"""Put something else in the place of what a whole sublayer adds to the stream: its mean over a batch, or another sequence's.

A sublayer that is skipped adds zero, which its model may never have seen. Here its addition stays, and so do the residual and any
norm behind the sum. What is added is replaced where it is added, so that norms, gates and factors of the sublayer itself have
acted on it before.

When not to use it: to skip a sublayer. Without a filling `without` leaves it out, together with the norms that its sum passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import blocks_alone
from uncollapse.anatomy.interception import Handler, Point, device_of, in_turn, intercepted
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.stacks import paddings
from uncollapse.anatomy.summands import with_operands
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import AdditionNode, Anatomy, Block, StreamAxes
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.interventions.single_heads import Filling, of_another

Place = tuple[int, int, int]  # block, part, and which of the operands that bring its update


def standing(
    block: Block, number: int, parts: Collection[int], filling: Filling, real: Callable[[], Tensor | None] | None
) -> dict[Point, Handler]:
    """Handlers that put the filling in the place of what some parts of a block add. `real` tells which tokens of the pass are."""
    axes = _axes(block, number)
    handlers: dict[Point, Handler] = {}
    for node, operand, place in _places(block, number, parts):

        def filled(update: Tensor, place: Place = place) -> Tensor:
            laid = _laid(update, axes, block, number)
            if filling.kind == "mean":
                made = filling.means[place].to(laid).expand(laid.shape)
            else:
                made = of_another(filling.seed, real, "parts_as")(laid[:, None])[:, 0]
            return axes.stream(made, update)

        handler = _replacing(operand, filled)
        handlers[node.point] = in_turn(handlers[node.point], handler) if node.point in handlers else handler
    return handlers


def means_of(
    model: nn.Module, anatomy: Anatomy, parts: Mapping[int, Collection[int]], batch: Mapping[str, Any]
) -> dict[Any, Tensor]:
    """The mean of what parts of the given blocks add over the real tokens of a batch, [width]."""
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    found: dict[Any, Tensor] = {}
    acting: dict[Point, Handler] = {}
    with probing(model):
        padding = paddings(model, given, anatomy, blocks_alone)

        def noting(number: int, block: Block, operand: int, place: Place) -> Handler:
            def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                update = list(tensors_in([args, kwargs]))[operand]
                laid, known = _laid(update, _axes(block, number), block, number), padding[anatomy.stack_of(number)]
                if known.reason or (known.mask is not None and known.mask.shape != laid.shape[:2]):
                    raise InputError(
                        f"without: expected a batch whose real tokens can be told in block {number} for parts_as='mean', got "
                        f"{known.reason or 'another number of tokens there than in its mask'}. "
                        "Pass a batch without padding."
                    )
                real = laid.new_ones(laid.shape[:2]) if known.mask is None else known.mask.to(laid.device)
                weight = real.double()[..., None]
                found[place] = (torch.where(weight > 0, laid.double(), 0).sum((0, 1)) / weight.sum()).to(laid.dtype)
                return function(*args, **kwargs)

            return handler

        for number, own in parts.items():
            block = anatomy.blocks[number]
            for node, operand, place in _places(block, number, own):
                handler = noting(number, block, operand, place)
                acting[node.point] = in_turn(acting[node.point], handler) if node.point in acting else handler
        with intercepted(model, acting):
            model(**given)
    return found


def _places(block: Block, number: int, parts: Collection[int]) -> Iterator[tuple[AdditionNode, int, Place]]:
    for part in parts:
        met = 0
        for node in (node for residual in block.residuals for node in residual.additions):
            own = [operand for operand, leaves in enumerate(node.leaves) if leaves == {part}]
            if own and node.point.operation.startswith("addcmul"):
                raise _not_filled(block, number, "it is added as a product of two values in one operation")
            for operand in own:
                yield node, operand, (number, part, met)
                met += 1


def _replacing(operand: int, filled: Callable[[Tensor], Tensor]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = with_operands(args, kwargs, {operand: filled})
        return function(*given, **named)

    return handler


def _axes(block: Block, number: int) -> StreamAxes:
    if block.axes is None or block.axes.sequence is None:
        raise _not_filled(block, number, block.axes_reason or "its sequences are laid end to end")
    return block.axes


def _laid(update: Tensor, axes: StreamAxes, block: Block, number: int) -> Tensor:
    """What is added, as [sequence, token, width]."""
    if update.ndim != axes.ndim:
        raise _not_filled(block, number, f"what is added there is laid out as {list(update.shape)}")
    return axes.cloud(update)


def _not_filled(block: Block, number: int, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"without: expected sequences and tokens that can be told apart in what block {number} ({block.name}) adds, got none: "
        f"{reason}. Pass parts_as='zero'."
    )
