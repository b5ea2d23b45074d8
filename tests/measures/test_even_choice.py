"""What even choice at random gives: against every outcome of small cases in fractions, and against the law of large numbers."""

from __future__ import annotations

import doctest
import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest

from uncollapse.errors import InputError
from uncollapse.measures import even_choice as module
from uncollapse.measures.even_choice import even_choice


def outcomes(experts: int, chosen: int, tokens: int) -> Counter[tuple[int, ...]]:
    """How often each vector of counts comes out, over all choices of all tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    choices = list(itertools.combinations(range(experts), chosen))
    for each in itertools.product(choices, repeat=tokens):
        counts = Counter(expert for choice in each for expert in choice)
        found[tuple(counts[expert] for expert in range(experts))] += 1
    return found


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(2, 1, 1), (3, 1, 6), (4, 2, 5), (4, 3, 6), (5, 1, 5)])
def test_the_expected_entropy_and_number_of_dead_experts(experts: int, chosen: int, tokens: int) -> None:
    found = outcomes(experts, chosen, tokens)
    cases = sum(found.values())
    entropy = sum(
        often / cases * -sum(c / (tokens * chosen) * math.log(c / (tokens * chosen)) for c in counts if c)
        for counts, often in found.items()
    )
    dead = sum((Fraction(often * counts.count(0), cases) for counts, often in found.items()), Fraction())
    even = even_choice(experts, chosen, tokens)
    assert even.entropy == pytest.approx(entropy / math.log(experts), rel=1e-12)
    assert even.dead == pytest.approx(float(dead), rel=1e-12)


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(4, 1, 50), (8, 2, 400), (64, 8, 30), (3, 2, 9)])
def test_the_loads_are_the_points_of_the_binomial_law(experts: int, chosen: int, tokens: int) -> None:
    share, outside = Fraction(chosen, experts), Fraction(5, 100) / (2 * experts)
    law = [math.comb(tokens, c) * share**c * (1 - share) ** (tokens - c) for c in range(tokens + 1)]
    low, high = (round(end * tokens * chosen) for end in even_choice(experts, chosen, tokens).load)
    assert sum(law[:low]) < outside <= sum(law[: low + 1])
    assert sum(law[high + 1 :]) <= outside < sum(law[high:])


def test_all_loads_lie_between_the_two_in_95_of_100_cases() -> None:
    found = outcomes(4, 1, 7)
    low, high = even_choice(4, 1, 7).load
    inside = sum(often for counts, often in found.items() if all(low <= c / 7 <= high for c in counts))
    assert 0.95 <= inside / sum(found.values()) < 1


def test_many_tokens_come_near_to_an_even_load_as_one_over_their_number() -> None:
    """H = ln E - E/2 sum (load - 1/E)^2 and so on; a load has variance p (1 - p)/(n k^2)."""
    experts, chosen, tokens = 64, 8, 10**8
    even = even_choice(experts, chosen, tokens)
    expected = experts * (1 - chosen / experts) / (2 * tokens * chosen)
    assert (1 - even.entropy) * math.log(experts) == pytest.approx(expected, rel=1e-3)
    assert even.dead == 0
    assert even.load == pytest.approx((1 / 64, 1 / 64), rel=1e-3)


@pytest.mark.parametrize("given", [(4, 1, 0), (4, 4, 3), (4, 0, 3), (1, 1, 3)])
def test_what_is_no_choice_is_refused(given: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"^even_choice: expected at least 1 token that chooses"):
        even_choice(*given)


def test_examples() -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
