"""Read an anatomy off a recorded graph: residual additions first, then parts, norms, projections and blocks.

What each rule says is in `uncollapse.anatomy.vocabulary`; this module is the reading alone. Nothing here is believed until `proof`
has checked it on the live model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from uncollapse.anatomy.attention_graph import MixingProduct, has_other_data, making, mixing_products, serves_weights
from uncollapse.anatomy.interception import Point, device_of
from uncollapse.anatomy.norm_reading import Piece, cuts, kind_between, next_products, pieces_between
from uncollapse.anatomy.replaying import between
from uncollapse.anatomy.summands import same_term, summands_of
from uncollapse.anatomy.torch_calls import PASSES
from uncollapse.anatomy.tracing import Call, Trace
from uncollapse.anatomy.vocabulary import (
    PICKS,
    STREAM,
    AdditionNode,
    Anatomy,
    AttentionCall,
    Block,
    Gate,
    Layout,
    MaskingStep,
    ModuleCall,
    Norm,
    NormPiece,
    NormRole,
    Part,
    Place,
    Placement,
    Residual,
    Stack,
)
from uncollapse.errors import UnsupportedModel
from uncollapse.restoring import is_own

SIDE_BY_SIDE = "several streams side by side"  # as messages call them
_LONGEST_NORM = 64  # operations in a module that may be a norm
_MOST_SOURCES = 4  # values that an embedding is summed of, and so many are followed to its norm
_GATINGS = frozenset(["mul", "rmul", "multiply"])
_FACTORS = frozenset(["mul", "rmul", "multiply", "div", "truediv", "true_divide", "neg"])
_CASTS = frozenset(["to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "dropout"])
_MOST_PRODUCTS = 24  # products of a part that are followed: of hundreds of experts the first tell as much


_CUTS = frozenset(["getitem", "split", "chunk", "narrow", "tensor_split", "unbind"])
_MIXES = frozenset(["matmul", "rmatmul", "bmm", "baddbmm", "einsum", "tensordot"])  # of streams with each other
_SUMS = frozenset(["sum", "mean"])
_PUTS = frozenset(["scatter", "index_copy", "index_put", "setitem"])  # tokens in the place of others


_At = TypeVar("_At", bound=Hashable)  # a value of the graph, or one with what was met on the way


@dataclass
class _Sum:
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


@dataclass
class _Stretch:
    """The stretch of a pass that is one block: the run of its module, or of the module in whose own code it stands beside
    others (then with `entry` and `exit`, the values where it begins and ends, and a `label`). `group` tells stacks apart."""

    call: Call
    sums: list[_Sum]
    group: tuple[int, int]
    entry: int | None = None
    exit: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.call.name


def read(model: nn.Module, recorded: Trace, layout: Layout | None = None, *, several: bool = False) -> Anatomy:
    """The picture that the graph shows; not yet proved. several: streams side by side are looked for, which sublayers read and
    write together. Raises `UnsupportedModel` where no blocks can be made out."""
    reader = _Reader(model, recorded, several=several)
    if several and not any(found.read is not None for found in reader.sums):
        raise reader._refusal(f"no sublayer reads {SIDE_BY_SIDE}")
    blocks = tuple(reader.blocks(layout))
    return Anatomy(blocks, reader.outer_norms(blocks), stacks=reader.stacks(blocks))


def _walked(
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


class _Reader:
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

    # Residual additions -------------------------------------------------------------------------------------------
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

    def _read_of(self, found: _Sum) -> int | None:
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

    def _unwritten(self, leaf: int, found: _Sum) -> int:
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
        return set(_walked([index], lambda i: () if i in ends else self._behind(i)))

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

        return max(filter(is_found, _walked([operand], onward)), default=None)

    def _sums(self) -> list[_Sum]:
        roots: list[_Sum] = []
        for node in self.t.nodes:
            of_hook = 0 <= self.t.calls[node.call].ran <= node.index  # no module's own code: nobody can stand there
            if of_hook or node.index in self.logits or not self._is_addition(node.index):
                continue
            stream, is_gated = self._stream_of(node.index)
            if stream is not None:
                found = _Sum(node.index, stream, *self._tree(node.index, stream, is_gated), is_gated)
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
        kept: list[_Sum] = []
        for found in reversed(outer):  # what is nested in a nested addition's update is not thereby nested
            if not any(self._is_nested(found, other) for other in kept):
                kept.append(found)
        return kept[::-1]

    def _is_beside(self, outer: _Sum, inner: _Sum) -> bool:
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

    def _scores_of(self, found: _Sum) -> set[int]:
        return {s for leaf in found.leaves if leaf != found.stream for s in self._attending(leaf, found.stream)}

    def _is_nested(self, inside: _Sum, outside: _Sum) -> bool:
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

    # Parts --------------------------------------------------------------------------------------------------------
    def _attending(self, leaf: int, stream: int) -> list[int]:
        """The attention products between a stream and a summand of its update."""
        return [
            product
            for product in self.attentions
            if (self.t.depends(leaf, product) or leaf == product) and self.t.depends(product, stream)
        ]

    def _group(self, found: _Sum) -> tuple[list[Part], list[AdditionNode]]:
        """The parts of a residual addition and its tree, nested additions within one part folded away."""
        summands = [leaf for leaf in found.leaves if leaf != found.stream]
        inside = {leaf: self._attending(leaf, found.stream) for leaf in summands}
        attending = [leaf for leaf in summands if inside[leaf]]
        rest = [leaf for leaf in summands if not inside[leaf]]
        parts: list[Part] = []
        part_of: dict[int, int] = {found.stream: STREAM}
        if attending:
            scores = list(dict.fromkeys(s for leaf in attending for s in inside[leaf]))
            calls = tuple(
                replace(
                    self._attention_call(s),
                    has_other_data=has_other_data(self.t, self.attentions[s].values, found.stream),
                    serves_weights=len(scores) > 1
                    and serves_weights(self.t, s, self.attentions, found.stream, attending),
                )
                for s in scores
            )
            crossing = all(not self.t.depends(self._value_node(s), found.stream) for s in scores)
            name = self.t.calls[self.t.nodes[scores[0]].call].name
            parts.append(Part("cross" if crossing else "attention", calls, name, read=self._read_place(found)))
            part_of |= dict.fromkeys(attending, 0)
        if rest:
            parts.append(self._mlp(rest[0], found))
            part_of |= dict.fromkeys(rest, len(parts) - 1)
        tree: list[AdditionNode] = []
        added: list[int] = []
        for index in found.nodes:
            terms, inputs = self._terms(index), self.t.nodes[index].inputs
            leaves = tuple(self._under(v, found, part_of) if i in terms else frozenset() for i, v in enumerate(inputs))
            if len(frozenset().union(*leaves)) > 1:  # an addition within one part belongs to that part
                tree.append(AdditionNode(self._point(index), leaves))
                added += [v for v, of in zip(inputs, leaves, strict=True) if of == {0}]
        if attending and len(set(added)) == 1:
            products = [s for leaf in attending for s in inside[leaf]]
            written = self._written(self._unwritten(added[0], found), products)
            parts[0] = replace(parts[0], written=self._point(written), gates=self._gates_on(products, written))
        return parts, tree

    def _read_place(self, found: _Sum) -> Place | None:
        """Where that is made which a sublayer reads of several streams."""
        return None if found.read is None else self._place(found.read, self.t.calls[0])

    def _under(self, index: int, found: _Sum, part_of: Mapping[int, int]) -> frozenset[int]:
        """The leaves of a residual addition under one of its nodes: part numbers, or `STREAM`."""
        if index in part_of:
            return frozenset({part_of[index]})
        if not self.t.depends(index, found.stream):
            return frozenset({STREAM})
        terms = self._summands(index)
        behind = terms or self._onward(index, found.is_gated)
        return frozenset().union(*(self._under(value, found, part_of) for value in behind))

    def _written(self, added: int, products: list[int]) -> int:
        """What the heads write together: the summand `added`, before norms, casts and factors that do not come from the heads."""
        index = added
        while not any(index == p for p in products):
            node = self.t.nodes[index]
            norm = next(
                (
                    c
                    for c in self.t.calls
                    if c.outputs.get(None) == index
                    and c.inputs
                    and index not in c.inputs.values()
                    and self.norm_kind(c)
                ),
                None,
            )
            if norm is not None:
                index = next(iter(norm.inputs.values()))
                continue
            made = [i for i in range(index) if self.t.is_learned_product(i) and self.t.depends(index, i)]
            source = max((i for i in made if self.t.depends(i, products[-1])), default=products[-1])
            pieces = [p for p in pieces_between(self.t, source, [index]) if p.target == index]
            if pieces:
                index = pieces[0].source
                continue
            from_heads = [i for i in node.inputs if any(i == p or self.t.depends(i, p) for p in products)]
            steps = node.operation in _FACTORS or node.operation in _CASTS
            if not steps or len(from_heads) != 1 or self.t.nodes[from_heads[0]].shape != node.shape:
                break
            index = from_heads[0]
        return index

    def _gates_on(self, products: Collection[int], written: int) -> tuple[Gate, ...]:
        """The factors from elsewhere in the data on what these products mix, before anything learned."""
        found = []
        for index in range(min(products) + 1, written + 1):
            node = self.t.nodes[index]
            if node.operation not in _GATINGS or not (index == written or self.t.depends(written, index)):
                continue
            from_heads = [any(i == p or self.t.depends(i, p) for p in products) for i in node.inputs]
            if len(from_heads) != 2 or sum(from_heads) != 1:
                continue
            gate = from_heads.index(False)
            mixed = node.inputs[1 - gate]
            if self.t.nodes[node.inputs[gate]].is_data and not any(self.t.learned(mixed, p) for p in products):
                found.append(Gate(self._point(index), gate))
        return tuple(found)

    def _point(self, index: int) -> Point:
        node = self.t.nodes[index]
        call = self.t.calls[node.call]
        return Point(call.name, call.ordinal, node.counted, node.ordinal)

    def _mlp(self, leaf: int, found: _Sum) -> Part:
        """The part whose summand is `leaf`: named after the outermost module that makes its last learned product and holds
        none of the residual additions."""
        leaf, read = self._unwritten(leaf, found), self._read_place(found)
        learned = [n.index for n in self.t.nodes if self.t.is_learned_product(n.index) and self._feeds(n.index, leaf)]
        inside = [i for i in learned if self.t.depends(i, found.given)]
        if not inside:
            return Part("mlp", (), self.t.calls[self.t.nodes[leaf].call].name, read=read)
        name = ""
        for index in self.t.call_path(self.t.nodes[inside[-1]].call):
            call = self.t.calls[index]
            if call.first <= found.root < call.last or not call.name:
                break
            name = call.name
        reads, writes = self._leaf_call(inside[0]), self._leaf_call(inside[-1])
        if reads == writes:  # experts behind a router, in one fused product: no hidden layer to be met
            reads = writes = None
        elif reads is not None and reads.name in {c.name for i in inside[1:] if (c := self._leaf_call(i))}:
            reads = writes = None  # run on some of the tokens at a time: no run sees them all
        return Part("mlp", (), name, reads=reads, writes=writes, read=read)

    def _leaf_call(self, learned: int) -> ModuleCall | None:
        """The run of the module made for a learned product: one without children of its own."""
        call = self.t.calls[self.t.nodes[learned].call]
        return ModuleCall(call.name, call.ordinal) if call.name and not call.children else None

    def _feeds(self, index: int, leaf: int) -> bool:
        return index == leaf or self.t.depends(leaf, index)

    def _value_node(self, product: int) -> int:
        return self.attentions[product].values

    def _drops_columns(self, found: MixingProduct) -> bool:
        """Whether some of the softmax's columns are gone from the weights. Whole slices, such as heads, may be taken one by one."""
        if found.is_fused or found.score is None or found.weights is None:
            return False
        kept = self.t.nodes[found.weights].size
        return kept > 0 and self.t.nodes[found.score].size % kept != 0

    def _attention_call(self, product: int) -> AttentionCall:
        found = self.attentions[product]
        node, value = self.t.nodes[product], found.values
        weights_shape = self.t.nodes[node.inputs[0] if found.weights is None else found.weights].shape
        batch = next((n.shape[0] for n in self.t.nodes if n.operation == "batch" and n.shape), 1)
        if len(weights_shape) >= 4:
            heads = weights_shape[-3]
        elif len(weights_shape) == 3:
            heads = max(1, weights_shape[0] // batch)
        else:
            heads = 1
        head_width = self.t.nodes[value].shape[-1]
        projection = self._projection(product)
        place = None if projection is None else self._projection_place(projection, product, heads * head_width)
        similarity, query, key = self._similarity(found)
        compared = () if similarity is None else self.t.nodes[similarity].inputs
        return AttentionCall(
            score=None if found.score is None else self._point(found.score),
            product=self._point(product),
            weight_operand=None if found.weights is None else node.inputs.index(found.weights),
            value_operand=node.inputs.index(value),
            heads=heads,
            key_value_heads=max(1, self._key_value_heads(value, heads)),
            head_width=head_width,
            projection=place,
            logits=None if found.is_fused else self._logits_operand(found),
            way=self._way(found),
            masking=tuple(
                MaskingStep(
                    self._point(index),
                    operand,
                    None if found.score is None else index > found.score,
                    made=self._made(self.t.nodes[index].inputs[operand]),
                )
                for index, operand in found.masking
            ),
            made=self._made(node.inputs[3]) if found.is_fused and len(node.inputs) > 3 else (),
            drops_columns=self._drops_columns(found),
            value_bias=any(map(self._has_bias, self._learned_behind(value))),
            output_bias=projection is not None and any(map(self._has_bias, self._products_of(place, projection))),
            queries=self._learned_place(query, product),
            keys=self._learned_place(key, product),
            values=self._learned_place(value, product),
            similarity=None if similarity is None else self._point(similarity),
            query_operand=compared.index(query) if query in compared else 0,
            key_operand=compared.index(key) if key in compared else 1,
        )

    def _made(self, operand: int) -> tuple[Point, ...]:
        return tuple(dict.fromkeys(self._point(index) for index in making(self.t, operand)))

    def _similarity(self, found: MixingProduct) -> tuple[int | None, int | None, int | None]:
        """The product of queries with keys and its two operands; nothing where several products are summed before the softmax."""
        if found.is_fused:
            query, key = self.t.nodes[found.product].inputs[:2]
            return found.product, query, key
        if len(found.similarity) != 1:
            return None, None, None
        (product,) = found.similarity
        data = [i for i in self.t.nodes[product].inputs if self.t.nodes[i].is_data]
        return product, data[-2], data[-1]  # `baddbmm` takes what it adds first

    def _logits_operand(self, found: MixingProduct) -> tuple[Point, int] | None:
        """Where the logits are met: the first operation after them on the way to the weights, and the number of its operand."""
        if found.score is None or found.logits is None:
            return None
        met = next(i for i in found.between if found.logits in self.t.nodes[i].inputs and i <= found.score)
        return self._point(met), self.t.nodes[met].inputs.index(found.logits)

    def _way(self, found: MixingProduct) -> tuple[Point, ...]:
        """The operations from the first mask, or from the logits, to the weights."""
        starts = [index for index, _ in found.masking]
        if found.score is not None and not found.is_fused:
            starts.append(next(i for i in found.between if found.logits in self.t.nodes[i].inputs))
        steps = sorted({*(index for index, _ in found.masking), *found.between})
        return tuple(self._point(i) for i in steps if starts and i >= min(starts))

    def _learned_place(self, operand: int | None, product: int) -> ModuleCall | Point | None:
        """Where the one learned product behind an operand of the attention is made: the run of a module that returns just
        that, or a point. None where several make the operand, or none."""
        learned = [] if operand is None else self._learned_behind(operand)
        if len(learned) != 1:
            return None
        call = self.t.calls[self.t.nodes[learned[0]].call]
        result = call.outputs.get(None)
        if (
            call.name
            and not call.first <= product < call.last
            and result is not None
            and self._moved(result, learned[0])
        ):
            return ModuleCall(call.name, call.ordinal)
        return self._point(learned[0])

    def _has_bias(self, learned: int) -> bool:
        """Whether a learned product takes a second parameter beside its weight."""
        return sum(self.t.nodes[i].is_parameter for i in self.t.nodes[learned].inputs) > 1

    def _products_of(self, place: ModuleCall | Point | None, projection: int) -> list[int]:
        """The learned products of an output projection: of an adapter's too, where one is wrapped around it."""
        if not isinstance(place, ModuleCall):
            return [projection]
        call = next(c for c in self.t.calls if (c.name, c.ordinal) == (place.name, place.call))
        return [i for i in range(call.first, call.last) if self.t.is_learned_product(i)]

    def _learned_behind(self, value: int) -> list[int]:
        """The learned products that a value comes from, an adapter's beside the layer's own."""
        learned = self.t.is_learned_product
        behind = _walked(self._data([value]), lambda i: () if learned(i) else self._data(self.t.nodes[i].inputs))
        return list(filter(learned, behind))

    def _data(self, values: Iterable[int]) -> list[int]:
        """Those that come of the batch."""
        return [i for i in values if self.t.nodes[i].is_data]

    def _key_value_heads(self, value: int, heads: int) -> int:
        """Heads over the factor by which the values were repeated between their learned product and the attention."""
        index: int | None = value
        if self.t.nodes[value].operation != "batch" and len(self.t.nodes[value].shape) >= 4:
            heads = min(heads, self.t.nodes[value].shape[-3])
        while index is not None and not self.t.is_learned_product(index):
            node = self.t.nodes[index]
            data = [i for i in node.inputs if self.t.nodes[i].is_data]
            if node.operation in {"expand", "repeat_interleave", "repeat"} and data:
                before = self.t.nodes[data[0]].size
                if before and node.size > before:
                    return heads * before // node.size
            index = data[0] if len(data) == 1 else None
        return heads

    def _projection(self, product: int) -> int | None:
        """The first learned product downstream of the attention."""
        ahead = _walked([product], lambda i: self.t.consumers[i], nearest_first=True)
        return next((i for i in ahead if i != product and self.t.is_learned_product(i)), None)

    def _projection_place(self, projection: int, product: int, mixed: int) -> ModuleCall | Point | None:
        """The run of the module that is the output projection, or the point of a product in the attention's own code."""
        call = self.t.calls[self.t.nodes[projection].call]
        data = [i for i in self.t.nodes[projection].inputs if self.t.nodes[i].is_data]
        while self._wraps(call.parent, data[0], product):  # an adapter around the layer is part of the projection
            call = self.t.calls[call.parent]
        if call.first <= product < call.last:
            return self._point(projection) if self.t.nodes[data[0]].shape[-1] == mixed else None
        inputs = [self.t.nodes[i].shape for i in call.inputs.values()]
        if call.name and any(shape and shape[-1] == mixed for shape in inputs):
            return ModuleCall(call.name, call.ordinal)
        return None

    def _wraps(self, index: int, given: int, product: int) -> bool:
        """Whether a call takes just the value `given` and does to it nothing but learned maps: no attention, no residual
        addition, no norm."""
        call = self.t.calls[index]
        if index <= 0 or list(call.inputs.values()) != [given] or call.first <= product < call.last:
            return False
        if any(call.first <= s.root < call.last for s in self.sums):
            return False
        inside = [c for c in self.t.calls if index in self.t.call_path(c.index)]
        return all(self.norm_kind(c) is None for c in inside)

    # Norms --------------------------------------------------------------------------------------------------------
    def norm_kind(self, call: Call) -> Literal["layer", "rms"] | None:
        """Whether the module behaved as a norm in this run, whatever else it was given: told by what it does, on random inputs."""
        if not call.inputs or None not in call.outputs:
            return None
        if call.index not in self._norm_kinds:
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            inside = range(call.first, call.last)
            kind: Literal["layer", "rms"] | None = None
            if self.t.depends(result, source):
                products = any(self.t.is_matrix_product(i) or self.t.is_data_product(i) for i in inside)
                if not products and len(inside) <= _LONGEST_NORM:
                    kind = kind_between(self.t, source, result)
            elif not call.children and source != result:  # it hides what it does from tracing: ask the module itself
                kind = behaves_as_norm(self.model.get_submodule(call.name), self.t.nodes[source].shape)
            self._norm_kinds[call.index] = kind
        return self._norm_kinds[call.index]

    def _outermost_norms(self) -> list[Call]:
        """The runs of modules that are norms and not within another such run."""
        norms = {c.index for c in self.t.calls if self.norm_kind(c) is not None}
        return [self.t.calls[i] for i in sorted(norms) if not norms & set(self.t.call_path(self.t.calls[i].parent))]

    def outer_norms(self, blocks: tuple[Block, ...]) -> tuple[ModuleCall | NormPiece, ...]:
        """The norms that stand in no block: of the embedding, between blocks, the final one."""
        inside = {(b.module.name, b.module.call) for b in blocks if not b.label}
        known = {n.where for b in blocks for n in b.norms}
        found: dict[int, ModuleCall | NormPiece] = {}
        spans: list[range] = []
        for call in self._outermost_norms():
            around = {(self.t.calls[i].name, self.t.calls[i].ordinal) for i in self.t.call_path(call.index)}
            if not around & inside:
                found[call.outputs[None]] = ModuleCall(call.name, call.ordinal)
                spans.append(range(call.first, max(call.last, call.outputs[None] + 1)))
        for piece in self._outer_pieces(blocks):
            covering = [s for s in spans if piece.bare in s]
            if not covering:
                found[piece.target] = self._norm_where(piece)[1] or self._norm_where(piece)[0]
            elif (
                piece.target not in covering[0] and piece.target not in found
            ):  # a module, and a condition's scale behind it
                inner = next(i for i in found if i in covering[0])
                del found[inner]
                found[piece.target] = self._norm_where(piece)[1] or self._norm_where(piece)[0]
        return tuple(found[i] for i in sorted(found) if found[i] not in known)

    def _outer_pieces(self, blocks: tuple[Block, ...]) -> list[Piece]:
        by_run = {(c.name, c.ordinal): c for c in self.t.calls}
        calls = [by_run[b.module.name, b.module.call] for b in blocks]
        entries, exits = zip(*(self.edges[b.entry, b.exit] for b in blocks), strict=True)
        pieces: list[Piece] = []
        for number, start in enumerate(exits):
            if start is None:
                continue
            targets = [
                operand
                for operand, product in next_products(self.t, start, self.t.results).items()
                if not any(
                    c.first <= product < c.last and e in cuts(self.t, start, operand)
                    for c, e in zip(calls, entries, strict=True)
                )
            ]
            following = entries[number + 1] if number + 1 < len(entries) else None
            ends = [*self.t.results, *([following] if following is not None else [])]
            targets += [
                i for i in ends if i != start and self.t.depends(i, start) and not self._product_between(start, i)
            ]
            pieces += pieces_between(self.t, start, targets)
        for entry in dict.fromkeys(e for e in entries if e is not None):
            if any(x is not None and self.t.depends(entry, x) for x in exits):
                continue
            sources = self._makers(entry)[:_MOST_SOURCES]
            pieces += [p for s in sources for p in pieces_between(self.t, s, [entry])]
        return list(dict.fromkeys(pieces))

    def _product_between(self, start: int, end: int) -> bool:
        """Whether a way from `start` to `end` leads through a matrix product."""
        return not cuts(self.t, start, end)

    def _makers(self, index: int) -> list[int]:
        """The values that a value is made of without a matrix product: products, looked-up rows, what was given."""
        nodes = self.t.nodes

        def data(at: int) -> list[int]:
            return [i for i in self._data(nodes[at].inputs) if nodes[i].is_floating]

        def is_maker(at: int) -> bool:
            return at != index and (self.t.is_matrix_product(at) or nodes[at].operation == "embedding" or not data(at))

        start = [index] if nodes[index].is_floating else []
        behind = _walked(start, lambda at: () if is_maker(at) or self.t.is_matrix_product(at) else data(at))
        return sorted(filter(is_maker, behind))

    def _norms(self, sums: list[_Sum], parts_of: list[list[int]], stream_out: int, block: Call) -> list[Norm]:
        """The norms of a block: pieces of the graph first, then modules that behave as norms and were met in no such piece."""
        found: dict[int, Norm] = {}
        covered: list[Piece] = []
        for piece, role, place in self._norm_pieces(sums, parts_of, stream_out):
            module, written = self._norm_where(piece)
            if piece.target in found:
                if found[piece.target].place != place and role == found[piece.target].role:
                    found[piece.target] = replace(found[piece.target], place=None)
                continue
            found[piece.target] = Norm(module, piece.kind, role, place, written)
            covered.append(piece)
            if role == "post":  # the proof repeats it on the sum, and compares with the stream behind it
                root, following = sums[place or 0].root, [*(s.stream for s in sums[1:]), stream_out][place or 0]
                start = root if self._only_moved(piece.source, root) else piece.source
                end = following if self._only_moved(following, piece.target) else piece.target
                self.t.pieces[found[piece.target].where] = start, end
        for call in self._outermost_norms():
            if not (block.first <= call.first and call.last <= block.last) or call.index == block.index:
                continue
            kind = self.norm_kind(call)
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            if kind is None or any(p.bare == result or call.first <= p.bare < call.last for p in covered):
                continue
            role_part = self._norm_role(source, result, sums, parts_of, stream_out)
            if role_part is not None:
                found[result] = Norm(ModuleCall(call.name, call.ordinal), kind, *role_part)
                self.t.pieces[found[result].where] = source, result
        return [found[i] for i in sorted(found)]

    def _norm_pieces(
        self, sums: list[_Sum], parts_of: list[list[int]], stream_out: int
    ) -> Iterable[tuple[Piece, NormRole, int | None]]:
        """The norms of a block on the graph: on the stream behind an addition, before its parts, within them, and behind them."""
        streams = [s.stream for s in sums[1:]] + [stream_out]
        for number, (found, following) in enumerate(zip(sums, streams, strict=True)):
            for piece in pieces_between(self.t, found.root, [following] if following != found.root else []):
                yield piece, "post", number
        for found, numbers in zip(sums, parts_of, strict=True):
            leaves = [self._unwritten(x, found) for x in found.leaves if x != found.stream]
            shared = len(set(numbers)) > 1
            for part in dict.fromkeys(numbers):
                own = [leaf for leaf, number in zip(leaves, numbers, strict=True) if number == part]
                for piece in pieces_between(self.t, found.given, next_products(self.t, found.given, own)):
                    yield piece, "before", None if shared else part
                inside = [i for i in self._products_feeding(own) if self.t.depends(i, found.given)]
                for source in inside[:_MOST_PRODUCTS]:
                    for piece in pieces_between(self.t, source, next_products(self.t, source, own)):
                        yield piece, "inner", part
                # However many products come before, behind the last ones stands what is behind the sublayer. Of experts that are
                # added up one by one, the last are nearest to it.
                products = set(inside)
                makers = {leaf: [i for i in self._makers(leaf) if i in products] for leaf in own}
                for source in sorted({i for of in makers.values() for i in of[-_MOST_PRODUCTS:]}, reverse=True):
                    for piece in pieces_between(self.t, source, [leaf for leaf in own if source in makers[leaf]]):
                        yield piece, "after", part

    def _products_feeding(self, leaves: list[int]) -> list[int]:
        return [
            n.index
            for n in self.t.nodes
            if n.is_data
            and (self.t.is_matrix_product(n.index) or n.operation == "scaled_dot_product_attention")
            and any(n.index == leaf or self.t.depends(leaf, n.index) for leaf in leaves)
        ]

    def _norm_where(self, piece: Piece) -> tuple[ModuleCall, NormPiece | None]:
        """The run of the module that is just this norm, or the run whose code holds it with the place in that code."""
        for call in reversed(self.t.calls):
            if (
                not call.inputs
                or None not in call.outputs
                or not call.first <= piece.bare < max(call.last, call.first + 1)
            ):
                continue
            given, result = next(iter(call.inputs.values())), call.outputs[None]
            if self._like(given, piece.source) and self._like(result, piece.target):
                run = ModuleCall(call.name, call.ordinal)
                self.t.pieces.setdefault(run, (given, result))
                return run, None
        call = self.t.calls[self.t.nodes[piece.target].call]
        path = between(self.t, piece.source, piece.target)
        first = next(i for i in path if piece.source in self.t.nodes[i].inputs)
        operation = self.t.tape.operations[piece.target]
        written = NormPiece(
            self._point(first),
            self.t.nodes[first].inputs.index(piece.source),
            self._point(piece.target),
            operation.member,
            "" if operation.is_exchangeable else "its last operation returns an object of a kind of its own",
        )
        self.t.pieces.setdefault(written, (piece.source, piece.target))
        return ModuleCall(call.name, call.ordinal), written

    def _like(self, a: int, b: int) -> bool:
        """Whether two values are one and the same, or one is the other moved or cast."""
        return self._only_moved(a, b) or self._only_moved(b, a)

    def _only_moved(self, index: int, source: int) -> bool:
        while index != source:
            passed = self.t.passes_through(index) if self.t.nodes[index].operation in PASSES else None
            if passed is None:
                return False
            index = passed
        return True

    def _norm_role(
        self, source: int, result: int, sums: list[_Sum], parts_of: list[list[int]], stream_out: int
    ) -> tuple[NormRole, int | None] | None:
        streams = [s.stream for s in sums[1:]] + [stream_out]
        for number, (found, following) in enumerate(zip(sums, streams, strict=True)):
            if self.t.depends(result, found.root) and self._normed(following, result):
                return "post", number
        for found, numbers in zip(sums, parts_of, strict=True):
            for leaf, part in zip([x for x in found.leaves if x != found.stream], numbers, strict=True):
                on_path = self.t.depends(leaf, result) or leaf == result
                if not on_path or not (self.t.depends(source, found.given) or source == found.given):
                    continue
                if not self.t.learned(self._unwritten(leaf, found), result):
                    return "after", part
                if not self.t.learned(source, found.given):
                    return "before", part if len(set(numbers)) == 1 else None
                return "inner", part
        return None

    def _normed(self, index: int, source: int) -> bool:
        """Whether value `index` is value `source`, moved, cast, or through further norms."""
        while index != source:
            norm = next(
                (c for c in self.t.calls if c.outputs.get(None) == index and self.norm_kind(c) is not None), None
            )
            passed = self.t.passes_through(index) if norm is None else next(iter(norm.inputs.values()))
            if passed is None:
                return False
            index = passed
        return True

    def _moved(self, index: int, source: int) -> bool:
        """Whether value `index` is value `source`, merely moved or cast."""
        while index != source:
            passed = self._passes(index)
            if passed is None:
                return False
            index = passed
        return True

    # Blocks -------------------------------------------------------------------------------------------------------
    def _stretches(self, layout: Layout | None) -> list[_Stretch]:
        """The blocks, in the order they run."""
        holds = {c.index: [s for s in self.sums if c.first <= s.root < c.last] for c in self.t.calls}
        attending = {s.root for s in self.sums if any(p.kind == "attention" for p in self._group(s)[0])}
        attends = {index: [s for s in held if s.root in attending] for index, held in holds.items()}
        if layout is not None:
            return self._laid_out(layout, holds, attending)
        chosen: list[int] = []
        shared: list[int] = []  # modules in whose own code the additions of several blocks stand
        for found in (s for s in self.sums if s.root in attending):
            scores = self._scores_of(found)
            path = self.t.call_path(self.t.nodes[found.root].call)
            home = next(i for i in path if all(self.t.calls[i].first <= s < self.t.calls[i].last for s in scores))
            if len(attends[home]) > 1 and not self._is_one(home, holds, attends[home]):
                shared.append(home)
                continue
            outermost = path[0]
            members: list[int] = []
            for index in path:
                if len(attends[index]) > 1:
                    break
                outermost = index
                if self._is_member(index, holds):
                    members.append(index)
            inside = [s for leaf in found.leaves if leaf != found.stream for s in self._attending(leaf, found.stream)]
            chosen.append(self._deepest(members[-1] if members else outermost, holds, inside))
            if not self._enters(chosen[-1], holds):  # one block alone, in the model's own code
                shared.append(chosen.pop())
        chosen = list(dict.fromkeys(chosen))
        chosen = [c for c in chosen if not any(c != other and self._within(other, c) for other in chosen)]
        lists = {self.t.calls[i].name.rpartition(".")[0] for i in chosen if self._is_listed(self.t.calls[i].name)}
        for call in self.t.calls:  # blocks without attention between blocks with it: hybrids
            covered = any(self._within(call.index, c) or self._within(c, call.index) for c in chosen)
            if call.name and call.name.rpartition(".")[0] in lists and holds[call.index] and not covered:
                chosen.append(call.index)
        found_blocks = [self._of_module(i, holds) for i in chosen]
        taken = {s.root for i in chosen for s in holds[i]}
        for home in dict.fromkeys(shared):
            found_blocks += self._side_by_side(home, [s for s in holds[home] if s.root not in taken], attending)
        return sorted(found_blocks, key=lambda stretch: stretch.sums[0].root if stretch.sums else stretch.call.first)

    def _of_module(self, index: int, holds: Mapping[int, list[_Sum]]) -> _Stretch:
        call = self.t.calls[index]
        return _Stretch(call, holds[index], (call.parent, 0))

    def _laid_out(self, layout: Layout, holds: Mapping[int, list[_Sum]], attending: Collection[int]) -> list[_Stretch]:
        """The blocks that a layout names: modules that run, or that hold what runs in the code of a module around them."""
        whole = [c for c in self.t.calls if c.name in set(layout.blocks) and holds[c.index]]
        found = [self._of_module(c.index, holds) for c in whole]
        for name in (n for n in layout.blocks if n not in {c.name for c in whole}):
            scores = [
                i for i in self.attentions if f"{self.t.calls[self.t.nodes[i].call].name}.".startswith(f"{name}.")
            ]
            home = next((s for s in self.sums if s.root in attending and self._scores_of(s) & set(scores)), None)
            beside = [] if home is None else self._side_by_side(*self._shared_home(home, holds), attending)
            own = [b for b in beside if home is not None and home.root in {s.root for s in b.sums}]
            if not own:
                start = self._layout(layout)
                advice = f", or start from {start}" if start else ""
                raise UnsupportedModel(
                    f"anatomy: expected the Layout's blocks among the modules that run, got no run of {name!r} in "
                    f"{type(self.model).__name__}. Look at model.named_modules() for the names{advice}.",
                    found=self._found(),
                    identity=f"the Layout's block {name!r} runs",
                    layout=start,
                )
            found += [replace(b, label=name) for b in own]
        return sorted(found, key=lambda stretch: stretch.sums[0].root if stretch.sums else stretch.call.first)

    def _shared_home(self, found: _Sum, holds: Mapping[int, list[_Sum]]) -> tuple[int, list[_Sum]]:
        """The innermost run that holds a sum and its attention, and the sums in it."""
        scores = self._scores_of(found)
        path = self.t.call_path(self.t.nodes[found.root].call)
        home = next(i for i in path if all(self.t.calls[i].first <= s < self.t.calls[i].last for s in scores))
        return home, holds[home]

    def _is_one(self, home: int, holds: Mapping[int, list[_Sum]], attending: list[_Sum]) -> bool:
        """Whether a run with several self-attention additions is one block all the same: a member of a list of its like, and
        its attentions are not themselves members of a list inside it."""
        inner = {self._listed_inside(home, found) for found in attending}
        return self._is_member(home, holds) and inner == {None}

    def _listed_inside(self, home: int, found: _Sum) -> str | None:
        """The member of a list inside the module of `home` that an attention stands in."""
        around = self.t.calls[home].name
        owner = self.t.calls[self.t.nodes[min(self._scores_of(found))].call].name
        steps = owner.split(".") if owner else []
        for end in range(around.count(".") + 2 if around else 1, len(steps) + 1):
            name = ".".join(steps[:end])
            if isinstance(
                self.model.get_submodule(name.rpartition(".")[0]), (nn.ModuleList, nn.Sequential, nn.ModuleDict)
            ):
                return name
        return None

    def _side_by_side(self, home: int, sums: list[_Sum], attending: Collection[int]) -> list[_Stretch]:
        """Blocks whose additions stand in one module's own code: each a self-attention addition and those after it, up to the
        next. Where as many stand before the first as are missing behind the last (macaron), each takes its own before it."""
        starts = [i for i, s in enumerate(sums) if s.root in attending]
        gaps = {b - a for a, b in itertools.pairwise(starts)}
        lead = starts[0]
        if gaps and gaps != {len(sums) - starts[-1] + lead}:
            lead = 0
        starts = [0, *(i - lead for i in starts[1:]), len(sums)]
        pieces = [sums[a:b] for a, b in itertools.pairwise(starts)]
        call, found = self.t.calls[home], []
        group, left, behind_norm = 0, None, False
        for number, piece in enumerate(pieces):
            entry = self._beginning(call, piece[0].stream, left)
            if piece[0].read is not None:
                entry = self._laid_like(entry, piece[0].root)
            group += left is not None and entry != left
            if number + 1 < len(pieces):
                leaving = self._leaving(piece[-1].root, pieces[number + 1][0].stream)
                behind_norm = leaving != piece[-1].root
            else:
                within = [self._leaving(a.root, b.stream) != a.root for a, b in itertools.pairwise(piece)]
                leaving = self._leaving_last(piece[-1].root) if behind_norm or any(within) else piece[-1].root
            summed = self._summed(leaving)
            named = self._listed_inside(home, next((s for s in piece if s.root in attending), piece[0]))
            label = named or f"block {number} of {call.name or 'the model itself'}"
            found.append(_Stretch(call, piece, (home, group), entry, summed, label))
            left = summed
        return found

    def _summed(self, root: int) -> int:
        """The sum itself, where it is the sum over a stack."""
        return self.t.consumers[root][0] if self.t.nodes[root].operation == "stack" else root

    def _beginning(self, call: Call, stream: int, left: int | None) -> int:
        """Where the stream of a block's first addition begins: where the block before left it, as an argument of the module
        around, or where it is made."""
        carried = self._carried(stream, () if left is None else (left,))
        if left in carried:
            return left
        given = [i for i in call.inputs.values() if i in carried and self.t.nodes[i].size == self.t.nodes[stream].size]
        return max(given) if given else stream

    def _laid_like(self, stream: int, root: int) -> int:
        """Several streams as they lie in a sum: where a view of them was found, the value that it is a view of."""
        index: int | None = stream
        while index is not None and self.t.nodes[index].shape != self.t.nodes[root].shape:
            index = self.t.passes_through(index) if self.t.nodes[index].operation in PASSES else None
        return stream if index is None else index

    def _leaving(self, root: int, following: int) -> int:
        """Where a block is left whose last addition is `root`: behind the norms that the sum passes before it is carried on to
        the stream of the following block."""
        return root if root == following else self._behind_norms(root, [following])

    def _leaving_last(self, root: int) -> int:
        """The same for the last of several blocks that are left behind a norm: behind the first norm that the sum passes."""
        targets = [*next_products(self.t, root, self.t.results), *self.t.results]
        return self._behind_norms(root, [i for i in targets if self.t.depends(i, root)][:1], first=True)

    def _behind_norms(self, root: int, targets: Collection[int], *, first: bool = False) -> int:
        """The last value of the norms between `root` and the targets; where a module makes it, the module's."""
        pieces = pieces_between(self.t, root, targets)
        if not pieces:
            return root
        piece = pieces[0] if first else pieces[-1]
        for call in self.t.calls:  # the outermost module that holds the norm and no more than it
            result = call.outputs.get(None)
            if (
                result is not None
                and root < call.first <= piece.bare < call.last
                and self._only_moved(piece.target, result)
            ):
                return result
        return piece.target

    def _within(self, inner: int, outer: int) -> bool:
        return outer in self.t.call_path(inner)

    def _is_member(self, index: int, holds: Mapping[int, list[_Sum]]) -> bool:
        """Whether the call runs one of a list of like modules, another of which holds additions too."""
        call = self.t.calls[index]
        around, _, _ = call.name.rpartition(".")
        if not call.name or not isinstance(
            self.model.get_submodule(around), (nn.ModuleList, nn.Sequential, nn.ModuleDict)
        ):
            return False
        kind = type(self.model.get_submodule(call.name))
        return any(
            c.name != call.name
            and c.name.rpartition(".")[0] == around
            and holds[c.index]
            and type(self.model.get_submodule(c.name)) is kind
            for c in self.t.calls
        )

    def _deepest(self, index: int, holds: Mapping[int, list[_Sum]], scores: list[int]) -> int:
        """The deepest call inside `index` that still holds all of its additions and the attention."""
        while True:
            inside = [
                c
                for c in self.t.calls[index].children
                if len(holds[c]) == len(holds[index])
                # Not where only some tokens go through it, unless the stream only begins in here.
                and (self._sizes(c) & (self._sizes(index) or self._sizes(c)) or not self._enters(index, holds))
                and all(
                    self.t.calls[c].first <= s < self.t.calls[c].last
                    for s in scores
                    if self.t.calls[index].first <= s < self.t.calls[index].last
                )
            ]
            if not inside:
                return index
            index = inside[0]

    def _enters(self, index: int, holds: Mapping[int, list[_Sum]]) -> bool:
        """Whether the stream of a call's additions comes from outside, among its arguments."""
        given = tuple(self.t.calls[index].inputs.values())
        stream = holds[index][0].stream
        return index > 0 and bool(set(given) & self._carried(stream, given))

    def _sizes(self, index: int) -> set[int]:
        call = self.t.calls[index]
        return {self.t.nodes[i].size for i in (*call.outputs.values(), *call.written.values())}

    def blocks(self, layout: Layout | None) -> list[Block]:
        self.layout = layout
        stretches = self._stretches(layout)
        if not stretches:
            raise self._refusal("no module call that holds one self-attention and its residual addition")
        stacks: list[Literal["encoder", "decoder"] | None] = [None] * len(stretches)
        if layout is not None and layout.stacks:
            by_name = dict(zip(layout.blocks, layout.stacks, strict=True))
            stacks = [by_name[s.name] for s in stretches]
        blocks = [self._block(stretch, s) for stretch, s in zip(stretches, stacks, strict=True)]
        self._require_own_attention(blocks)
        if layout is None:
            self._require_every_attention(blocks)
        if layout is None or not layout.stacks:
            blocks = self._with_stacks(blocks, stretches)
        return blocks

    def _require_own_attention(self, blocks: list[Block]) -> None:
        """Refuse a picture in which several blocks hold one and the same attention: it is added to several streams."""
        met: dict[Point, str] = {}
        for block in blocks:
            for product in {c.product for p in block.parts for c in p.attention}:
                if product in met:
                    raise self._refusal(
                        f"the attention in {product.owner} is that of {met[product]} and of {block.name}"
                    )
                met[product] = block.name

    def _require_every_attention(self, blocks: list[Block]) -> None:
        """Refuse a picture that leaves out a block: attention inside a module of a class that is a block elsewhere, or, of a
        kind that blocks have, inside a member of a list. A pooling head's may stand outside the blocks. What reaches nothing that
        the model returns, such as the state that a recurrent layer would hand on to a next text, is nobody's."""
        inside = {c.product for b in blocks for p in b.parts for c in p.attention}
        kinds = {type(self.model.get_submodule(point.owner)) for point in inside}
        classes = {type(self.model.get_submodule(b.module.name)) for b in blocks if not b.label}
        for product in self.attentions:
            point = self._point(product)
            if point in inside or not any(self.t.depends(result, product) for result in self.t.results):
                continue
            names = [self.t.calls[i].name for i in self.t.call_path(self.t.nodes[product].call) if self.t.calls[i].name]
            of_a_kind = type(self.model.get_submodule(point.owner)) in kinds and any(map(self._is_listed, names))
            if of_a_kind or any(type(self.model.get_submodule(n)) in classes for n in names):
                raise self._refusal(
                    f"the attention in {point.owner or 'the model itself'} belongs to no block that was found"
                )

    def _is_listed(self, name: str) -> bool:
        """Whether the module stands in a list with others."""
        around = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(around, (nn.ModuleList, nn.Sequential)) and len(around) > 1

    def _with_stacks(self, blocks: list[Block], stretches: list[_Stretch]) -> list[Block]:
        """Encoder and decoder, told by cross-attention: a group whose blocks cross is a decoder, what it reads an encoder."""
        crossing = {s.group for b, s in zip(blocks, stretches, strict=True) if any(p.kind == "cross" for p in b.parts)}
        if not crossing:
            return blocks
        return [
            replace(b, stack="decoder" if s.group in crossing else "encoder")
            for b, s in zip(blocks, stretches, strict=True)
        ]

    def stacks(self, blocks: tuple[Block, ...]) -> tuple[Stack, ...]:
        """The chains of blocks that hand a stream on, in the order in which they begin."""
        entries, exits = zip(*(self.edges[b.entry, b.exit] for b in blocks), strict=True)
        chains: list[list[int]] = []
        for number, entry in enumerate(entries):
            given = next((i for i in reversed(range(number)) if self._hands_on(exits[i], entry)), None)
            known = next((chain for chain in chains if given in chain), None)
            if known is None:
                chains.append([number])
            else:
                known.append(number)
        return tuple(Stack(blocks[chain[0]].stack, tuple(chain)) for chain in chains)

    def _hands_on(self, left: int, entered: int) -> bool:
        """Whether the stream that leaves a block is the one that enters another: moved, scaled or added to without a learned
        product on the way, or the only data that the entering one is made of (as where patches are merged)."""
        if left != entered and not self.t.depends(entered, left):
            return False
        dominates, carries = True, False

        def onward(at: tuple[int, bool]) -> list[tuple[int, bool]]:
            index, is_learned = at
            behind = [] if index == left else self._data(self.t.nodes[index].inputs)
            return [(i, is_learned or self.t.is_matrix_product(index)) for i in behind]

        for index, is_learned in _walked([(i, False) for i in self._data([entered])], onward):
            if index == left:
                carries |= not is_learned
            else:
                dominates &= bool(self._data(self.t.nodes[index].inputs))
        return dominates or carries

    def _block(self, stretch: _Stretch, stack: Literal["encoder", "decoder"] | None) -> Block:
        call, sums = stretch.call, stretch.sums
        if not sums:
            raise self._refusal(f"no residual addition inside {stretch.name}")
        if call.outputs == {} and call.written == {} and stretch.exit is None and call.index:
            raise self._refusal(f"no tensor among the outputs of {stretch.name}")
        parts: list[Part] = []
        residuals: list[Residual] = []
        parts_of: list[list[int]] = []
        # By addition: the ways of the stream, from their ends to their beginnings.
        carried: list[list[tuple[int, int]]] = []
        entry, entry_value = self._entry(stretch)
        exit_place, exit_value = self._exit(stretch)
        before = entry_value
        for found in sums:
            own, tree = self._group(found)
            offset = len(parts)
            numbers = {STREAM: STREAM} | {i: i + offset for i in range(len(own))}
            tree = [
                AdditionNode(n.point, tuple(frozenset(numbers[i] for i in leaves) for leaves in n.leaves)) for n in tree
            ]
            summands = [leaf for leaf in found.leaves if leaf != found.stream]
            attending = bool(own) and own[0].kind in {"attention", "cross"}
            parts_of.append(
                [offset if not attending or self._attending(leaf, found.stream) else offset + 1 for leaf in summands]
            )
            carried.append([(found.stream, before), (found.root, found.stream)])
            if found.read is not None:  # the weights that it is read by, too
                carried[-1].append((found.read, found.stream))
            if found is sums[-1]:
                carried[-1].append((exit_value, found.root))
            elif self._is_piecewise(found, sums[len(residuals) + 1]):
                raise self._refusal(
                    f"a sublayer of {stretch.name} runs on some of the tokens at a time, one piece after another. How many "
                    "pieces there are depends on the input. Let it run on all tokens at once"
                )
            residuals.append(Residual(tuple(tree), tuple(range(offset, offset + len(own)))))
            parts.extend(own)
            before = found.root
        region = call if stretch.entry is None else replace(call, first=entry_value + 1, last=exit_value + 1)
        norms = self._norms(sums, parts_of, exit_value, region)
        self.edges[entry, exit_place] = (entry_value, exit_value)
        inside = [self.t.pieces[n.where] for n in norms if n.role == "post" and n.where in self.t.pieces]
        residuals = [
            replace(
                r,
                norms_post=tuple(n.where for n in norms if n.role == "post" and n.place == i),
                gates=tuple(dict.fromkeys(gate for way in carried[i] for gate in self._gates(*way, inside))),
            )
            for i, r in enumerate(residuals)
        ]
        roles = {n.role for n in norms}
        placement: Placement = (
            "post"
            if "post" in roles
            else "sandwich"
            if {"before", "after"} <= roles
            else "pre"
            if "before" in roles
            else "output"
            if "after" in roles
            else "none"
        )
        return Block(
            ModuleCall(call.name, call.ordinal),
            stack,
            placement,
            tuple(parts),
            tuple(residuals),
            tuple(norms),
            entry,
            exit_place,
            label=stretch.label,
        )

    def _is_piecewise(self, found: _Sum, following: _Sum) -> bool:
        """Whether two sums that follow each other stand side by side on pieces of one stream."""
        beside = not self._feeds(found.root, following.stream) and self.t.nodes[found.stream].operation in _CUTS
        origins = [self.t.nodes[s.stream] for s in (found, following)]
        return beside and (origins[0].operation, origins[0].inputs) == (origins[1].operation, origins[1].inputs)

    def _entry(self, stretch: _Stretch) -> tuple[Place, int]:
        """Where the stream enters the block, and the value there: the latest of the block's arguments that the stream of the
        first addition is, or carries."""
        call, stream = stretch.call, stretch.sums[0].stream
        if stretch.entry is not None:
            return self._place(stretch.entry, call), stretch.entry
        at = ModuleCall(call.name, call.ordinal)
        for path, index in call.inputs.items():
            if index == stream or self._moved(stream, index):
                return Place(at, "in", path), index
        carried = self._carried(stream, tuple(call.inputs.values()))
        given = [(index, path) for path, index in call.inputs.items() if index in carried]
        if not given:
            raise self._refusal(
                f"the residual stream of {stretch.name} is none of its arguments (it is the result of "
                f"{self.t.nodes[stream].operation}{self._in_hooks(call)})"
            )
        index, path = max(given, key=lambda found: found[0])
        return Place(at, "in", path), index

    def _exit(self, stretch: _Stretch) -> tuple[Place, int]:
        """Where the stream leaves the block, and the value there: preferably one that carries the last addition unchanged, or
        is at least of its size."""
        call, last = stretch.call, stretch.sums[-1]
        if stretch.exit is not None:
            return self._place(stretch.exit, call), stretch.exit
        at, size = ModuleCall(call.name, call.ordinal), self.t.nodes[self._summed(last.root)].size
        places: list[tuple[Place, int]] = [(Place(at, "out", path or ()), i) for path, i in call.outputs.items()]
        places += [(Place(at, "written", path), i) for path, i in call.written.items()]
        reached = [(p, i) for p, i in places if self._feeds(last.root, i)]
        carrying = [(p, i) for p, i in reached if last.root in self._carried(i, (last.root,))]
        alike = [(p, i) for p, i in reached if self.t.nodes[i].size == size]
        for found in (carrying, alike, reached):
            if found:
                return found[0]
        raise self._refusal(f"the output of {stretch.name} does not depend on its last residual addition")

    def _place(self, index: int, around: Call) -> Place:
        """Where a value can be met that is made in, or given to, the code of the module that runs in `around`."""
        for path, given in around.inputs.items():
            if given == index:
                return Place(ModuleCall(around.name, around.ordinal), "in", path)
        # What a module makes is met where it leaves it: hooks may put another value in its place.
        for call in self.t.calls:
            inside = around.first <= call.first and call.index != around.index and call.first <= index < call.last
            if inside and call.outputs.get(None) == index:
                return Place(ModuleCall(call.name, call.ordinal), "out")
        node = self.t.nodes[index]
        made = [
            n.index for n in self.t.nodes if n.ordinal == node.ordinal and self._point(n.index) == self._point(index)
        ]
        if node.operation not in {"batch", "parameter", "constant"}:
            return Place(self._point(index), "out", (made.index(index),) if len(made) > 1 else ())
        for call in self.t.calls:
            for key, given in call.outputs.items():
                if given == index:
                    return Place(ModuleCall(call.name, call.ordinal), "out", key or ())
        raise self._refusal(
            f"the residual stream in {around.name or 'the model itself'} begins with a constant of its own"
        )

    def _in_hooks(self, call: Call) -> str:
        """Names the modules in a block that a user's own forward hook stands on."""
        hooked = [
            c.name
            for c in self.t.calls
            if c.first >= call.first and c.last <= call.last and has_own_hooks(self.model.get_submodule(c.name))
        ]
        if not hooked:
            return ""
        return (
            f"; a forward hook of yours stands on {', '.join(dict.fromkeys(hooked))}, and may change what passes there"
        )

    def _found(self) -> str:
        def places(indices: Iterable[int]) -> str:
            owners = (self.t.calls[self.t.nodes[i].call].name or "the model itself" for i in indices)
            return ", ".join(list(dict.fromkeys(owners))[:4]) or "no module"

        return (
            f"{len(self.attentions)} attention calls (in {places(self.attentions)}) and "
            f"{len(self.sums)} residual additions (in {places(s.root for s in self.sums)})"
        )

    def _layout(self, refused: Layout | None) -> str:
        """A layout to start from; none where it would be the one that was just refused."""
        owners = [self.t.calls[self.t.nodes[i].call].name for i in self.attentions]
        blocks = _block_candidates(self.model, owners)
        return (
            "" if not blocks or (refused is not None and refused.blocks == blocks) else f"uc.Layout(blocks={blocks!r})"
        )

    def _several_streams(self) -> str | None:
        """Where what an attention makes is added to more than one value, or to one of more axes: streams side by side."""
        for product in self.attentions:
            made = self._projection(product)
            sums: set[int] = set()

            def moved_on(index: int, sums: set[int] = sums) -> list[int]:
                consumers = set(self.t.consumers[index])
                added = {i for i in consumers if self.t.nodes[i].operation == "add" and len(self.t.nodes[i].inputs) > 1}
                sums |= added
                return [i for i in consumers - added if self._passes(i) == index]

            for _ in _walked([] if made is None else [made], moved_on):
                pass
            if len(sums) > 1 or any(self.t.nodes[i].size > self.t.nodes[made].size for i in sums if made is not None):
                return self.t.calls[self.t.nodes[product].call].name or "the model itself"
        return None

    def _opaque_attention(self) -> str | None:
        """The name of an attention call of another kind than `scaled_dot_product_attention`, where one was met."""
        fused = [n.operation for n in self.t.nodes if "attention" in n.operation or "attn" in n.operation]
        return next((name for name in fused if name != "scaled_dot_product_attention"), None)

    def _refusal(self, reason: str) -> UnsupportedModel:
        found, layout = self._found(), self._layout(self.layout)
        advice = f"Pass layout={layout}." if layout else "No layout helps here: it would be read in the same way."
        opaque = self._opaque_attention()
        if opaque:
            reason = f"{opaque} is one opaque call, and what it mixes by cannot be seen"
            layout, advice = "", "Load the model with attn_implementation='sdpa' or 'eager'."
        elif (several := self._several_streams()) is not None:
            reason = f"what the attention in {several} makes is added to {SIDE_BY_SIDE} (hyper-connections)"
            layout, advice = (
                "",
                "They are measured where they are one tensor and are mixed by products; no layout helps.",
            )
        return UnsupportedModel(
            f"anatomy: expected a Transformer whose blocks can be told apart, got {type(self.model).__name__}: {reason}. "
            f"Found {found}. {advice}",
            found=found,
            identity=reason,
            layout=layout,
        )


def has_own_hooks(module: nn.Module) -> bool:
    """Whether somebody else's forward hooks stand on a module."""
    return not all(map(is_own, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))


def _block_candidates(model: nn.Module, attention: Iterable[str]) -> tuple[str, ...]:
    """The members of the longest list of like modules, preferably one that holds attention: what a user would call blocks."""
    best: tuple[bool, int, tuple[str, ...]] = (False, 0, ())
    for name, module in model.named_modules():
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in module.children()}) == 1:
            attends = any(f"{owner}.".startswith(f"{child}.") for owner in attention for child in children)
            if (attends, len(children)) > best[:2]:
                best = (attends, len(children), tuple(children))
    return best[2]


def behaves_as_norm(module: nn.Module, shape: tuple[int, ...]) -> Literal["layer", "rms"] | None:
    """`layer` or `rms` if the module normalises its last axis, else `None`: f(16x) = f(256x), not constant, and for `layer`
    f(x + c·1) = f(x). `shape` is an input shape the module met in the traced pass."""
    if not shape or isinstance(module, (nn.Softmax, nn.Identity, nn.Dropout)):
        return None
    if any(p.ndim > 1 for p in module.parameters()):  # a norm's parameters are vectors; spares running every linear map
        return None
    parameter = next(module.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.dtype.is_floating_point else torch.float32
    device = device_of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, *shape[1:]), generator=generator).to(device, dtype)
    y = torch.randn((2, *shape[1:]), generator=generator).to(device, dtype)
    tolerance = 64 * torch.finfo(dtype).eps
    try:
        with torch.no_grad():
            plain, large, other, shifted = (module(v) for v in (16 * x, 256 * x, 16 * y, 16 * x + 16))
    except Exception:  # a module of whatever kind, given one tensor alone: one that does not take it is no norm here
        return None
    if not all(isinstance(v, Tensor) and v.shape == x.shape for v in (plain, large, other, shifted)):
        return None
    scale = float(plain.abs().max()) or 1.0

    def same(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs().max() <= max(tolerance, 1e-3) * scale).item())

    if not same(plain, large) or same(plain, other):
        return None
    if same(plain, plain.sign()):  # a sign-like activation saturates without normalising
        return None
    return "layer" if same(plain, shifted) else "rms"
