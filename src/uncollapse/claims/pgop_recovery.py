"""What recurring contents give away about the heads, through gates of rank G."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.jacobian import matrices, unseen
from uncollapse.claims.ledger import HERE, Claim, Finding, equal, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def recurring(gates: fmpq_mat, head_width: int) -> Callable[[list[Any]], list[Any]]:
    """The same head contents at every position: (o_1 .. o_H) -> (sum_h g_h(i) o_h)_i in a shared channel space."""

    def observed(values: list[Any]) -> list[Any]:
        (contents,) = matrices(values, (gates.ncols(), head_width))
        return list((gates * contents).entries())

    return observed


def changing(gates: fmpq_mat, head_width: int) -> Callable[[list[Any]], list[Any]]:
    """Other contents at every position: (o_h(i)) -> (sum_h g_h(i) o_h(i))_i."""
    positions, count = gates.nrows(), gates.ncols()

    def observed(values: list[Any]) -> list[Any]:
        blocks = matrices(values, *[(count, head_width)] * positions)
        return [e for i, block in enumerate(blocks) for e in (exact.part(gates, [i], range(count)) * block).entries()]

    return observed


def check(
    trials: int,
    seed: int,
    *,
    contents: str = "recurring",
    formula: Callable[[int, int], int] = lambda h, rank: h - rank,
) -> Finding:
    """`contents="changing"` drops the hypothesis; `formula` takes H and rank G."""
    draws = Draws("pgop-recovery", seed)
    opened, single, bound, same_as_ungated = [], [], [], []
    for _ in range(max(1, trials // 3)):
        m, h, k = draws.randint(1, 4), draws.randint(1, 4), draws.randint(1, 2)
        gates = exact.rational([[draws.randint(1, 3) for _ in range(h)] for _ in range(m)])
        rank = exact.rank(gates)
        content, own = exact.zeros(h, k), exact.zeros(m * h, k)  # the maps are linear: one point is as good as another
        if contents == "recurring":
            dimension = unseen(recurring(gates, k), content.entries())
        else:
            dimension = unseen(changing(gates, k), own.entries())
        opened.append(dimension == formula(h, rank) * k)
        bound.append(rank <= min(m, h))
        alone = [unseen(recurring(exact.part(gates, [i], range(h)), k), content.entries()) for i in range(m)]
        single.append(alone == [(h - 1) * k] * m)
        same_as_ungated.append(unseen(changing(gates, k), own.entries()) == m * (h - 1) * k)
    gates = exact.rational([[1, 1], [1, 2]])
    return [
        tally(f"{contents} contents leave (H - rank G) d_k directions open", opened),
        tally("at one position nothing is gained: (H - 1) d_k, as without gates", single),
        tally("rank G <= min(m, H)", bound),
        tally("contents that change leave m (H - 1) d_k open, as without gates", same_as_ungated, role="boundary"),
        equal(
            "two positions, two heads, rank G = 2, recurring: open",
            unseen(recurring(gates, 1), exact.zeros(2, 1).entries()),
            0,
            role="context",
        ),
    ], Counterexample(
        "gates of full rank recover the heads of any sequence",
        {
            "gates (position x head)": exact.text(gates),
            "head contents at the two positions": [["2", "-2"], ["2", "-1"]],
        },
        "contents (2, -2) at the first and (2, -1) at the second position give Y = 0, as contents 0 do.",
        "two positions and two heads of width one",
    )


CLAIM = Claim(
    "pgop-recovery",
    "Where the same contents recur at m positions with gate rows G, heads are recovered up to (H - rank G) d_k "
    "directions per content, rank G <= min(m, H); one position alone gains nothing.",
    HERE,
    check,
    title="Heads are recovered where contents recur",
    formula=r"\dim = (H - \mathrm{rank}\, G)\, d_k",
    theory="8. The position-gated output projection",
    hypotheses=("the head contents are the same at the m positions", "gates are known", "heads share their channels"),
)
