"""Three lower bounds on the entropy of a softmax row, in rigorous interval arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flint import arb, fmpq

from uncollapse.claims.balls import at_most, near
from uncollapse.claims.draws import Draws
from uncollapse.claims.ledger import Claim, Finding, tally


def entropy(logits: Sequence[fmpq]) -> Any:
    """H = log-sum-exp minus the mean logit under the softmax, in nats."""
    weights = [arb(s).exp() for s in logits]
    mass = sum(weights, arb(0))
    return mass.log() - sum((w * arb(s) for w, s in zip(weights, logits, strict=True)), arb(0)) / mass


def floor(norm: Any, keys: int) -> Any:
    """Zhai et al.'s bound for a centred logit 2-norm `norm` over `keys` keys."""
    t = arb(keys)
    beta = (-norm * (t / (t - 1)).sqrt()).exp()
    return (1 + (t - 1) * beta).log() + norm * (t * (t - 1)).sqrt() * beta / (1 + (t - 1) * beta)


def centred_norm(logits: Sequence[fmpq]) -> Any:
    """The 2-norm of the logits minus their mean."""
    mean = sum(logits, fmpq(0)) / len(logits)
    return arb(sum(((s - mean) * (s - mean) for s in logits), fmpq(0))).sqrt()


def floor_by_max(logits: Sequence[fmpq]) -> Any:
    """log-sum-exp minus the largest logit: equal to H where all logits are equal."""
    return sum((arb(s).exp() for s in logits), arb(0)).log() - arb(max(logits))


def floor_by_mean(logits: Sequence[fmpq]) -> Any:
    """ln T minus what the largest logit is above the mean."""
    return arb(len(logits)).log() - arb(max(logits) - sum(logits, fmpq(0)) / len(logits))


def check(trials: int, seed: int, *, share: fmpq | int = 1) -> Finding:
    """`share` < 1 uses only that share of the logit norm: the floor is then too high."""
    draws = Draws("entropy-floor", seed)
    above, tight, monotone, by_max, by_mean = [], [], [], [], []
    for trial in range(trials):
        keys = draws.randint(2, 6)
        size = draws.choice([1, 4, 12])
        logits = [fmpq(draws.randint(-8, 8), 8) * size for _ in range(keys)]
        if trial % 4 == 1:  # two high keys, and one low: the rivals of the extremal row
            high = fmpq(draws.randint(1, 40), 8)
            logits = [high, high, *([fmpq(0)] * (keys - 2))] if trial % 8 == 1 else [-high, *([fmpq(0)] * (keys - 1))]
        if len(set(logits)) == 1:
            continue
        norm, h = centred_norm(logits), entropy(logits)
        # Rows of the extremal kind attain the floor, and balls cannot order equal numbers.
        if len(set(sorted(logits)[:-1])) > 1:
            above.append(at_most(floor(norm * arb(share), keys), h))
            monotone.append(at_most(floor(norm * 2, keys), floor(norm, keys)))
        extremal = [fmpq(draws.randint(1, 60), 8), *([fmpq(0)] * (keys - 1))]
        tight.append(near(entropy(extremal), floor(centred_norm(extremal) * arb(share), keys), arb(10) ** -60))
        by_max.append(at_most(floor_by_max(logits), h))
        by_mean.append(at_most(floor_by_mean(logits), h))
    return [
        tally("H is at least the floor of the centred norm, on rows of every other kind", above),
        tally("equality (to 1e-60) for one key above T - 1 equal ones", tight),
        tally("the floor falls as the norm grows, so an upper bound on the norm serves", monotone),
        tally("H >= log-sum-exp - max logit", by_max),
        tally("H >= ln T - (max - mean logit)", by_mean),
    ], None


CLAIM = Claim(
    "entropy-floor",
    "A softmax row over T keys whose centred logits have 2-norm s has entropy at least ln(1 + (T-1)b) + "
    "s sqrt(T(T-1)) b/(1 + (T-1)b), b = exp(-s sqrt(T/(T-1))), and the bound is attained.",
    "S. Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296; "
    "proved in docs/theory.md for a given row",
    check,
    title="The least entropy of logits of a given size",
    formula=r"H \ge \ln(1 + (T - 1) b) + \frac{\varsigma \sqrt{T (T - 1)}\, b}{1 + (T - 1) b}, "
    r"\quad b = e^{-\varsigma \sqrt{T / (T - 1)}}",
    theory="10. Entropy",
)
