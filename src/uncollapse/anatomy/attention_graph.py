"""Attention on a recorded graph: which product mixes values, by what, and what stands between its logits and its weights.

A product of data with data is an attention when one of its operands, the *weights* A, is made from another product of data
with data (queries and keys) by something other than a matrix product, and the other operand, the *values* V, is not. What happens
to the logits on their way (a softmax, written out or called, a sigmoid, masks before and after it, renormalisation, a sink's
column) makes no difference to that: the operand that meets the values is what mixes them. A fused call is one such product.
Heads may also be mixed with each other on that way, by a learned map before the softmax, behind it, or both.

The graph only proposes. Whether the contracted axis is that of the tokens, which slices are heads and which sequences, and
whether rows sum to one is found on the live model (`proof`, and in each measured pass).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from uncollapse.anatomy.masking import BY_RESULT
from uncollapse.anatomy.operands import FUSED
from uncollapse.anatomy.torch_calls import PASSES
from uncollapse.anatomy.tracing import Trace

MASKING = frozenset(["add", "sub", "masked_fill", "where", "mul", "setitem"])
_CHOICES = frozenset(["getitem", "index_select", "gather", "index", "take", "chunk", "split", "unbind"])
_ADDING = frozenset(["baddbmm", "addmm"])
_JOINS = frozenset(["cat", "concat", "concatenate"])
_JOINING = frozenset(["add", "sub", "masked_fill", "where", "setitem"])
_SOFTMAXES = frozenset(["softmax", "special_softmax", "log_softmax"])
_EXPONENTIALS = frozenset(["exp", "exp2"])
# These take the shape of a tensor, and nothing of what it holds.
_SHAPED_LIKE = frozenset(["full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"])


@dataclass(frozen=True)
class MixingProduct:
    """One attention product, by node numbers. `score` is the node whose operand `logits` are the logits: the softmax, the
    exponential of a softmax that is written out, the fused call itself; None where weights are made in another way or by
    several. `similarity` are the products of queries with keys. `between` are the nodes from those to the weights, in order;
    `masking` those among them that may forbid a pair, with the number of the operand that would forbid it."""

    product: int
    weights: int | None
    values: int
    score: int | None
    logits: int | None
    similarity: tuple[int, ...]
    between: tuple[int, ...] = ()
    masking: tuple[tuple[int, int], ...] = ()

    @property
    def is_fused(self) -> bool:
        return self.weights is None


def mixing_products(t: Trace) -> dict[int, MixingProduct]:
    """Every attention product of the graph, by its node number, in the order in which they ran."""
    found: dict[int, MixingProduct] = {}
    for node in t.nodes:
        if node.operation == FUSED and node.is_data and len(node.inputs) >= 3:
            found[node.index] = MixingProduct(node.index, None, node.inputs[2], node.index, None, (node.index,))
        elif t.is_data_product(node.index) and not node.operation.startswith("conv"):
            product = _mixing(t, node.index, found)
            if product is not None:
                found[node.index] = product
    return found


def _mixing(t: Trace, product: int, known: Collection[int]) -> MixingProduct | None:
    operands = [i for i in t.nodes[product].inputs if t.nodes[i].is_data][-2:]
    if len(operands) < 2 or operands[0] == operands[1] or any(_is_chosen_weight(t, i) for i in operands):
        return None
    made = [_similarities(t, operand) for operand in operands]
    if not made[0] and not made[1]:
        made = [_similarities_behind_maps(t, operand, known) for operand in operands]
    if bool(made[0]) == bool(made[1]):
        if not made[0]:
            return None
        peaked = [
            any(t.nodes[i].operation in _SOFTMAXES | _EXPONENTIALS for i in _way(t, o, m))
            for o, m in zip(operands, made, strict=True)
        ]
        if peaked[0] == peaked[1]:
            return None
        made = [m if p else [] for m, p in zip(made, peaked, strict=True)]
    weights, values = operands if made[0] else operands[::-1]
    similarity = tuple(made[0] or made[1])
    between = _way(t, weights, similarity)
    score = _score(t, between)
    return MixingProduct(
        product,
        weights,
        values,
        score,
        None if score is None else _logits(t, score, similarity),
        similarity,
        between,
        _masking(t, between, similarity),
    )


def behind(t: Trace, starts: Iterable[int], goes_on: Callable[[int], bool]) -> set[int]:
    """The data values reached from `starts` by walking back, these included; behind a value for which `goes_on` is False the walk
    does not go."""
    frontier, seen = list(starts), set()
    while frontier:
        index = frontier.pop()
        if index in seen or not t.nodes[index].is_data:
            continue
        seen.add(index)
        if goes_on(index):
            frontier.extend(t.nodes[index].inputs)
    return seen


def _similarities(t: Trace, operand: int) -> list[int]:
    """The products of data with data behind an operand, with no matrix product between; the first found on each way back."""
    reached = behind(t, [operand], lambda i: not t.is_matrix_product(i) and t.nodes[i].operation != FUSED)
    products = sorted(i for i in reached if t.is_data_product(i))
    return [p for p in products if not _has_chosen_weight(t, p)]


def _has_chosen_weight(t: Trace, product: int) -> bool:
    """Whether one of the values that a product multiplies is a weight that the data chose. What `baddbmm` adds is none of them."""
    node = t.nodes[product]
    return any(_is_chosen_weight(t, i) for i in node.inputs[node.operation in _ADDING :])


def _similarities_behind_maps(t: Trace, operand: int, known: Collection[int]) -> list[int]:
    """The same behind a learned map of heads on the one side of a softmax, or on both; attention products already `known` are
    none, since what they mixed only came here through the stream."""
    found: set[int] = set()
    frontier, seen = [(operand, False, False)], set[tuple[int, bool, bool]]()
    while frontier:
        index, is_mapped, is_peaked = frontier.pop()
        node = t.nodes[index]
        if (index, is_mapped, is_peaked) in seen or not node.is_data or node.operation == FUSED or index in known:
            continue
        seen.add((index, is_mapped, is_peaked))
        if t.is_data_product(index):
            if is_peaked and not _has_chosen_weight(t, index):
                found.add(index)
            continue
        if t.is_matrix_product(index):
            if is_mapped:
                continue
            is_mapped = True
        elif not is_peaked and node.operation in _SOFTMAXES | _EXPONENTIALS:
            is_mapped, is_peaked = False, True
        frontier.extend((i, is_mapped, is_peaked) for i in node.inputs)
    return sorted(found)


def _is_chosen_weight(t: Trace, index: int) -> bool:
    """Whether a value is a weight that the data only chose, such as an expert's by its router: its numbers are parameters'."""
    node = t.nodes[index]
    if node.is_parameter or node.operation == "parameter":
        return True
    floating = [i for i in node.inputs if t.nodes[i].is_floating]
    moves = t.passes_through(index) is not None or node.operation in _CHOICES
    return moves and bool(floating) and node.operation != "embedding" and all(_is_chosen_weight(t, i) for i in floating)


def _way(t: Trace, operand: int, similarity: Iterable[int]) -> tuple[int, ...]:
    """The values between the products `similarity` and `operand`, this one included, in the order in which they were made."""
    products = set(similarity)
    reached = behind(t, [operand], lambda i: i not in products and not t.is_data_product(i))
    return tuple(sorted(i for i in reached if i not in products and any(t.depends(i, p) for p in products)))


def _score(t: Trace, between: Iterable[int]) -> int | None:
    named = [i for i in between if t.nodes[i].operation in _SOFTMAXES]
    if len(named) == 1:
        return named[0]
    raised = [i for i in between if t.nodes[i].operation in _EXPONENTIALS]
    return raised[0] if len(raised) == 1 and not named else None


def _logits(t: Trace, score: int, similarity: Iterable[int]) -> int:
    """The operand of the softmax or the exponential; what stood there before the row's maximum was subtracted, if it was."""
    given = next(i for i in t.nodes[score].inputs if any(t.depends(i, p) or i == p for p in similarity))
    node = t.nodes[given]
    if node.operation == "sub" and len(node.inputs) == 2:
        first, second = node.inputs
        if t.depends(second, first) and t.nodes[second].size < t.nodes[first].size:
            return first
    return given


def has_other_data(t: Trace, values: int, stream: int) -> bool:
    """Whether the values of a product are those of its own stream joined with others, learned from what the model was given as
    well, but not by way of this stream. A column of zeros comes by that way, and virtual tokens were not given."""
    given = sum(1 << node.index for node in t.nodes if node.operation == "batch")
    frontier, seen = [values], set[int]()
    while frontier:
        index = frontier.pop()
        node = t.nodes[index]
        if index in seen:
            continue
        seen.add(index)
        others = [i for i in node.inputs if not t.depends(i, stream)] if node.operation in _JOINS else []
        if len(others) < len(node.inputs) and any(t.is_learned_from(i) and t.ancestors[i] & given for i in others):
            return True
        if node.operation in PASSES:
            frontier.extend(node.inputs)
    return False


def serves_weights(
    t: Trace, product: int, products: Mapping[int, MixingProduct], stream: int, targets: Collection[int]
) -> bool:
    """Whether what a product mixes reaches the `targets` through the weights of others alone: it takes part in choosing whom these
    attend to, and mixes nothing that is added. `stream`: where the way back ends."""
    crossed: set[int] = set()
    frontier = list(targets)
    while frontier:
        met = behind(t, frontier, lambda i: i not in products and i != stream) & products.keys()
        if product in met:
            return False
        frontier = [products[i].values for i in met - crossed]
        crossed |= met
    return True


def making(t: Trace, operand: int) -> tuple[int, ...]:
    """How an operand of the logits came to hold a mask beside a bias, if it does: the values, in order, that an addition, a filling
    or a choice made on the way to it, and those that were made of these."""
    reached, frontier = set[int](), [operand]
    while frontier:
        index = frontier.pop()
        if index not in reached and t.nodes[index].inputs and not t.is_matrix_product(index):
            reached.add(index)
            frontier.extend(t.nodes[index].inputs)
    found: set[int] = set()
    for index in sorted(reached):
        node = t.nodes[index]
        if node.is_floating and (node.operation in _JOINING or any(i in found for i in node.inputs)):
            found.add(index)
    return tuple(sorted(found))


def _masking(t: Trace, between: Iterable[int], similarity: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The nodes that may forbid a pair: they take the logits or weights, and something that nothing learned has made."""
    products = set(similarity)

    def of_them(index: int) -> bool:
        return index in products or any(t.depends(index, p) for p in products)

    # A product that adds something to its logits adds its first operand: nn.MultiheadAttention's mask.
    found = [
        (p, 0)
        for p in sorted(products)
        if t.nodes[p].operation in _ADDING and not t.is_learned_from(t.nodes[p].inputs[0])
    ]
    for index in between:
        node = t.nodes[index]
        if node.operation in BY_RESULT:
            own = [
                number
                for number, i in enumerate(node.inputs)
                if t.nodes[i].shape == node.shape and of_them(i) and t.nodes[i].operation not in _SHAPED_LIKE
            ]
            if len(own) == 1 and not any(t.is_learned_from(i) for i in node.inputs if not of_them(i)):
                found.append((index, own[0]))
        if node.operation not in MASKING:
            continue
        for number, operand in enumerate(node.inputs):
            if not of_them(operand) and not t.is_learned_from(operand):
                found.append((index, number))
                break
    return tuple(found)
