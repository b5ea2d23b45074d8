"""Which permutations of the heads leave a layer's function alone: those that respect the key/value groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.ledger import HERE, Claim, Finding, found, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

SHAPES = ((2, 1), (2, 2), (3, 3), (4, 2), (4, 1))

Weights = list[list[fmpq_mat]]  # queries and outputs of the heads, keys and values of the groups


def draw(draws: Draws, count: int, groups: int) -> Weights:
    """Width 2, head width 1."""
    return [[draws.matrix(2, 1) for _ in range(count)], [draws.matrix(1, 2) for _ in range(count)]] + [
        [draws.matrix(2, 1) for _ in range(groups)] for _ in range(2)
    ]


def layer(x: fmpq_mat, weights: Weights) -> fmpq_mat:
    """sum_h softmax(ln 2 X W_Q W_K^T X^T) X W_V W_h, exactly."""
    queries, outputs, keys, values = weights
    per_group = len(queries) // len(keys)
    total = exact.zeros(x.nrows(), 2)
    for h, (query, out) in enumerate(zip(queries, outputs, strict=True)):
        key, value = keys[h // per_group], values[h // per_group]
        total = total + softmax(x * query * key.transpose() * x.transpose()) * x * value * out
    return total


def permuted(weights: Weights, heads: tuple[int, ...], groups: tuple[int, ...]) -> Weights:
    """The heads' (W_Q, W_h) in one order, the groups' (W_K, W_V) in another."""
    return [[block[i] for i in heads] for block in weights[:2]] + [[block[i] for i in groups] for block in weights[2:]]


def respects(heads: tuple[int, ...], groups: int) -> bool:
    """Whether each block of places is filled from one group."""
    size = len(heads) // groups
    return all(len({h // size for h in heads[g * size : (g + 1) * size]}) == 1 for g in range(groups))


def check(
    trials: int,
    seed: int,
    *,
    order: Callable[[int, int], int] = lambda h, g: math.factorial(h // g) ** g * math.factorial(g),
    require_groups: bool = True,
) -> Finding:
    """`order` is the size claimed for the group; `require_groups=False` claims it for every permutation."""
    draws = Draws("head-permutation", seed)
    kept, sizes = [], []
    for count, groups in SHAPES:
        exact_size = []
        for _ in range(max(2, trials // 100)):
            clouds, weights = [draws.matrix(3, 2, 1) for _ in range(3)], draw(draws, count, groups)
            before = [layer(x, weights) for x in clouds]
            good = 0
            for heads in itertools.permutations(range(count)):
                same = any(
                    all(layer(x, permuted(weights, heads, g)) == y for x, y in zip(clouds, before, strict=True))
                    for g in itertools.permutations(range(groups))
                )
                good += same
                if respects(heads, groups) or not require_groups:
                    kept.append(same)
            exact_size.append(good == order(count, groups))
        sizes.append(found(f"H={count}, G={groups}: exactly {order(count, groups)} permutations keep f", exact_size))
    weights = [[exact.rational(m) for m in block] for block in (_Q, _OUT, _K, _V)]
    x = exact.rational(_X)
    swapped = permuted(weights, (2, 1, 0, 3), (0, 1))
    y, z = layer(x, weights), layer(x, swapped)
    return [
        tally("permutations that respect the groups, with their keys and values, keep f", kept),
        *sizes,
        shown("swapping heads of two different groups changes f", "outputs differ", y != z),
    ], Counterexample(
        "any permutation of the query heads keeps f",
        {"X": exact.text(x), "Y": exact.text(y), "Y with heads 1 and 3 swapped": exact.text(z)},
        "H = 4, G = 2: after the swap head 1's output weights meet the second group's values.",
        "two groups of two heads of width one, entries 0 and 1",
    )


_X = ((1, 0), (0, 1))
_Q = [((0,), (0,))] * 4
_OUT = [((1, 0),), ((0, 0),), ((0, 1),), ((0, 0),)]
_K = [((0,), (0,))] * 2
_V = [((1,), (0,)), ((1,), (1,))]

CLAIM = Claim(
    "head-permutation",
    "A layer's function is unchanged under permutations of its heads: S_{H/G} wreath S_G with G key/value groups, "
    "that is (H/G)!^G G! of the H! orders.",
    HERE,
    check,
    title="How many orders of the heads give the same function",
    formula=r"((H/G)!)^G \cdot G!",
    theory="7. Heads: who can tell them apart",
    hypotheses=("the permutation maps key/value groups to groups, and keys, values and outputs move along",),
)
