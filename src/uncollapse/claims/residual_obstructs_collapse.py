"""With a residual almost every choice of weights keeps the rank, whatever the patterns; without it none may."""

from __future__ import annotations

from collections.abc import Sequence

from flint import fmpq_mat

from uncollapse.claims import balls
from uncollapse.claims.draws import Draws, heads, softmax, uniform, with_residual
from uncollapse.claims.layernorm_affine_rank import LARGE
from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, found, shown, tally
from uncollapse.measures import exact
from uncollapse.measures.normalization import rank_change
from uncollapse.records.ledger import Counterexample

EXCEPTION = (((1,),), ((1,),), ((-1,),))  # X, A, W: the head takes away what the residual carries
SATURATED = ((1, 0), (0, 1))  # post-norm, two features: the norm alone takes a direction
SHAPES = ((2, 2), (3, 2), (2, 4), (3, 3), (4, 3), (4, 5))
_SIZE = 10**6  # a minor that is not identically 0 vanishes with probability <= degree/(2 _SIZE + 1)


def two_layers(draws: Draws, n: int, d: int) -> bool | None:
    """Whether two softmax layers with residuals keep rank min(n, d) for one of three draws, by a ball determinant."""
    size = min(n, d)
    x = draws.of_rank(n, d, size, 2)
    while (
        exact.rank(exact.part(x, range(size), range(size))) < size
    ):  # the minor that is followed must not be 0 at W = 0
        x = draws.of_rank(n, d, size, 2)
    for _ in range(3):
        layers = [
            (
                [draws.matrix(d, d, _SIZE) / (4 * _SIZE) for _ in range(2)],
                [draws.matrix(d, d, _SIZE) / _SIZE for _ in range(2)],
            )
            for _ in range(2)
        ]
        if balls.certainly_full_rank([row[:size] for row in stacked(x, layers)[:size]]):
            return True
    return None


def stacked(x: fmpq_mat, layers: Sequence[tuple[Sequence[fmpq_mat], Sequence[fmpq_mat]]]) -> balls.Rows:
    """X <- X + sum_h softmax(X M_h X^T) X W_h, layer by layer; a layer is its logit forms M and its weights W."""
    y = balls.balls(x)
    for forms, weights in layers:
        y = balls.total(y, balls.attention(y, [balls.balls(m) for m in forms], [balls.balls(w) for w in weights]))
    return y


def layer(draws: Draws, x: fmpq_mat, patterns: list[fmpq_mat], residual: bool) -> fmpq_mat:
    """X + sum A_h X W_h for random W, or without the X."""
    weights = [draws.matrix(x.ncols(), x.ncols(), _SIZE) for _ in patterns]
    return (with_residual if residual else heads)(x, patterns, weights)


def witness(draws: Draws, x: fmpq_mat, patterns: list[fmpq_mat], residual: bool) -> bool:
    """Whether the layer keeps the rank of x: one draw that does proves that almost every W does; three are tried."""
    return any(exact.rank(layer(draws, x, patterns, residual)) >= exact.rank(x) for _ in range(3))


def check(trials: int, seed: int, *, residual: bool = True, patterns: str = "all kinds") -> Finding:
    """`residual=False` removes the residual; `patterns="uniform"` fixes the patterns a collapse tends to."""
    draws = Draws("residual-obstructs-collapse", seed)
    witnesses, real, deep, post, stack, bare = [], [], [], [], [], []

    for trial in range(trials):
        n, d = SHAPES[trial % len(SHAPES)]
        x = draws.of_rank(n, d, draws.randint(1, min(n, d)))
        kinds = [uniform(n), exact.identity(n), draws.pattern(n, causal=True), draws.pattern(n)]
        given = [uniform(n)] if patterns == "uniform" else draws.sample(kinds, draws.randint(1, 3))
        witnesses.append(witness(draws, x, given, residual))
        logits = x * draws.matrix(d, d, 1) * x.transpose()
        real.append(witness(draws, x, [softmax(logits)], True))
        bare.append(witness(draws, x, [softmax(logits), uniform(n)], False))
        if trial % 20 == 0:
            deep.append(two_layers(draws, n, d))
            # The pattern of equal logits is where the residual matters: without it nothing keeps more than rank one.
            level, full = [uniform(n)], draws.of_rank(n, d, min(n, d))
            outputs = [layer(draws, full, level, residual) for _ in range(3)]
            normed = exact.rank(full * exact.centring(d))  # what LN leaves of it, beta = 0: one direction at least
            post.append(normed <= max(rank_change(y, eps=LARGE).after.rank for y in outputs))
            twice = [layer(draws, y, level, residual) for y in outputs]
            stack.append(any(exact.rank(y) >= min(n, d) for y in twice))
    x, a, w = (exact.rational(part) for part in EXCEPTION)
    y = with_residual(x, [a], [w])
    saturated = rank_change(exact.rational(SATURATED), eps=LARGE)
    return [
        tally("some W has rank(X + sum A_h X W_h) >= rank X, hence almost every W (fixed patterns)", witnesses),
        tally("the same with the softmax patterns of X itself, residual in place", real),
        tally("two layers of uniform attention keep full rank", stack),
        tally("post-norm, uniform attention: some W, hence almost every W, keeps the rank that LN X has", post),
        tally("two softmax layers with residuals keep full rank (certified determinant)", deep, role="context"),
        shown(
            "post-norm with two features: the norm alone takes a direction, and no residual brings it back",
            f"rank {saturated.before.rank} -> {saturated.after.rank}",
            (saturated.before.rank, saturated.after.rank) == (2, 1),
        ),
        shown("an exceptional W exists: A = I, W = -I", f"rank {exact.rank(x)} -> {exact.rank(y)}", exact.rank(y) == 0),
        found("true softmax attention without the residual keeps the exact rank too", bare, role="context"),
    ], Counterexample(
        "every W keeps the rank (it is almost every, not every)",
        {"X": exact.text(x), "A": exact.text(a), "W": exact.text(w), "X + A X W": exact.text(y)},
        "the one head cancels the residual.",
        "one token of width one",
    )


CLAIM = Claim(
    "residual-obstructs-collapse",
    "Residual connections generically obstruct rank collapse: for any attention patterns, and for softmax attention, "
    "almost every choice of weights keeps the rank of X (post-norm: the rank that the norms leave).",
    ABSTRACT + ", in the measure-theoretic sense",
    check,
    title="Residual connections keep the rank for almost all weights",
    formula=r"\mathrm{rank}(X + \sum_h A_h X W_h) \ge \mathrm{rank}\, X",
    theory="5. Residual connections",
    kind="generic",
)
