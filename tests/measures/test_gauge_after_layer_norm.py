"""The closed forms of `gauge_dimension` and `query_key_gauge_dimension` after a layer norm are what exact Jacobians give."""

import functools

import pytest
from flint import fmpq

from uncollapse.claims import gauge_with_norms, query_key_gauge, value_output_gauge
from uncollapse.claims.draws import Draws
from uncollapse.claims.jacobian import flat, unseen
from uncollapse.measures.heads import gauge_dimension, query_key_gauge_dimension


@pytest.mark.parametrize("rotary", [0, 2])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norm", [None, "centred", "shifted"])
def test_queries_and_keys(norm, biases, rotary):
    heads, groups, head_width, width = 2, 1, 2, 4
    draws = Draws("queries and keys", 0)
    layout = query_key_gauge.Layout(heads, groups, head_width, width, biases, rotary)
    clouds = [_tokens(draws, norm, width) for _ in range(8)]
    point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in layout.shapes))
    seen = functools.partial(query_key_gauge.logits, layout, clouds)
    expected = query_key_gauge_dimension(heads, groups, head_width, bias=biases, rotary_width=rotary, layer_norm=norm)
    assert unseen(seen, point) == expected


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norm", [None, "centred", "shifted"])
def test_values_and_outputs(norm, biases):
    draws = Draws("values and outputs", 0)
    layout = value_output_gauge.Layout(2, 1, 2, 4, biases)
    probes = [(_tokens(draws, norm, 4), [draws.pattern(5) for _ in range(2)]) for _ in range(8)]
    point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in layout.shapes))
    seen = functools.partial(value_output_gauge.output, layout, probes)
    expected = gauge_dimension(1, 2, value_bias=biases, output_bias=biases, width=4, layer_norm=norm)
    assert unseen(seen, point) == expected


@pytest.mark.parametrize(("groups", "head_width", "width"), [(2, 2, 3), (2, 1, 3), (3, 1, 2)])
def test_a_value_bias_without_an_output_bias(groups, head_width, width):
    draws = Draws("a value bias alone", 0)
    layout = value_output_gauge.Layout(groups, groups, head_width, width, True)
    probes = [(draws.matrix(3, width), [draws.pattern(3) for _ in range(groups)]) for _ in range(8)]
    point = flat(*(draws.of_rank(r, c, min(r, c)) for r, c in layout.shapes[:-1]))

    def seen(values):
        return value_output_gauge.output(layout, probes, [*values, *[fmpq(0)] * width])

    assert unseen(seen, point) == gauge_dimension(groups, head_width, value_bias=True, width=width)


def _tokens(draws, norm, width):
    if norm is None:
        return draws.matrix(5, width)
    beta = [fmpq(0)] * width if norm == "centred" else [fmpq(i + 1) for i in range(width)]
    return gauge_with_norms.normed(draws, 5, [fmpq(i + 1) for i in range(width)], beta)
