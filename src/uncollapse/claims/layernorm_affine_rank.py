"""The paper's sentence on layer normalisation, taken at its word: refuted in both directions by small matrices."""

from __future__ import annotations

from flint import fmpq, fmpq_mat

from uncollapse.claims.draws import Draws, shifted
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import rank_change
from uncollapse.records.ledger import Counterexample, Evidence

# Found by `search.smallest`, for every eps tried at once; a test repeats the search.
LOSES = ((0, 1), (1, 2))
GAINS = ((0, 0, 1), (0, 1, 1), (0, 2, 1))
USUAL, LARGE = fmpq(1, 100_000), fmpq(1)  # that of nn.LayerNorm, and one beside which no token is large
EPSILONS = (fmpq(0), USUAL, LARGE)


def changes(x: fmpq_mat) -> list[int]:
    """The change of the affine rank at each eps of `EPSILONS`; empty where the layer is undefined at eps = 0."""
    if any(len(set(row)) == 1 for row in x.tolist()):
        return []
    return [rank_change(x, eps=eps).affine_rank for eps in EPSILONS]


def _regimes(draws: Draws, rounds: int) -> list[Evidence]:
    """What happens instead, for generic clouds of width d >= 3 (r >= 2 through the origin): the change to expect."""
    outcomes: dict[str, list[bool | None]] = {
        "saturated, rank X = n and 1_d outside the row space: unchanged": [],
        "more tokens than width, rank X = d: one direction or more lost": [],
        "a flat of dimension r off the origin becomes min(r + 1, n - 1, d - 1)": [],
        "a flat of dimension r >= 2 through the origin, r < min(n, d), keeps r": [],
        "consensus stays consensus": [],
    }
    saturated, over, off, through, consensus = outcomes.values()
    for _ in range(rounds):
        n, d = draws.randint(2, 4), draws.randint(5, 6)
        x = draws.of_rank(n, d, n)
        if not exact.in_row_space(x, exact.ones(1, d)):
            saturated.append(rank_change(x, eps=LARGE).affine_rank == 0)
        x = draws.of_rank(d, n, n)
        if exact.affine_rank(x) == n:
            over.append(rank_change(x, eps=LARGE).affine_rank <= -1)
        d, r = draws.randint(3, 6), draws.randint(1, 2)
        x = shifted(draws.of_rank(n, d, min(r, n - 1), 10**4), draws.matrix(1, d, 10**4))
        flat = exact.affine_rank(x)
        if exact.rank(x) == flat + 1:
            off.append(rank_change(x, eps=LARGE).after.affine_rank == min(flat + 1, n - 1, d - 1))
        x = draws.of_rank(5, d, 2, 10**4)
        if exact.affine_rank(x) == 2:
            through.append(rank_change(x, eps=LARGE).after.affine_rank == 2)
        consensus.append(rank_change(exact.ones(n) * draws.matrix(1, d), eps=LARGE).after.affine_rank == 0)
    return [tally(f"instead, {what}", cases, role="context") for what, cases in outcomes.items()]


def check(trials: int, seed: int, *, regime: str = "any") -> Finding:
    """`regime="saturated"` keeps clouds with rank X = n and 1_d outside the row space: there the sentence is true."""
    draws = Draws("layernorm-affine-rank", seed)
    outcomes: list[bool | None] = []
    for _ in range(trials):
        n, d = draws.randint(2, 5), draws.randint(2, 5)
        x = draws.matrix(n, d)
        if regime == "saturated" and (exact.rank(x) < n or exact.in_row_space(x, exact.ones(1, d))):
            continue
        outcomes.append(rank_change(x, eps=USUAL).affine_rank == 0)
    evidence = [tally(f"affine rank unchanged on random integer clouds ({regime} regime)", outcomes)]
    if regime != "any":
        return evidence, None
    loses, gains = exact.rational(LOSES), exact.rational(GAINS)
    for name, x in (("two tokens that differ by (1, 1)", loses), ("three collinear tokens off the origin", gains)):
        change = rank_change(x, eps=0)
        story = f"{change.before.affine_rank} -> {change.after.affine_rank}, brackets {change.brackets}"
        kept = all(c == 0 for c in changes(x))
        evidence.append(shown(f"affine rank unchanged on {name}, eps 0, 1e-5 and 1", story, kept, role="statement"))
    evidence += _regimes(draws, max(1, trials // 5))
    return evidence, Counterexample(
        "layer normalisation preserves the affine rank",
        {"X that loses": exact.text(loses), "X that gains": exact.text(gains)},
        "LN maps both rows of the first matrix to one point for every eps (affine rank 1 -> 0) and the three collinear "
        "rows of the second to three points that are not collinear (1 -> 2).",
        "fewest entries, then smallest sum of entries, among non-negative integer matrices of width 2 or more whose "
        "affine rank changes at eps = 0, 1e-5 and 1 alike",
    )


CLAIM = Claim(
    "layernorm-affine-rank",
    "Layer normalisation is precisely affine-rank-neutral: it preserves the affine rank of the token set exactly.",
    ABSTRACT,
    check,
    title="Layer normalisation keeps the affine rank",
    formula=r"\mathrm{affrank}(\mathrm{LN}\, X) = \mathrm{affrank}\, X",
    theory="2. Layer normalisation",
)
