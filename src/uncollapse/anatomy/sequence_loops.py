"""Attention that runs once for each sequence: a loop over sequences, or over images that lie end to end.

Each run mixes one sequence and sees no other. How many runs there are depends on the batch, so the runs of the example are put
together to one call whose points recur. Which run mixes which sequence is never taken from the order of the loop: sequences are
numbered in binary, for each digit those that have a 1 there are changed, then those that have a 0, and a run is its sequence's if
it moves with exactly the digits of that one.

When not to use it: for a loop over heads inside a sequence, which is several calls, and for queries in chunks (`shares_queries`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.influence import moved_rows, poked
from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, MaskingStep, ModuleCall, Part

OF_ITS_OWN = "each sequence is mixed by a call of its own"
NO_LOOP = f"{OF_ITS_OWN}, and these do not follow each other as the runs of one loop do"
Runs = tuple[tuple[int, ...], ...]  # of each call of a part, the sequence that each of its runs mixes


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a stream are: the `places` of each along an axis of it. `is_packed`: they lie end to end along that of
    the tokens, and have no axis of their own."""

    axis: int
    places: tuple[Tensor, ...]
    is_packed: bool

    def poked(self, stream: Tensor, numbers: Sequence[int]) -> Tensor:
        """The stream with other values in these sequences."""
        return poked(stream, self.axis, torch.cat([self.places[number] for number in numbers]))

    def first_tokens_poked(self, stream: Tensor, token: int) -> Tensor:
        """The stream with other values at the first token of each sequence. `token`: the axis of the tokens."""
        first = torch.stack([places[0] for places in self.places]) if self.is_packed else torch.tensor([0])
        return poked(stream, token, first)

    def tokens(self, number: int, stream: Tensor, token: int) -> int:
        """How many tokens one of the sequences has. `token`: the axis of the tokens."""
        return len(self.places[number]) if self.is_packed else stream.shape[token]

    def of(self, laid: Tensor, number: int, axis: int) -> Tensor:
        """What is laid out as [sequence, …, token, …] of one sequence; of sequences end to end, its rows along `axis`."""
        if self.is_packed:
            return laid.index_select(axis, self.places[number].to(laid.device))
        return laid[number : number + 1]


def sequences_of_runs(mixing: Callable[[Tensor], list[list[Tensor]]], stream: Tensor, sequences: Sequences) -> Runs:
    """Which sequence each run of each call mixes. `mixing`: what the runs of each call mix [..., query, width], given a stream.

    Raises `UnreadableError` where a run hears several sequences, or none."""
    plain, count = mixing(stream), len(sequences.places)
    digits = count.bit_length()
    heard = [[[0, 0] for _ in runs] for runs in plain]
    for digit, bit in itertools.product(range(digits), (0, 1)):
        some = [number for number in range(count) if (number + 1) >> digit & 1 == bit]
        other = mixing(sequences.poked(stream, some)) if some else plain
        if [len(runs) for runs in other] != [len(runs) for runs in plain]:
            raise UnreadableError("how often it runs depends on what the tokens are")
        for before, after, codes in zip(plain, other, heard, strict=True):
            for one, changed, code in zip(before, after, codes, strict=True):
                code[bit] |= int(bool(moved_rows(one, changed).any())) << digit
    return tuple(tuple(_decoded(zeros, ones, digits, count) for zeros, ones in codes) for codes in heard)


def _decoded(zeros: int, ones: int, digits: int, count: int) -> int:
    if zeros & ones:
        raise UnreadableError("it mixes several sequences of the batch")
    if zeros | ones != (1 << digits) - 1 or not 0 < ones <= count:
        raise UnreadableError("none of it depends on the tokens")
    return ones - 1


# Runs of a loop as one call -----------------------------------------------------------------------------------------


def in_groups(calls: Sequence[AttentionCall], owners: Sequence[int]) -> list[list[int]]:
    """The numbers of the calls that are one and the same in each turn of a loop over sequences, in the order in which they run:
    the first of each sequence, the second of each, and so on. `owners`: the sequence of each call.

    Raises `UnreadableError` where sequences have several numbers of calls."""
    order = sorted(range(len(calls)), key=lambda i: (calls[i].product.call or 0, calls[i].product.ordinal))
    by_sequence: dict[int, list[int]] = {}
    for number in order:
        by_sequence.setdefault(owners[number], []).append(number)
    if len({len(own) for own in by_sequence.values()}) != 1:
        raise UnreadableError("some of its sequences are mixed by more calls than others")
    return [sorted(group, key=order.index) for group in zip(*by_sequence.values(), strict=True)]


def as_one(runs: Sequence[AttentionCall]) -> AttentionCall:
    """One call for the runs of a loop, in order: that of the first, with points that recur.

    Raises `UnreadableError` where the runs are not alike, or do not follow each other at one distance."""
    first, *others = runs
    if any((c.weight_operand, c.value_operand) != (first.weight_operand, first.value_operand) for c in others):
        raise UnreadableError(NO_LOOP)
    product = _recurring([call.product for call in runs])
    if others and not product.recurs:
        raise UnreadableError(NO_LOOP)
    logits = [call.logits for call in runs]
    known = [each for each in logits if each is not None]
    if len({each[1] for each in known}) > 1 or len(known) not in (0, len(logits)):
        raise UnreadableError(NO_LOOP)
    return replace(
        first,
        turns=len(runs),
        product=product,
        score=_recurring_or_none([call.score for call in runs]),
        similarity=_recurring_or_none([call.similarity for call in runs]),
        logits=(_recurring([point for point, _ in known]), known[0][1]) if known else None,
        way=_all_recurring([call.way for call in runs]),
        made=_all_recurring([call.made for call in runs]),
        masking=tuple(_step(steps) for steps in _in_step([call.masking for call in runs])),
        projection=_same([call.projection for call in runs]),
        queries=_same([call.queries for call in runs]),
        keys=_same([call.keys for call in runs]),
        values=_same([call.values for call in runs]),
    )


def _in_step(several: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    if len({len(each) for each in several}) > 1:
        raise UnreadableError(NO_LOOP)
    return zip(*several, strict=True)


def _step(steps: Sequence[MaskingStep]) -> MaskingStep:
    if len({(step.operand, step.after_softmax) for step in steps}) > 1:
        raise UnreadableError(NO_LOOP)
    point, made = _recurring([step.point for step in steps]), _all_recurring([step.made for step in steps])
    return replace(steps[0], point=point, made=made)


def _all_recurring(several: Sequence[Sequence[Point]]) -> tuple[Point, ...]:
    return tuple(_recurring(points) for points in _in_step(several))


def _recurring_or_none(points: Sequence[Point | None]) -> Point | None:
    known = [point for point in points if point is not None]
    if len(known) not in (0, len(points)):
        raise UnreadableError(NO_LOOP)
    return _recurring(known) if known else None


def _recurring(points: Sequence[Point]) -> Point:
    """One point for those of the runs of a loop: the same in all of them, or one that recurs."""
    first = points[0]
    if all(point == first for point in points):
        return first
    steps = {(b.ordinal - a.ordinal, (b.call or 0) - (a.call or 0)) for a, b in itertools.pairwise(points)}
    every, each_run = steps.pop() if len(steps) == 1 else (0, 0)
    is_alike = len({(point.owner, point.operation) for point in points}) == 1
    if not is_alike or min(every, each_run) != 0 or max(every, each_run) <= 0:
        raise UnreadableError(NO_LOOP)
    return replace(first, every=every, each_run=each_run)


def _same(places: Sequence[ModuleCall | Point | None]) -> ModuleCall | Point | None:
    """The place, if it is one and the same for all runs."""
    return places[0] if all(place == places[0] for place in places) else None


# Whether the rest of a model can be met whatever the number of sequences -----------------------------------------------


def with_loops_apart(anatomy: Anatomy, recorded: Trace) -> Anatomy:
    """The anatomy, with a reason against each loop over sequences on whose number of turns it depends where something else of the
    model is met: operations are counted, and there are more of them in a longer loop."""
    blocks = list(anatomy.blocks)
    for number, block in enumerate(blocks):
        parts = list(block.parts)
        for place, part in enumerate(parts):
            if part.by_sequence and any(_shifts(anatomy, recorded, part, call) for call in part.attention):
                reason = f"{OF_ITS_OWN}, and how many operations come before others depends on their number"
                calls = tuple(replace(c, unreadable=c.unreadable or reason) for c in part.attention)
                parts[place] = replace(part, attention=calls)
        blocks[number] = replace(block, parts=tuple(parts))
    return replace(anatomy, blocks=tuple(blocks))


def _shifts(anatomy: Anatomy, recorded: Trace, part: Part, call: AttentionCall) -> bool:
    """Whether something other than the loop itself is met by counting what the loop does, too; or whether what comes after the
    loop looks like one more turn of it."""
    at: dict[Point, int] = {}
    for node in recorded.nodes:
        own = recorded.calls[node.call]
        at.setdefault(Point(own.name, own.ordinal, node.counted, node.ordinal), node.index)
    turns = [index for point, index in at.items() if _is_turn(call.product, point)]
    if len(turns) != call.turns:
        return True
    first, last = min(turns), max(turns)
    calls = [recorded.calls[node.call] for node in recorded.nodes]
    operations = {(calls[i].name, calls[i].ordinal, recorded.nodes[i].counted) for i in range(first + 1, last + 1)}
    modules = {own.name for own in recorded.calls if own.name and first < own.first <= last}
    own_points = set(_places_in(part.attention))
    for place in _places_in(anatomy):
        if isinstance(place, ModuleCall):
            begins = next((c.first for c in recorded.calls if (c.name, c.ordinal) == (place.name, place.call)), -1)
            if place.name in modules and begins > first:
                return True
            continue
        index = at.get(replace(place, every=0, each_run=0), -1)
        recurs = place.recurs and place in own_points and index <= last
        is_counted = (place.owner, place.call, place.operation) in operations or place.owner in modules
        if is_counted and index > first and not recurs:
            return True
    return False


def _is_turn(product: Point, point: Point) -> bool:
    """Whether a recurring point stands at this one."""
    if (point.owner, point.operation) != (product.owner, product.operation):
        return False
    after, runs = point.ordinal - product.ordinal, (point.call or 0) - (product.call or 0)
    if product.every:
        return runs == 0 and after >= 0 and after % product.every == 0
    return after == 0 and runs >= 0 and runs % (product.each_run or 1) == 0 and (runs == 0 or bool(product.each_run))


def _places_in(value: Any) -> Iterator[Point | ModuleCall]:
    """Every point and every run of a module in nested plain data, but for what is only looked at when parts are removed."""
    if isinstance(value, (Point, ModuleCall)):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            if each.name != "last_products":
                yield from _places_in(getattr(value, each.name))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _places_in(each)
