"""Attention so sharp that each token copies its strongest key: who stays, and how many groups are left.

A *leader* is a token that is its own single strongest key: x_i M x_i > x_i M y for every other token y that it sees. All later
tokens are averages of those of now, so no later key is stronger, and a leader never moves. If M is positive definite, a token
without ties that is no leader moves to one of larger norm |x|^2 = x M x, by Cauchy and Schwarz; so it arrives at a leader within
n - 1 layers. Its key is copied to a place that stays occupied, so no leader is made on the way: with a full mask there are as many
groups as leaders. Two leaders are two groups for ever: the limit of infinite logits does not collapse. Proofs: docs/theory.md.
"""

from __future__ import annotations

from typing import Any, Literal

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.ledger import Claim, Finding, equal, found, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

OPPOSITE = ((1,), (-1,))  # two tokens of width one, M = 1: both are leaders
Row = tuple[Any, ...]


def rows_of(x: fmpq_mat) -> list[Row]:
    """The tokens, as rows that can be compared and counted."""
    return [tuple(row) for row in x.tolist()]


def strongest(x: fmpq_mat, form: fmpq_mat, *, causal: bool = False) -> list[list[int]]:
    """Of each token the keys with the largest logit x_i M x_j, all of them in a tie."""
    best = []
    for i, row in enumerate((x * form * x.transpose()).tolist()):
        seen = row[: i + 1] if causal else row
        best.append([j for j, logit in enumerate(seen) if logit == max(seen)])
    return best


def hard_max(x: fmpq_mat, form: fmpq_mat, *, causal: bool = False) -> fmpq_mat:
    """The pattern of softmax(t X M X^T) for t to infinity: uniform on the strongest keys of each row."""
    rows = [[fmpq(int(j in best), len(best)) for j in range(x.nrows())] for best in strongest(x, form, causal=causal)]
    return exact.from_rows(rows, x.nrows())


def leaders(x: fmpq_mat, form: fmpq_mat, *, causal: bool = False) -> set[int]:
    """The tokens whose strongest keys all are equal to themselves."""
    tokens = rows_of(x)
    return {i for i, best in enumerate(strongest(x, form, causal=causal)) if all(tokens[j] == tokens[i] for j in best)}


def is_tied(x: fmpq_mat, form: fmpq_mat, *, causal: bool = False) -> bool:
    """Whether some token has two different strongest keys."""
    tokens = rows_of(x)
    return any(len({tokens[j] for j in best}) > 1 for best in strongest(x, form, causal=causal))


def check(
    trials: int,
    seed: int,
    *,
    definite: bool = True,
    attention: Literal["hard", "soft"] = "hard",
    values: Literal["the tokens", "drawn"] = "the tokens",
    layers: int | None = None,
) -> Finding:
    """`definite=False` draws M freely, `attention="soft"` keeps the temperature finite, `values="drawn"` multiplies each layer by
    a matrix, `layers` replaces n - 1: each takes a hypothesis away or states too much."""
    draws = Draws("leaders", seed)
    stay: list[bool | None] = []
    largest: list[bool | None] = []
    arrive: list[bool | None] = []
    groups: list[bool | None] = []
    several: list[bool | None] = []
    for _ in range(trials):
        n, d, causal = draws.randint(2, 6), draws.randint(1, 3), draws.choice([False, True])
        x, root = draws.matrix(n, d), draws.invertible(d)
        form = root * root.transpose() if definite else draws.matrix(d, d)
        value = exact.identity(d) if values == "the tokens" else draws.invertible(d)
        first = leaders(x, form, causal=causal)
        norms = [
            (exact.part(x, [i], range(d)) * form * exact.part(x, [i], range(d)).transpose())[0, 0] for i in range(n)
        ]
        largest.append(norms.index(max(norms)) in first)
        y, kept, tied = x, [], False
        for _ in range(n - 1 if layers is None else layers):
            tied = tied or is_tied(y, form, causal=causal)
            logits = y * form * y.transpose()
            if attention == "soft":
                pattern = softmax(exact.rational([[int(e.p) for e in row] for row in logits.tolist()]), causal=causal)
            else:
                pattern = hard_max(y, form, causal=causal)
            y = pattern * y * value
            kept += [rows_of(y)[i] == rows_of(x)[i] for i in first]
            if attention == "soft":
                break  # its tokens are no integers any more: one layer shows it
        if first:
            stay.append(all(kept))
        led, ends = len({rows_of(x)[i] for i in first}), len(set(rows_of(y)))
        several.append(led > 1)
        groups.append(ends >= led if tied or causal else ends == led)
        if not tied:
            arrive.append(leaders(y, form, causal=causal) == set(range(n)))
    free = [draws.matrix(draws.randint(2, 4), 2) for _ in range(trials)]
    leaderless = [not leaders(x, draws.matrix(2, 2)) for x in free]
    evidence: list[Evidence] = [
        tally("a leader is where it was after every one of n - 1 layers, with and without a causal mask", stay),
        tally("M positive definite: the token of the largest norm is a leader, so there always is one", largest),
        tally("without ties, every token sits on a leader after n - 1 layers", arrive),
        tally("as many groups are left as there were different leaders (with ties or a causal mask: or more)", groups),
        found("there are clouds with two different leaders or more", several, role="boundary"),
        *_at_finite_temperature(),
        found("without positive definite M there may be no leader", leaderless, role="boundary"),
    ]
    x, one = exact.rational(OPPOSITE), exact.identity(1)
    return evidence, Counterexample(
        "attention without a residual brings all tokens together, however large the logits",
        {"X": exact.text(x), "W_QK": exact.text(one), "A for infinite logits": exact.text(hard_max(x, one))},
        "each token is its own strongest key, and none ever moves.",
        "two tokens of width one",
    )


def _at_finite_temperature() -> list[Evidence]:
    """Tokens 1 and -1 with softmax at base 2^t: the first becomes (4^t - 1)/(4^t + 1) < 1, for every t."""
    x = exact.rational(OPPOSITE)
    after = [(softmax(x * x.transpose() * t) * x)[0, 0] for t in (1, 5, 20)]
    return [
        equal(
            "softmax with logits (1, -1) ln 2: where 1 and -1 are after a layer", str(after[0]), "3/5", role="boundary"
        ),
        shown(
            "the same with logits 5 and 20 times as large: they still approach, ever more slowly",
            ", ".join(f"1 - {float(1 - each):.1e}" for each in after[1:]),
            after[0] < after[1] < after[2] < 1,
        ),
    ]


CLAIM = Claim(
    "leaders",
    "If each token copies its strongest key (the limit of infinite logits), a token that is its own single strongest key never "
    "moves; without ties every token sits on such a leader after n - 1 layers. Two leaders stay two groups: no collapse into one.",
    "after A. Alcalde, G. Fantuzzi, E. Zuazua, Clustering in pure-attention hardmax transformers, arXiv 2407.01602 (2024), "
    "who have a residual and a norm, and N. Karagodin et al., arXiv 2411.04990 (2024), on causal masks; this version is proved "
    "in docs/theory.md",
    check,
    title="Sharp attention keeps as many groups as it has leaders",
    formula=r"x_i M x_i > x_i M x_j \;\; (x_j \ne x_i) \;\Rightarrow\; (A X)_i = x_i",
    theory="4. Attention alone collapses, and how fast",
    hypotheses=(
        "the limit of infinite logits: at any finite temperature two such tokens approach each other",
        "the values are the tokens (W_VO = 1), no residual; full or causal mask",
        "for the arrival: W_QK positive definite, no ties",
    ),
)
