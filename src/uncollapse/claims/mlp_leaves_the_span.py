"""Taken literally, the sentence on the span of the embeddings fails for one token and one head."""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, with_residual
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

X, W = ((1, 0),), ((0, 1), (0, 0))


def check(trials: int, seed: int, *, values: str = "any") -> Finding:
    """`values="scalar"` asks for W_h = c_h I, under which the sentence is true."""
    draws = Draws("mlp-leaves-the-span", seed)
    inside = []
    for _ in range(trials):
        d = draws.randint(2, 5)
        n = draws.randint(1, d - 1)
        start = x = draws.matrix(n, d)
        for _ in range(2):
            weights: list[fmpq_mat] = []
            for _ in range(2):
                scalar = exact.identity(d) * draws.randint(-3, 3)
                weights.append(scalar if values == "scalar" else draws.matrix(d, d))
            x = with_residual(x, [draws.pattern(n), draws.pattern(n)], weights)
        inside.append(exact.in_row_space(start, x))
    evidence = [tally(f"two attention layers with residuals stay in the span of the embeddings ({values} W_h)", inside)]
    if values != "any":
        return evidence, None
    x, w = exact.rational(X), exact.rational(W)
    y = exact.identity(1) * x * w
    story = f"rank of X and Y together {exact.rank(exact.above(x, y))}, of X alone {exact.rank(x)}"
    stays = exact.in_row_space(x, y)
    evidence.append(shown("one token, one head: the output stays in the span", story, stays, role="statement"))
    return evidence, Counterexample(
        "no stack of attention layers leaves the linear span of the token embeddings",
        {"X": exact.text(x), "A": [["1"]], "W = W_V W_O": exact.text(w), "Y = A X W": exact.text(y)},
        "the value-output matrix sends the only embedding direction e_1 to e_2, outside the span.",
        "one token, width two, one non-zero entry in X and in W: in width one every non-zero token spans everything",
    )


CLAIM = Claim(
    "mlp-leaves-the-span",
    "The MLP generates feature directions outside the linear span of the original token embeddings, which no stack of "
    "attention layers can produce.",
    ABSTRACT + ", taken literally",
    check,
    title="Only the MLP leaves the span of the embeddings",
    formula=r"\mathrm{row}(A X W_V W_O) \subseteq \mathrm{row}\, X",
    theory="6. What the MLP adds",
)
