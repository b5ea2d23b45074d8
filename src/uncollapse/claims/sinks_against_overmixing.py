"""What a sink does to mixing: a share s of every row on a token whose value is zero multiplies the head's output by 1 - s."""

from __future__ import annotations

from flint import fmpq

from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample


def check(trials: int, seed: int, *, sink_value: int = 0) -> Finding:
    """`sink_value=1` gives the sink's value in all channels."""
    draws = Draws("sinks-against-overmixing", seed)
    outputs, influence = [], []
    for _ in range(trials):
        n, k = draws.randint(2, 4), draws.randint(1, 3)
        share = fmpq(draws.randint(1, 9), 10)
        rest = draws.pattern(n)
        values = draws.of_rank(n, k, min(n, k))
        # Key 0 is the sink. Its value is beside those of the n other tokens.
        pattern = exact.beside(exact.ones(n) * share, rest * (1 - share))
        whole = exact.above(exact.ones(1, k) * sink_value, values)
        outputs.append(pattern * whole == rest * values * (1 - share))
        step = draws.matrix(n, k)
        while not any(step.entries()):
            step = draws.matrix(n, k)
        moved = pattern * exact.above(exact.ones(1, k) * sink_value, values + step) - pattern * whole
        influence.append(moved == rest * step * (1 - share))
    pattern = exact.rational([[fmpq(1, 2), fmpq(1, 4), fmpq(1, 4)], [0, fmpq(1, 2), fmpq(1, 2)]])
    equal_tokens = exact.rational([[0], [1], [1]])
    after = pattern * equal_tokens
    return [
        tally("a share s on a sink of value 0 gives (1 - s) times the output without the sink", outputs),
        tally("the influence of every other token is multiplied by 1 - s", influence, role="context"),
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
    "influence of every other token on it, are multiplied by 1 - s.",
    "after F. Barbero et al., Why do LLMs attend to the first token?, arXiv 2504.02732 (2025)",
    check,
    hypotheses=("the sink's value is zero", "the same share in every row"),
)
