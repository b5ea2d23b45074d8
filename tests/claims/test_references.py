"""What claims are checked with, against another library: pieces whose mistakes a verdict alone would not show."""

import numpy as np
import pytest
import torch
from flint import fmpq

from uncollapse.claims import (
    CLAIMS,
    attention_is_affine_given_patterns,
    balls,
    causal_collapse_is_geometric,
    ffn_width_four,
    layernorm_and_distance,
    leaders,
    pgop_gauge,
    pgop_overhead,
    random_residuals_are_geometric,
    residual_needs_no_mlp,
    scaling_fixed_points,
    width_collapse,
)
from uncollapse.claims.attention_only_collapse import after, in_dongs_gauge
from uncollapse.claims.draws import Draws, shifted, with_residual
from uncollapse.claims.entropy_floor import floor_by_max, floor_by_mean
from uncollapse.claims.residual_obstructs_collapse import stacked, two_layers
from uncollapse.measures import exact

X = [[1, 2], [0, -1], [3, 1]]
FORM, VALUE = [[1, -2], [0, 1]], [[1, 1], [-1, 2]]


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def gauge(z):
    return np.sqrt(np.abs(z).sum(0).max() * np.abs(z).sum(1).max())


def numbers(matrix):
    return np.array([[float(entry) for entry in row] for row in matrix.tolist()])


def middle(rows):
    return np.array([[float(entry.mid()) for entry in row] for row in rows])


def test_dongs_inequality_has_its_own_two_sides():
    x, form, value = np.array(X) / 4, np.array(FORM) / 4, np.array(VALUE)
    left, right = in_dongs_gauge(exact.rational(X) / 4, exact.rational(FORM) / 4, exact.rational(VALUE))
    mean = x.mean(0)
    rest = x - mean
    common = softmax(mean @ form @ rest.T)
    y = softmax(x @ form @ x.T) @ x @ value
    bound = 4 * np.sqrt(len(x) * common.max()) * np.abs(form).sum(0).max() * gauge(value) * gauge(rest) ** 3
    assert float(left.mid()) == pytest.approx(gauge(y - (mean + common @ rest) @ value) ** 2)
    assert float(right.mid()) == pytest.approx(bound**2)


def test_two_layers_with_residuals_are_two_layers_with_residuals():
    layers = [([FORM, VALUE], [VALUE, FORM]), ([VALUE], [FORM])]
    y = x = np.array(X) / 8
    for forms, weights in layers:
        y = y + sum(softmax(y @ np.array(m) @ y.T) @ y @ np.array(w) for m, w in zip(forms, weights, strict=True))
    exactly = [([exact.rational(m) for m in f], [exact.rational(w) for w in v]) for f, v in layers]
    seen = middle(stacked(exact.rational(X) / 8, exactly))
    assert np.allclose(seen, y)
    assert not np.allclose(seen, x)


def test_weights_that_cancel_the_residual_are_not_called_full_rank():
    one = exact.identity(1)
    assert balls.certainly_full_rank(stacked(one, [([one], [-one])])) is None
    assert balls.certainly_full_rank(stacked(one, [([one], [one])])) is True

    class Cancelling:
        """Draws the cancelling weight every time: M, then W = -1."""

        def of_rank(self, *_):
            return one

        def matrix(self, rows, columns, size):
            return exact.rational([[fmpq(-size, 2)]])  # two heads of -1/2 each

    assert two_layers(Cancelling(), 1, 1) is None


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("value", [0.5, 1.0, 3.0])
def test_the_bound_over_several_layers_is_reached_by_two_tokens(layers: int, value: float) -> None:
    """x and -x with M = 1 and values v become v tanh(x^2) times themselves: at a small x the bound is what happens."""
    x = 1 / 64
    for _ in range(layers):
        x = value * np.tanh(x * x) * x
    bound = after(fmpq(1, 4) * fmpq(str(int(value * 2))) / 2, fmpq(1, 32) ** 2, 3, layers)
    assert float(bound) == pytest.approx((2 * x) ** 2, rel=1e-3)
    assert (2 * x) ** 2 <= float(bound) * (1 + 1e-12)


@pytest.mark.parametrize("logits", [[0, 0, 0], [1, 1, 1, 1], [3, 0, -1, 2], [-2, 5]])
def test_two_floors_of_the_entropy(logits: list[int]) -> None:
    s = np.array(logits, dtype=float)
    p = np.exp(s) / np.exp(s).sum()
    entropy = -(p * np.log(p)).sum()
    by_max, by_mean = (float(f([fmpq(e) for e in logits]).mid()) for f in (floor_by_max, floor_by_mean))
    assert by_max == pytest.approx(-np.log(p.max()))  # the surprise of the likeliest key
    assert by_mean == pytest.approx(np.log(len(s)) - s.max() + s.mean())
    assert by_mean <= by_max + 1e-12
    assert by_max <= entropy + 1e-12


def test_a_linear_fit_of_the_mlp_leaves_what_the_formula_says() -> None:
    """(pi - 2)/(2 pi - 2) by least squares on drawn tokens, at every width."""
    shown = [p for p in CLAIMS["ffn-width-four"].run(20, 0).evidence if p.what.startswith("the same by least squares")]
    assert len(shown) == 4
    for piece in shown:
        assert float(str(piece.observed).split(" ")[0]) == pytest.approx((np.pi - 2) / (2 * np.pi - 2), abs=0.04)


def test_the_slopes_that_width_is_compared_with() -> None:
    """-1/2 for independent logits, 0 on the plateau."""
    steep, flat = CLAIMS["width-collapse"].run(1, 0).evidence[:2]
    assert (steep.expected, flat.expected) == (-0.5, 0)


def test_the_limit_of_the_overhead_is_the_papers() -> None:
    """Below 1.6 %: 1/63 is, 1/62 is not."""
    limit = pgop_overhead.LIMIT
    assert limit == fmpq(16, 1000)


def test_two_tokens_through_norms_are_what_numpy_makes_of_them():
    """Twelve layers of softmax(X M X^T) X under a causal mask, with a norm behind each and without."""
    form = np.array([[0.75, 0.0], [0.0, 0.0]])

    def through(x, eps):
        for _ in range(12):
            y = x.copy()
            y[1] = softmax(x[1] @ form @ x.T) @ x
            if eps is not None:
                y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + eps)
            x = y
        return x

    for start in (layernorm_and_distance.START, layernorm_and_distance.MERGES):
        for eps in (None, fmpq(1, 10)):
            found = layernorm_and_distance.stack(exact.rational(start), exact.rational([[fmpq(3, 4), 0], [0, 0]]), eps)
            expected = through(np.array(start, dtype=float), None if eps is None else 0.1)
            assert np.allclose(middle(found), expected)
            share = ((expected - expected.mean(0)) ** 2).sum() / (expected**2).sum()
            assert float(layernorm_and_distance.relative(found).mid()) == pytest.approx(share)
    assert layernorm_and_distance.normalised(exact.rational([[3, 1], [0, 5]])) == exact.rational([[1, -1], [-1, 1]])


def test_rows_at_twice_the_logits_are_softmax_rows():
    row = [fmpq(1, 2), fmpq(1, 3), fmpq(1, 6)]
    expected = softmax(3 * np.log([1 / 2, 1 / 3, 1 / 6]))
    assert np.allclose([float(e) for e in scaling_fixed_points.scaled(row, 3)], expected)
    assert scaling_fixed_points.normalised([1, 3, 0]) == [fmpq(1, 4), fmpq(3, 4), 0]
    assert scaling_fixed_points.uniform_on([fmpq(2, 5), fmpq(2, 5), fmpq(1, 5)]) == [fmpq(1, 2), fmpq(1, 2), 0]
    assert scaling_fixed_points.distance([fmpq(1), fmpq(0)], [fmpq(1, 4), fmpq(1, 2)]) == fmpq(3, 4)


def test_leaders_are_their_own_strongest_keys():
    x, one = exact.rational([[2], [1], [-1], [-3], [2]]), exact.identity(1)
    assert leaders.strongest(x, one) == [[0, 4], [0, 4], [3], [3], [0, 4]]
    assert leaders.strongest(x, one, causal=True) == [[0], [0], [2], [3], [0, 4]]
    assert leaders.leaders(x, one) == {0, 3, 4}
    assert leaders.leaders(x, one, causal=True) == {0, 2, 3, 4}
    assert leaders.hard_max(x, one).tolist()[1] == [fmpq(1, 2), 0, 0, 0, fmpq(1, 2)]
    assert not leaders.is_tied(x, one)  # both strongest keys are the same token
    assert leaders.is_tied(exact.rational([[0], [1], [-1]]), one)


def test_gate_profiles_are_alike_up_to_a_factor():
    gates = exact.rational([[1, 2, 1, 3, 2], [2, 4, 1, 3, 5]])
    assert sorted(pgop_gauge.class_sizes(gates)) == [1, 2, 2]
    assert pgop_gauge._sum_of_squares([1, 2], 3) == 9 + 36


def test_the_expected_energy_is_that_of_all_weights_in_numpy():
    """E|x (I + W)|^2 over the 81 matrices of entries 0, 1 and -1 with probabilities 1/2, 1/4, 1/4, times alpha."""
    x, alpha = np.array([2.0, -1.0]), 1.5
    entries = [(0, 0.5), (1, 0.25), (-1, 0.25)]
    total = sum(
        a[1] * b[1] * c[1] * d[1] * ((x @ (np.eye(2) + alpha * np.array([[a[0], b[0]], [c[0], d[0]]]))) ** 2).sum()
        for a in entries
        for b in entries
        for c in entries
        for d in entries
    )
    found = random_residuals_are_geometric.expected_energy(exact.rational([[2, -1]]), fmpq(3, 2), 1)
    assert float(found) == pytest.approx(total)
    twice = random_residuals_are_geometric.expected_energy(exact.rational([[2, -1]]), fmpq(3, 2), 2)
    assert float(twice) == pytest.approx(total * (1 + alpha**2))
    assert random_residuals_are_geometric.squared(3, fmpq(2), 2) == fmpq(3, 7)
    assert random_residuals_are_geometric.relative(exact.rational([[2, 0], [0, 0]])) == fmpq(1, 2)


def test_the_path_near_the_identity_is_that_of_numpy():
    x, weight = np.array([[1.0, 0.0], [0.5, 2.0]]), np.array([[1.0, 0.25], [0.0, 0.75]])
    found = residual_needs_no_mlp.approaching(
        exact.rational([[1, 0], [fmpq(1, 2), 2]]), exact.rational([[1, fmpq(1, 4)], [0, fmpq(3, 4)]]), 3
    )
    assert len(found) == 4
    for share in found:
        assert float(share) == pytest.approx(((x - x.mean(0)) ** 2).sum() / (x**2).sum())
        x = x + np.full((2, 2), 0.5) @ x @ weight


def test_patterns_at_initialisation_are_softmax_patterns():
    generator = torch.Generator().manual_seed(3)
    logits = 0.5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    assert np.allclose(width_collapse.independent(6, generator, False), softmax(logits))
    causal = width_collapse.independent(6, torch.Generator().manual_seed(3), True).numpy()
    assert np.allclose(causal, softmax(np.where(np.tri(6) > 0, logits, -np.inf)))
    q, k = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    seen = width_collapse.gaussian(5, torch.Generator().manual_seed(4), False, 4)
    assert np.allclose(seen, softmax(q @ k.T / 2))
    assert width_collapse.second_singular_value(seen) == pytest.approx(np.linalg.svd(seen.numpy())[1][1])
    values = [3.0, 2.0, 2.5, 1.0]
    expected = np.polyfit(np.log(width_collapse.TOKENS), np.log(values), 1)[0]
    assert width_collapse.slope(values) == pytest.approx(expected)
    assert width_collapse.TOKENS == (64, 128, 256, 512)


def test_the_hidden_layer_is_measured_as_numpy_measures_it():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.relu(x @ torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    a, b = (np.column_stack([part.numpy(), np.ones(20)]) for part in (x[:20], x[20:]))
    rest = y[20:].numpy() - b @ np.linalg.lstsq(a, y[:20].numpy(), rcond=None)[0]
    total = y[20:].numpy() - y[20:].numpy().mean(0)
    assert ffn_width_four.innovation(x, y) == pytest.approx((rest**2).sum() / (total**2).sum())
    sigma = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    share = sigma / sigma.sum()
    assert ffn_width_four.effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_an_attention_stack_is_that_of_numpy() -> None:
    """Two layers of two heads behind a mean subtraction; the live patterns have the weights 1 + <x_i, x_j>^2."""
    draws, x = Draws("test", 3), np.array(X, dtype=float)
    layers = [
        (
            [draws.pattern(3) for _ in range(2)],
            [draws.matrix(2, 2) for _ in range(2)],
            draws.matrix(1, 2),
            exact.diagonal([fmpq(1, 2), fmpq(1), fmpq(1, 3)]),
        )
        for _ in range(2)
    ]
    for kind in ("frozen", "live"):
        y = x
        for patterns, weights, bias, scale in layers:
            normed = numbers(scale) @ (y - y.mean(1, keepdims=True))
            live = 1 + (normed @ normed.T) ** 2
            live /= live.sum(1, keepdims=True)
            mixed = [live if kind == "live" else numbers(pattern) for pattern in patterns]
            heads = [a @ normed @ numbers(w) for a, w in zip(mixed, weights, strict=True)]
            y = y + sum(heads) + numbers(bias)
        found = attention_is_affine_given_patterns.forward(exact.rational(X), layers, kind)
        assert np.allclose(numbers(found), y)


def test_two_tokens_that_positions_turn_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position i turns its query and its key by i radians, clockwise; causal softmax, the values are the tokens."""
    first, second = np.array([[1.0, 2.0], [0.5, -1.0]])
    turn = np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])  # of rows, clockwise

    def own(token: np.ndarray) -> float:
        """What the second token gives to itself."""
        logits = [(token @ turn) @ first, (token @ turn) @ (token @ turn)]
        return float(softmax(np.array([logits]))[0, 1])

    token = second
    for _ in range(3):
        token = own(token) * token + (1 - own(token)) * first
    monkeypatch.setattr(causal_collapse_is_geometric, "LAYERS", 3)
    ratio, limit = causal_collapse_is_geometric.rotated_ratio(exact.rational([[1, 2], [fmpq(1, 2), -1]]))
    assert float(ratio.mid()) == pytest.approx(own(token) ** 2)
    assert float(limit.mid()) == pytest.approx(own(first) ** 2)


def test_a_layer_with_its_residual_is_that_of_numpy() -> None:
    draws, x = Draws("test", 4), np.array(X, dtype=float)
    patterns, weights = [draws.pattern(3) for _ in range(2)], [draws.matrix(2, 2) for _ in range(2)]
    y = sum(numbers(a) @ x @ numbers(w) for a, w in zip(patterns, weights, strict=True))
    assert np.allclose(numbers(with_residual(exact.rational(X), patterns, weights)), x + y)
    assert np.allclose(numbers(shifted(exact.rational(X), exact.rational([[1, -2]]))), x + np.array([1, -2]))
