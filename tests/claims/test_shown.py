"""What each claim shows, computed anew with the standard library's fractions and NumPy, and not by the claim's own pieces."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from uncollapse.claims import (
    CLAIMS,
    attention_never_gains_rank,
    attention_only_collapse,
    causal_collapse_is_geometric,
    head_permutation,
    residual_obstructs_collapse,
)

Matrix = list[list[Fraction]]
HALF = Fraction(1, 2)


def times(*factors: Matrix) -> Matrix:
    """The matrix product."""
    left, *rest = factors
    for right in rest:
        left = [
            [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in zip(*right, strict=True)]
            for row in left
        ]
    return left


def plus(left: Matrix, right: Matrix) -> Matrix:
    """The sum."""
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def rank(matrix: Matrix) -> int:
    """By elimination."""
    rows, found = [list(row) for row in matrix], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(found, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[found], rows[pivot] = rows[pivot], rows[found]
        for i in range(found + 1, len(rows)):
            factor = rows[i][column] / rows[found][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[found], strict=True)]
        found += 1
    return found


def centred(matrix: Matrix) -> Matrix:
    """Without the mean row."""
    mean = [sum(column) / len(matrix) for column in zip(*matrix, strict=True)]
    return [[a - m for a, m in zip(row, mean, strict=True)] for row in matrix]


def relu(matrix: Matrix) -> Matrix:
    """max(entry, 0)."""
    return [[max(entry, Fraction(0)) for entry in row] for row in matrix]


def softmax(logits: Matrix, causal: bool = False) -> Matrix:
    """Of integer logits times ln 2."""
    rows = [
        [Fraction(2) ** int(e) if j <= i or not causal else Fraction(0) for j, e in enumerate(r)]
        for i, r in enumerate(logits)
    ]
    return [[entry / sum(row) for entry in row] for row in rows]


def turned(matrix: Matrix) -> Matrix:
    """The transpose."""
    return [list(column) for column in zip(*matrix, strict=True)]


def identity(size: int) -> Matrix:
    """The identity."""
    return [[Fraction(int(i == j)) for j in range(size)] for i in range(size)]


def scaled(matrix: Matrix, factor: int | Fraction) -> Matrix:
    """Every entry times a number."""
    return [[entry * factor for entry in row] for row in matrix]


def survivors(gates: Matrix, projection: Matrix) -> int:
    """The dimension of {(m, w): m D_i W_O + D_i w = 0 for every position i}, heads of width one, in floating point."""
    W, columns = np.array(projection, dtype=float), []
    size, width = W.shape
    for index in range(size * size + size * width):
        unit = np.zeros(size * size + size * width)
        unit[index] = 1
        m, w = unit[: size * size].reshape(size, size), unit[size * size :].reshape(size, width)
        columns.append(np.concatenate([(m @ np.diag(g) @ W + np.diag(g) @ w).ravel() for g in np.array(gates, float)]))
    return len(columns) - int(np.linalg.matrix_rank(np.array(columns)))


def normed(matrix: Matrix, eps: float) -> np.ndarray:
    """Layer normalisation of the rows."""
    x = np.array(matrix, dtype=float)
    return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)


def apart(x: np.ndarray) -> int:
    """The affine rank."""
    return int(np.linalg.matrix_rank(x - x.mean(0), tol=1e-9))


def meets_no_smaller_pair(v: Matrix) -> bool:
    """Two keys with different values fix a row that sums to one."""
    return rank([[*row, Fraction(1)] for row in v[:2]]) == 2


# Of each claim: whether its matrices, in the order in which they are shown, do what the example says.
EXAMPLES: dict[str, Callable[..., Any]] = {
    # beta D^2/4 = 2 with D = 2: not below one; 2 tanh(1) > 3/2
    "attention-only-collapse": lambda x, m, v: (
        m[0][0] * v[0][0] * (x[0][0] - x[1][0]) ** 2 / 4 == 2 and v[0][0] * math.tanh(m[0][0] * x[0][0] ** 2) > 1.5
    ),
    "causal-collapse-is-geometric": lambda x, m: x[0] == x[1] != x[2] and m == [[1]] and {*x[0], *x[2]} == {0, 1},
    "relative-bias-collapse-is-geometric": lambda x, m, b: (
        b[0] == b[1]
        and [e / sum(b[0]) for e in b[0]] == [Fraction(3, 4), Fraction(1, 4)]
        and max(b[0]) == 3
        and x == [[Fraction(1, 4)], [-Fraction(1, 4)]]
        and m == [[1]]
    ),
    "leaders": lambda x, m, a: (
        a == identity(2)
        and all(max(row) == row[i] > min(row) for i, row in enumerate(times(x, m, turned(x))))
        and x == [[1], [-1]]
    ),
    "attention-never-gains-rank": lambda x, a, b, v, w, y: (
        plus(times(a, x, v), times(b, x, w)) == y
        and (rank(x), rank(y)) == (1, 2)
        and a == softmax(scaled(times(x, turned(x)), 0))
        and b == softmax(times(x, turned(x)))
        and v == identity(2) == w[::-1]
        and sum(e != 0 for row in x for e in row) == 1
    ),
    # the rest of what the sink leaves is positive
    "consensus-is-invariant": lambda a, x, y: (
        times(a, x) == y
        and rank(centred(x)) == 0
        and rank(centred(y)) == 1
        and (sum(a[0]), sum(a[1])) == (1, HALF)
        and x == [[1], [1]]
    ),
    "layernorm-affine-rank": lambda loses, gains: (
        all(apart(normed(loses, eps)) == 0 and apart(normed(gains, eps)) == 2 for eps in (0, 1e-5, 1))
        and rank(centred(loses)) == rank(centred(gains)) == 1
    ),
    "layernorm-matrix-rank": lambda x, y: (
        rank(x) == 2 and rank(y) == 1 and np.allclose(normed(x, 0), np.array(y, dtype=float))
    ),
    "rmsnorm-rank": lambda x, g: (
        x == identity(2) and rank([[a * b for a, b in zip(row, g[0], strict=True)] for row in x]) == 1
    ),
    "layernorm-and-distance": lambda x, m, a, y, z: (
        a == softmax(times(x, m, turned(x)), causal=True)
        and times(a, x) == y
        and z == x
        and np.allclose(normed(y, 0), np.array(z, dtype=float))
        and times(x, m, turned(x))[1] == [-1, 1]
        and sum(e != 0 for row in m for e in row) == 1
    ),
    "residual-obstructs-collapse": lambda x, a, w, y: plus(x, times(a, x, w)) == y and (rank(x), rank(y)) == (1, 0),
    "residual-needs-no-mlp": lambda x, a, w: (
        sum(e * e for row in centred(plus(x, times(a, x, w))) for e in row)
        == sum(e * e for row in plus(x, times(a, x, w)) for e in row) / 5
        and rank(plus(x, times(a, x, w))) == 2
    ),
    "random-residuals-are-geometric": lambda x, w, y: (
        plus(x, times([[HALF, HALF], [HALF, HALF]], x, w)) == y
        and centred(y) == y
        and centred(x) != x
        and x == [[2], [0]]
        and w == [[-1]]
    ),
    "mlp-leaves-the-span": lambda x, a, w, y: (
        times(a, x, w) == y and rank([*x, *y]) == rank(x) + 1 and a == [[1]] and x == [[1, 0]]
    ),
    "mlp-leaves-the-reachable-space": lambda x, w, y: (
        times(relu(times(x, w)), w) == y != x
        and rank([*x, *y]) == rank(x) == 1
        and [sum(map(abs, r)) for r in x] == [1, 1]
        and sum(x[0]) == -sum(x[1])
    ),
    "attention-is-affine-given-patterns": lambda x, y, z: (
        times(softmax(times(x, turned(x))), x) == y
        and times(softmax(scaled(times(x, turned(x)), 4)), scaled(x, 2)) == z
        and z != scaled(y, 2)
        and x == [[1], [-1]]
    ),
    "head-channel-ambiguity": lambda w, o, y: (
        times(o, w) == y and rank(w) == 2 and times(y, turned(w)) == o and w == identity(2)[::-1] and o == [[1, 2]]
    ),
    "head-observers": lambda o, w: times(o, w) == [[0]] and (o, w) == ([[0]], [[0]]),
    "attention-weights-unidentifiable": lambda v, a, y: (
        times(a, v) == y
        and y[0] == y[1]
        and a == [[Fraction(1, 3)] * 3, [HALF, 0, HALF]]
        and v == [[0], [1], [2]]
        and meets_no_smaller_pair(v)
    ),
    "mlp-cannot-unmix": lambda o, w, y, first, second, back: (
        times(o, w) == y
        and times(relu(times(y, first)), second) == back == o
        and o == [[1, -2]]
        and w == identity(2)[::-1]
    ),
    "pgop-overhead": lambda sizes, share: (
        share[0][0]
        == (sizes[0][0] + 1) * sizes[0][1] / ((sizes[0][0] + 1) * sizes[0][0])
        == 1 / sizes[0][2]
        > Fraction(16, 1000)
    ),
    "pgop-gauge": lambda g, w: survivors(g, w) == 3 and w == [[1], [0]] and g == [[1, 1], [1, 2]],
    "pgop-recovery": lambda g, o: (
        all(sum(a * b for a, b in zip(*rows, strict=True)) == 0 for rows in zip(g, o, strict=True))
        and g == [[1, 1], [1, 2]]
        and o[0] != o[1]
    ),
    "channel-gates": lambda g, w: survivors(g, w) == 4 and g == [[1, 1], [2, 2]] and w == identity(2),
    "last-token-collapse": lambda n, gap, spacing: gap[0][0] == 1 / n[0][0] == spacing[0][0] == Fraction(1, 2**9),
    "scaling-fixed-points": lambda row, end: (
        row[0] == [Fraction(51, 100), Fraction(49, 100), 0]
        and (row[0][1] / row[0][0]) ** 128 < Fraction(1, 100)
        and end == [[1, 0, 0]]
    ),
    "sinks-against-overmixing": lambda a, v, y: (
        times(a, v) == y
        and y[0] != y[1]
        and v[0] == [0]
        and v[1] == v[2]
        and all(sum(r) == 1 for r in a)
        and y == [[HALF], [1]]
        and v[1] == [1]
        and a[1] == [0, HALF, HALF]
        and a[0][1] == a[0][2]
    ),
    "token-permutation": lambda x, y, z: (
        times(softmax([[0, 0], [0, 0]], causal=True), x[::-1]) == y
        and times(softmax([[0, 0], [0, 0]], causal=True), x)[::-1] == z != y
        and x == [[0], [1]]
    ),
    "head-permutation": lambda x, y, z: y != z and y == [r[::-1] for r in z],
    "value-output-gauge": lambda v, w: v == [[1], [1]] and w == [[1, 1]],
    "query-key-gauge": lambda g: len(set(g[0])) == 1,
    "gauge-with-norms": lambda x, k, moved: (
        times(x, k) == times(x, moved) and k != moved and all(sum(r) == 0 for r in x)
    ),
    "four-symmetries": lambda s, p, q: (
        softmax(s) == p and softmax(scaled(s, 2)) == q and p == [[Fraction(1, 3), Fraction(2, 3)]]
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_example_does_what_it_says(claim: str) -> None:
    shown = CLAIMS[claim].run(12, 0).counterexample
    if shown is None:
        assert claim not in EXAMPLES
        return
    matrices = [[[Fraction(e) for e in row] for row in rows] for rows in shown.matrices.values()]
    assert EXAMPLES[claim](*matrices)


def test_the_swap_of_heads_is_of_the_smallest_weights() -> None:
    """All entries 0 or 1, no logits, so that every pattern is uniform; heads 1 and 3 write, each of its own group's values."""
    module = head_permutation
    entries = {
        e for block in (module._X, *module._Q, *module._OUT, *module._K, *module._V) for row in block for e in row
    }
    assert entries == {0, 1}
    assert not np.any(module._Q)
    assert not np.any(module._K)
    assert np.array(module._OUT).tolist() == [[[1, 0]], [[0, 0]], [[0, 1]], [[0, 0]]]
    first, second = (np.full((2, 2), 0.5) @ np.eye(2) @ np.array(v, dtype=float) for v in module._V)
    heads = np.array(module._OUT, dtype=float)
    shown = CLAIMS["head-permutation"].run(12, 0).counterexample
    assert shown is not None
    y, z = ([[float(Fraction(e)) for e in row] for row in shown.matrices[key]] for key in list(shown.matrices)[1:])
    assert np.allclose(y, first @ heads[0] + second @ heads[2])
    assert np.allclose(z, first @ heads[2] + second @ heads[0])


def test_the_words_name_the_numbers() -> None:
    turned_by_position = [
        p.what for p in CLAIMS["causal-collapse-is-geometric"].run(12, 0).evidence if "RoPE" in p.what
    ]
    assert "from {}, {}:".format(*causal_collapse_is_geometric.ROTATED) in turned_by_position[0]
    for claim in ("residual-obstructs-collapse", "attention-never-gains-rank", "attention-only-collapse"):
        assert CLAIMS[claim].run(12, 0).counterexample is not None
    assert set(residual_obstructs_collapse.SATURATED) == {(1, 0), (0, 1)}  # the fewest and smallest of rank two
    assert attention_never_gains_rank.BIAS == ((0, 1),)
    a, b = (np.array(m) for m in attention_only_collapse.GAUGE)

    def squared(z: np.ndarray) -> int:
        return int(np.abs(z).sum(0).max() * np.abs(z).sum(1).max())

    assert (squared(a), squared(b), squared(a + b)) == (2, 2, 9)  # sqrt 2 + sqrt 2 < 3


def observed(claim: str, start: str) -> list[str]:
    """What was observed in the pieces of evidence that begin so."""
    return [str(piece.observed) for piece in CLAIMS[claim].run(12, 0).evidence if piece.what.startswith(start)]


def rounded(value: Fraction, bits: int) -> Fraction:
    """A number in (0, 1] to so many significant bits, to nearest and in a tie to even, by Fraction's own rounding."""
    exponent = 0
    while value * 2**exponent < 1:
        exponent += 1
    return Fraction(round(value * 2 ** (exponent + bits - 1)), 2 ** (exponent + bits - 1))


@pytest.mark.parametrize(("bits", "length"), [(8, 512), (11, 4096)])  # significands of bfloat16 and float16
def test_two_prompts_meet_where_rounding_says(bits: int, length: int) -> None:
    name = {8: "bfloat16", 11: "float16"}[bits]
    alike = [rounded(1 - Fraction(1, n), bits) == 1 for n in range(2, 2 * length)]
    assert 2 + alike.index(True) == length
    assert all(alike[length - 2 :])
    assert observed("last-token-collapse", f"{name}: the shortest") == [str(length)]
    assert observed("last-token-collapse", f"{name}: so they stay") == [f"0 exceptions in {length} cases"]


def test_the_papers_own_pair_of_prompts_meets_a_little_later() -> None:
    alike = [rounded(1 - Fraction(1, n), 8) == rounded(1 - Fraction(2, n + 1), 8) for n in range(2, 3000)]
    last = max(n for n, same in enumerate(alike, 2) if not same)
    assert observed("last-token-collapse", "bfloat16, 1...10 against 1...100") == [str(last + 1)]


def test_torch_itself_comes_to_the_same_bits() -> None:
    (length,) = observed("last-token-collapse", "the same prompts in the bfloat16 attention")
    assert 256 < int(length) <= 512  # its weights are rounded, too, so it may be earlier


def test_random_residuals_fall_as_numpy_says() -> None:
    """The formula and draws of NumPy's own; the claim's draws are torch's."""
    rng, (flat, scaled_down) = (
        np.random.default_rng(0),
        observed("random-residuals-are-geometric", "dev = 15 n m, L = 24"),
    )
    for shown, alpha in ((flat, 1.0), (scaled_down, 24**-0.5)):
        formula, median = (float(word) for word in shown.split(" and "))
        assert formula == pytest.approx((15 / (15 + (1 + alpha**2) ** 24)) ** 0.5, rel=0.01)
        seen = []
        for _ in range(60):
            x = rng.standard_normal((16, 64))
            for _ in range(24):
                x = x + np.full((16, 16), 1 / 16) @ x @ rng.standard_normal((64, 64)) * alpha / 8
            seen.append(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x))
        assert median == pytest.approx(float(np.median(seen)), rel=0.35 if alpha == 1 else 0.02)


@pytest.mark.parametrize(
    ("claim", "start", "figure"),
    [
        ("attention-is-affine-given-patterns", "unfrozen", "510/257 against 6/5"),
        ("pgop-overhead", "d = 384", "3.1250%"),
        ("pgop-overhead", "the same model with d_phi = 128", f"{(128 + 1) * 12 / (385 * 384):.4%}"),
        ("scaling-fixed-points", "the uniform row on two", f"first entry {1 / (1 + (49 / 51) ** 128):.4f}"),
        ("causal-collapse-is-geometric", "a second token equal", f"{1 / 9:.6f}"),
        (
            "causal-collapse-is-geometric",
            "with RoPE",
            "{0:.6f}, expected {0:.6f}".format((1 / (1 + math.exp(-2 * (1 - math.cos(1))))) ** 2),
        ),
        ("attention-only-collapse", "above the condition", "at least 3/2 in 6 of 6"),
        ("four-symmetries", "entropy: multiplying", "12 exceptions in 12 cases"),
        ("mlp-leaves-the-reachable-space", "all weights the identity", "['1', '0']"),
        ("value-output-gauge", "heads with one and the same pattern", "5"),
        ("residual-obstructs-collapse", "post-norm with two", "rank 2 -> 1"),
        ("residual-needs-no-mlp", "near W = I", f"1/{1 + 4**10}"),
        ("four-symmetries", "the weights (1/3, 2/3)", "[['1/5', '4/5']]"),
        ("leaders", "the same with logits 5 and 20", f"1 - {2 / (4**5 + 1):.1e}, 1 - {2 / (4**20 + 1):.1e}"),
        ("residual-obstructs-collapse", "an exceptional W", "rank 1 -> 0"),
        ("random-residuals-are-geometric", "W = -I removes", "[['1'], ['-1']]"),
        ("last-token-collapse", "the exact last state", "4/5"),
        ("last-token-collapse", "in float32 the prompts", f"{511 / 512:.6f} and 1"),
        ("attention-never-gains-rank", "one softmax head with", "1 -> 2"),
        ("attention-never-gains-rank", "two softmax heads", "1 -> 2"),
        ("consensus-is-invariant", "a sink lifts", "0 -> 1"),
        ("consensus-is-invariant", "equal row sums", "0"),
        ("rmsnorm-rank", "a zero in gamma", "2 -> 1"),
        ("layernorm-matrix-rank", "rank unchanged on the 2 x 2 swap, eps 0", "2 -> 1"),
        ("layernorm-matrix-rank", "rank unchanged on the 2 x 2 swap, eps 1", "2 -> 1"),
        ("layernorm-affine-rank", "affine rank unchanged on two", "1 -> 0, brackets (1, 1, 1)"),
        ("layernorm-affine-rank", "affine rank unchanged on three", "1 -> 2, brackets (1, 0, 0)"),
        ("layernorm-and-distance", "one layer exactly", "[['1', '-1'], ['-3/5', '3/5']]"),
        ("mlp-leaves-the-span", "one token, one head", "rank of X and Y together 2, of X alone 1"),
        ("mlp-leaves-the-reachable-space", "it need not", "[['1', '0'], ['0', '0']]"),
        ("mlp-leaves-the-reachable-space", "tokens on which ReLU is", "[['1', '1']]"),
        ("mlp-leaves-the-reachable-space", "a mean subtraction alone", "[['-1/2', '1/2']]"),
        ("head-channel-ambiguity", "H = 2 heads", "0"),
        ("head-observers", "at O = 0", "2 against 1"),
        ("attention-weights-unidentifiable", "weights (1/3", "[['1'], ['1']]"),
        ("mlp-cannot-unmix", "two heads of width one", "[['1', '-2']]"),
        ("pgop-gauge", "with D = 2 > d = 1", "3"),
        ("pgop-recovery", "two positions, two heads", "0"),
        ("channel-gates", "D = 2, W_O = [['1'], ['0']], gates [['1', '1'], ['1', '2']]: what survives", "3"),
        ("channel-gates", "two channels with", "4"),
        ("sinks-against-overmixing", "a share that differs", "[['1/2'], ['1']]"),
        ("token-permutation", "a causal mask", "[['1'], ['1/2']] against [['1/2'], ['0']]"),
        ("token-permutation", "an added position", "[['1'], ['1']] against [['2'], ['0']]"),
    ],
)
def test_the_figure_in_the_evidence(claim: str, start: str, figure: str) -> None:
    assert observed(claim, start) == [figure]


def test_the_gauge_after_a_layer_norm_has_the_counts_of_the_theory() -> None:
    """H = 2, G = 1, d_k = 2, d = 4, no biases: queries and keys 4 -> 10 and 6, values and outputs 4 -> 6 and 4."""
    sizes = "H=2 G=1 d_k=2 d=4 biases=False"
    for kind, at_zero, elsewhere in (("query-key", "10", "6"), ("value-output", "6", "4")):
        what = f"{kind} gauge after a layer norm, {sizes}"
        assert observed("gauge-with-norms", f"{what}, beta = 0") == [at_zero]
        assert observed("gauge-with-norms", f"{what}, beta not 0") == [elsewhere]
