"""What a layer norm before the attention adds to its gauge: directions of the weights that only act on what the norm removes.

With gains gamma without zeros, what leaves the norm lies in a hyperplane: u.(x - beta) = 0 for u = 1/gamma, entry by entry.
Adding u c^T to a weight moves its output by (u.beta) c, the same for every token. So

* keys: a constant is added to each row of logits. The softmax does not see it: G d_k directions, with or without biases;
* queries and values: invisible where u.beta = 0 (in particular beta = 0), or where a bias takes the constant back: H d_k and
  G d_k directions. Attention passes a constant of the values on (A1 = 1), so an output bias takes it back as well.

These directions belong to the norm, not to the heads, and change no count about heads. Credit for gauges of Transformers'
weights: van Nierop, arXiv 2412.14543, and OpenReview KrkbYbK0cH (NeurReps 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from flint import fmpq, fmpq_mat

from uncollapse.claims import query_key_gauge, value_output_gauge
from uncollapse.claims.draws import Draws, with_residual
from uncollapse.claims.jacobian import between, flat, generic, matrices, unseen
from uncollapse.claims.ledger import HERE, Claim, Finding, bracketed, equal, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

# heads H, key/value groups G, head width d_k, width d, biases
SIZES = ((2, 1, 2, 4, False), (2, 2, 1, 3, False), (2, 1, 2, 4, True))
Extra = Callable[[int, int, int, bool, bool], int]  # (H, G, d_k, biases, whether u.beta = 0) -> directions


def query_key_extra(h: int, g: int, k: int, biases: bool, centred: bool) -> int:
    """Of keys always, of queries where nothing is shifted or a bias takes it back."""
    return g * k + (h * k if biases or centred else 0)


def value_output_extra(h: int, g: int, k: int, biases: bool, centred: bool) -> int:
    """Of values where nothing is shifted or a bias takes it back."""
    return g * k if biases or centred else 0


def normed(draws: Draws, tokens: int, gamma: Sequence[Any], beta: Sequence[Any]) -> fmpq_mat:
    """Rows gamma * z + beta with z centred: what a layer norm gives, up to the scale of each z."""
    width = len(gamma)
    z = draws.matrix(tokens, width) * exact.centring(width)
    return exact.from_rows([[g * e + b for g, e, b in zip(gamma, row, beta, strict=True)] for row in z.tolist()], width)


def _along(u: Sequence[Any], channel: int, width: int) -> fmpq_mat:
    """u e^T: the move of a weight matrix [d, d_k] that the norm hides."""
    return exact.from_rows([[entry if column == channel else fmpq(0) for column in range(width)] for entry in u], width)


def _tangents(
    shapes: Sequence[tuple[int, int]], movable: Sequence[tuple[int, int | None]], u: Sequence[Any], shift: Any
) -> list[list[Any]]:
    """u e^T on each movable weight, -shift e on its bias where it has one: (index of the weight, index of its bias)."""
    tangents = []
    for weight, bias in movable:
        width = shapes[weight][1]
        for channel in range(width):
            parts = [fmpq_mat(rows, columns) for rows, columns in shapes]
            parts[weight] = _along(u, channel, width)
            if bias is not None:
                parts[bias] = fmpq_mat(1, width, [-shift if column == channel else 0 for column in range(width)])
            tangents.append(flat(*parts))
    return tangents


def check(
    trials: int,
    seed: int,
    *,
    query_key: Extra = query_key_extra,
    value_output: Extra = value_output_extra,
    norm: bool = True,
) -> Finding:
    """The formulas can be corrupted; `norm=False` draws free tokens: nothing is hidden."""
    draws = Draws("gauge-with-norms", seed)
    evidence: list[Evidence] = []
    for h, g, k, d, biases in SIZES:
        for centred in (True, False):
            found_qk, found_vo = [], []
            for _ in range(max(2, trials // 200)):
                gamma = [fmpq(draws.choice((1, 2, 3, -1, -2))) for _ in range(d)]
                u = [1 / entry for entry in gamma]
                beta = [fmpq(0)] * d if centred else [fmpq(draws.randint(1, 3)) * entry for entry in gamma]
                shift = sum((a * b for a, b in zip(u, beta, strict=True)), fmpq(0))
                cloud = functools.partial(normed, draws, gamma=gamma, beta=beta)
                clouds = [cloud(5) if norm else draws.matrix(5, d) for _ in range(8)]

                pairs = query_key_gauge.Layout(h, g, k, d, biases)
                point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in pairs.shapes))
                movable = [(i, h + g + i if biases and i < h else None) for i in range(h + g)]
                moves = query_key_gauge.moves(pairs, point) + _tangents(pairs.shapes, movable, u, shift)
                found_qk.append(between(functools.partial(query_key_gauge.logits, pairs, clouds), point, moves))

                written = value_output_gauge.Layout(h, g, k, d, biases)
                point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in written.shapes))
                probes = [(x, [draws.pattern(5) for _ in range(h)]) for x in clouds]
                movable = [(i, g + i if biases else None) for i in range(g)]
                moves = value_output_gauge.moves(written, point) + _tangents(written.shapes, movable, u, shift)
                found_vo.append(between(functools.partial(value_output_gauge.output, written, probes), point, moves))
            what = f"H={h} G={g} d_k={k} d={d} biases={biases}, {'beta = 0' if centred else 'beta not 0'}"
            claimed = query_key_gauge.dimension(pairs) + query_key(h, g, k, biases, centred)
            evidence.append(bracketed(f"query-key gauge after a layer norm, {what}", *generic(found_qk), claimed))
            claimed = g * k * k + biases * g * k + value_output(h, g, k, biases, centred)
            evidence.append(bracketed(f"value-output gauge after a layer norm, {what}", *generic(found_vo), claimed))
    hidden = [_hidden_behind_the_next_norm(draws) for _ in range(max(1, trials // 20))]
    evidence += [
        tally(
            "W_h + a 1^T changes nothing that is read through the next norm: D directions of no single layer", hidden
        ),
        _value_bias_alone(draws),
        shown(
            "tokens (1, -1), (-2, 2): W_K = (1, 0) and (2, 1) give the same keys",
            "the same",
            exact.rational(TOKENS) * exact.rational([[1], [0]]) == exact.rational(TOKENS) * exact.rational([[2], [1]]),
        ),
    ]
    return evidence, Counterexample(
        "the gauge of queries and keys is GL(d_k) for each group, also behind a layer norm without biases",
        {"X": exact.text(TOKENS), "W_K": [["1"], ["0"]], "W_K + u": [["2"], ["1"]]},
        "both give the keys 1 and -2; no change of basis of one channel does that.",
        "two tokens of width two, one head of width one",
    )


TOKENS = ((1, -1), (-2, 2))


def _hidden_behind_the_next_norm(draws: Draws) -> bool:
    """Whether moving every W_h by a_h 1^T leaves (X + sum A_h X W_v W_h) P as it is, P the mean subtraction of a layer norm."""
    n, d, k = draws.randint(2, 4), draws.randint(2, 4), draws.randint(1, 2)
    x, patterns = draws.matrix(n, d), [draws.pattern(n) for _ in range(2)]
    values, out = [draws.matrix(d, k) for _ in range(2)], [draws.matrix(k, d) for _ in range(2)]
    moved = [w + draws.matrix(k, 1) * exact.ones(1, d) for w in out]
    before = with_residual(x, patterns, [v * w for v, w in zip(values, out, strict=True)])
    after = with_residual(x, patterns, [v * w for v, w in zip(values, moved, strict=True)])
    return bool(before * exact.centring(d) == after * exact.centring(d))


def _value_bias_alone(draws: Draws) -> Evidence:
    """A value bias without an output bias: its shift is invisible where sum_h delta W_h = 0, in G d_k - d directions."""
    layout = value_output_gauge.Layout(2, 2, 2, 3, True)
    probes = [(draws.matrix(3, 3), [draws.pattern(3) for _ in range(2)]) for _ in range(8)]
    point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in layout.shapes[:-1]))
    last = matrices([fmpq(0)] * 3, (1, 3))

    def seen(values: Sequence[Any]) -> list[Any]:
        return value_output_gauge.output(layout, probes, [*values, *flat(*last)])

    what = "a value bias without an output bias, G d_k = 4 > d = 3: gauge dimension G d_k^2 + G d_k - d"
    return equal(what, unseen(seen, point), 2 * 2**2 + 4 - 3, role="context")


CLAIM = Claim(
    "gauge-with-norms",
    "After a layer norm G d_k more directions of the key weights are invisible, with or without biases; H d_k of the query "
    "and G d_k of the value weights, if sum(beta/gamma) = 0 or a bias takes the constant back.",
    HERE,
    check,
    title="A layer norm before the attention hides more directions",
    formula=r"W \to W + u c^T, \quad u = 1 / \gamma",
    theory="7. Heads: who can tell them apart",
    hypotheses=("gamma without zeros", "the attention reads the output of the norm alone", "A1 = 1, no RoPE"),
)
