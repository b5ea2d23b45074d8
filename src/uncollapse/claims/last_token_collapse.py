"""When two prompts become the same bits: one token among n moves an average by 1/n, and number formats are coarse."""

from __future__ import annotations

import torch
from flint import fmpq

from uncollapse.claims.ledger import Claim, Finding, equal, shown, tally
from uncollapse.measures import exact
from uncollapse.records.ledger import Counterexample, Evidence

# Bits after the leading one. The spacing of the numbers just below 1 is 2^-(bits + 1), half of it rounds to 1 (ties to even).
BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
LIMIT = {dtype: 2 ** (bits + 2) for dtype, bits in BITS.items()}

REPEATED = 2 * LIMIT[torch.bfloat16] - 1  # 1 - 2/(n + 1) rounds to 1 as well


def last_state(n: int, differing: int, dtype: torch.dtype) -> float:
    """The mean of n ones of which `differing` are zero, rounded to the format once."""
    return torch.tensor((n - differing) / n, dtype=torch.float64).to(dtype).item()


def with_the_last_repeated(n: int, dtype: torch.dtype) -> tuple[float, float]:
    """The pair of the paper: n - 1 ones and a zero, and the same with the zero twice."""
    return last_state(n, 1, dtype), last_state(n + 1, 2, dtype)


def in_torch(n: int, dtype: torch.dtype) -> bool:
    """Whether torch's own attention, with all keys equal, ends in the same bits for both prompts."""
    keys = torch.zeros(n, 1, dtype=dtype)[None, None]
    ones = torch.ones_like(keys)
    other = (torch.arange(n) < n - 1).to(dtype).view_as(ones)
    query = keys[:, :, -1:]
    mixed = [torch.nn.functional.scaled_dot_product_attention(query, keys, values) for values in (ones, other)]
    return torch.equal(*mixed)


def check(trials: int, seed: int, *, limit: dict[torch.dtype, int] | None = None) -> Finding:
    """`limit` replaces the lengths claimed."""
    limits = LIMIT if limit is None else limit
    evidence = []
    for dtype in (torch.bfloat16, torch.float16):
        n = limits[dtype]
        lengths = range(2, 2 * n)
        same = [last_state(m, 1, dtype) == 1 for m in lengths]
        first = next((m for m, equal_bits in zip(lengths, same, strict=True) if equal_bits), "none")
        name = str(dtype).removeprefix("torch.")
        evidence += [
            equal(f"{name}: the shortest prompts 1...1 and 1...10 whose last states have the same bits", first, n),
            tally(f"{name}: so they stay for every longer prompt that was tried", same[n - 2 :]),
        ]
    repeated = [len(set(with_the_last_repeated(m, torch.bfloat16))) == 1 for m in range(2, 2 * REPEATED)]
    by_torch = [in_torch(m, torch.bfloat16) for m in range(2, 2 * LIMIT[torch.bfloat16])]
    small = 5
    (exactly,) = (exact.ones(1, small) * exact.rational([[1]] * (small - 1) + [[0]]) / small).entries()
    return [
        *evidence,
        equal(
            "bfloat16, 1...10 against 1...100 (the last token repeated): the length from which they always agree",
            _always(repeated),
            REPEATED,
            role="context",
        ),
        Evidence(
            f"the same prompts in the bfloat16 attention of torch {torch.__version__}, all keys equal: from this length on",
            _always(by_torch),
            None,
            None,
            "context",
            exact=False,
        ),
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


def _always(same: list[bool]) -> int:
    """The length from which on all are the same; the first length is 2."""
    return 2 + max((i + 1 for i, each in enumerate(same) if not each), default=0)


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
