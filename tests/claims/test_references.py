"""What claims are checked with, against another library: pieces whose mistakes a verdict alone would not show."""

import numpy as np
import pytest
from flint import fmpq

from uncollapse.claims import CLAIMS, attention_never_gains_rank, balls, pgop_overhead
from uncollapse.claims.attention_only_collapse import after, in_dongs_gauge
from uncollapse.claims.draws import softmax as exact_softmax
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


def test_the_head_with_a_bias_has_a_softmax_pattern() -> None:
    """The one of theory.md: logits 1, 0 and 0, 0, in base two."""
    given = [[entry / sum(row) for entry in row] for row in exact.rational(attention_never_gains_rank.PATTERN).tolist()]
    assert exact.from_rows(given, 2) == exact_softmax(exact.rational([[1, 0], [0, 0]]))


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
