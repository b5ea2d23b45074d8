"""The stored counterexamples are the smallest: exhaustive search finds the same matrices, and each does what it says."""

from fractions import Fraction

import pytest
from flint import fmpq

from uncollapse.claims import CLAIMS, layernorm_affine_rank, layernorm_matrix_rank, mlp_leaves_the_span
from uncollapse.claims.draws import relu, softmax
from uncollapse.claims.search import candidates, smallest
from uncollapse.measures import exact
from uncollapse.measures.normalization import rank_change

SHAPES = [(n, d) for n in range(1, 4) for d in range(2, 4)]


def has_changes(x, sign):
    changes = layernorm_affine_rank.changes(x)
    return bool(changes) and all(change == sign for change in changes)


def test_the_smallest_cloud_that_layer_normalisation_takes_a_direction_from():
    assert smallest(SHAPES, range(3), lambda x: has_changes(x, -1)) == exact.rational(layernorm_affine_rank.LOSES)


def test_the_smallest_cloud_that_layer_normalisation_gives_a_direction_to():
    assert smallest(SHAPES, range(3), lambda x: has_changes(x, 1)) == exact.rational(layernorm_affine_rank.GAINS)


def test_the_smallest_cloud_that_loses_matrix_rank():
    def loses(x):
        if any(all(entry == row[0] for entry in row) for row in x.tolist()):
            return False
        return all(rank_change(x, eps=eps).rank != 0 for eps in (0, 1))

    assert smallest(SHAPES, range(3), loses) == exact.rational(layernorm_matrix_rank.SMALLEST)


def test_the_smallest_weights_that_lead_out_of_the_span():
    x = exact.rational(mlp_leaves_the_span.X)
    found = smallest([(2, 2)], range(2), lambda w: not exact.in_row_space(x, x * w))
    assert found == exact.rational(mlp_leaves_the_span.W)


def test_the_smallest_token_that_relu_leads_out_of_its_span():
    found = smallest([(1, 1), (1, 2)], range(-1, 2), lambda x: not exact.in_row_space(x, relu(x)))
    assert found == exact.rational([[1, -1]])


def test_two_heads_gain_rank_by_hand():
    matrices = CLAIMS["attention-never-gains-rank"].run(5, 0).counterexample.matrices
    x, a1, a2, w1, w2 = (
        [[Fraction(e) for e in row] for row in matrices[name]] for name in ("X", "A_1", "A_2", "W_1", "W_2")
    )

    def product(a, b):
        return [[sum(p * q for p, q in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]

    first, second = product(product(a1, x), w1), product(product(a2, x), w2)
    y = [[p + q for p, q in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]
    assert [[str(entry) for entry in row] for row in y] == matrices["Y"]
    assert y[0][0] * y[1][1] != y[0][1] * y[1][0]
    assert all(sum(row) == 1 for row in a1 + a2)


def test_candidates_come_smallest_first_and_completely():
    listed = [tuple(matrix.entries()) for matrix in candidates([(2, 1), (1, 1), (1, 2)], range(-1, 2))]
    assert len(listed) == 3 + 9 + 9
    sizes = [(len(entries), sum(map(abs, entries))) for entries in listed]
    assert sizes == sorted(sizes)
    assert smallest([(1, 1)], [0, 1], lambda m: m[0, 0] > 5) is None


@pytest.mark.parametrize("claim", CLAIMS)
def test_counterexamples_are_matrices_of_rationals_one_can_copy(claim):
    counterexample = CLAIMS[claim].run(12, 0).counterexample
    if counterexample is None:
        return
    assert counterexample.refutes
    assert counterexample.shows
    assert counterexample.minimal
    for rows in counterexample.matrices.values():
        assert len({len(row) for row in rows}) == 1
        assert all(isinstance(entry, str) for row in rows for entry in row)
        [[Fraction(entry) for entry in row] for row in rows if "," not in row[0]]


def test_softmax_in_base_two_is_a_softmax():
    import torch

    logits = [[1, 0, -3], [2, 2, 5], [0, 7, 1]]
    for causal in (False, True):
        exactly = softmax(exact.rational(logits), causal=causal)
        tensor = torch.tensor(logits, dtype=torch.float64) * torch.log(torch.tensor(2.0, dtype=torch.float64))
        if causal:
            tensor = tensor.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
        assert torch.allclose(
            torch.tensor([[float(e) for e in row] for row in exactly.tolist()]).double(), tensor.softmax(-1)
        )
    assert softmax(exact.zeros(2, 2)) == exact.ones(2, 2) * fmpq(1, 2)
