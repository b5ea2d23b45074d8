"""What a residual addition adds: attention with its gates, or an MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from uncollapse.anatomy.attention_graph import has_other_data, serves_weights
from uncollapse.anatomy.norm_reading import pieces_between
from uncollapse.anatomy.reading_refusals import Refusals
from uncollapse.anatomy.reading_sums import Sum
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Gate,
    ModuleCall,
    Part,
    Place,
)

_GATINGS = frozenset(["mul", "rmul", "multiply"])
_FACTORS = frozenset(["mul", "rmul", "multiply", "div", "truediv", "true_divide", "neg"])
_CASTS = frozenset(["to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "dropout"])


class Parts(Refusals):
    """The parts that each addition adds."""

    def _group(self, found: Sum) -> tuple[list[Part], list[AdditionNode]]:
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

    def _read_place(self, found: Sum) -> Place | None:
        """Where that is made which a sublayer reads of several streams."""
        return None if found.read is None else self._place(found.read, self.t.calls[0])

    def _under(self, index: int, found: Sum, part_of: Mapping[int, int]) -> frozenset[int]:
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

    def _mlp(self, leaf: int, found: Sum) -> Part:
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

    def _value_node(self, product: int) -> int:
        return self.attentions[product].values
