"""Logit scaling on one attention row: p -> p^t / sum p^t. Which rows stay, and which attract."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from flint import fmpq

from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.records.ledger import Counterexample

Row = list[Any]
TIMES = 32


def scaled(row: Sequence[Any], times: int) -> Row:
    """The softmax row after its logits were multiplied by `times`, exactly."""
    powers = [entry**times for entry in row]
    mass = sum(powers, fmpq(0))
    return [power / mass for power in powers]


def normalised(weights: Sequence[int]) -> Row:
    """The row with these proportions."""
    return [fmpq(weight, sum(weights)) for weight in weights]


def uniform_on(row: Sequence[Any]) -> Row:
    """Uniform on the keys where `row` is largest."""
    top = [entry == max(row) for entry in row]
    return [fmpq(int(t), sum(top)) for t in top]


def distance(left: Sequence[Any], right: Sequence[Any]) -> Any:
    """The largest entrywise difference."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def check(trials: int, seed: int, *, attracting: str = "single keys", fixed: str = "uniform on a subset") -> Finding:
    """`attracting="any arg-max set"` claims it of ties too; `fixed="uniform on all keys"` forgets the subsets."""
    draws = Draws("scaling-fixed-points", seed)
    characterised, limits, attracts, repels = [], [], [], []
    for keys in (2, 3, 4):
        for weights in itertools.product(range(4), repeat=keys):
            if not any(weights):
                continue
            row = normalised(weights)
            flat = len(set(weights) - ({0} if fixed == "uniform on a subset" else set())) == 1
            characterised.append((scaled(row, 2) == row) == (scaled(row, 3) == row) == flat)
    for _ in range(trials):
        keys = draws.randint(2, 5)
        row = normalised([draws.randint(1, 9) for _ in range(keys)])
        ordered = sorted(row, reverse=True)
        top = row.count(ordered[0])
        runner_up = ordered[top] if top < keys else fmpq(0)
        bound = keys * (runner_up / ordered[0]) ** TIMES
        limits.append(distance(scaled(row, TIMES), uniform_on(row)) <= bound)
        if top < keys:
            # The odds against the last key are squared: the row moves away from uniform on all keys.
            repels.append(scaled(row, 2)[row.index(ordered[0])] > ordered[0])
        size = 1 if attracting == "single keys" else draws.randint(2, keys)
        nearby = [fmpq(draws.randint(96, 104)) if i < size else fmpq(draws.randint(0, 4)) for i in range(keys)]
        start = [entry / sum(nearby, fmpq(0)) for entry in nearby]
        target = [fmpq(int(i < size), size) for i in range(keys)]
        attracts.append(distance(scaled(start, 64), target) <= distance(start, target))
    tie = normalised([51, 49, 0])
    far = scaled(tie, 128)
    return [
        tally(
            f"a row is fixed under t = 2 and 3 exactly where it is {fixed}, all rows with entries 0..3",
            characterised,
        ),
        tally(f"t = {TIMES} brings a row within T (p_2/p_1)^t of the uniform row on its arg-max keys", limits),
        tally(
            f"rows near the uniform row on an arg-max set ({attracting}) come no further away under t = 64", attracts
        ),
        tally("a row that is not uniform moves away from uniform on all keys", repels),
        shown(
            "the uniform row on two of three keys is not an attractor: (51, 49, 0)/100 under t = 128",
            f"first entry {float(far[0]):.4f}",
            far[0] > fmpq(99, 100),
        ),
    ], Counterexample(
        "every row that is uniform on its arg-max keys attracts its neighbours",
        {"row": [[str(entry) for entry in tie]], "limit t -> infinity": [["1", "0", "0"]]},
        "(1/2, 1/2, 0) is fixed, and the limit of every row with that tie; a row next to it leaves for one key.",
        "three keys are the fewest with an arg-max set that is neither one key nor all",
    )


CLAIM = Claim(
    "scaling-fixed-points",
    "Under logit scaling t > 1 exactly the rows uniform on a subset of the keys are fixed; every row tends to the "
    "uniform row on its arg-max keys; those fixed points attract, and the uniform row on all keys repels.",
    HERE,
    check,
    title="What temperature leaves fixed, and what attracts",
    formula=r"p \mapsto \frac{p^t}{\sum_j p_j^t}",
    theory="10. Entropy",
    hypotheses=(
        "for attraction of a whole neighbourhood: a single arg-max key (with ties the fixed point is a saddle)",
    ),
)
