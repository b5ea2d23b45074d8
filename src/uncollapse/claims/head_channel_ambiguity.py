"""The paper's count of ambiguous degrees of freedom: what it counts, and the observer it belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.jacobian import matrices, unseen
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, equal, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def sum_of_heads(tokens: int, count: int, width: int) -> Callable[[list[Any]], list[Any]]:
    """(O_1 .. O_H) -> sum O_h in one shared channel space of the head width."""

    def observed(values: list[Any]) -> list[Any]:
        total = exact.zeros(tokens, width)
        for block in matrices(values, *[(tokens, width)] * count):
            total = total + block
        return list(total.entries())

    return observed


def projected(tokens: int, projection: fmpq_mat) -> Callable[[list[Any]], list[Any]]:
    """O -> O W_O for one fixed W_O, D x d."""

    def observed(values: list[Any]) -> list[Any]:
        (outputs,) = matrices(values, (tokens, projection.nrows()))
        return list((outputs * projection).entries())

    return observed


def check(trials: int, seed: int, *, observer: str = "shared channels") -> Finding:
    """`observer="knows W_O"` gives the observer the projection: the hypothesis is gone."""
    draws = Draws("head-channel-ambiguity", seed)
    counts, single = [], []
    for _ in range(max(1, trials // 5)):
        n, h, k = draws.randint(1, 3), draws.randint(1, 4), draws.randint(1, 3)
        point = draws.matrix(1, n * h * k).entries()
        sees = sum_of_heads(n, h, k) if observer == "shared channels" else projected(n, draws.invertible(h * k))
        counts.append(unseen(sees, point) == n * (h - 1) * k)
        if observer == "shared channels":
            # What is seen together with one head leaves the others of them open: the difference is open for that head.
            both = unseen(functools.partial(_with_the_first, sees, n * k), point)
            single.append(unseen(sees, point) - both == n * k * min(h - 1, 1))
    swap, outputs = exact.rational([[0, 1], [1, 0]]), exact.rational([[1, 2]])
    return [
        tally(
            f"the observer ({observer}) leaves exactly n(H-1)d_k directions of all head outputs together open", counts
        ),
        tally("of a single head all n d_k directions are open, if there is another head", single, role="context"),
        equal(
            "H = 2 heads of width 1, one token, W_O invertible and known: directions left open",
            unseen(projected(1, swap), outputs.entries()),
            0,
            role="boundary",
        ),
    ], Counterexample(
        "n(H-1)d_k = 1 degree of freedom stays ambiguous whatever the observer knows",
        {"W_O": exact.text(swap), "O": exact.text(outputs), "Y = O W_O": exact.text(outputs * swap)},
        "O = Y W_O^-1: both heads are read off without any ambiguity.",
        "one token, two heads of width one",
    )


def _with_the_first(sees: Callable[[list[Any]], list[Any]], entries: int, values: list[Any]) -> list[Any]:
    """What the observer sees, and the first head's output beside it."""
    return [*sees(values), *values[:entries]]


CLAIM = Claim(
    "head-channel-ambiguity",
    "n(H-1)d_k degrees of freedom per layer stay ambiguous when the heads are recovered from the mixed signal (of one "
    "single head, all n d_k).",
    ABSTRACT,
    check,
    title="In a shared channel space the heads' outputs are ambiguous",
    formula=r"\dim \ker \left( (O_1, \dots, O_H) \mapsto \sum_h O_h \right) = n (H - 1) d_k",
    theory="7. Heads: who can tell them apart",
    hypotheses=("the observer sees only the sum of the heads in one shared d_k-wide channel space",),
)
