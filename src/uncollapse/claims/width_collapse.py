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


def second_singular_value(pattern: Tensor) -> float:
    """sigma_2 of an attention matrix."""
    return float(torch.linalg.svdvals(pattern)[1])


def independent(n: int, generator: torch.Generator, causal: bool) -> Tensor:
    """Softmax of independent Gaussian logits."""
    return _softmax(DEVIATION * torch.randn(n, n, generator=generator, dtype=torch.float64), causal)


def gaussian(n: int, generator: torch.Generator, causal: bool) -> Tensor:
    """Softmax of q.k/sqrt(d_k) with Gaussian queries and keys of fixed width."""
    q, k = torch.randn(2, n, HEAD_WIDTH, generator=generator, dtype=torch.float64)
    return _softmax(q @ k.T / math.sqrt(HEAD_WIDTH), causal)


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
    slopes, levels = [], []
    for _ in range(max(10, trials // 20)):
        free = [second_singular_value(independent(n, generator, causal)) for n in TOKENS]
        fixed = [second_singular_value(gaussian(n, generator, causal)) for n in TOKENS]
        slopes.append(slope(free if independent_logits else fixed))
        levels.append(fixed[-1] * math.sqrt(HEAD_WIDTH))
    fitted, level = interval(slopes), interval(levels)
    logits = "independent logits" if independent_logits else "Gaussian q.k"
    regime = f"{'causal' if causal else 'full'} mask, {logits}, n = {TOKENS[0]}..{TOKENS[-1]}"
    # -1/4 is half way between the two laws, n^(-1/2) and a plateau; at finite n the slope is a little off -1/2.
    steep = f"slope of ln sigma_2 against ln n nearer to -1/2 than to 0 ({regime})"
    flat = f"plateau: sigma_2 sqrt(d_k) not below 1 at n = {TOKENS[-1]} for Gaussian q.k with d_k = {HEAD_WIDTH}"
    return [
        Evidence(steep, str(fitted), -0.5, fitted.below(-0.25), exact=False),
        Evidence(flat, str(level), ">= 1", level.below(1) is not True, exact=False),
    ], None


CLAIM = Claim(
    "width-collapse",
    "At initialisation the second singular value of a softmax attention matrix falls like n^(-1/2) with the number of "
    "tokens n; for Gaussian queries and keys of fixed width it levels off, never below 1/sqrt(d_k).",
    "T. Nait Saada, A. Naderi, J. Tanner, Mind the Gap, arXiv 2410.07799 (2025); plateau derived in docs/theory.md",
    check,
    hypotheses=("full mask", "for the slope: independent logits"),
    kind="measured",
)
