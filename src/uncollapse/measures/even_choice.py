"""What the load of a router's experts is where every token chooses at random, each expert as likely as any other: what the load of
a trained router is compared with.

A short text leaves experts without tokens and lowers the entropy by chance alone. These figures say by how much. When not to use
them: as what training should reach. Tokens are not independent of each other, and experts that specialise are chosen unevenly.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from uncollapse.errors import InputError

_OUTSIDE = 0.05  # how often some load lies outside `EvenChoice.load`, at most
_WIDE = 12.0  # standard deviations around the mean, beyond which a count has no probability that a double holds


class EvenChoice(NamedTuple):
    """What comes of even choice at random: the expected `entropy` of the load beside ln(experts), the expected number of `dead`
    experts, and the `load` (lowest, highest share of all choices) between which all of the experts lie in 95 % of the cases."""

    entropy: float
    dead: float
    load: tuple[float, float]


@functools.cache
def even_choice(experts: int, chosen: int, tokens: int) -> EvenChoice:
    """The load of `experts` of which each of `tokens` independent tokens draws `chosen` different ones, all equally likely.

    An expert is then drawn by c tokens with c from the binomial law of n = tokens and p = k/E, and all counts add up to n k. So by
    linearity, exactly up to rounding: E H = -E sum_c P(c) c/(n k) ln(c/(n k)), and E (1 - p)^n experts are dead. For `load` each
    expert gets the E-th part of 5 % to lie outside, half of it at either end; together they lie outside less often than that
    (Bonferroni).

    >>> even_choice(4, 1, 10)
    EvenChoice(entropy=0.8766..., dead=0.2252..., load=(0.0, 0.6))

    Raises `InputError` where there are no tokens, or not 1 <= chosen < experts.
    """
    if tokens < 1 or not 1 <= chosen < experts:
        raise InputError(
            f"even_choice: expected at least 1 token that chooses at least 1 of more experts, got experts={experts}, "
            f"chosen={chosen}, tokens={tokens}. The router may not have been met. Pass what it chose from."
        )
    share = chosen / experts
    counts, probabilities = _binomial(tokens, share)
    loads = counts / (tokens * chosen)
    entropy = experts * float((probabilities * torch.special.entr(loads)).sum())
    ends = torch.tensor([_OUTSIDE / (2 * experts), 1 - _OUTSIDE / (2 * experts)], dtype=torch.float64)
    places = torch.searchsorted(probabilities.cumsum(0), ends).clamp(max=len(loads) - 1)
    low, high = loads[places].tolist()
    return EvenChoice(entropy / math.log(experts), experts * math.exp(tokens * math.log1p(-share)), (low, high))


def _binomial(tokens: int, share: float) -> tuple[Tensor, Tensor]:
    """The counts of a binomial law that have a probability, and these."""
    reach = _WIDE * math.sqrt(tokens * share * (1 - share)) + _WIDE**2
    low, high = max(0, math.floor(tokens * share - reach)), min(tokens, math.ceil(tokens * share + reach))
    counts = torch.arange(low, high + 1, dtype=torch.float64)
    n = torch.tensor(float(tokens), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n - counts + 1)
    logs = ways + counts * math.log(share) + (n - counts) * math.log1p(-share)
    return counts, logs.softmax(0)  # what rounding of large logarithms takes from the sum is given back
