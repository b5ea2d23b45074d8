"""Find norms on a recorded graph by what they do, whether a module, a function or a few lines of the model's own.

A norm is a piece f of the graph, from one value to another of its shape, through which everything on its way passes, with
f(16x) = f(256x), not constant, odd but for a shift: f(x) + f(-x) is the same for all x (a softmax, a GELU behind a norm are
not), and not of one size everywhere as a sign is. It is `layer` if f(x + c) = f(x) too, else `rms`. The scale and the shift
behind it belong to it, also where they come from a condition (adaptive norms), as long as they are the same for all tokens of
a sequence. All this is asked in float64 on random inputs, never on what the pass happened to hold.

When not to use this: between values that a matrix product separates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uncollapse.anatomy.replaying import NotReplayable, between, rehearsed
from uncollapse.anatomy.torch_calls import PASSES
from uncollapse.anatomy.tracing import Reference, Trace

Kind = Literal["layer", "rms"]

# An operation with one operand of the path that moves, scales or shifts it: no norm begins or ends with it.
_STEPS = frozenset(
    ["mul", "rmul", "div", "truediv", "true_divide", "multiply", "neg", "add", "sub", "subtract", "addcmul"]
)
_MOVES = PASSES | {
    "roll",
    "pad",
    "gather",
    "index_select",
    "unbind",
    "chunk",
    "split",
    "repeat",
    "stack",
    "flip",
    "unfold",
}
_MOST_CUTS = 24  # so many values in a row are asked; a norm is a handful of operations
_SAME = 1e-3  # relative: eps beside inputs of deviation 16


@dataclass(frozen=True)
class Piece:
    """One norm on the graph: from value `source` to value `target`, `bare` being the normalised value before its scale."""

    source: int
    target: int
    bare: int
    kind: Kind


def pieces_between(trace: Trace, source: int, targets: Iterable[int]) -> list[Piece]:
    """The norms that stand between value `source` and the `targets`, in order; where they stand before several targets, what
    they have in common."""
    found: dict[tuple[int, int], tuple[Kind, list[list[int]]]] = {}
    for target in targets:
        for start, bare, kind, tail in _along(trace, cuts(trace, source, target)):
            found.setdefault((start, bare), (kind, []))[1].append(tail)
    pieces = []
    for (start, bare), (kind, tails) in found.items():
        common = set(tails[0]).intersection(*tails[1:])
        pieces.append(Piece(start, max(common, default=bare), bare, kind))
    return sorted(pieces, key=lambda p: p.target)


def next_products(trace: Trace, source: int, feeding: Iterable[int]) -> dict[int, int]:
    """The values made of value `source` without a matrix product that enter one which reaches one of `feeding`; with it."""
    wanted = list(feeding)
    found: dict[int, int] = {}
    frontier, seen = [source], {source}
    while frontier:
        index = frontier.pop()
        for consumer in trace.consumers[index]:
            if not any(consumer == w or trace.depends(w, consumer) for w in wanted):
                continue
            if trace.is_matrix_product(consumer) or _is_attention(trace, consumer):
                found.setdefault(index, consumer)
            elif consumer not in seen:
                seen.add(consumer)
                frontier.append(consumer)
    return {i: found[i] for i in sorted(found) if i != source}


def _is_attention(trace: Trace, index: int) -> bool:
    return trace.nodes[index].operation == "scaled_dot_product_attention"


def cuts(trace: Trace, source: int, target: int) -> list[int]:
    """The values from `source` to `target` that everything on the way passes, in order, both included; nothing where a way leads
    through a matrix product."""
    reaching = trace.ancestors[target] | 1 << target
    if not reaching >> source & 1:
        return []
    order = [source, *between(trace, source, target)]
    if any(trace.is_matrix_product(index) or _is_attention(trace, index) for index in order[1:]):
        return []
    place = {index: number for number, index in enumerate(order)}
    crossed = [0] * (len(order) + 1)
    for index in order:
        for operand in trace.nodes[index].inputs:
            if operand in place:
                crossed[place[operand] + 1] += 1
                crossed[place[index]] -= 1
    found, open_ways = [], 0
    for number, index in enumerate(order):
        open_ways += crossed[number]
        if open_ways == 0:
            found.append(index)
    return found


def _along(trace: Trace, chain: list[int]) -> list[tuple[int, int, Kind, list[int]]]:
    """The norms along a chain of cuts: where each begins, its bare value, its kind, and what may be its end."""
    found: list[tuple[int, int, Kind, list[int]]] = []
    start = 0
    chain = chain[:_MOST_CUTS] if len(chain) > 2 * _MOST_CUTS else chain
    while start < len(chain) - 1:
        while start < len(chain) - 1 and _is_step(trace, chain[start], chain[start + 1]):
            start += 1
        met = _first_norm(trace, chain[start], chain[start + 1 :]) if start < len(chain) - 1 else None
        if met is None:
            start += 1
            continue
        bare, kind = met
        at = chain.index(bare)
        # What mixes or moves before the norm is none of it: it begins as late as it is still of the same kind.
        start = next((k for k in range(at - 1, start, -1) if kind_between(trace, chain[k], bare) == kind), start)
        tail, end = _tail(trace, chain[at:]), at
        if tail:
            end = chain.index(tail[-1])
        found.append((chain[start], bare, kind, [bare, *tail]))
        start = end
    return found


def _is_step(trace: Trace, before: int, index: int) -> bool:
    """Whether value `index` is value `before` moved, cast, scaled or shifted by what does not depend on it."""
    node = trace.nodes[index]
    operands = [i for i in node.inputs if i == before or trace.depends(i, before)]
    if operands != [before]:
        return False
    made = trace.tape.operations.get(index)
    divides = node.operation in {"div", "truediv", "true_divide"} and not (
        made is not None
        and made.args
        and isinstance(made.args[0], Reference)
        and made.args[0].node == before
        and getattr(made.function, "__name__", "") != "__rtruediv__"
    )
    return (node.operation in _STEPS and not divides) or node.operation in _MOVES


def _first_norm(trace: Trace, source: int, later: list[int], *, moved: bool = False) -> tuple[int, Kind] | None:
    shape = trace.nodes[source].shape
    candidates = [
        i
        for i in later
        if trace.nodes[i].shape == shape
        and trace.nodes[i].is_floating
        and (moved or trace.nodes[i].operation not in _MOVES)
    ]
    if not candidates or not shape or not trace.nodes[source].is_floating:
        return None
    try:
        return _asked(rehearsed(trace, source, candidates), trace, source, candidates)
    except (NotReplayable, RuntimeError, TypeError, ValueError, IndexError):
        return None  # whatever the piece is, it does not run on other values: not told


def _asked(
    run: Callable[[Tensor], dict[int, Tensor]], trace: Trace, source: int, candidates: list[int]
) -> tuple[int, Kind] | None:
    given = trace.tape.tensor(source)
    if given is None:
        raise NotReplayable("it is made of weights that exist only while their module runs")
    shape = trace.nodes[source].shape
    noise = trace.tape.noise
    for seed in (0, 1):
        if (shape, seed) not in noise:
            noise[shape, seed] = random_input(shape, seed)
    x, y = (noise[shape, seed].to(given.device) for seed in (0, 1))
    plain, large = run(16 * x), run(256 * x)
    invariant = [i for i in candidates if same(plain[i], large[i])]
    if not invariant:
        return None
    minus, other, other_minus, shifted = run(-16 * x), run(16 * y), run(-16 * y), run(16 * x + 16)
    for index in invariant:
        kind = kind_of(*(v[index] for v in (plain, minus, other, other_minus, shifted)))
        if kind is not None:
            return index, kind
    return None


def kind_between(trace: Trace, source: int, target: int) -> Kind | None:
    """The kind of norm that makes value `target` of value `source`; None if it is none, or cannot be run again."""
    if not trace.depends(target, source) or trace.nodes[target].shape != trace.nodes[source].shape:
        return None
    if not trace.nodes[source].is_floating or not trace.nodes[target].is_floating:
        return None
    met = _first_norm(trace, source, [target], moved=True)
    return met[1] if met is not None else None


def random_input(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not bool(a.isfinite().all() & b.isfinite().all()):
        return False
    return bool(((a - b).abs().max() <= _SAME * a.abs().max()).item())


def kind_of(plain: Tensor, minus: Tensor, other: Tensor, other_minus: Tensor, shifted: Tensor) -> Kind | None:
    """The kind of a norm, from f(x), f(-x), f(y), f(-y) and f(x + c), where f(16x) = f(256x) is known; None if it is none."""
    odd, odd_other = (plain - minus) / 2, (other - other_minus) / 2
    scale = float(odd.abs().max())
    if not scale > 0 or not all(bool(v.isfinite().all()) for v in (plain, minus, other, other_minus, shifted)):
        return None
    if float((plain + minus - other - other_minus).abs().max()) > 2 * _SAME * scale:
        return None
    if float((odd.abs() - odd_other.abs()).abs().max()) <= _SAME * scale:  # one size everywhere: a sign, a saturation
        return None
    return "layer" if float((plain - shifted).abs().max()) <= _SAME * scale else "rms"


def _tail(trace: Trace, chain: list[int]) -> list[int]:
    """Of the values behind a bare norm, `chain[0]`, those whose scales and shifts still belong to it."""
    bare = chain[0]
    found: list[int] = []
    for before, index in itertools.pairwise(chain):
        node = trace.nodes[index]
        if not _is_step(trace, before, index) or node.shape != trace.nodes[bare].shape:
            break
        if node.operation in _MOVES:
            continue  # a cast between the norm and its scale
        beside = [i for i in node.inputs if i != before]
        if not all(_belongs(trace, bare, index, side) for side in beside) or (
            not beside and node.call != trace.nodes[bare].call
        ):
            is_sum = any(trace.nodes[side].is_data and trace.nodes[side].size == node.size for side in beside)
            if is_sum and found and _is_one_number(trace, found[-1]):
                # a norm(x) + b x0: one number for all features, and a sum with another value, is the sum's factor, not a gain.
                # Only the last one: in a (√d norm(x)) + b x0 the other is the norm's.
                found.pop()
            break
        found.append(index)
    return found


def _is_one_number(trace: Trace, index: int) -> bool:
    """Whether a scale or shift is the same for all features: a number, or a tensor of one."""
    node = trace.nodes[index]
    return sum(trace.nodes[i].size == node.size for i in node.inputs) == 1 and all(
        trace.nodes[i].size in {1, node.size} for i in node.inputs
    )


def _belongs(trace: Trace, bare: int, index: int, side: int) -> bool:
    """Whether a scale or shift belongs to the norm: along the features, alike for all tokens. A parameter does so; a
    condition's may differ from sequence to sequence. A table of positions, a mask of tokens and a gate for each entry do not."""
    node, other = trace.nodes[index], trace.nodes[side]
    padded = (1,) * (len(node.shape) - len(other.shape)) + other.shape
    varies = {axis for axis, length in enumerate(padded) if length > 1}
    whole = {axis for axis, length in enumerate(node.shape) if length > 1}
    if not varies:
        return node.call == trace.nodes[bare].call
    if not other.is_data:
        return len(varies) == 1
    features = len(node.shape) - 1 if len(node.shape) < 4 else None
    return (features is None or features in varies) and (varies != whole or len(varies) == 1)
