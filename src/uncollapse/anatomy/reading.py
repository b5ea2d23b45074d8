"""Read an anatomy off a recorded graph: residual additions first, then parts, norms, projections and blocks.

What each rule says is in `uncollapse.anatomy.vocabulary`; this module is the reading alone. Nothing here is believed until `proof`
has checked it on the live model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Point, device_of
from uncollapse.anatomy.tracing import Call, Trace
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Anatomy,
    AttentionCall,
    Block,
    Layout,
    ModuleCall,
    Norm,
    NormRole,
    Part,
    Placement,
    Residual,
)
from uncollapse.errors import UnsupportedModel


@dataclass
class _Sum:
    """A residual addition as found in the graph: the outermost node, its stream value, its internal additions, leaves."""

    root: int
    stream: int
    nodes: list[int]
    leaves: list[int]
    stream_scales: tuple[float, ...] = ()


def read(model: nn.Module, recorded: Trace, layout: Layout | None = None) -> Anatomy:
    """The picture that the graph shows; not yet proved. Raises `UnsupportedModel` where no blocks can be made out."""
    reader = _Reader(model, recorded)
    blocks = tuple(reader.blocks(layout))
    return Anatomy(blocks, reader.outer_norms(blocks))


class _Reader:
    def __init__(self, model: nn.Module, recorded: Trace) -> None:
        self.model = model
        self.t = recorded
        self.parameters = sum(1 << n.index for n in recorded.nodes if n.operation == "parameter")
        self.attention_of = self._attention_operations()
        self.logits = self._logits()
        self.sums = self._sums()
        self._norm_kinds: dict[str, Literal["layer", "rms"] | None] = {}

    # Attention ----------------------------------------------------------------------------------------------------
    def _attention_operations(self) -> dict[int, int]:
        """Score node (fused call or softmax) → product node (fused call or weights × values)."""
        found: dict[int, int] = {}
        for node in self.t.nodes:
            if node.operation == "scaled_dot_product_attention" and node.is_data:
                found[node.index] = node.index
            elif node.operation in {"softmax", "special_softmax"} and node.is_data:
                product = self._weights_product(node.index)
                if product is not None and self._from_data_product(node.index):
                    found[node.index] = product
        return found

    def _weights_product(self, softmax: int) -> int | None:
        """The data × data product that takes the softmax's output as an operand, through casts, cuts and dropout."""
        frontier = [softmax]
        for _ in range(12):
            following: list[int] = []
            for index in frontier:
                for consumer in self.t.consumers[index]:
                    if self.t.is_data_product(consumer):
                        return consumer
                    if self.t.passes_through(consumer) == index or self.t.nodes[consumer].operation in {
                        "masked_fill",
                        "where",
                        "mul",
                    }:
                        following.append(consumer)
            frontier = following
        return None

    def _from_data_product(self, softmax: int) -> bool:
        frontier, seen = list(self.t.nodes[softmax].inputs), set()
        while frontier:
            index = frontier.pop()
            if index in seen or not self.t.nodes[index].is_data:
                continue
            seen.add(index)
            if self.t.is_data_product(index):
                return True
            if not self.t.is_matrix_product(index):
                frontier.extend(self.t.nodes[index].inputs)
        return False

    def _logits(self) -> set[int]:
        """The values between a product of queries and keys and its softmax: a bias added there is no residual."""
        found: set[int] = set()
        for score, product in self.attention_of.items():
            if product == score:
                continue
            frontier, seen, products = list(self.t.nodes[score].inputs), set(), []
            while frontier:
                index = frontier.pop()
                if index in seen or not self.t.nodes[index].is_data:
                    continue
                seen.add(index)
                if self.t.is_data_product(index):
                    products.append(index)
                elif not self.t.is_matrix_product(index):
                    frontier.extend(self.t.nodes[index].inputs)
            found |= {i for i in seen if any(self.t.depends(i, p) for p in products)}
        return found

    # Residual additions -------------------------------------------------------------------------------------------
    def _is_addition(self, index: int) -> bool:
        node = self.t.nodes[index]
        return node.operation == "add" and sum(self.t.nodes[i].is_data for i in node.inputs) >= 2

    def _carries_tokens(self, index: int, size: int) -> bool:
        """Whether a value can be the stream of a sum of this size. An attention mask is no stream: nothing learned is in it,
        though in later blocks every score depends on it through learned products."""
        node = self.t.nodes[index]
        learned = bool(self.t.ancestors[index] & self.parameters) or node.operation == "batch"
        return node.is_floating and node.size == size and learned

    def _stream_value(self, operand: int, update: int, size: int) -> int | None:
        """The first value behind `operand`, through additions, casts and scalings, that `update` is learned from."""
        frontier = [operand]
        while frontier:
            index = frontier.pop(0)
            if self.t.learned(update, index) and self._carries_tokens(index, size):
                return index
            if self._is_addition(index):
                frontier.extend(i for i in self.t.nodes[index].inputs if self.t.nodes[i].is_data)
            else:
                passed = self.t.passes_through(index)
                if passed is not None:
                    frontier.append(passed)
        return None

    def _sums(self) -> list[_Sum]:
        candidates: list[tuple[int, int, int, int]] = []  # node, stream value, stream operand, update operand
        for node in self.t.nodes:
            if not self._is_addition(node.index) or node.index in self.logits:
                continue
            first, second = node.inputs[0], node.inputs[1]
            for stream, update in ((first, second), (second, first)):
                value = self._stream_value(stream, update, node.size)
                if value is not None:
                    candidates.append((node.index, value, stream, update))
                    break
        roots: list[_Sum] = []
        for index, value, _, _ in candidates:
            internal, leaves, scales = self._tree(index, value)
            roots.append(_Sum(index, value, internal, leaves, scales))
        roots = [s for s in roots if s.leaves.count(s.stream) == 1]  # twice: a skip around whole blocks
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

    def _scores_of(self, found: _Sum) -> set[int]:
        return {s for leaf in found.leaves if leaf != found.stream for s in self._scores_inside(leaf, found.stream)}

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

    def _tree(self, root: int, stream: int) -> tuple[list[int], list[int], tuple[float, ...]]:
        """The additions under `root` down to the stream value and the summands; innermost first, `root` last."""
        internal: list[int] = []
        leaves: list[int] = []
        scales: list[float] = []
        frontier: list[tuple[int, list[float], bool]] = [(root, [], False)]  # node, factors around it, operands done
        while frontier:  # no recursive closure: it would be a cycle that keeps the model alive
            index, behind, is_done = frontier.pop()
            passed = None if index == stream else self.t.passes_through(index)
            if is_done:
                internal.append(index)
            elif index == stream:
                leaves.append(index)
                scales.extend(behind)
            elif self._is_addition(index) and self.t.depends(index, stream):
                frontier.append((index, behind, True))
                frontier.extend((operand, behind, False) for operand in reversed(self.t.nodes[index].inputs[:2]))
            elif passed is not None and (passed == stream or self._leads_to_addition(passed, stream)):
                node = self.t.nodes[index]
                factors = list(node.scalars) if node.operation == "mul" else []
                frontier.append((passed, behind + factors, False))
            else:
                leaves.append(index)
        return internal, leaves, tuple(scales)

    def _leads_to_addition(self, index: int, stream: int) -> bool:
        while True:
            if index == stream or (self._is_addition(index) and self.t.depends(index, stream)):
                return True
            passed = self.t.passes_through(index)
            if passed is None:
                return False
            index = passed

    # Parts --------------------------------------------------------------------------------------------------------
    def _scores_inside(self, leaf: int, stream: int) -> list[int]:
        return [
            score
            for score, product in self.attention_of.items()
            if (self.t.depends(leaf, product) or leaf == product) and self.t.depends(product, stream)
        ]

    def _group(self, found: _Sum) -> tuple[list[Part], list[AdditionNode]]:
        """The parts of a residual addition and its tree, nested additions within one part folded away."""
        summands = [leaf for leaf in found.leaves if leaf != found.stream]
        inside = {leaf: self._scores_inside(leaf, found.stream) for leaf in summands}
        attending = [leaf for leaf in summands if inside[leaf]]
        rest = [leaf for leaf in summands if not inside[leaf]]
        parts: list[Part] = []
        part_of: dict[int, int] = {found.stream: STREAM}
        if attending:
            scores = list(dict.fromkeys(s for leaf in attending for s in inside[leaf]))
            calls = tuple(self._attention_call(s) for s in scores)
            crossing = all(not self.t.depends(self._value_node(s), found.stream) for s in scores)
            name = self.t.calls[self.t.nodes[scores[0]].call].name
            parts.append(Part("cross" if crossing else "attention", calls, name))
            part_of |= dict.fromkeys(attending, 0)
        if rest:
            parts.append(self._mlp(rest[0], found))
            part_of |= dict.fromkeys(rest, len(parts) - 1)
        tree: list[AdditionNode] = []
        for index in found.nodes:
            first, second = (self._under(i, found, part_of) for i in self.t.nodes[index].inputs[:2])
            if len(first | second) > 1:  # an addition within one part belongs to that part
                tree.append(AdditionNode(self._point(index), first, second))
        return parts, tree

    def _under(self, index: int, found: _Sum, part_of: Mapping[int, int]) -> frozenset[int]:
        """The leaves of a residual addition under one of its nodes: part numbers, or `STREAM`."""
        if index in part_of:
            return frozenset({part_of[index]})
        if index in found.nodes:
            first, second = self.t.nodes[index].inputs[:2]
            return self._under(first, found, part_of) | self._under(second, found, part_of)
        passed = self.t.passes_through(index)
        return self._under(passed, found, part_of) if passed is not None else frozenset()

    def _point(self, index: int) -> Point:
        node = self.t.nodes[index]
        call = self.t.calls[node.call]
        return Point(call.name, call.ordinal, node.counted, node.ordinal)

    def _mlp(self, leaf: int, found: _Sum) -> Part:
        """The part whose summand is `leaf`: named after the outermost module that makes its last learned product and holds
        none of the residual additions."""
        learned = [n.index for n in self.t.nodes if self.t.is_learned_product(n.index) and self._feeds(n.index, leaf)]
        inside = [i for i in learned if self.t.depends(i, found.stream)]
        if not inside:
            return Part("mlp", (), self.t.calls[self.t.nodes[leaf].call].name)
        name = ""
        for index in self.t.call_path(self.t.nodes[inside[-1]].call):
            call = self.t.calls[index]
            if call.first <= found.root < call.last or not call.name:
                break
            name = call.name
        reads, writes = self._leaf_call(inside[0]), self._leaf_call(inside[-1])
        if reads == writes:  # experts behind a router, in one fused product: no hidden layer to be met
            reads = writes = None
        return Part("mlp", (), name, reads=reads, writes=writes)

    def _leaf_call(self, learned: int) -> ModuleCall | None:
        """The run of the module made for a learned product: one without children of its own."""
        call = self.t.calls[self.t.nodes[learned].call]
        return ModuleCall(call.name, call.ordinal) if call.name and not call.children else None

    def _feeds(self, index: int, leaf: int) -> bool:
        return index == leaf or self.t.depends(leaf, index)

    def _value_node(self, score: int) -> int:
        product = self.attention_of[score]
        node = self.t.nodes[product]
        data = [i for i in node.inputs if self.t.nodes[i].is_data]
        if product == score:
            return node.inputs[2]
        return next(i for i in data if not (self.t.depends(i, score) or i == score))

    def _attention_call(self, score: int) -> AttentionCall:
        product = self.attention_of[score]
        node = self.t.nodes[product]
        value = self._value_node(score)
        weights_shape = self.t.nodes[score].shape if product != score else self.t.nodes[node.inputs[0]].shape
        batch = next((n.shape[0] for n in self.t.nodes if n.operation == "batch" and n.shape), 1)
        if len(weights_shape) >= 4:
            heads = weights_shape[-3]
        elif len(weights_shape) == 3:
            heads = max(1, weights_shape[0] // batch)
        else:
            heads = 1
        head_width = self.t.nodes[value].shape[-1]
        projection = self._projection(product)
        place = None if projection is None else self._projection_place(projection, score, heads * head_width)
        similarity, query, key = self._similarity(score)
        compared = () if similarity is None else self.t.nodes[similarity].inputs
        return AttentionCall(
            score=self._point(score),
            product=self._point(product),
            value_operand=node.inputs.index(value),
            heads=heads,
            key_value_heads=max(1, self._key_value_heads(value, heads)),
            head_width=head_width,
            projection=place,
            masking=self._masking(score),
            value_bias=any(map(self._has_bias, self._learned_behind(value))),
            output_bias=projection is not None and any(map(self._has_bias, self._products_of(place, projection))),
            queries=self._learned_place(query, score),
            keys=self._learned_place(key, score),
            values=self._learned_place(value, score),
            similarity=None if similarity is None else self._point(similarity),
            query_operand=compared.index(query) if query in compared else 0,
            key_operand=compared.index(key) if key in compared else 1,
        )

    def _similarity(self, score: int) -> tuple[int | None, int | None, int | None]:
        """The product of queries with keys and its two operands; nothing where several products are summed before the softmax."""
        if self.attention_of[score] == score:
            return score, self.t.nodes[score].inputs[0], self.t.nodes[score].inputs[1]
        found, frontier, seen = [], list(self.t.nodes[score].inputs), set()
        while frontier:
            index = frontier.pop()
            if index in seen or not self.t.nodes[index].is_data:
                continue
            seen.add(index)
            if self.t.is_data_product(index):
                found.append(index)
            elif not self.t.is_matrix_product(index):
                frontier.extend(self.t.nodes[index].inputs)
        if len(found) != 1:
            return None, None, None
        data = [i for i in self.t.nodes[found[0]].inputs if self.t.nodes[i].is_data]
        return found[0], data[-2], data[-1]  # `baddbmm` takes what it adds first

    def _learned_place(self, operand: int | None, score: int) -> ModuleCall | Point | None:
        """Where the one learned product behind an operand of the attention is made: the run of a module that returns just
        that, or a point. None where several make the operand, or none."""
        learned = [] if operand is None else self._learned_behind(operand)
        if len(learned) != 1:
            return None
        call = self.t.calls[self.t.nodes[learned[0]].call]
        result = call.outputs.get(None)
        if call.name and not call.first <= score < call.last and result is not None and self._moved(result, learned[0]):
            return ModuleCall(call.name, call.ordinal)
        return self._point(learned[0])

    def _masking(self, score: int) -> tuple[Point, ...]:
        """The additions and replacements between the product of queries with keys and a softmax of the model's own."""
        found, frontier, seen = [], list(self.t.nodes[score].inputs), set()
        while frontier:
            index = frontier.pop()
            if index in seen or not self.t.nodes[index].is_data or self.t.is_matrix_product(index):
                continue
            seen.add(index)
            if self.t.nodes[index].operation in {"add", "masked_fill", "where"} and self._from_data_product(index):
                found.append(self._point(index))
            frontier.extend(self.t.nodes[index].inputs)
        return () if self.t.nodes[score].operation == "scaled_dot_product_attention" else tuple(found)

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
        found, frontier, seen = [], [value], set()
        while frontier:
            index = frontier.pop()
            if index in seen or not self.t.nodes[index].is_data:
                continue
            seen.add(index)
            if self.t.is_learned_product(index):
                found.append(index)
            else:
                frontier.extend(self.t.nodes[index].inputs)
        return found

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
        frontier, seen = [product], set()
        while frontier:
            index = frontier.pop(0)
            for consumer in self.t.consumers[index]:
                if consumer in seen:
                    continue
                seen.add(consumer)
                if self.t.is_learned_product(consumer):
                    return consumer
                frontier.append(consumer)
        return None

    def _projection_place(self, projection: int, score: int, mixed: int) -> ModuleCall | Point | None:
        """The run of the module that is the output projection, or the point of a product in the attention's own code."""
        call = self.t.calls[self.t.nodes[projection].call]
        data = [i for i in self.t.nodes[projection].inputs if self.t.nodes[i].is_data]
        while self._wraps(call.parent, data[0], score):  # an adapter around the layer is part of the projection
            call = self.t.calls[call.parent]
        if call.first <= score < call.last:
            return self._point(projection) if self.t.nodes[data[0]].shape[-1] == mixed else None
        inputs = [self.t.nodes[i].shape for i in call.inputs.values()]
        if call.name and any(shape and shape[-1] == mixed for shape in inputs):
            return ModuleCall(call.name, call.ordinal)
        return None

    def _wraps(self, index: int, given: int, score: int) -> bool:
        """Whether a call takes just the value `given` and does to it nothing but learned maps: no attention, no residual
        addition, no norm."""
        call = self.t.calls[index]
        if index <= 0 or list(call.inputs.values()) != [given] or call.first <= score < call.last:
            return False
        if any(call.first <= s.root < call.last for s in self.sums):
            return False
        inside = [c for c in self.t.calls if index in self.t.call_path(c.index)]
        return all(self.norm_kind(c) is None for c in inside)

    # Norms --------------------------------------------------------------------------------------------------------
    def norm_kind(self, call: Call) -> Literal["layer", "rms"] | None:
        """Whether the module behaves as a norm on the shape it met: told once a module, by what it does."""
        if call.children or not call.inputs or None not in call.outputs:
            return None
        if call.name not in self._norm_kinds:
            shape = self.t.nodes[next(iter(call.inputs.values()))].shape
            self._norm_kinds[call.name] = behaves_as_norm(self.model.get_submodule(call.name), shape)
        return self._norm_kinds[call.name]

    def outer_norms(self, blocks: tuple[Block, ...]) -> tuple[ModuleCall, ...]:
        """The norm calls that happen in no block."""
        inside = {(b.module.name, b.module.call) for b in blocks}
        found = []
        for call in self.t.calls:
            around = {(self.t.calls[i].name, self.t.calls[i].ordinal) for i in self.t.call_path(call.index)}
            if not around & inside and self.norm_kind(call) is not None:
                found.append(ModuleCall(call.name, call.ordinal))
        return tuple(found)

    def _norms(self, block: Call, sums: list[_Sum], parts_of: list[list[int]], stream_out: int) -> list[Norm]:
        calls = [c for c in self.t.calls if block.first <= c.first and c.last <= block.last and c.index != block.index]
        norms: list[Norm] = []
        for call in calls:
            kind = self.norm_kind(call)
            if kind is None:
                continue
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            module = ModuleCall(call.name, call.ordinal)
            role_part = self._norm_role(source, result, sums, parts_of, stream_out)
            if role_part is not None:
                norms.append(Norm(module, kind, *role_part))
        return norms

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
                if not on_path or not (self.t.depends(source, found.stream) or source == found.stream):
                    continue
                if not self.t.learned(leaf, result):
                    return "after", part
                if not self.t.learned(source, found.stream):
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
            passed = self.t.passes_through(index)
            if passed is None:
                return False
            index = passed
        return True

    # Blocks -------------------------------------------------------------------------------------------------------
    def _block_calls(self, layout: Layout | None) -> list[Call]:
        if layout is not None:
            calls = [c for c in self.t.calls if c.name in set(layout.blocks)]
            missing = [n for n in layout.blocks if n not in {c.name for c in calls}]
            if missing:
                start = self._layout()
                raise UnsupportedModel(
                    f"anatomy: expected the Layout's blocks among the modules that run, got no run of {missing[0]!r} in "
                    f"{type(self.model).__name__}. Look at model.named_modules() for the names, or start from {start}.",
                    found=self._found(),
                    identity=f"the Layout's block {missing[0]!r} runs",
                    layout=start,
                )
            return calls
        holds = {c.index: [s for s in self.sums if c.first <= s.root < c.last] for c in self.t.calls}
        attends = {
            index: [s for s in held if any(p.kind == "attention" for p in self._group(s)[0])]
            for index, held in holds.items()
        }
        chosen: list[int] = []
        for found in self.sums:
            if not any(p.kind == "attention" for p in self._group(found)[0]):
                continue
            path = self.t.call_path(self.t.nodes[found.root].call)
            outermost = path[0]
            members: list[int] = []
            for index in path:
                if len(attends[index]) > 1:
                    break
                outermost = index
                if self._is_member(index, holds):
                    members.append(index)
            scores = [
                s for leaf in found.leaves if leaf != found.stream for s in self._scores_inside(leaf, found.stream)
            ]
            chosen.append(self._deepest(members[-1] if members else outermost, holds, scores))
        chosen = list(dict.fromkeys(chosen))
        chosen = [c for c in chosen if not any(c != other and self._within(other, c) for other in chosen)]
        lists = {self.t.calls[i].name.rpartition(".")[0] for i in chosen if self._is_listed(self.t.calls[i].name)}
        for call in self.t.calls:  # blocks without attention between blocks with it: hybrids
            covered = any(self._within(call.index, c) or self._within(c, call.index) for c in chosen)
            if call.name and call.name.rpartition(".")[0] in lists and holds[call.index] and not covered:
                chosen.append(call.index)
        return [self.t.calls[i] for i in sorted(chosen, key=lambda i: self.t.calls[i].first) if i]

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
                and all(
                    self.t.calls[c].first <= s < self.t.calls[c].last
                    for s in scores
                    if self.t.calls[index].first <= s < self.t.calls[index].last
                )
            ]
            if not inside:
                return index
            index = inside[0]

    def blocks(self, layout: Layout | None) -> list[Block]:
        calls = self._block_calls(layout)
        if not calls:
            raise self._refusal("no module call that holds one self-attention and its residual addition")
        names = [c.name for c in calls]
        stacks: list[Literal["encoder", "decoder"] | None] = [None] * len(calls)
        if layout is not None and layout.stacks:
            by_name = dict(zip(layout.blocks, layout.stacks, strict=True))
            stacks = [by_name[n] for n in names]
        blocks = [self._block(c, s) for c, s in zip(calls, stacks, strict=True)]
        if layout is None:
            self._require_every_attention(blocks)
        if layout is None or not layout.stacks:
            blocks = self._with_stacks(blocks, calls)
        return blocks

    def _require_every_attention(self, blocks: list[Block]) -> None:
        """Refuse a picture that leaves out a block: attention inside a module of a class that is a block elsewhere, or, of a
        kind that blocks have, inside a member of a list. A pooling head's may stand outside the blocks."""
        inside = {c.score for b in blocks for p in b.parts for c in p.attention}
        kinds = {type(self.model.get_submodule(point.owner)) for point in inside}
        classes = {type(self.model.get_submodule(b.module.name)) for b in blocks}
        for score in self.attention_of:
            point = self._point(score)
            if point in inside:
                continue
            names = [self.t.calls[i].name for i in self.t.call_path(self.t.nodes[score].call) if self.t.calls[i].name]
            of_a_kind = type(self.model.get_submodule(point.owner)) in kinds and any(map(self._is_listed, names))
            if of_a_kind or any(type(self.model.get_submodule(n)) in classes for n in names):
                raise self._refusal(
                    f"the attention in {point.owner or 'the model itself'} belongs to no block that was found"
                )

    def _is_listed(self, name: str) -> bool:
        """Whether the module stands in a list with others."""
        around = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(around, (nn.ModuleList, nn.Sequential)) and len(around) > 1

    def _with_stacks(self, blocks: list[Block], calls: list[Call]) -> list[Block]:
        """Encoder and decoder, told by cross-attention: a parent whose blocks cross is a decoder, what it reads an encoder."""
        crossing = {c.parent for b, c in zip(blocks, calls, strict=True) if any(p.kind == "cross" for p in b.parts)}
        if not crossing:
            return blocks
        return [
            replace(b, stack="decoder" if c.parent in crossing else "encoder")
            for b, c in zip(blocks, calls, strict=True)
        ]

    def _block(self, call: Call, stack: Literal["encoder", "decoder"] | None) -> Block:
        sums = [s for s in self.sums if call.first <= s.root < call.last]
        if not sums:
            raise self._refusal(f"no residual addition inside {call.name}")
        if call.outputs == {}:
            raise self._refusal(f"no tensor among the outputs of {call.name}")
        parts: list[Part] = []
        residuals: list[Residual] = []
        parts_of: list[list[int]] = []
        for found in sums:
            own, tree = self._group(found)
            offset = len(parts)
            numbers = {STREAM: STREAM} | {i: i + offset for i in range(len(own))}
            tree = [
                AdditionNode(n.point, frozenset(numbers[i] for i in n.first), frozenset(numbers[i] for i in n.second))
                for n in tree
            ]
            summands = [leaf for leaf in found.leaves if leaf != found.stream]
            attending = bool(own) and own[0].kind in {"attention", "cross"}
            parts_of.append(
                [
                    offset if not attending or self._scores_inside(leaf, found.stream) else offset + 1
                    for leaf in summands
                ]
            )
            residuals.append(Residual(tuple(tree), tuple(range(offset, offset + len(own))), found.stream_scales))
            parts.extend(own)
        stream_input = self._entry(call, sums[0])
        stream_output = self._exit(call, sums[-1])
        norms = self._norms(call, sums, parts_of, call.outputs[stream_output])
        residuals = [
            replace(r, norms_post=tuple(n.module for n in norms if n.role == "post" and n.place == i))
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
            stream_input,
            stream_output,
            _token_axis(self.t.nodes[call.outputs[stream_output]].shape),
        )

    def _entry(self, call: Call, first: _Sum) -> int | str:
        """Which argument of the block is the stream."""
        for key, index in call.inputs.items():
            if index == first.stream or self._moved(first.stream, index):
                return key
        raise self._refusal(
            f"the residual stream of {call.name} is none of its arguments "
            f"(it is the result of {self.t.nodes[first.stream].operation})"
        )

    def _exit(self, call: Call, last: _Sum) -> int | None:
        for key, index in call.outputs.items():
            if index == last.root or self.t.depends(index, last.root):
                return key
        raise self._refusal(f"the output of {call.name} does not depend on its last residual addition")

    def _found(self) -> str:
        def places(indices: Iterable[int]) -> str:
            owners = (self.t.calls[self.t.nodes[i].call].name or "the model itself" for i in indices)
            return ", ".join(list(dict.fromkeys(owners))[:4]) or "no module"

        return (
            f"{len(self.attention_of)} attention calls (in {places(self.attention_of)}) and "
            f"{len(self.sums)} residual additions (in {places(s.root for s in self.sums)})"
        )

    def _layout(self) -> str:
        owners = [self.t.calls[self.t.nodes[i].call].name for i in self.attention_of]
        return f"uc.Layout(blocks={_block_candidates(self.model, owners)!r})"

    def _refusal(self, reason: str) -> UnsupportedModel:
        found, layout = self._found(), self._layout()
        return UnsupportedModel(
            f"anatomy: expected a Transformer whose blocks can be told apart, got {type(self.model).__name__}: {reason}. "
            f"Found {found}. Pass layout={layout}.",
            found=found,
            identity=reason,
            layout=layout,
        )


def _token_axis(shape: tuple[int, ...]) -> int | None:
    """Where the tokens of the one traced sequence are: axis 1, axis 0 in token-first models, None laid end to end."""
    if len(shape) == 2:
        return None
    return 0 if len(shape) == 3 and shape[1] == 1 and shape[0] > 1 else 1


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
    except Exception:
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
