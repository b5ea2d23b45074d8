"""How an attention writes what its heads mix, proved on a block that runs by itself.

Everything that the mixed values do to what is added goes through one product, whose features are each one head's: the output
projection. Otherwise W_O is the whole map from the mixed values to what they write, behind the gates that act between the two, if
that is affine (`output_maps`). What is neither carries its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.block_alone import BlockAlone, observing
from uncollapse.anatomy.deviations import difference
from uncollapse.anatomy.interception import Handler, Point, in_turn
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.output_maps import ProductMap, axes_order, opening, product_map, sounding
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Gate, ModuleCall, Part, Place
from uncollapse.errors import UncollapseError


class HeadsWriting(BlockAlone):
    """One block, run by itself to see how its attentions write."""

    def writes(self, number: int, part: Part) -> Part:
        """The part with how its heads write: through an output projection that takes all of them on, with whose features it
        reads; else by the whole map from the mixed values, or why that is none."""
        projections = {call.projection for call in part.attention}
        projection = projections.pop() if len(projections) == 1 else None
        if projection is not None and self._takes_all(number, part, projection):
            try:
                return replace(part, features=self._features(number, part, projection))
            except UnreadableError as error:
                # It reads a sum of several products' heads, perhaps: then these are told before it.
                alone = self._writes_at_once(number, part)
                return replace(part, no_output_map=str(error)) if alone.no_output_map else alone
            except UncollapseError:  # its input is met in another way: by keyword, say
                return part
        return self._writes_at_once(number, part)

    def _writes_at_once(self, number: int, part: Part) -> Part:
        """The part with the whole map from its mixed values to what they write as its W_O, or why there is none."""
        part, gates = replace(part, gates=()), part.gates
        part = replace(part, attention=tuple(replace(call, projection=None) for call in part.attention))
        problem = next((call.unreadable for call in part.attention if call.unreadable), None)
        if problem is not None:
            return replace(part, no_output_map=problem)
        # Gates first: with one that hardly varies the map is one matrix to the rounding of half precision, and is not.
        if gates:
            try:
                laid = tuple(self._laid_gate(number, replace(part, gates=gates), gate) for gate in gates)
                opened = replace(part, gates=laid)
                self.output_map(number, opened)
            except UnreadableError:
                pass  # what acts there is no gate, or not only gates
            else:
                return opened
        try:
            matrix, _ = self.output_map(number, part)
        except UnreadableError as error:
            return replace(part, no_output_map=str(error))
        if gates and torch.finfo(matrix.dtype).eps > torch.finfo(torch.float32).eps:
            return replace(
                part, no_output_map="whether a gate acts between its heads and the projection is lost to rounding"
            )
        return part

    def _laid_gate(self, number: int, part: Part, gate: Gate) -> Gate:
        """A gate with how it lies on the mixed values: of all heads together, or of those of one call after the other.

        Raises `UnreadableError` where that cannot be told."""
        axes, widths = self.block.axes, {call.head_width for call in part.attention}
        if axes is None or len(widths) != 1:
            raise UnreadableError("what its heads mix was not found")
        shape = (*axes.cloud(self.stream).shape[:2], widths.pop())
        others = tuple(i for i in range(len(self.block.parts)) if i != number)

        def order(own: slice) -> tuple[int, ...] | None:
            pattern = torch.zeros(shape[0], part.heads, *shape[1:], dtype=self.stream.dtype, device=self.stream.device)
            numbers = torch.arange(1, pattern[:, own].numel() + 1, dtype=torch.float64).reshape(pattern[:, own].shape)
            pattern[:, own] = numbers.to(pattern)
            seen: list[Tensor] = []
            look = observing(lambda *met: seen.append(met[3].detach().clone()))
            handlers = self._giving(number, part, pattern) | {each.point: opening(each) for each in part.gates}
            handlers[gate.point] = in_turn(look, handlers[gate.point])
            self._replay(others, None, handlers)
            return axes_order(seen[-1], pattern[:, own]) if seen else None

        whole = order(slice(0, part.heads))
        orders, first = [whole], 0
        if whole is None:
            orders = []
            for call in part.attention:
                orders.append(order(slice(first, first + call.heads)))
                first += call.heads
        known = tuple(each for each in orders if each is not None)
        if len(known) < len(orders):
            raise UnreadableError("how a gate lies on the mixed values of its heads could not be told")
        return replace(gate, orders=known)

    def _takes_all(self, number: int, part: Part, projection: ModuleCall | Point) -> bool:
        """Whether everything that the mixed values do to what the part adds goes through this product with one matrix, whose result
        is as wide as the stream: with zeros in place of its result, other mixed values change nothing."""
        width = self.stream.shape[-1 if self.block.axes is None else self.block.axes.width]
        widths: list[int] = []
        maps: list[ProductMap | None] = []

        def updated(seed: int) -> Tensor:
            further: dict[Point, Handler] = {call.product: _scattering(seed) for call in part.attention}
            actions: list[tuple[Place, Action]] = []

            def silence(result: Tensor) -> Tensor:
                widths.append(result.shape[-1])
                return torch.zeros_like(result)

            def silence_product(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                maps.append(product_map(function, args, kwargs))
                return silence(function(*args, **kwargs))

            if isinstance(projection, Point):
                further[projection] = silence_product
            else:
                actions.append((Place(projection), silence))
            return self.update(number, None, further, actions)

        first, second = updated(0), updated(1)
        return set(widths) == {width} and None not in maps and difference(first, second) == 0.0

    def _features(self, number: int, part: Part, projection: ModuleCall | Point) -> tuple[int, ...]:
        """The head of each feature that an output projection reads; empty where the heads lie side by side, or stay within windows.

        Heads speak in turn, numbered in binary: for each digit those that have a 1 there, then those that have a 0. A feature is
        a head's if it moves with its digits and with nothing else. Raises `UnreadableError` where features are of several heads.
        """
        axes, heads = self.block.axes, part.heads
        widths = {call.head_width for call in part.attention}
        if axes is None or len(widths) != 1 or any(c.unreadable for c in part.attention) or heads == 1:
            return ()
        if part.in_pieces:  # found to lie side by side, or it would be none
            return ()
        sequences, tokens = axes.cloud(self.stream).shape[:2]
        width = widths.pop()

        def read(further: dict[Point, Handler]) -> Tensor:
            """What the projection reads when the calls give something else."""
            seen: list[Tensor] = []
            actions: list[tuple[Place, Action]] = []
            if isinstance(projection, Point):
                keep = observing(lambda *met: seen.append(_product_input(*met[:3])))
                further[projection] = keep
            else:
                actions.append((Place(projection, "in", (0,)), lambda given: seen.append(given.detach().clone())))
            self.update(number, None, further, actions)
            return seen[-1]

        def heard(speaking: Tensor) -> Tensor:
            further: dict[Point, Handler] = {}
            first = 0
            for call in part.attention:
                at_once = 1 if call.turns else sequences
                further[call.product] = sounding(speaking[first : first + call.heads], call, at_once)
                first += 0 if part.shares_queries else call.heads
            return read(further)

        alike = read_alike = torch.empty(0)
        if not any("window" in {axis.role, axis.inner} for call in part.attention for axis in call.lead):
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(sequences, heads, tokens, width, generator=generator).to(self.stream)
            alike = noise.transpose(1, 2).flatten(2)
            read_alike = read(self._giving(number, part, noise))
            if read_alike.shape[-1] == alike.shape[-1] and any(
                torch.equal(read_alike.flatten(), known.flatten()) for known in (alike, alike.transpose(0, 1))
            ):
                return ()
        silent = heard(torch.zeros(heads, dtype=torch.bool))
        if silent.shape[-1] != heads * width:
            raise UnreadableError("its output projection does not read the heads side by side")
        owner = torch.zeros(silent.shape[-1], dtype=torch.long)
        numbers = torch.arange(heads)
        for digit in range((heads - 1).bit_length()):
            ones = (numbers >> digit & 1).bool()
            by_one, by_zero = (_moved_features(silent, heard(some)) for some in (ones, ~ones))
            if bool((by_one == by_zero).any()):
                return self._alike_features(read_alike, alike, heads)
            owner += by_one.long() << digit
        if not bool((owner.bincount(minlength=heads) == width).all()):
            raise UnreadableError(
                "its heads do not have the same number of features in what the output projection reads"
            )
        return () if torch.equal(owner, owner.sort().values) else tuple(owner.tolist())

    def _alike_features(self, read: Tensor, spoken: Tensor, heads: int) -> tuple[int, ...]:
        """The same where a norm over all heads lets every head move every feature: the head of the feature it most resembles."""
        best = torch.empty(0)
        ways = [spoken, spoken.transpose(0, 1)] if read.numel() and read.numel() == spoken.numel() else []
        for rows in ways:
            given = read.double().reshape(-1, read.shape[-1])
            sources = rows.double().flatten(0, 1)
            sources, given = sources - sources.mean(0), given - given.mean(0)
            agreement = (given / given.norm(dim=0)).T @ (sources / sources.norm(dim=0))
            found, place = agreement.abs().nan_to_num().max(-1)
            if bool((found > 0.8).all()) and len(place.unique()) == len(place):
                best = place
        if not len(best):
            raise UnreadableError(
                "which features of what its output projection reads are of which head could not be told"
            )
        owner = best // (len(best) // heads)
        return () if torch.equal(owner, owner.sort().values) else tuple(owner.tolist())


def _product_input(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a product with one matrix reads."""
    found = product_map(function, args, kwargs)
    assert found is not None
    return found.given.clone()


def _scattering(seed: int) -> Handler:
    """Random signs in place of an operation's result."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(2, output.shape, generator=generator) * 2 - 1).to(output)

    return handler


def _moved_features(before: Tensor, after: Tensor) -> Tensor:
    """Which features, along the last axis, differ beyond rounding in any row."""
    change = (after.double() - before.double()).abs().nan_to_num().flatten(0, -2).amax(0)
    size = torch.maximum(before.double().abs(), after.double().abs()).nan_to_num().flatten(0, -2).amax(0)
    return (change > 16 * torch.finfo(before.dtype).eps * size).cpu()
