"""Layer normalisation and the distance to consensus: it can keep tokens apart for ever, and it can make them equal at once.

The distance is relative, |CX|/|X|: a norm sets the size of every token, so an absolute distance would say nothing. Two stacks of
causal softmax attention with the same weights are compared, one with a norm after each layer; the patterns follow the tokens. About
the exact rank see `layernorm-rank-formula`. Wu et al. (arXiv 2405.18781) show that layer normalisation admits stacks that do not
collapse; the smallest one has two tokens of width two.
"""

from __future__ import annotations

from typing import Any

from flint import arb, fmpq, fmpq_mat

from uncollapse.claims import balls
from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.ledger import PAPER, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

LAYERS = 12
START = ((1, -1), (-1, 1))
FORM = ((1, 0), (0, 0))  # times ln 2: the second token has the logits -1 and 1
MERGES = ((0, 1), (1, 2))  # they differ by a multiple of (1, 1), and so do all their averages
USUAL = fmpq(1, 100_000)  # eps


def normalised(x: fmpq_mat) -> fmpq_mat:
    """Layer normalisation of tokens of width two with eps = 0: (a, b) -> sign(a - b) (1, -1). Exact; a = b has none."""
    rows = []
    for a, b in x.tolist():
        if a == b:
            raise ZeroDivisionError("a token with equal entries has no layer normalisation at eps = 0")
        rows.append([1, -1] if a > b else [-1, 1])
    return exact.rational(rows)


def normed(x: balls.Rows, eps: fmpq) -> balls.Rows:
    """Layer normalisation of tokens of width two: with h half the difference of the entries, h/sqrt(h^2 + eps) times (1, -1)."""
    halves = [(a - b) / 2 for a, b in x]
    entries = [half / (half * half + arb(eps)).sqrt() for half in halves]
    return [[entry, -entry] for entry in entries]


def relative(x: balls.Rows) -> Any:
    """|CX|^2/|X|^2 of two tokens: half their squared distance, over their energy."""
    energy = sum((entry * entry for row in x for entry in row), arb(0))
    return balls.squared_distance(*x) / 2 / energy


def stack(x: fmpq_mat, form: fmpq_mat, eps: fmpq | None) -> balls.Rows:
    """X <- softmax(X M X^T) X under a causal mask, `LAYERS` times, with a norm after each layer unless `eps` is None."""
    cloud, one = balls.balls(x), balls.balls(exact.identity(x.ncols()))
    for _ in range(LAYERS):
        cloud = balls.attention(cloud, [balls.balls(form)], [one], causal=True)
        cloud = cloud if eps is None else normed(cloud, eps)
    return cloud


def check(trials: int, seed: int, *, norm: bool = True) -> Finding:
    """`norm=False` compares the stack with itself."""
    draws = Draws("layernorm-and-distance", seed)
    start, merging = exact.rational(START), exact.rational(MERGES)
    same, kept, usual, lost, equal, apart = [], [], [], [], [], []
    for _ in range(max(1, trials // 20)):
        form = exact.rational(FORM) * fmpq(draws.randint(1, 6), 8)
        bare, with_norms = relative(stack(start, form, None)), relative(stack(start, form, fmpq(0)))
        same.append(balls.near(with_norms if norm else bare, bare, fmpq(1, 1000)))
        kept.append(balls.near(with_norms, 1, fmpq(1, 10**60)))
        usual.append(balls.at_most(arb(fmpq(99, 100)), relative(stack(start, form, USUAL))))
        lost.append(balls.at_most(bare, arb(fmpq(1, 100))))
        together = stack(merging, form, USUAL)
        equal.append(balls.near(balls.squared_distance(*together), 0, fmpq(1, 10**60)))
        apart.append(balls.at_most(arb(fmpq(1, 10**12)), relative(stack(merging, form, None))))
    pattern = softmax(start * exact.rational(FORM) * start.transpose(), causal=True)
    mixed = pattern * start
    return [
        tally(f"{LAYERS} layers: the same relative distance of the tokens with and without norms (within 1e-3)", same),
        tally("from (1, -1), (-1, 1): with norms it stays 1", kept, role="boundary"),
        tally("with eps = 1e-5 in the norms it stays above .99", usual, role="boundary"),
        tally("without them its square falls below 1/100", lost, role="boundary"),
        tally("from (0, 1), (1, 2), eps = 1e-5: with norms the tokens are equal", equal, role="boundary"),
        tally("without them they are not", apart, role="boundary"),
        shown("one layer exactly: LN(A X) = X", str(exact.text(mixed)), normalised(mixed) == start),
    ], Counterexample(
        "layer normalisation neither contributes to nor mitigates a collapse in distance",
        {
            "X": exact.text(start),
            "W_QK / ln 2": exact.text(FORM),
            "A": exact.text(pattern),
            "A X": exact.text(mixed),
            "LN(A X)": exact.text(normalised(mixed)),
        },
        "LN(A X) = X: with the norm the tokens never come nearer (causal mask, values the tokens); without it the second comes to "
        "the first, by a factor of two a layer in the end.",
        "two tokens of width two, the smallest that a norm with eps = 0 leaves apart; one weight that is not 0",
    )


CLAIM = Claim(
    "layernorm-and-distance",
    "Layer normalisation neither contributes to nor mitigates collapse: with the same weights the distance of the tokens, relative "
    "to their size, goes the same way with and without it.",
    PAPER + ", longer abstract of the arXiv page, read about distances; against X. Wu et al., arXiv 2405.18781",
    check,
    title="Layer normalisation neither causes nor prevents a collapse",
    theory="2. Layer normalisation",
)
