"""Layer normalisation and the distance to consensus: it can keep tokens apart for ever, and it can make them equal at once.

About the exact rank see `layernorm-rank-formula`. Wu et al. (arXiv 2405.18781) show that layer normalisation admits stacks that
do not collapse; the smallest one has two tokens of width two.
"""

from __future__ import annotations

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import PAPER, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

LAYERS = 12
START = ((1, -1), (-1, 1))
PATTERN = ((1, 0), (fmpq(1, 4), fmpq(3, 4)))
MERGES = ((0, 1), (1, 2))  # they differ by a multiple of (1, 1)


def normalised(x: fmpq_mat) -> fmpq_mat:
    """Layer normalisation of tokens of width two with eps = 0: (a, b) -> sign(a - b) (1, -1). Exact; a = b has none."""
    rows = []
    for a, b in x.tolist():
        if a == b:
            raise ZeroDivisionError("a token with equal entries has no layer normalisation at eps = 0")
        rows.append([1, -1] if a > b else [-1, 1])
    return exact.rational(rows)


def squared_distance(x: fmpq_mat) -> fmpq:
    """Of the two tokens."""
    first, second = x.tolist()
    return sum(((a - b) * (a - b) for a, b in zip(first, second, strict=True)), fmpq(0))


def check(trials: int, seed: int, *, norm: bool = True) -> Finding:
    """`norm=False` compares the stack with itself."""
    draws = Draws("layernorm-and-distance", seed)
    same, kept, lost = [], [], []
    for _ in range(max(1, trials // 4)):
        own = fmpq(draws.randint(6, 9), 10)  # what the second token gives to itself
        pattern = exact.rational([[1, 0], [1 - own, own]])
        bare = other = exact.rational(START)
        for _ in range(LAYERS):
            bare = pattern * bare
            other = normalised(pattern * other) if norm else pattern * other
        same.append(squared_distance(bare) == squared_distance(other))
        kept.append(squared_distance(other) == squared_distance(exact.rational(START)))
        lost.append(squared_distance(bare) == own ** (2 * LAYERS) * squared_distance(exact.rational(START)))
    merging = exact.rational(MERGES)
    merged = normalised(merging)
    pattern, start = exact.rational(PATTERN), exact.rational(START)
    return [
        tally(f"{LAYERS} attention layers: the same distance of the tokens with and without norms", same),
        tally("with the norms the distance stays as it was", kept, role="context"),
        tally("without them it falls geometrically", lost, role="context"),
        shown(
            "tokens that differ by a multiple of (1, 1) become equal behind the norm",
            f"squared distance {squared_distance(merging)} -> {squared_distance(merged)}",
            squared_distance(merged) == 0,
        ),
    ], Counterexample(
        "layer normalisation neither contributes to nor mitigates a collapse in distance",
        {
            "X": exact.text(start),
            "A": exact.text(pattern),
            "A X": exact.text(pattern * start),
            "LN(A X)": exact.text(normalised(pattern * start)),
        },
        "LN(A X) = X: with the norm the tokens never come nearer; without it their distance is 3/4 of it, layer by layer.",
        "two tokens of width two, the smallest that a norm with eps = 0 leaves apart",
    )


CLAIM = Claim(
    "layernorm-and-distance",
    "Layer normalisation neither contributes to nor mitigates collapse: with the same weights the distance of the tokens goes the "
    "same way with and without it.",
    PAPER + ", longer abstract of the arXiv page, read about distances; against X. Wu et al., arXiv 2405.18781",
    check,
    title="Layer normalisation neither causes nor prevents a collapse",
    theory="2. Layer normalisation",
)
