"""Without positions and mask a block does not know the order of its tokens."""

from __future__ import annotations

from flint import fmpq_mat

from uncollapse.claims.draws import Draws, relu, shifted, softmax, with_residual
from uncollapse.claims.ledger import HERE, Claim, Finding, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

X = ((0,), (1,))
POSITIONS = ((0,), (1,))  # one number is added at each place


def permutation(order: list[int]) -> fmpq_mat:
    """The matrix P with (P X)_i = X_order[i]."""
    return exact.part(exact.identity(len(order)), order, range(len(order)))


def check(trials: int, seed: int, *, causal: bool = False, positions: bool = False) -> Finding:
    """`causal=True` adds the mask, `positions=True` adds a row of its own to every position."""
    draws = Draws("token-permutation", seed)
    maps, blocks = [], []
    for _ in range(trials):
        n, d = draws.randint(2, 4), draws.randint(1, 3)
        x = draws.matrix(n, d, 2)
        turn = permutation(draws.sample(range(n), n))
        form, value, up, down = draws.matrix(d, d, 2), draws.matrix(d, d), draws.matrix(d, 4), draws.matrix(4, d)
        offsets = draws.of_rank(n, d, min(n, d)) if positions else exact.zeros(n, d)
        bias = draws.matrix(1, 4)

        def pattern(z: fmpq_mat, form: fmpq_mat = form, offsets: fmpq_mat = offsets) -> fmpq_mat:
            placed = z + offsets
            return softmax(placed * form * placed.transpose(), causal=causal)

        def block(
            z: fmpq_mat, value: fmpq_mat = value, up: fmpq_mat = up, down: fmpq_mat = down, bias: fmpq_mat = bias
        ) -> fmpq_mat:
            y = with_residual(z, [pattern(z)], [value])
            return y + relu(shifted(y * up, bias)) * down

        maps.append(pattern(turn * x) == turn * pattern(x) * turn.transpose())
        blocks.append(block(turn * x) == turn * block(x))
    x, swap = exact.rational(X), permutation([1, 0])
    after = softmax(exact.zeros(2, 2), causal=True) * swap * x
    before = swap * softmax(exact.zeros(2, 2), causal=True) * x
    added = exact.rational(POSITIONS)
    placed, moved = swap * x + added, swap * (x + added)
    return [
        tally("A(PX) = P A(X) P^T for softmax attention without positions and mask", maps),
        tally("a block of attention, residual and ReLU MLP commutes with every P", blocks),
        shown("a causal mask breaks it", f"{exact.text(after)} against {exact.text(before)}", after != before),
        shown(
            "an added position breaks it",
            f"{exact.text(placed)} against {exact.text(moved)}",
            placed != moved,
        ),
    ], Counterexample(
        "attention commutes with permutations under a causal mask",
        {"X": exact.text(x), "A(PX) P X": exact.text(after), "P A(X) X": exact.text(before)},
        "the first token sees only itself, whichever token it is (all logits 0).",
        "two tokens of width one, entries 0 and 1",
    )


CLAIM = Claim(
    "token-permutation",
    "Self-attention, residual and MLP commute with permutations of the tokens, f(PX) = P f(X), and A(PX) = P A(X) P^T.",
    HERE,
    check,
    title="Attention does not know the order of the tokens",
    formula=r"f(\Pi X) = \Pi f(X)",
    theory="11. Symmetries",
    hypotheses=("no positions in tokens or logits", "no mask but a full one"),
)
