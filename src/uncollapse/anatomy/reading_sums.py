"""Residual additions in a recorded graph: which sums carry the stream on, and what they add to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from torch import nn

from uncollapse.anatomy.attention_graph import mixing_products
from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.summands import same_term, summands_of
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import (
    PICKS,
    Layout,
    Place,
)

_MIXES = frozenset(["matmul", "rmatmul", "bmm", "baddbmm", "einsum", "tensordot"])  # of streams with each other
_SUMS = frozenset(["sum", "mean"])
_PUTS = frozenset(["scatter", "index_copy", "index_put", "setitem"])  # tokens in the place of others
_At = TypeVar("_At", bound=Hashable)  # a value of the graph, or one with what was met on the way


def walked(
    starts: Iterable[_At], onward: Callable[[_At], Iterable[_At]], *, nearest_first: bool = False
) -> Iterator[_At]:
    """Each value that a way through the graph comes to, once: from `starts`, and from each to those that `onward` gives."""
    frontier, seen = deque(starts), set[_At]()
    while frontier:
        at = frontier.popleft() if nearest_first else frontier.pop()
        if at not in seen:
            seen.add(at)
            yield at
            frontier.extend(onward(at))


@dataclass
class Sum:
    """A residual addition as found in the graph: the outermost node, its stream value, its internal additions, and its
    summands: those that depend on the stream. `is_gated`: the stream passes a product with a factor made from data. `read`: of
    several streams side by side, the value that the sublayer reads of them."""

    root: int
    stream: int
    nodes: list[int]
    leaves: list[int]
    is_gated: bool = False
    read: int | None = None

    @property
    def given(self) -> int:
        """What the sublayer is given: the stream, or what it reads of several."""
        return self.stream if self.read is None else self.read


class Sums:
    """The additions that carry the stream through a recorded pass."""

    def __init__(self, model: nn.Module, recorded: Trace, *, several: bool = False) -> None:
        self.model = model
        self.t = recorded
        self.several = several
        self.layout: Layout | None = None
        self.parameters = sum(1 << n.index for n in recorded.nodes if n.operation == "parameter")
        self.attentions = mixing_products(recorded)
        if several:  # what mixes streams is a product of data with data, too, and made from the one before
            self.attentions = {i: found for i, found in self.attentions.items() if found.score is not None}
        self.logits = {i for m in self.attentions.values() for i in m.between}  # a bias added there is no residual
        self.sums = self._sums()
        self._norm_kinds: dict[int, Literal["layer", "rms"] | None] = {}
        self.edges: dict[
            tuple[Place, Place], tuple[int, int]
        ] = {}  # by entry and exit of a block: the stream's values there

    def _terms(self, index: int) -> tuple[int, ...]:
        """The numbers of the operands that a sum adds up, if at least two of them are made from data; else none."""
        node = self.t.nodes[index]
        found = [i for i in summands_of(node.operation, len(node.inputs)) if self.t.nodes[node.inputs[i]].is_data]
        while len(found) > 1 and same_term(node.operation, found[-2], found[-1]):  # a gate and what it gates
            attends = [any(self._feeds(p, node.inputs[i]) for p in self.attentions) for i in found[-2:]]
            del found[-1 if attends == [True, False] else -2]
        if node.operation == "stack" and not self._is_summed(index):
            return ()
        return tuple(found) if len(found) > 1 else ()

    def _is_summed(self, stack: int) -> bool:
        """Whether a stack of values is nothing but added up."""
        shape = self.t.nodes[self.t.nodes[stack].inputs[0]].shape
        following = [self.t.nodes[i] for i in self.t.consumers[stack]]
        return len(following) == 1 and following[0].operation == "sum" and following[0].shape == shape

    def _is_addition(self, index: int) -> bool:
        return bool(self._terms(index))

    def _summands(self, index: int) -> list[int]:
        return [self.t.nodes[index].inputs[i] for i in self._terms(index)]

    def _passes(self, index: int) -> int | None:
        """The value that a node merely moves, casts, scales or shifts by what is no data."""
        node = self.t.nodes[index]
        if node.operation == "sum" and self.t.nodes[node.inputs[0]].operation == "stack":
            return node.inputs[0] if self._is_summed(node.inputs[0]) else None
        data = [i for i in node.inputs if self.t.nodes[i].is_data]
        if len(data) == 1 and node.operation in {"sub", "lerp", "addcmul"} and data[0] == node.inputs[0]:
            return data[0]
        return self.t.passes_through(index)

    def _gated(self, index: int) -> list[int]:
        """The operands of a product of data with data, factor by factor; none where it is no such product."""
        node = self.t.nodes[index]
        data = [i for i in node.inputs if self.t.nodes[i].is_data]
        return data if node.operation == "mul" and len(data) > 1 else []

    def _behind(self, index: int) -> list[int]:
        """Where the stream may come from that a value carries: the summands of a sum, the factors of a product, or the value
        that is merely moved, cast or scaled."""
        passed = self._passes(index)
        return self._summands(index) or (
            [passed] if passed is not None else self._gated(index) or self._picked(index) or self._mixed(index)
        )

    def _mixed(self, index: int) -> list[int]:
        """The streams that a product or a sum may mix with each other; nothing where one stream is looked for. What mixes them,
        one weight for each pair, is the smaller operand. Whether it is so, the proof says."""
        node = self.t.nodes[index]
        if not self.several or index in self.attentions:
            return []
        data = [i for i in node.inputs if self.t.nodes[i].is_data and self.t.nodes[i].is_floating]
        if data and (node.operation in _MIXES or (node.operation in _SUMS and len(data) == 1)):
            return [max(data, key=lambda i: self.t.nodes[i].size)]
        return []

    def _weighed(self, index: int) -> list[int]:
        """The streams that a product with data may weigh before a sum mixes them."""
        return [i for i in self._gated(index) if self.t.nodes[i].size == self.t.nodes[index].size]

    def _read_of(self, found: Sum) -> int | None:
        """What a sublayer reads of several streams: behind the last product or sum that mixes them; None where it
        reads none, or more than one mixture of them."""
        wanted = [leaf for leaf in found.leaves if leaf != found.stream]
        onward: set[int] = {found.stream}  # the streams, moved or mixed
        mixed: set[int] = set()
        for index in range(found.stream + 1, found.root):
            behind = [i for i in (self._passes(index), *self._picked(index)[:1], *self._mixed(index)) if i in onward]
            behind = behind or [i for i in self._weighed(index) if i in onward and i not in mixed]
            if behind:
                onward.add(index)
                if self._mixed(index) or self._picked(index) or mixed & set(behind):
                    mixed.add(index)
        read = [
            i
            for i in mixed
            for consumer in self.t.consumers[i]
            if consumer not in onward and any(self._feeds(consumer, leaf) for leaf in wanted)
        ]
        largest = max((self.t.nodes[i].size for i in read), default=0)
        found_last = max((i for i in read if self.t.nodes[i].size == largest), default=None)
        if found_last is None or any(not self._feeds(i, found_last) for i in read if self.t.nodes[i].size == largest):
            return None  # nothing, or several mixtures
        return found_last

    def _unwritten(self, leaf: int, found: Sum) -> int:
        """What a sublayer makes, before it is written to several streams."""
        while found.read is not None:
            made = self._passes(leaf)
            behind = [made] if made is not None else self._mixed(leaf) or self._gated(leaf)
            behind = [i for i in behind if self.t.depends(i, found.read)]
            if not behind:
                break
            leaf = behind[0]
        return leaf

    def _picked(self, index: int) -> list[int]:
        """The values that an operation picks tokens from or puts tokens into, its data among the operands last."""
        node = self.t.nodes[index]
        if node.operation in PICKS:
            return [node.inputs[0]]
        return [node.inputs[0], node.inputs[-1]] if node.operation in _PUTS else []

    def _carried(self, index: int, ends: Collection[int] = ()) -> set[int]:
        """Every value on the way back from `index`, no further than `ends`, that it may carry."""
        return set(walked([index], lambda i: () if i in ends else self._behind(i)))

    def _gates(self, index: int, stream: int, norms: Collection[tuple[int, int]]) -> tuple[tuple[Point, int], ...]:
        """The factors made from data, and the choices of tokens, that the stream meets from value `stream` to value `index`.
        What lies in one of the `norms`, from a value to a value, is the norm's own: it is taken from whatever stream comes."""
        found: list[tuple[Point, int]] = []
        for value in sorted(self._carried(index, (stream,)) - {stream}):
            node = self.t.nodes[value]
            if not self.t.depends(value, stream) or any(start < value <= end for start, end in norms):
                continue
            numbers = range(len(node.inputs))
            if node.operation == "lerp":
                numbers = range(2, len(node.inputs))
            elif self._picked(value):
                numbers = range(1, len(node.inputs))
            elif not self._gated(value) and not self._mixed(value):
                continue
            mixed = self._mixed(value)
            factors = [i for i in numbers if self.t.nodes[node.inputs[i]].is_data and node.inputs[i] not in mixed]
            if (self._gated(value) or mixed) and stream not in self._carried(value, (stream,)):
                # On an update's way, a factor that this stream does not make: the weight of a token that was chosen before it.
                factors = [i for i in factors if not self.t.depends(node.inputs[i], stream)]
            found += [
                (self._point(value), i)
                for i in factors
                if mixed or stream not in self._carried(node.inputs[i], (stream,))
            ]
        return tuple(found)

    def _carries_tokens(self, index: int, size: int) -> bool:
        """Whether a value can be the stream of a sum of this size. An attention mask is no stream: nothing learned is in it,
        though in later blocks every score depends on it through learned products."""
        node = self.t.nodes[index]
        learned = bool(self.t.ancestors[index] & self.parameters) or node.operation == "batch"
        return node.is_floating and node.size == size and learned

    def _stream_value(self, operand: int, update: int, size: int, gated: bool) -> int | None:
        """The latest value behind `operand`, through sums, casts and scalings (`gated`: and products with data), that `update`
        is learned from."""

        def is_found(index: int) -> bool:
            return self.t.learned(update, index) and self._carries_tokens(index, size)

        def onward(index: int) -> Iterable[int]:
            is_statistic = self.t.depends(update, index) and self.t.nodes[update].size < size  # as of x in x - mean(x)
            ends = is_statistic or is_found(index) or not (gated or not self._gated(index))
            return () if ends else self._behind(index)

        return max(filter(is_found, walked([operand], onward)), default=None)

    def _sums(self) -> list[Sum]:
        roots: list[Sum] = []
        for node in self.t.nodes:
            of_hook = 0 <= self.t.calls[node.call].ran <= node.index  # no module's own code: nobody can stand there
            if of_hook or node.index in self.logits or not self._is_addition(node.index):
                continue
            stream, is_gated = self._stream_of(node.index)
            if stream is not None:
                found = Sum(node.index, stream, *self._tree(node.index, stream, is_gated), is_gated)
                roots.append(replace(found, read=self._read_of(found)) if self.several else found)
        streams = {s.root: s for s in roots}
        # The stream twice is a skip around whole blocks, unless all happens around one stream: x + a (f - x).
        roots = [
            s
            for s in roots
            if s.leaves.count(s.stream) == 1 or all(self._is_beside(s, streams[n]) for n in s.nodes if n in streams)
        ]
        inner = {n for s in roots for n in s.nodes if n != s.root}
        outer = [s for s in roots if s.root not in inner]
        scores = {s.root: self._scores_of(s) for s in outer}
        # A skip around additions that attend themselves spans whole blocks: it belongs to none of them.
        outer = [s for s in outer if not any(scores[s.root] & scores[o.root] and self._is_nested(o, s) for o in outer)]
        kept: list[Sum] = []
        for found in reversed(outer):  # what is nested in a nested addition's update is not thereby nested
            if not any(self._is_nested(found, other) for other in kept):
                kept.append(found)
        return kept[::-1]

    def _is_beside(self, outer: Sum, inner: Sum) -> bool:
        calls = [self.t.nodes[s.root].call for s in (outer, inner)]
        return outer.stream == inner.stream and calls[0] == calls[1]

    def _stream_of(self, addition: int) -> tuple[int | None, bool]:
        """The stream of a residual addition, and whether it had to be looked for behind a product with data."""
        terms = self._summands(addition)
        size = max(self.t.nodes[i].size for i in terms)
        for gated in (False, True):
            for operand in terms:
                for update in terms:
                    value = self._stream_value(operand, update, size, gated) if update != operand else None
                    if value is not None:
                        return value, gated
        return None, False

    def _scores_of(self, found: Sum) -> set[int]:
        return {s for leaf in found.leaves if leaf != found.stream for s in self._attending(leaf, found.stream)}

    def _is_nested(self, inside: Sum, outside: Sum) -> bool:
        """Whether an addition happens within another one's update, such as a skip inside an MLP."""
        if inside.root == outside.root:
            return False
        updates = [leaf for leaf in outside.leaves if leaf != outside.stream]
        return (
            any(self.t.depends(leaf, inside.root) or leaf == inside.root for leaf in updates)
            and not (self.t.depends(outside.stream, inside.root) or outside.stream == inside.root)
            and (self.t.depends(inside.root, outside.stream))
        )

    def _tree(self, root: int, stream: int, is_gated: bool) -> tuple[list[int], list[int]]:
        """The additions under `root` down to the stream value and the summands; innermost first, `root` last. What does not
        depend on the stream is carried along with it and is no summand."""
        internal: list[int] = []
        leaves: list[int] = []
        # No recursive closure: it would be a cycle that keeps the model alive.
        self._descend(root, stream, is_gated, internal, leaves)
        return internal, leaves

    def _descend(self, index: int, stream: int, is_gated: bool, internal: list[int], leaves: list[int]) -> None:
        if index == stream:
            leaves.append(index)
        elif self.t.depends(index, stream):
            terms = self._summands(index)
            onward = terms or [i for i in self._onward(index, is_gated) if self._leads_to_addition(i, stream, is_gated)]
            before = len(leaves)
            for value in onward:
                self._descend(value, stream, is_gated, internal, leaves)
            if onward and set(leaves[before:]) == {stream}:  # the stream twice, as in a x + b x0 where x is x0
                del leaves[before + 1 :]
            elif terms and self._shifts(index, terms, leaves[before:], stream):
                leaves[before:] = [index]
            elif terms:
                internal.append(index)
            elif not onward:
                leaves.append(index)

    def _shifts(self, index: int, terms: list[int], leaves: list[int], stream: int) -> bool:
        """Whether a sum under a residual addition shifts one update by what is alike for several of its entries: the shift of an
        adaptive output norm, or a bias made from a condition. It is the update's own and leaves with it."""
        fixed = [i for i in terms if not self.t.depends(i, stream)]
        smaller = all(self.t.nodes[i].size < self.t.nodes[index].size for i in fixed)
        return len(leaves) == 1 and leaves[0] != stream and bool(fixed) and smaller

    def _onward(self, index: int, is_gated: bool) -> list[int]:
        passed = self._passes(index)
        if passed is not None:
            return [passed]
        several = (self._mixed(index) or self._picked(index)[:1]) if self.several else []
        return several or (self._gated(index) if is_gated else [])

    def _leads_to_addition(self, index: int, stream: int, is_gated: bool) -> bool:
        if index == stream or (self._is_addition(index) and self.t.depends(index, stream)):
            return True
        return any(self._leads_to_addition(i, stream, is_gated) for i in self._onward(index, is_gated))

    def _attending(self, leaf: int, stream: int) -> list[int]:
        """The attention products between a stream and a summand of its update."""
        return [
            product
            for product in self.attentions
            if (self.t.depends(leaf, product) or leaf == product) and self.t.depends(product, stream)
        ]

    def _feeds(self, index: int, leaf: int) -> bool:
        return index == leaf or self.t.depends(leaf, index)

    def _point(self, index: int) -> Point:
        node = self.t.nodes[index]
        call = self.t.calls[node.call]
        return Point(call.name, call.ordinal, node.counted, node.ordinal)

    def _data(self, values: Iterable[int]) -> list[int]:
        """Those that come of the batch."""
        return [i for i in values if self.t.nodes[i].is_data]
