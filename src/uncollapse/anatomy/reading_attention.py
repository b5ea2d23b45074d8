"""Attention calls in a recorded graph: what mixes values, from which logits, behind which masks, into which projection."""

from __future__ import annotations

from uncollapse.anatomy.attention_graph import MixingProduct, making
from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.reading_norms import Norms
from uncollapse.anatomy.reading_sums import walked
from uncollapse.anatomy.vocabulary import (
    AttentionCall,
    MaskingStep,
    ModuleCall,
)


class Attentions(Norms):
    """The attention calls, each with what its product, logits and projection are."""

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
        behind = walked(self._data([value]), lambda i: () if learned(i) else self._data(self.t.nodes[i].inputs))
        return list(filter(learned, behind))

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
        ahead = walked([product], lambda i: self.t.consumers[i], nearest_first=True)
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
