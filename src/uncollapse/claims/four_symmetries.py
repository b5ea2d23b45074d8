"""The paper's main thesis: four collapses, each a distinct symmetry of the forward pass. Two of the four are symmetries.

Depth: permutations of the tokens. Heads: W_V -> W_V M, W_O -> M^-1 W_O with M acting within each head. Both are exact. (An M that
mixes heads leaves the product O W_O as it is too, but no weights do that: heads have patterns of their own.) Width: permuting
the columns of A alone, A -> A Pi, changes what is mixed at every finite n. Entropy: multiplying the logits by t changes the
weights. What is exact there is something else: (a W_Q, W_K/a), and a constant added to a row of logits. `scaling-fixed-points`
says what the scaling does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.ledger import PAPER, Claim, Finding, found, shown, tally
from uncollapse.claims.token_permutation import permutation
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

LOGITS = ((0, 1),)  # times ln 2
COLLAPSES = ("depth", "width", "heads", "entropy")


def layer(x: fmpq_mat, patterns: Sequence[fmpq_mat], values: fmpq_mat, projection: fmpq_mat) -> fmpq_mat:
    """[A_1 X W_V,1 ... A_H X W_V,H] W_O: each head mixes its own columns of the values."""
    width = values.ncols() // len(patterns)
    mixed = [
        pattern * x * exact.part(values, range(values.nrows()), range(h * width, (h + 1) * width))
        for h, pattern in enumerate(patterns)
    ]
    return functools.reduce(exact.beside, mixed) * projection


def check(
    trials: int,
    seed: int,
    *,
    collapses: tuple[str, ...] = COLLAPSES,
    mixing: Literal["within heads", "across heads"] = "within heads",
) -> Finding:
    """`collapses` are those whose symmetry is asked for as part of the statement; the others are context. `mixing="across heads"`
    lets M mix the channels of different heads."""
    draws = Draws("four-symmetries", seed)
    outcomes: dict[str, list[bool | None]] = {name: [] for name in COLLAPSES}
    scales, shifts, mixed = [], [], []
    for _ in range(trials):
        n, d, k = draws.randint(2, 4), draws.randint(1, 3), draws.randint(1, 2)
        x, form, value = draws.of_rank(n, d, min(n, d), 2), draws.matrix(d, d, 2), draws.invertible(d)
        turn = permutation(draws.sample(range(n), n))
        outcomes["depth"].append(
            softmax(turn * x * form * x.transpose() * turn.transpose()) * turn * x * value
            == turn * softmax(x * form * x.transpose()) * x * value
        )
        while turn * x == x:  # a permutation that moves unequal keys
            turn = permutation(draws.sample(range(n), n))
            x = draws.of_rank(n, d, min(n, d), 2)
        pattern = draws.pattern(n)
        outcomes["width"].append(pattern * turn * x * value == pattern * x * value)
        patterns = [draws.pattern(n), draws.pattern(n)]
        stacked, projection = draws.matrix(d, 2 * k), draws.of_rank(2 * k, d, min(2 * k, d))
        none, across = exact.zeros(k, k), draws.invertible(2 * k)
        within = exact.above(exact.beside(draws.invertible(k), none), exact.beside(none, draws.invertible(k)))
        before = layer(x, patterns, stacked, projection)
        after = {
            name: layer(x, patterns, stacked * turned, turned.inv() * projection) == before
            for name, turned in (("within heads", within), ("across heads", across))
        }
        outcomes["heads"].append(after[mixing])
        mixed.append(after["across heads"])
        logits = draws.matrix(1, n)
        while len(set(logits.entries())) == 1:
            logits = draws.matrix(1, n)
        outcomes["entropy"].append(softmax(logits * 2) == softmax(logits))
        queries, keys, scale = draws.matrix(n, k), draws.matrix(n, k), fmpq(draws.randint(1, 5), draws.randint(1, 5))
        scales.append((queries * scale) * (keys / scale).transpose() == queries * keys.transpose())
        shifts.append(softmax(logits + exact.ones(1, n) * draws.randint(-3, 3)) == softmax(logits))
    words = {
        "depth": "depth: f(PX) = P f(X) for permutations of the tokens, without positions and mask",
        "width": "width: permuting the columns of A alone leaves A X W_V as it is (unequal tokens)",
        "heads": f"heads: W_V M, M^-1 W_O with M {mixing} give the same sum",
        "entropy": "entropy: multiplying the logits by 2 leaves the weights as they are (unequal logits)",
    }
    logits = exact.rational(LOGITS)
    once, twice = softmax(logits), softmax(logits * 2)
    return [
        *(tally(words[c], outcomes[c], role="statement" if c in collapses else "context") for c in COLLAPSES),
        tally("exact instead: (a W_Q, W_K/a) changes no logit", scales, role="context"),
        tally("exact instead: a constant added to a row of logits changes no weight", shifts, role="context"),
        found("an M that mixes two heads is none: the sum changes", [not same for same in mixed], role="context"),
        shown("the weights (1/3, 2/3) become (1/5, 4/5) when the logits double", str(exact.text(twice)), once != twice),
    ], Counterexample(
        "scaling the logits is a symmetry of the forward pass",
        {
            "logits / ln 2": exact.text(logits),
            "weights": exact.text(once),
            "weights at twice the logits": exact.text(twice),
        },
        "the entropy falls: scaling moves the weights, so it is no symmetry, but a flow with fixed points.",
        "two keys, logits 0 and ln 2",
    )


CLAIM = Claim(
    "four-symmetries",
    "The four collapses (rank in depth, rank in width, head channels, entropy) are each a distinct symmetry of the forward pass.",
    PAPER + ", title and abstract",
    check,
    title="Four collapses, four distinct symmetries",
    theory="11. Symmetries",
)
