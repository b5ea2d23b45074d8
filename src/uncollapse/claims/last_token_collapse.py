"""When two prompts become the same bits: one token among n moves an average by 1/n, and number formats are coarse."""

from __future__ import annotations

import torch
from flint import fmpq

from uncollapse.claims.draws import uniform
from uncollapse.claims.ledger import Claim, Finding, equal, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample

# Bits after the leading one. The spacing of the numbers just below 1 is 2^-(bits + 1), half of it rounds to 1 (ties to even).
BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
LIMIT = {dtype: 2 ** (bits + 2) for dtype, bits in BITS.items()}


def last_state(n: int, differing: int, dtype: torch.dtype) -> float:
    """The mean of n ones of which `differing` are zero, rounded to the format once."""
    return torch.tensor((n - differing) / n, dtype=torch.float64).to(dtype).item()


def check(trials: int, seed: int, *, limit: dict[torch.dtype, int] | None = None) -> Finding:
    """`limit` replaces the lengths claimed."""
    limits = LIMIT if limit is None else limit
    evidence = []
    for dtype in (torch.bfloat16, torch.float16):
        n = limits[dtype]
        lengths = range(2, 2 * n)
        same = [last_state(m, 1, dtype) == last_state(m, 0, dtype) for m in lengths]
        first = next((m for m, equal_bits in zip(lengths, same, strict=True) if equal_bits), 0)
        name = str(dtype).removeprefix("torch.")
        evidence += [
            equal(f"{name}: the shortest prompts 1...1 and 1...10 whose last states have the same bits", first, n),
            tally(f"{name}: so they stay for every longer prompt that was tried", same[n - 2 :]),
        ]
    small = 5
    exactly = (uniform(small) * exact.rational([[1]] * (small - 1) + [[0]]))[small - 1, 0]
    return [
        *evidence,
        equal("the exact last state of 1, 1, 1, 1, 0", str(exactly), str(fmpq(small - 1, small)), role="context"),
        shown(
            "in float32 the prompts of 512 tokens differ",
            f"{last_state(512, 1, torch.float32):.6f} and 1",
            last_state(512, 1, torch.float32) != 1.0,
        ),
    ], Counterexample(
        "different prompts have different last states",
        {
            "n": [[str(LIMIT[torch.bfloat16])]],
            "exact difference": [[str(fmpq(1, LIMIT[torch.bfloat16]))]],
            "half the spacing below 1": [[str(fmpq(1, 2 ** (BITS[torch.bfloat16] + 2)))]],
        },
        "1 - 1/512 lies half way between 1 and the next smaller bfloat16, and rounds to 1.",
        "one differing token, values 0 and 1; no shorter prompt does it",
    )


CLAIM = Claim(
    "last-token-collapse",
    "In a head that averages its n tokens, two prompts that differ in one token get bit-identical last states once n is long "
    "enough: from n = 512 in bfloat16 and 4,096 in float16, for values 0 and 1.",
    "F. Barbero et al., Transformers need glasses!, arXiv 2406.04267 (2024); the lengths are derived in docs/theory.md",
    check,
    title="Two long prompts end in the same bits",
    formula=r"1 - \frac{1}{n} \to 1 \;\; \mathrm{for} \;\; n \ge 2^{p + 1}",
    theory="9. Collapse in width",
    hypotheses=("attention uniform over the tokens", "one rounding, to nearest, of the exact average"),
)
