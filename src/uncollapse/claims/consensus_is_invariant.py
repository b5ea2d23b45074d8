"""Tokens that are all equal stay equal through a block; row sums that differ can separate them."""

from __future__ import annotations

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, relu, shifted, with_residual
from uncollapse.claims.layernorm_affine_rank import LARGE
from uncollapse.claims.ledger import HERE, Claim, Finding, equal, shown, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import rank_change
from uncollapse.records.ledger import Counterexample

SINK = (((1, 0), (0, fmpq(1, 2))), ((1,), (1,)))
SUMS_OF_TWO = ((1, 1), (0, 2))


def _commutes(pattern: fmpq_mat) -> bool:
    centre = exact.centring(pattern.nrows())
    return bool(centre * pattern == centre * pattern * centre)


def check(trials: int, seed: int, *, sinks: bool = False) -> Finding:
    """`sinks=True` lets rows lose mass to a sink: the hypothesis A1 = 1 is gone."""
    draws = Draws("consensus-is-invariant", seed)
    identity, through_attention, through_norm, through_mlp, gated = [], [], [], [], []
    for trial in range(trials):
        n, d, h = draws.randint(2, 5), draws.randint(1, 4), draws.randint(1, 3)
        patterns = [draws.pattern(n, causal=trial % 2 == 0, sinks=sinks) for _ in range(h)]
        identity += [_commutes(pattern) for pattern in patterns]
        token = draws.matrix(1, d)
        x = exact.ones(n) * token
        y = shifted(with_residual(x, patterns, [draws.matrix(d, d) for _ in range(h)]), draws.matrix(1, d))
        through_attention.append(exact.affine_rank(y) == 0)
        through_norm.append(rank_change(y, eps=LARGE, beta=draws.matrix(1, d).entries()).after.affine_rank == 0)
        hidden = relu(shifted(y * draws.matrix(d, 6), draws.matrix(1, 6)))
        through_mlp.append(exact.affine_rank(y + hidden * draws.matrix(6, d)) == 0)
        # Position gates: at consensus head h contributes one row k_h everywhere, and the output is G K.
        gates = draws.matrix(n, h, 2)
        contributions = draws.of_rank(h, h + 1, h)
        gated.append(exact.affine_rank(gates * contributions) == exact.affine_rank(gates))
    a, x = exact.rational(SINK[0]), exact.rational(SINK[1])
    lifted = exact.affine_rank(a * x)
    return [
        tally("C A = C A C", identity),
        tally("n equal tokens are equal after attention (any mask, heads, bias) and the residual", through_attention),
        tally("they are equal after layer normalisation", through_norm),
        tally("they are equal after a ReLU MLP and its residual", through_mlp),
        shown("a sink lifts the affine rank of a consensus", f"0 -> {lifted}", (lifted, _commutes(a)) == (1, False)),
        equal(
            "equal row sums other than 1 keep it: affine rank after",
            exact.affine_rank(exact.rational(SUMS_OF_TWO) * x),
            0,
            role="context",
        ),
        tally("position gates lift a consensus to exactly the affine rank of the gate matrix", gated, role="boundary"),
    ], Counterexample(
        "tokens that are all equal stay equal under any attention",
        {"A": exact.text(a), "X": exact.text(x), "A X": exact.text(a * x)},
        "the second row of A has lost half its mass (a sink, or dropout), and the equal tokens move apart.",
        "two tokens of width one: no smaller cloud has an affine rank",
    )


CLAIM = Claim(
    "consensus-is-invariant",
    "Tokens that are all equal stay equal through attention with any mask, residual, norm and MLP; and CA = CAC.",
    HERE,
    check,
    title="Equal tokens stay equal",
    formula=r"A_h \mathbf{1} x^T W_h = \mathbf{1} x^T W_h",
    theory="3. What attention can do to rank and to consensus",
    hypotheses=("every row of A sums to one (no sinks, no dropout)", "norm and MLP treat every token alike"),
)
