"""Ranks over the rationals against elimination with `fractions.Fraction`, written out."""

import random
from fractions import Fraction

import pytest
import torch
from flint import fmpq, fmpq_mat, fmpz_mat
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.errors import InputError
from uncollapse.measures import exact


def rank_by_elimination(rows):
    rows = [[Fraction(entry) for entry in row] for row in rows]
    count = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(count, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[count], rows[pivot] = rows[pivot], rows[count]
        for i in range(count + 1, len(rows)):
            factor = rows[i][column] / rows[count][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[count], strict=True)]
        count += 1
    return count


def affine_rank_by_elimination(rows):
    count, width = len(rows), len(rows[0])
    mean = [sum(Fraction(row[j]) for row in rows) / count for j in range(width)]
    return rank_by_elimination([[Fraction(row[j]) - mean[j] for j in range(width)] for row in rows])


@st.composite
def products(draw, entries):
    tokens, width, inner = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    left = [[draw(entries) for _ in range(inner)] for _ in range(tokens)]
    right = [[draw(entries) for _ in range(width)] for _ in range(inner)]
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*right, strict=True)] for row in left
    ]


@settings(max_examples=150, deadline=None)
@given(products(st.fractions(-3, 3, max_denominator=4)))
def test_ranks_agree_with_elimination(rows):
    assert exact.rank(rows) == rank_by_elimination(rows)
    assert exact.affine_rank(rows) == affine_rank_by_elimination(rows)
    contains_ones = exact.in_column_space(rows, [[1]] * len(rows))
    assert exact.affine_rank(rows) == exact.rank(rows) - contains_ones


@settings(max_examples=60, deadline=None)
@given(products(st.integers(-3, 3)), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_a_tensor_of_small_integers_has_the_rank_of_the_integers(rows, dtype):
    tensor = torch.tensor(rows, dtype=dtype)
    assert exact.rank(tensor) == rank_by_elimination(rows)
    assert exact.affine_rank(tensor) == affine_rank_by_elimination(rows)


def test_floats_are_taken_at_their_binary_value():
    rows = [[0.1, 0.3], [0.3, 0.9]]  # proportional in decimal, and not in binary
    assert exact.rank(torch.tensor(rows, dtype=torch.float64)) == rank_by_elimination(rows) == 2
    assert exact.rank([[Fraction(1, 10), Fraction(3, 10)], [Fraction(3, 10), Fraction(9, 10)]]) == 1
    tiny = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]], dtype=torch.float64)
    assert exact.rank(tiny) == 2
    assert exact.rank(torch.tensor([[5e-324, 1.7e308], [0.0, 5e-324]], dtype=torch.float64)) == 2


@pytest.mark.parametrize("inner", [5, 12])
def test_large_floats_agree_with_elimination_whether_deficient_or_not(inner):
    generator = torch.Generator().manual_seed(inner)
    left = torch.randint(-9, 9, (12, inner), generator=generator).double() / 8
    right = torch.randint(-9, 9, (inner, 15), generator=generator).double() / 4
    product = left @ right
    assert exact.rank(product) == rank_by_elimination(product.tolist()) == inner


def test_a_rank_the_prime_would_lower_is_still_right():
    prime = (1 << 61) - 1
    rows = [[prime if i == j == 0 else int(i == j) for j in range(12)] for i in range(12)]
    assert exact.rank(rows) == 12


def test_batches_and_masks():
    x = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [0.0, 7.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert exact.rank(x).tolist() == [2, 2]
    assert exact.rank(x, mask).tolist() == [1, 2]
    assert exact.affine_rank(x, mask).tolist() == [1, 2]
    assert exact.rank(x[0], mask[0]) == 1
    assert exact.affine_rank(x, torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]


def test_kinds_of_input_agree():
    rows = [[1, 2], [3, 4]]
    assert exact.rational(rows) == exact.rational(fmpz_mat(rows)) == exact.rational(fmpq_mat(2, 2, [1, 2, 3, 4]))
    assert exact.rational(torch.tensor(rows)) == exact.rational(rows)
    assert exact.rank([]) == 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([[1, 2], [3]], "rows of one length, got lengths \\[1, 2\\]"),
        ([[float("nan")]], "finite rational number, got nan"),
        (torch.tensor([[float("inf")]]), "finite rational number, got inf"),
        (torch.ones(3), "axes \\(token, width\\), got shape \\(3,\\)"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_has_no_exact_rank_is_refused(bad, words):
    with pytest.raises(InputError, match=words):
        exact.rank(bad)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(InputError, match="mask"):
        exact.rank(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="mask"):
        exact.rank([[1, 2]], torch.ones(1, dtype=torch.bool))


def test_null_space_is_annihilated_and_has_the_right_dimension():
    rng = random.Random(0)
    for _ in range(40):
        rows = [[rng.randint(-1, 1) for _ in range(5)] for _ in range(rng.randint(1, 5))]
        basis = exact.null_space(rows)
        assert basis.ncols() == exact.null_dimension(rows) == 5 - rank_by_elimination(rows)
        assert exact.rank(exact.rational(rows) * basis) == 0
        assert exact.rank(basis) == basis.ncols()


def test_kronecker_is_vec_of_a_product():
    rng = random.Random(1)
    a, x, b = (
        exact.rational([[rng.randint(-5, 5) for _ in range(k)] for _ in range(n)]) for n, k in ((2, 3), (3, 4), (4, 2))
    )
    product = exact.kronecker(a, b.transpose()) * exact.rational([[e] for row in x.tolist() for e in row])
    assert [row[0] for row in product.tolist()] == [e for row in (a * x * b).tolist() for e in row]


def test_blocks():
    a, b = exact.rational([[1, 2], [3, 4]]), exact.rational([[5], [6]])
    assert exact.text(exact.beside(a, b)) == [["1", "2", "5"], ["3", "4", "6"]]
    assert exact.text(exact.above(b, b)) == [["5"], ["6"], ["5"], ["6"]]
    assert exact.text(exact.part(a, [1], [1, 0])) == [["4", "3"]]
    assert exact.text(exact.centring(2)) == [["1/2", "-1/2"], ["-1/2", "1/2"]]
    assert exact.in_row_space(a, [[7, 8]])
    assert not exact.in_row_space([[1, 0]], [[1, 1]])


def test_square_classes_rebuild_the_roots():
    rng = random.Random(2)
    for _ in range(50):
        squares = [Fraction(rng.randint(1, 30), rng.randint(1, 8)) for _ in range(6)]
        classes = exact.square_classes(squares)
        for i, square in enumerate(squares):
            rebuilt = sum(float(m) ** 0.5 * float(part[i]) for m, part in classes)
            assert rebuilt == pytest.approx(float(square) ** 0.5)
            assert sum(part[i] != 0 for _, part in classes) == 1
        quotients = [a / b for k, (a, _) in enumerate(classes) for b, _ in classes[:k]]
        assert all(exact.square_root(quotient) is None for quotient in quotients)
        assert [m for m, _ in classes if exact.square_root(m)] in ([], [fmpq(1)])


def test_root_scaled_has_a_multiple_of_the_rank_over_the_field():
    # Rows (sqrt 2, 2), (1, sqrt 2) are proportional; with 3 in place of 2 they are not.
    b = exact.rational([[1, 2], [1, 2]])
    representation, degree = exact.root_scaled(b, [2, 3])
    assert (degree, exact.rank(representation)) == (4, 4)
    # sqrt 2 = sqrt 8 / 2: one generator only, and the centred matrix keeps its affine rank.
    two, degree = exact.root_scaled(exact.rational([[1, 1], [1, 1]]), [2, 8])
    centred = exact.kronecker(exact.centring(2), exact.identity(degree)) * two
    assert (degree, exact.rank(centred) // degree) == (2, 1)
    same, degree = exact.root_scaled(exact.rational([[2, 2], [1, 1]]), [2, 8])
    assert exact.rank(exact.kronecker(exact.centring(2), exact.identity(degree)) * same) == 0


def test_root_scaled_agrees_with_floats():
    rng = random.Random(3)
    for _ in range(30):
        rows = [[rng.randint(-2, 2) for _ in range(3)] for _ in range(4)]
        squares = [rng.choice([1, 2, 3, 4, 6, 8]) for _ in range(4)]
        big, degree = exact.root_scaled(exact.rational(rows), squares)
        shift = exact.kronecker(exact.centring(4), exact.identity(degree))
        scaled = torch.tensor(rows, dtype=torch.float64) * torch.tensor(squares, dtype=torch.float64).sqrt()[:, None]
        centred = scaled - scaled.mean(0)
        assert exact.rank(big) == degree * int(torch.linalg.matrix_rank(scaled))
        assert exact.rank(shift * big) == degree * int((torch.linalg.svdvals(centred) > 1e-10).sum())


@pytest.mark.parametrize(
    ("value", "root"),
    [
        (fmpq(9, 4), fmpq(3, 2)),
        (0, 0),
        (1, 1),
        (fmpq(1, 4), fmpq(1, 2)),
        (-1, None),
        (fmpq(-9, 4), None),
        (2, None),
        (fmpq(4, 3), None),  # the root of the top alone
        (fmpq(3, 4), None),  # of the bottom alone
        (10**40, 10**20),
        (10**40 + 1, None),
    ],
)
def test_the_rational_root_of_a_rational(value: object, root: object) -> None:
    assert exact.square_root(value) == root
