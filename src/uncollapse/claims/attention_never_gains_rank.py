"""One head without a value bias cannot raise the rank; with one it can, and two heads can."""

from __future__ import annotations

from uncollapse.claims.draws import Draws, heads, shifted, softmax, uniform
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

X = ((1, 0), (0, 0))
BIAS = ((0, 1),)
VALUES = (((1, 0), (0, 1)), ((0, 1), (1, 0)))


def check(trials: int, seed: int, *, count: int = 1, sinks: bool = False) -> Finding:
    """`count=2` asks the same of two heads, `sinks=True` drops A1 = 1."""
    draws = Draws("attention-never-gains-rank", seed)
    rank, affine, bias, several = [], [], [], []
    for trial in range(trials):
        n, d = draws.randint(2, 5), draws.randint(2, 5)
        x = shifted(draws.of_rank(n, d, 1, 2), draws.matrix(1, d, 1)) if trial % 2 else draws.matrix(n, d, 1)
        patterns = [draws.pattern(n, causal=trial % 3 == 0, sinks=sinks) for _ in range(3)]
        weights = [draws.matrix(d, d) for _ in range(3)]
        y = heads(x, patterns[:count], weights[:count])
        rank.append(exact.rank(y) <= exact.rank(x))
        affine.append(exact.affine_rank(y) <= exact.affine_rank(x))
        biased = shifted(y, draws.matrix(1, d))
        bias.append(exact.rank(biased) <= exact.rank(y) + 1 and exact.affine_rank(biased) == exact.affine_rank(y))
        several.append(exact.rank(heads(x, patterns, weights)) <= 3 * exact.rank(x))
    x = exact.rational(X)
    patterns = [uniform(2), softmax(x * x.transpose())]
    y = heads(x, patterns, [exact.rational(value) for value in VALUES])
    with_bias = shifted(patterns[1] * x, exact.rational(BIAS))
    return [
        tally(f"rank of the output <= rank of X, {count} head(s)", rank),
        tally("affine rank of the output <= affine rank of X", affine),
        tally("a value bias adds at most 1 to the rank and nothing to the affine rank", bias, role="context"),
        tally("three heads reach at most 3 rank X", several, role="context"),
        shown(
            "one softmax head with a value bias gains rank",
            f"{exact.rank(x)} -> {exact.rank(with_bias)}",
            (exact.rank(x), exact.rank(with_bias)) == (1, 2),
        ),
        shown(
            "two softmax heads gain rank",
            f"{exact.rank(x)} -> {exact.rank(y)}",
            (exact.rank(x), exact.rank(y)) == (1, 2),
        ),
    ], Counterexample(
        "attention without a residual never gains rank (two heads)",
        {
            "X": exact.text(x),
            "A_1": exact.text(patterns[0]),
            "A_2": exact.text(patterns[1]),
            "W_1": exact.text(VALUES[0]),
            "W_2": exact.text(VALUES[1]),
            "Y": exact.text(y),
        },
        "A_1 and A_2 are softmax patterns (logits 0, and ln 2 on the pair of first tokens); A_1 X and A_2 X differ.",
        "rank 2 needs two tokens and width two; X and the logits have one non-zero entry",
    )


CLAIM = Claim(
    "attention-never-gains-rank",
    "Without the residual, one attention head cannot gain rank or affine rank.",
    HERE,
    check,
    title="One head without a value bias never gains rank",
    formula=r"\mathrm{rank}(A X W) \le \mathrm{rank}\, X",
    theory="3. What attention can do to rank and to consensus",
    hypotheses=("one head", "no value bias (for the rank)", "every row of A sums to one (for the affine rank)"),
)
