"""The second singular value of a random attention matrix against the number of tokens, and where it levels off."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from uncollapse.claims.intervals import interval
from uncollapse.claims.ledger import Claim, Finding
from uncollapse.records.ledger import Evidence

TOKENS = (64, 128, 256, 512)
DEVIATION = 0.5  # of the independent logits
HEAD_WIDTH = 16
NARROW = 4  # so narrow that the plateau is reached at the lengths above
DRAWS_OF_NARROW = 20  # its single values scatter more


def second_singular_value(pattern: Tensor) -> float:
    """sigma_2 of an attention matrix."""
    return float(torch.linalg.svdvals(pattern)[1])


def independent(n: int, generator: torch.Generator, causal: bool) -> Tensor:
    """Softmax of independent Gaussian logits."""
    return _softmax(DEVIATION * torch.randn(n, n, generator=generator, dtype=torch.float64), causal)


def gaussian(n: int, generator: torch.Generator, causal: bool, head_width: int = HEAD_WIDTH) -> Tensor:
    """Softmax of q.k/sqrt(d_k) with Gaussian queries and keys of fixed width."""
    q, k = torch.randn(2, n, head_width, generator=generator, dtype=torch.float64)
    return _softmax(q @ k.T / math.sqrt(head_width), causal)


def _softmax(logits: Tensor, causal: bool) -> Tensor:
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(logits, -1)


def slope(values: list[float]) -> float:
    """Least-squares slope of ln values against ln tokens."""
    x, y = [math.log(n) for n in TOKENS], [math.log(value) for value in values]
    mean_x, mean_y = fmean(x), fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def check(trials: int, seed: int, *, causal: bool = False, independent_logits: bool = True) -> Finding:
    """`causal=True` masks; `independent_logits=False` fits the slope on Gaussian queries and keys instead."""
    generator = torch.Generator().manual_seed(seed)
    slopes: list[float] = []
    levels: dict[int, list[float]] = {n: [] for n in TOKENS[-2:]}
    for _ in range(max(10, trials // 20)):
        free = [second_singular_value(independent(n, generator, causal)) for n in TOKENS]
        fixed = [second_singular_value(gaussian(n, generator, causal)) for n in TOKENS]
        slopes.append(slope(free if independent_logits else fixed))
        for n in levels:
            levels[n].append(fixed[TOKENS.index(n)] * math.sqrt(HEAD_WIDTH))
    narrow = [
        slope([second_singular_value(gaussian(n, generator, causal, NARROW)) for n in TOKENS])
        for _ in range(max(DRAWS_OF_NARROW, trials // 20))
    ]
    short = [second_singular_value(gaussian(8, generator, causal, 1)) for _ in range(200)]
    fitted, levelled, below = interval(slopes), interval(narrow), interval(short)
    logits = "independent logits" if independent_logits else "Gaussian q.k"
    regime = f"{'causal' if causal else 'full'} mask, {logits}, n = {TOKENS[0]}..{TOKENS[-1]}"
    # -1/4 is half way between the two laws, n^(-1/2) and a plateau; at finite n the slope is a little off -1/2.
    steep = f"slope of ln sigma_2 against ln n nearer to -1/2 than to 0 ({regime})"
    flat = f"slope for Gaussian q.k with d_k = {NARROW} nearer to 0 than to -1/2 (the same mask and lengths)"
    evidence = [
        Evidence(steep, str(fitted), -0.5, fitted.below(-0.25), exact=False),
        Evidence(flat, str(levelled), 0, _not(levelled.below(-0.25)), exact=False),
    ]
    for n, values in levels.items():
        level = interval(values)
        what = f"sigma_2 sqrt(d_k) between 1 and 2 at n = {n} for Gaussian q.k with d_k = {HEAD_WIDTH}"
        outcomes = {_not(level.below(1)), level.below(2)}
        evidence.append(
            Evidence(
                what,
                str(level),
                "1 to 2",
                False if False in outcomes else (None if None in outcomes else True),
                exact=False,
            )
        )
    what = "sigma_2 sqrt(d_k) at n = 8, d_k = 1: below 1, for 1/sqrt(d_k) bounds the limit only"
    evidence.append(Evidence(what, str(below), "< 1", below.below(1), role="context", exact=False))
    return evidence, None


def _not(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


CLAIM = Claim(
    "width-collapse",
    "At initialisation the second singular value of a softmax attention matrix falls like n^(-1/2) with the number of "
    "tokens n; for Gaussian queries and keys of fixed width it levels off instead, at a limit of at least 1/sqrt(d_k).",
    "T. Nait Saada, A. Naderi, J. Tanner, Mind the Gap, arXiv 2410.07799 (2025); plateau derived in docs/theory.md",
    check,
    title="In long contexts attention at initialisation tends to one mixture",
    formula=r"\sigma_2(A) \sim n^{-1/2}, \quad \mathrm{or} \;\; \sigma_2 \ge \frac{1}{\sqrt{d_k}} \;\; \mathrm{in\ the\ limit}",
    theory="9. Collapse in width",
    hypotheses=("full mask", "for the slope: independent logits"),
    kind="measured",
)
