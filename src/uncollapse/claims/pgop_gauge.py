"""Which mixings of the heads survive position gates that are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.jacobian import matrices, unseen
from uncollapse.claims.ledger import HERE, Claim, Finding, equal, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def surviving(gates: fmpq_mat, head_width: int, projection: fmpq_mat) -> int:
    """Dimension of the tangent of {(M, W') : M D_i W' = D_i W_O at every position}, at M = 1, W' = W_O.

    D_i repeats g_h(i) over the channels of head h. The tangent equations m D_i W_O + D_i w = 0 are linear in (m, w).
    """
    size, width = projection.nrows(), projection.ncols()
    spread = [exact.diagonal([g for g in row for _ in range(head_width)]) for row in gates.tolist()]

    def equations(values: list[Any]) -> list[Any]:
        m, w = matrices(values, (size, size), (size, width))
        return [entry for d in spread for entry in (m * d * projection + d * w).entries()]

    return unseen(equations, exact.zeros(1, size * size + size * width).entries())


def class_sizes(gates: fmpq_mat) -> list[int]:
    """How many heads share each gate profile, up to a factor."""
    columns = gates.transpose().tolist()
    classes: list[list[Any]] = []
    for column in columns:
        for members in classes:
            if exact.rank([*members, column]) == 1:
                members.append(column)
                break
        else:
            classes.append([column])
    return [len(members) for members in classes]


def _sum_of_squares(sizes: list[int], head_width: int) -> int:
    """The claimed dimension: sum over classes of proportional gate profiles of (members × head width)²."""
    return sum((members * head_width) ** 2 for members in sizes)


def check(
    trials: int,
    seed: int,
    *,
    formula: Callable[[list[int], int], int] = _sum_of_squares,
    full_rank: bool = True,
) -> Finding:
    """`formula` takes class sizes and d_k; `full_rank=False` silences the last head."""
    draws = Draws("pgop-gauge", seed)
    dimensions, extremes = [], []
    for _ in range(max(1, trials // 5)):
        h, k, n = draws.randint(2, 3), draws.randint(1, 2), draws.randint(1, 3)
        size = h * k
        profiles = [[draws.randint(1, 4) for _ in range(n)] for _ in range(2)]
        chosen = [[entry * draws.randint(1, 3) for entry in draws.choice(profiles)] for _ in range(h)]
        gates = exact.rational(chosen).transpose()
        whole = projection = draws.of_rank(size, size + draws.randint(0, 1), size)
        if not full_rank:
            heard = exact.part(whole, range(size - k), range(whole.ncols()))
            projection = exact.above(heard, exact.zeros(k, whole.ncols()))
        dimensions.append(surviving(gates, k, projection) == formula(class_sizes(gates), k))
        distinct = exact.rational([range(1, h + 1), range(h, 0, -1)])
        extremes.append(
            (surviving(exact.ones(n, h), k, whole), surviving(distinct, k, whole)) == (size * size, h * k * k)
        )
    gates, thin = exact.rational([[1, 1], [1, 2]]), exact.rational([[1], [0]])  # D = 2, d = 1
    loose = surviving(gates, 1, thin)
    return [
        tally("the mixings that survive have dimension sum over profile classes of (m_c d_k)^2", dimensions),
        tally("no gates leave D^2, distinct profiles leave H d_k^2", extremes),
        equal(
            "with D = 2 > d = 1 (rank W_O < D) more survives: dimension (the formula says 2)", loose, 3, role="boundary"
        ),
    ], Counterexample(
        "the formula holds for every output projection",
        {"gates (position x head)": exact.text(gates), "W_O": exact.text(thin)},
        "the second head writes nothing: what a mixing adds to or takes from it cannot be seen.",
        "two heads of width one; width one of the output is the only one below D",
    )


CLAIM = Claim(
    "pgop-gauge",
    "With known gates g > 0 a mixing M of the heads survives if and only if it commutes with every diag(g(i)/g(j)): "
    "dimension sum over classes of proportional profiles of (m_c d_k)^2, from D^2 without gates to H d_k^2.",
    HERE,
    check,
    title="Position gates break the mixing of heads with different profiles",
    formula=r"\dim = \sum_c (m_c d_k)^2",
    theory="8. The position-gated output projection",
    hypotheses=("W_O has full row rank D", "gates are positive and known"),
)
