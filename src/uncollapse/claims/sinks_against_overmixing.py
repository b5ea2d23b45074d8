"""What a sink does to mixing: a share s of every row on a token whose value is zero multiplies the head's output by 1 - s.

The sink is one more key of the same softmax. Its share is read off the softmax over all keys, and the output without it comes from
a softmax over the others: two computations that need not agree, and do not where the sink's value is not zero.
"""

from __future__ import annotations

from typing import Literal

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def logits_of_one_mass(draws: Draws, tokens: int) -> fmpq_mat:
    """Logits whose rows are the same numbers in different orders: a sink with one logit then has one share."""
    row = [draws.randint(-3, 3) for _ in range(tokens)]
    return exact.rational([draws.sample(row, tokens) for _ in range(tokens)])


def check(trials: int, seed: int, *, sink_value: int = 0, shares: Literal["equal", "drawn"] = "equal") -> Finding:
    """`sink_value=1` gives the sink's value in all channels, `shares="drawn"` gives the sink a logit of each row's own."""
    draws = Draws("sinks-against-overmixing", seed)
    outputs, influence, by_row = [], [], []
    for _ in range(trials):
        n, k = draws.randint(2, 4), draws.randint(1, 3)
        others = logits_of_one_mass(draws, n)
        sink = exact.ones(n) * draws.randint(-3, 3)
        while shares == "drawn" and len(set(sink.entries())) == 1:
            sink = draws.matrix(n, 1)
        values = draws.of_rank(n, k, min(n, k))
        written = exact.above(exact.ones(1, k) * sink_value, values)
        pattern, without = softmax(exact.beside(sink, others)), softmax(others)
        share = max(exact.part(pattern, range(n), [0]).entries())  # that of every row, by the hypothesis
        outputs.append(pattern * written == without * values * (1 - share))
        token = draws.randint(0, n - 1)
        step = exact.from_rows([[fmpq(int(i == token))] * k for i in range(n)], k)
        moved = pattern * exact.above(exact.ones(1, k) * sink_value, values + step) - pattern * written
        influence.append(moved == (without * (values + step) - without * values) * (1 - share))
        own = softmax(exact.beside(draws.matrix(n, 1), others))  # a share of each row's own
        kept = exact.diagonal([1 - own[i, 0] for i in range(n)])
        by_row.append(own * exact.above(exact.zeros(1, k), values) == kept * without * values)
    pattern = exact.rational([[fmpq(1, 2), fmpq(1, 4), fmpq(1, 4)], [0, fmpq(1, 2), fmpq(1, 2)]])
    equal_tokens = exact.rational([[0], [1], [1]])
    after = pattern * equal_tokens
    return [
        tally(
            "a softmax with a sink of value 0 and share s gives (1 - s) times the output of the softmax without it",
            outputs,
        ),
        tally("a change of one other token's value moves every row 1 - s times as much", influence),
        tally("shares that differ scale each row by its own 1 - s_i", by_row, role="context"),
        shown(
            "a share that differs between rows separates equal tokens: shares 1/2 and 0",
            str(exact.text(after)),
            after[0, 0] != after[1, 0],
        ),
    ], Counterexample(
        "a sink only scales what a head writes",
        {"A (sink first)": exact.text(pattern), "V": exact.text(equal_tokens), "A V": exact.text(after)},
        "the first token rests on the sink by half, the second not at all; the output is scaled row by row.",
        "a sink and two tokens of width one",
    )


CLAIM = Claim(
    "sinks-against-overmixing",
    "A head that puts the share s of every row on a sink token with value zero mixes 1 - s times as much: its output, and the "
    "influence of every other token's value on it, are multiplied by 1 - s.",
    "after F. Barbero et al., Why do LLMs attend to the first token?, arXiv 2504.02732 (2025)",
    check,
    title="A sink mixes less",
    formula=r"Y = (1 - s)\, Y_{\mathrm{without}}",
    theory="10. Entropy",
    hypotheses=("the sink's value is zero", "the same share in every row"),
)
