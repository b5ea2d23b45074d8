"""What claims are checked with, against another library: pieces whose mistakes a verdict alone would not show."""

import numpy as np
import pytest
from flint import fmpq

from uncollapse.claims import balls
from uncollapse.claims.attention_only_collapse import in_dongs_gauge
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
