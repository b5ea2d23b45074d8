"""The rank formula of a norm layer against the layer itself, built by other means than the formula.

Two references that share nothing with the code under test: rows made so that every deviation is rational (then the
layer's output is a rational matrix), and finite fields in which every deviation has a square root.
"""

import dataclasses
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from flint import nmod_mat

from uncollapse.errors import InputError
from uncollapse.measures import exact, normalization
from uncollapse.measures.normalization import rank_change

REGIMES = [
    "generic",  # n < d, n = d and n > d, as the shape falls
    "flat through the origin",
    "flat off the origin",
    "ones in the row space",
    "ones in the column space",
    "tokens equal up to a multiple of ones",
    "tokens that are multiples of one",
    "consensus",
    "constant tokens",
]


def random_cloud(rng, regime):
    n, d, low = rng.randint(1, 6), rng.randint(1, 6), rng.choice([1, 2, 4])

    def matrix(rows, columns):
        return [[rng.randint(-low, low) for _ in range(columns)] for _ in range(rows)]

    def product(a, b):
        return [[sum(p * q for p, q in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]

    inner = rng.randint(1, 3)
    x = matrix(n, d)
    if regime.startswith("flat"):
        x = product(matrix(n, inner), matrix(inner, d))
    if regime == "flat off the origin":
        offset = matrix(1, d)[0]
        x = [[entry + o for entry, o in zip(row, offset, strict=True)] for row in x]
    if regime == "ones in the row space":
        x = [*x[:-1], [1] * d]
        x = product(matrix(n, n), x)
    if regime == "ones in the column space":
        x = product([[1, *row] for row in matrix(n, inner)], matrix(inner + 1, d))
    if regime == "tokens equal up to a multiple of ones":
        x = [[entry + shift for entry in x[0]] for shift in (rng.randint(-low, low) for _ in range(n))]
    if regime == "tokens that are multiples of one":
        x = [[entry * factor for entry in x[0]] for factor in (rng.randint(1, 3) for _ in range(n))]
    if regime == "consensus":
        x = [list(x[0]) for _ in range(n)]
    if regime == "constant tokens":
        x[rng.randrange(n)] = [rng.randint(-low, low)] * d
    return x


def random_layer(rng, d):
    gamma = rng.choice(
        [None, [rng.choice([-2, -1, 1, 3]) for _ in range(d)], [rng.choice([0, 1, 2]) for _ in range(d)]]
    )
    beta = rng.choice([None, [0] * d, [rng.randint(-2, 2) for _ in range(d)]])
    return {"gamma": gamma, "beta": beta, "eps": rng.choice([0, 0.25, 1]), "kind": rng.choice(["layer", "rms"])}


def deviation_squares(x, eps, kind):
    d = len(x[0])
    means = [Fraction(sum(row), d) if kind == "layer" else 0 for row in x]
    return [Fraction(sum((e - m) ** 2 for e in row)) / d + Fraction(eps) for row, m in zip(x, means, strict=True)]


def prime_factors(value):
    factors, divisor = [], 2
    while value > 1:
        if value % divisor:
            divisor += 1
        else:
            factors.append(divisor)
            value //= divisor
    return factors


class NoRootError(Exception):
    pass


def square_root_in(p):
    """The map sqrt: positive rationals -> F_p that comes from one choice of root for each prime number."""

    def root(value):
        total = pow(value.denominator, -1, p)
        for q in prime_factors(value.numerator * value.denominator):
            if pow(q, (p - 1) // 2, p) != 1:
                raise NoRootError
            total = total * pow(q, (p + 1) // 4, p) % p
        return total

    return root


def output_modulo(p, x, gamma, beta, eps, kind):
    d, root = len(x[0]), square_root_in(p)
    rows = []
    for row, square in zip(x, deviation_squares(x, eps, kind), strict=True):
        mean = Fraction(sum(row), d) if kind == "layer" else Fraction(0)
        factors = [(e - mean) * (1 if gamma is None else gamma[j]) for j, e in enumerate(row)]
        scale = pow(root(square), -1, p)
        entries = [f.numerator * pow(f.denominator, -1, p) * scale for f in map(Fraction, factors)]
        rows.append([(entry + (beta[j] if beta else 0)) % p for j, entry in enumerate(entries)])
    return rows


def ranks_in_a_finite_field(x, rng, **layer):
    """Rank and affine rank of the layer's output, modulo primes in which all the deviations have a root.

    The rank modulo a prime never exceeds the true one and falls short for few primes only: take the larger of two.
    """
    found = []
    while len(found) < 2:
        p = rng.choice(PRIMES)
        try:
            rows = output_modulo(p, x, **layer)
        except NoRootError:
            continue
        differences = [[(a - b) % p for a, b in zip(row, rows[0], strict=True)] for row in rows[1:]]
        found.append((nmod_mat(rows, p).rank(), nmod_mat(differences, p).rank() if differences else 0))
    return max(found)


def is_prime(value):
    return all(pow(base, value - 1, value) == 1 for base in (2, 3, 5, 7, 11, 13, 17))


# Primes that are 3 modulo 4: a square root there is a power.
PRIMES = [p for p in range((1 << 40) + 3, (1 << 40) + 40_000, 4) if is_prime(p)]


def refuses(x, layer):
    return 0 in deviation_squares(x, layer["eps"], layer["kind"])


def agreement(cases, seed):
    """Run the tensor and the exact path on random clouds of all regimes; return how many were compared, by regime."""
    rng, compared = random.Random(seed), dict.fromkeys(REGIMES, 0)
    for index in range(cases):
        regime = REGIMES[index % len(REGIMES)]
        x = random_cloud(rng, regime)
        layer = random_layer(rng, len(x[0]))
        tensor = torch.tensor(x, dtype=torch.float64)
        if refuses(x, layer):
            for cloud in (x, tensor):
                with pytest.raises(InputError, match="positive standard deviation"):
                    rank_change(cloud, **layer)
            continue
        exactly, numerically = rank_change(x, **layer), rank_change(tensor, **layer)
        assert exactly == numerically, (regime, x, layer)
        compared[regime] += 1
    return compared


def test_tensors_and_exact_matrices_agree_on_ten_thousand_cases_in_every_regime():
    compared = agreement(12_600, seed=1)
    assert sum(compared.values()) >= 10_000
    assert min(compared.values()) > 500


def test_the_formula_gives_what_the_layer_does_in_finite_fields():
    rng, compared, seen = random.Random(5), 0, set()
    for index in range(700):
        x = random_cloud(rng, REGIMES[index % len(REGIMES)])
        layer = random_layer(rng, len(x[0]))
        if refuses(x, layer):
            continue
        squares = deviation_squares(x, layer["eps"], layer["kind"])
        under_roots = {q for square in squares for q in prime_factors(square.numerator * square.denominator)}
        if len(under_roots) > 5:  # each halves the share of finite fields that have the root
            continue
        change = rank_change(x, **layer)
        assert change.after == ranks_in_a_finite_field(x, rng=rng, **layer), (x, layer)
        assert change.before == (exact.rank(x), exact.affine_rank(x))
        assert change.affine_rank == change.brackets[0] - change.brackets[1] - change.brackets[2]
        compared += 1
        seen.add(change.affine_rank)
    assert compared > 500
    assert {-2, -1, 0, 1} <= seen


def test_the_formula_gives_what_the_layer_does_on_rational_deviations():
    """Rows whose variance is the square of a rational, by construction: the output itself is rational."""
    rng = random.Random(6)
    plain = {
        2: [[1, -1]],
        4: [[1, -1, 1, -1], [1, 1, -1, -1], [2, 2, -2, -2], [5, -1, -1, -3], [3, 1, 1, -5], [7, -7, 1, -1]],
    }
    rows_of = {
        d: [row for row in rows if exact.square_root(Fraction(sum(e * e for e in row), d))] for d, rows in plain.items()
    }
    assert len(rows_of[4]) >= 4
    for _ in range(300):
        d, n = rng.choice([2, 4]), rng.randint(1, 5)
        x, deviations = [], []
        for _ in range(n):
            row, scale, shift = rng.choice(rows_of[d]), rng.choice([1, 2, -1]), rng.randint(-2, 2)
            permuted = rng.sample(row, d)
            x.append([scale * e + shift for e in permuted])
            deviations.append(exact.square_root(Fraction(scale**2 * sum(e * e for e in row), d)))
        gamma, beta = [rng.choice([0, 1, 2]) for _ in range(d)], [rng.randint(-1, 1) for _ in range(d)]
        output = [
            [
                (Fraction(e) - Fraction(sum(row), d)) / Fraction(int(s.p), int(s.q)) * g + b
                for e, g, b in zip(row, gamma, beta, strict=True)
            ]
            for row, s in zip(x, deviations, strict=True)
        ]
        change = rank_change(x, gamma=gamma, beta=beta)
        assert change.after == (exact.rank(output), exact.affine_rank(output)), (x, gamma, beta)


@pytest.mark.parametrize(
    ("x", "eps", "change"),
    [
        ([[0, 1], [1, 2]], 0, -1),  # two tokens that differ by a multiple of the ones
        ([[0, 1], [1, 2]], 0.5, -1),
        ([[0, 0, 1], [0, 1, 1], [0, 2, 1]], 0, 1),  # collinear off the origin
        ([[0, 0, 1], [0, 1, 1], [0, 2, 1]], 1, 1),
        ([[0, 1], [0, 2]], 0, -1),  # one direction: scale is lost with eps = 0
        ([[0, 1], [0, 2]], 1, 0),
        ([[0, 1], [0, 2], [1, 4]], 0, -2),  # both at once
        ([[1, 2, 4], [1, 2, 4]], 0, 0),  # consensus
        ([[3, 0, 0], [0, 5, 0]], 0, 0),  # saturated
    ],
)
def test_hand_checked_changes(x, eps, change):
    assert rank_change(x, eps=eps).affine_rank == change
    assert rank_change(torch.tensor(x, dtype=torch.float32), eps=eps).affine_rank == change


def test_a_bias_moves_the_rank_by_minus_one_nought_or_one_and_never_the_affine_rank():
    x = [[0, 2], [2, 0]]  # deviations 1 and 1, output (-1, 1), (1, -1)
    plain = rank_change(x)
    assert plain.after == (1, 1)
    assert rank_change(x, beta=[1, 1]).after == (2, 1)
    assert rank_change(x, beta=[-1, 1]).after == (1, 1)
    one = [[0, 2], [1, 3]]  # both become (-1, 1); beta = (1, -1) cancels it
    assert rank_change(one).after == (1, 0)
    assert rank_change(one, beta=[1, -1]).after == (0, 0)
    # sqrt 2 and sqrt 8: s is twice as long for the second, both outputs are (-1, 1) scaled alike
    assert rank_change([[0, 2, 1], [0, 4, 2]], beta=[1, -1, 0]).after.rank == 1


def test_zeros_of_gamma_may_cost_more_than_two():
    x = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 2, 0, 1]]
    assert rank_change(x, gamma=[0, 0, 0, 0]).affine_rank == -4
    assert rank_change(x, gamma=[1, 0, 0, 0], kind="rms").affine_rank == -3


def test_storage_noise_is_no_direction():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 96, generator=generator, dtype=torch.float64
    )
    flat = flat + torch.randn(96, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        change = rank_change(flat.to(dtype), eps=1e-5)
        assert (change.before.affine_rank, change.after.affine_rank, change.brackets) == (6, 7, (1, 0, 0))
        back = rank_change(flat.to(dtype).double(), eps=1e-5, precision=dtype)
        assert back == change


def test_batches_masks_and_dtypes():
    x = torch.tensor([[[0.0, 1.0], [1.0, 2.0], [9.0, 9.0]], [[0.0, 1.0], [1.0, 0.0], [2.0, 7.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    change = rank_change(x, mask=mask)
    singles = [rank_change(x[0, :2]), rank_change(x[1])]
    assert change.affine_rank.tolist() == [single.affine_rank for single in singles]
    assert change.rank.tolist() == [single.rank for single in singles]
    assert [b.tolist() for b in change.brackets] == [list(b) for b in zip(*(s.brackets for s in singles), strict=True)]
    assert change.affine_rank.dtype == torch.int64
    assert isinstance(singles[0].affine_rank, int)
    assert isinstance(rank_change([[1, 2]]).affine_rank, int)
    y = torch.tensor(
        [[[0.0, 0, 1], [0, 1, 1], [0, 2, 1]], [[0, 1, 3], [1, 2, 4], [2, 3, 5]], [[1, 5, 2], [7, 1, 1], [2, 2, 9]]]
    )
    change, singles = rank_change(y), [rank_change(exact.rational(one)) for one in y]
    assert [b.tolist() for b in change.brackets] == [list(b) for b in zip(*(s.brackets for s in singles), strict=True)]
    assert len({str(b.tolist()) for b in change.brackets}) == 3  # no bracket may stand for another
    for name in ("before", "after"):
        for part in ("rank", "affine_rank"):
            together = getattr(getattr(change, name), part).tolist()
            assert together == [getattr(getattr(single, name), part) for single in singles]
    nobody = rank_change(x, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert nobody.rank.tolist() == [0, 0]
    assert [bracket.tolist() for bracket in nobody.brackets] == [[0, 0]] * 3


def test_a_torch_layer_norm_is_the_layer_described():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-3, 4, (5, 4), generator=generator).double()
    layer = torch.nn.LayerNorm(4, eps=1e-5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0, -1.0, 2.0]))
    change = rank_change(x, gamma=layer.weight, beta=layer.bias, eps=layer.eps)
    output = layer(x).detach()
    centred = output - output.mean(0)
    assert change.after == (
        int((torch.linalg.svdvals(output) > 1e-9).sum()),
        int((torch.linalg.svdvals(centred) > 1e-9).sum()),
    )
    rows = exact.rational(x)
    assert rank_change(rows, gamma=layer.weight, beta=layer.bias, eps=layer.eps) == change


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [[1, 1]]}, "token 0 with 0 and eps = 0"),
        ({"x": torch.tensor([[1.0, 2.0], [0.1, 0.1]])}, "token 1 with 0 and eps = 0"),
        ({"x": torch.tensor([[0.1, 0.1, 0.1]])}, "token 0 with 0 and eps = 0"),
        ({"x": [[0, 0]], "kind": "rms"}, "token 0 with 0 and eps = 0"),
        ({"x": [[1, 2]], "eps": -1}, "eps >= 0, got -1"),
        ({"x": [[1, 2]], "kind": "batch"}, "got 'batch'"),
        ({"x": [[1, 2]], "gamma": [1]}, "gamma with axis \\(width,\\) = \\(2,\\), got shape \\(1,\\)"),
        ({"x": torch.ones(3, 2).cumsum(1), "beta": torch.ones(3)}, "beta with axis"),
        ({"x": torch.ones(3)}, "axes \\(batch, token, width\\)"),
        ({"x": torch.tensor([[float("nan"), 1.0]])}, "finite tokens"),
        ({"x": [[1, 2]], "mask": torch.ones(1, dtype=torch.bool)}, "with a tensor only"),
    ],
)
def test_what_the_formula_does_not_cover_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        rank_change(**arguments)


def test_eps_above_zero_admits_constant_tokens():
    assert rank_change([[1, 1], [2, 2]], eps=Fraction(1, 4)).after == (0, 0)
    assert rank_change(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), eps=0.25).after == (0, 0)
    assert math.isclose(float(exact.number(0.25)), 0.25)


def test_a_bias_against_irrational_deviations():
    x = [[1, 1, -1, -1], [1, -1, 0, 0]]  # deviations 1 and sqrt(1/2), the output is x / s
    for beta, after in (([-1, -1, 1, 1], (1, 1)), ([0, -2, 1, 1], (2, 1)), ([-2, -2, 2, 2], (2, 1))):
        # beta = -x_1 cancels the first token; beta = x_2 - x_1 does in the rational part alone.
        assert rank_change(x, beta=beta).after == after
        assert rank_change(torch.tensor(x, dtype=torch.float64), beta=beta).after == after


@pytest.mark.parametrize("mean", [1e6, 1e9])
def test_the_rounding_of_a_large_mean_is_no_direction(mean):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(5, 300, generator=generator, dtype=torch.float64)
    flat = flat - flat.mean(1, keepdim=True)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64) @ flat
    change = rank_change(x + mean * torch.rand(300, 1, generator=generator, dtype=torch.float64))
    assert (change.before, change.after, change.brackets) == ((6, 6), (5, 5), (0, 0, 1))


def test_what_was_found_cannot_be_changed():
    own = [each for each in vars(normalization).values() if getattr(each, "__module__", "") == normalization.__name__]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert kept
    assert all(each.__dataclass_params__.frozen for each in kept)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("exponent", [0, 300, -300])
@pytest.mark.parametrize("shape", [(7, 3), (3, 6)], ids=str)
def test_what_counts_as_rounding_before_a_norm_and_behind_it(kind, exponent, shape, monkeypatch):
    """The noise of the format, and of float64 max(n, d) roundings of sigma_1; behind the norm width + 4 more of what each entry
    came from: |x|, and with a layer norm the mean of |x|, over the deviation, times gamma. Whatever the size of the tokens."""
    calls, whole = [], normalization._tolerance
    monkeypatch.setattr(normalization, "_tolerance", lambda *a: (calls.append((a, whole(*a))), calls[-1][1])[1])
    generator = np.random.default_rng(shape[0])
    x = generator.standard_normal(shape)
    x *= 0.75 / np.abs(x).max()  # between 1/2 and 1: such numbers are left as they are
    gamma, beta, eps = generator.standard_normal(shape[1]), generator.standard_normal(shape[1]), 0.1
    normalization.rank_change(
        torch.tensor(x) * 2.0**exponent,
        gamma=torch.tensor(gamma),
        beta=torch.tensor(beta),
        eps=eps * 4.0**exponent,
        kind=kind,
        precision=torch.bfloat16,
    )
    centred = x - x.mean(1, keepdims=True) if kind == "layer" else x
    deviation = np.sqrt((centred**2).mean(1, keepdims=True) + eps)
    level = np.abs(x).mean(1, keepdims=True) if kind == "layer" else 0
    normed, origin = centred / deviation * gamma, (np.abs(x) + level) / deviation * gamma
    expected = [(x, x, 0), (normed, origin, shape[1] + 4), (normed + beta, origin, shape[1] + 4)]
    n, d = shape
    assert len(calls) == 3
    for ((seen, came_from, data, *more), cut), (matrix, source, roundings) in zip(calls, expected, strict=True):
        np.testing.assert_allclose(seen.numpy(), matrix, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(came_from.numpy(), source, rtol=1e-12)
        assert (data, *more) == (2.0**-7, *([roundings] if roundings else []))
        size, top = np.linalg.norm(source), np.linalg.norm(matrix, 2)
        storage = 2.0**-7 * size * (n**-0.5 + d**-0.5)
        assert cut == pytest.approx(storage + 2.0**-52 * (max(n, d) * top + roundings * size), rel=1e-12)
        exactly = whole(seen, came_from, 0.0, roundings)
        assert exactly == pytest.approx(2.0**-52 * (max(n, d) * top + roundings * size), rel=1e-12)
