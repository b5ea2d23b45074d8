"""Gates for each channel leave less of the mixing symmetry than gates for each head."""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import Claim, Finding, equal, tally
from uncollapse.claims.pgop_gauge import surviving
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

PROPORTIONAL = ((1, 1), (2, 2))  # position x channel: both channels are doubled at the second position
DISTINCT = ((1, 1), (1, 2))
THIN = ((1,), (0,))  # two channels, one output: the second is not heard


def distinct(draws: Draws, count: int) -> fmpq_mat:
    """Gates at two positions, no two profiles of which are proportional."""
    return exact.rational([[1] * count, draws.sample(range(1, 3 * count), count)])


def check(trials: int, seed: int, *, gates: str = "of channels") -> Finding:
    """`gates="of heads"` lets the channels of a head share their gate."""
    draws = Draws("channel-gates", seed)
    left, by_heads = [], []
    for _ in range(max(1, trials // 5)):
        h, k = draws.randint(2, 3), 2
        size = h * k
        projection = draws.of_rank(size, size, size)
        by_channel, by_head = (
            surviving(distinct(draws, size), 1, projection),
            surviving(distinct(draws, h), k, projection),
        )
        left.append((by_channel if gates == "of channels" else by_head) == size)
        by_heads.append(by_head == h * k * k)
    loose = surviving(exact.rational(PROPORTIONAL), 1, exact.identity(2))
    return [
        tally(
            f"gates {gates} with distinct profiles leave exactly D directions of mixing, one scale for each channel",
            left,
        ),
        tally("gates of heads leave H d_k^2: all mixing within a head", by_heads),
        equal(
            f"D = 2, W_O = {exact.text(THIN)}, gates {exact.text(DISTINCT)}: what survives (the formula says 2)",
            surviving(exact.rational(DISTINCT), 1, exact.rational(THIN)),
            3,
            role="boundary",
        ),
        equal("two channels with proportional profiles: what survives (the formula says 2)", loose, 4, role="boundary"),
    ], Counterexample(
        "channel gates leave D directions whatever their profiles",
        {"gates (position x channel)": exact.text(PROPORTIONAL), "W_O": exact.text(exact.identity(2))},
        "proportional profiles break nothing: all of GL(2) survives, although the gates tell the positions apart.",
        "two channels, two positions, the smallest gates that differ between positions",
    )


CLAIM = Claim(
    "channel-gates",
    "Known positive gates for each channel leave D directions of mixing before the output projection, one scale each; gates for "
    "each head leave H d_k^2.",
    "gates after the attention, for each channel or each head, as in Z. Qiu et al., Gated Attention, arXiv 2505.06708 (2025), "
    "where they are computed from the token; the count is derived in docs/theory.md",
    check,
    title="Gates for each channel leave one scale a channel",
    formula=r"\dim = D \quad \mathrm{against} \quad H d_k^2",
    theory="8. The position-gated output projection",
    hypotheses=(
        "no two channels have proportional gate profiles",
        "W_O has full row rank D",
        "gates are positive and known",
    ),
)
