"""What each claim draws: how many whole numbers from which ranges. A matrix of other sizes, one more case or one less, or other
entries change a count. Who changes what a claim is checked on, changes this table with it.

The numbers are those of 20 trials with seed 0. They were counted, not derived: what they guard is that nothing changes unseen.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from uncollapse.claims import CLAIMS, ffn_width_four, width_collapse
from uncollapse.claims.draws import Draws

PRIME = (1 << 61) - 1  # of the finite field of the QK-RMSNorm gauge
DRAWN: dict[str, dict[tuple[int, int], int]] = {
    "attention-only-collapse": {(-4, 4): 97, (-2, 2): 236, (1, 2): 40, (1, 8): 52, (2, 3): 20},
    "causal-collapse-is-geometric": {(-2, 2): 3, (1, 2): 1, (2, 3): 1},
    "relative-bias-collapse-is-geometric": {
        (-3, 3): 269,
        (-2, 2): 4,
        (1, 2): 1,
        (1, 3): 20,
        (1, 6): 160,
        (2, 4): 20,
        (3, 6): 1,
    },
    "leaders": {(-3, 3): 583, (1, 3): 20, (2, 4): 20, (2, 6): 20},
    "attention-never-gains-rank": {(-3, 3): 880, (-2, 2): 75, (-1, 1): 142, (1, 5): 540, (2, 5): 40},
    "consensus-is-invariant": {(-3, 3): 1177, (-2, 2): 134, (1, 3): 20, (1, 4): 20, (1, 5): 375, (2, 5): 20},
    "layernorm-affine-rank": {
        (-(10**4), 10**4): 137,
        (-3, 3): 397,
        (1, 2): 4,
        (2, 4): 4,
        (2, 5): 40,
        (3, 6): 4,
        (5, 6): 4,
    },
    "layernorm-rank-formula": {(-4, 4): 8, (-2, 2): 114, (-1, 1): 92, (1, 3): 15, (1, 4): 25},
    "layernorm-matrix-rank": {(-4, 4): 29, (-2, 2): 107, (-1, 1): 96, (1, 3): 15, (1, 4): 25},
    "rmsnorm-rank": {(-4, 4): 24, (-2, 2): 121, (-1, 1): 83, (1, 3): 15, (1, 4): 25},
    "layernorm-and-distance": {(1, 6): 1},
    "residual-obstructs-collapse": {
        (-(10**6), 10**6): 1241,
        (-3, 3): 214,
        (-2, 2): 8,
        (-1, 1): 209,
        (1, 2): 11,
        (1, 3): 26,
        (1, 4): 3,
        (1, 5): 310,
    },
    "residual-needs-no-mlp": {(-(10**6), 10**6): 792, (-3, 3): 228, (-1, 1): 13, (1, 2): 13, (1, 3): 7, (1, 5): 624},
    "random-residuals-are-geometric": {(-3, 3): 46, (1, 4): 10, (2, 4): 5},
    "mlp-leaves-the-span": {(-3, 3): 1281, (1, 1): 2, (1, 2): 9, (1, 3): 5, (1, 4): 4, (1, 5): 276, (2, 5): 20},
    "mlp-leaves-the-reachable-space": {
        (-3, 3): 793,
        (-2, 2): 2070,
        (1, 1): 8,
        (1, 2): 3,
        (1, 3): 9,
        (1, 4): 20,
        (1, 5): 536,
        (3, 5): 20,
    },
    "attention-is-affine-given-patterns": {(-3, 3): 724, (1, 2): 40, (1, 3): 20, (1, 5): 279, (2, 3): 20},
    "head-channel-ambiguity": {(-3, 3): 48, (1, 3): 8, (1, 4): 4},
    "head-observers": {(-3, 3): 375, (0, 2): 2, (0, 3): 1, (0, 4): 1, (1, 2): 4, (1, 3): 4, (1, 4): 4, (1, 5): 4},
    "attention-weights-unidentifiable": {(-3, 3): 142, (1, 3): 20, (1, 5): 73, (2, 6): 20},
    "mlp-cannot-unmix": {(-5, 5): 82, (-3, 3): 3332, (1, 2): 20, (1, 3): 20, (2, 3): 40},
    "pgop-gauge": {(-3, 3): 183, (0, 1): 4, (1, 2): 4, (1, 3): 28, (1, 4): 18, (2, 3): 4},
    "pgop-recovery": {(1, 2): 6, (1, 3): 50, (1, 4): 12},
    "channel-gates": {(-3, 3): 248, (2, 3): 4},
    "entropy-floor": {(-8, 8): 82, (1, 40): 5, (1, 60): 19, (2, 6): 20},
    "dispersion": {
        (0, 1): 11,
        (0, 2): 38,
        (0, 3): 10,
        (0, 4): 17,
        (0, 5): 24,
        (0, 6): 24,
        (1, 6): 20,
        (1, 9): 20,
        (2, 12): 20,
    },
    "scaling-fixed-points": {(0, 4): 52, (96, 104): 20, (1, 9): 72, (2, 5): 20},
    "sinks-against-overmixing": {(-3, 3): 376, (0, 1): 6, (0, 2): 5, (0, 3): 9, (1, 3): 20, (2, 4): 20},
    "token-permutation": {(-3, 3): 533, (-2, 2): 244, (1, 3): 20, (2, 4): 20},
    "head-permutation": {(-3, 3): 192, (-1, 1): 180},
    "value-output-gauge": {(-3, 3): 1255, (1, 5): 2304},
    "query-key-gauge": {(-3, 3): 2177, (0, PRIME - 1): 1815, (1, 3): 10, (1, PRIME - 1): 164},
    "gauge-with-norms": {(-3, 3): 2823, (1, 2): 1, (1, 3): 22, (1, 5): 4962, (2, 4): 2},
    "four-symmetries": {(-3, 3): 1467, (-2, 2): 382, (1, 2): 20, (1, 3): 20, (1, 5): 598, (2, 4): 20},
}


# Those that draw none have a generator of their own, or nothing to draw.
NONE = {"ffn-width-four", "pgop-overhead", "width-collapse", "last-token-collapse"}


def test_every_claim_is_in_the_table() -> None:
    assert DRAWN.keys() | NONE == CLAIMS.keys()


@pytest.mark.parametrize("claim", DRAWN)
def test_each_claim_draws_as_many_numbers_of_each_range_as_before(claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    whole = random.Random.randrange

    def counted(self: Draws, start: int, stop: int | None = None, step: int = 1) -> int:
        seen[(0, start - 1) if stop is None else (start, stop - 1)] += 1
        return whole(self, start, stop, step)

    monkeypatch.setattr(Draws, "randrange", counted, raising=False)
    CLAIMS[claim].run(20, 0)
    assert seen == DRAWN[claim]


# Normal numbers of torch's generator: how many tensors of which sizes.
LENGTHS = (64, 128, 256, 512)
NORMAL: dict[str, dict[tuple[int, ...], int]] = {
    # Logits, and queries and keys of heads of width 16, ten times; of width 4 twenty times; one channel over eight tokens.
    "width-collapse": {(n, n): 10 for n in LENGTHS}
    | {(2, n, 16): 10 for n in LENGTHS}
    | {(2, n, 4): 20 for n in LENGTHS}
    | {(2, 8, 1): 200},
    # 20 pairs of weights of each width, and tokens for every fourth of them.
    "ffn-width-four": {(16, 16): 40, (6144, 16): 20}
    | {size: 20 for r in (2, 4, 8) for size in ((16, 16 * r), (16 * r, 16))},
    # 20 stacks of 24 layers for each of two sizes of the weights.
    "random-residuals-are-geometric": {(16, 64): 40, (64, 64): 40 * 24},
}


@pytest.mark.parametrize("claim", NORMAL)
def test_each_measured_claim_draws_as_many_tensors_of_each_size_as_before(
    claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    lengths: set[int] = set()
    whole = torch.randn

    def counted(*size: int, **options: object) -> torch.Tensor:
        seen[size] += 1
        return whole(*size, **options)

    # What is made of them says nothing here, and costs.
    monkeypatch.setattr(width_collapse, "second_singular_value", lambda pattern: 1.0)
    monkeypatch.setattr(ffn_width_four, "innovation", lambda x, y: 0.25)
    monkeypatch.setattr(ffn_width_four, "effective_rank", lambda hidden: (lengths.add(len(hidden)), 1.0)[1])
    monkeypatch.setattr(torch, "randn", counted)
    CLAIMS[claim].run(20, 0)
    assert seen == NORMAL[claim]
    assert lengths == ({1024} if claim == "ffn-width-four" else set())
