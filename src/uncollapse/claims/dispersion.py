"""How sharp attention over n keys can be at most, given the range of its logits.

With all logits in an interval of length delta, the largest weight is at most e^delta/(n - 1 + e^delta): the others are at least
e^-delta of it. And H >= ln n - (max - mean) >= ln n - delta. So a head whose logits are bounded (by QK normalisation or a soft
cap) cannot put the weight w on one key once n > 1 + e^delta (1 - w)/w.
"""

from __future__ import annotations

from flint import arb, fmpq

from uncollapse.claims.balls import at_most, near
from uncollapse.claims.draws import Draws, softmax
from uncollapse.claims.entropy_floor import entropy
from uncollapse.claims.ledger import Claim, Finding, tally
from uncollapse.measures import exact


def sharpest(bits: int, keys: int) -> fmpq:
    """The largest weight of one key at the logit bits ln 2 among others at 0."""
    return max(softmax(exact.rational([[bits, *([0] * (keys - 1))]])).entries())


def check(trials: int, seed: int, *, share: fmpq | int = 1) -> Finding:
    """`share` < 1 claims the bounds for that share of the range."""
    draws = Draws("dispersion", seed)
    weights, attained, entropies, reach = [], [], [], []
    for _ in range(trials):
        n, bits = draws.randint(2, 12), draws.randint(1, 6)
        logits = [0, bits, *(draws.randint(0, bits) for _ in range(n - 2))]
        draws.shuffle(logits)
        largest = max(softmax(exact.rational([logits])).entries())
        power = arb(2) ** arb(fmpq(bits) * share)
        bound = power / (n - 1 + power)
        # Rows of the extremal kind attain the bound, and balls cannot order equal numbers.
        if logits.count(0) < n - 1:
            weights.append(at_most(arb(largest), bound))
        attained.append(near(arb(sharpest(bits, n)), bound, arb(10) ** -60))
        natural = [fmpq(entry, 2) for entry in logits]
        delta = max(natural) - min(natural)
        entropies.append(at_most(arb(n).log() - arb(delta * share), entropy(natural)))
        wanted = fmpq(draws.randint(1, 9), 10)
        length = 1 + 2**bits * (1 - wanted) / wanted
        longer = int(length.p // length.q) + 1
        beyond, within = sharpest(bits, longer), sharpest(bits, longer - 1)
        reach.append(beyond <= wanted <= within)
    return [
        tally("the largest weight is at most e^delta/(n - 1 + e^delta), rows of every other kind", weights),
        tally("one key at the top, all others at the bottom attains it (to 1e-60)", attained),
        tally("H >= ln n - delta", entropies),
        tally(
            "beyond n = 1 + e^delta (1 - w)/w no key has more than the weight w, and up to it one can (exact)", reach
        ),
    ], None


CLAIM = Claim(
    "dispersion",
    "Softmax over n keys with logits in a range delta gives no key more than e^delta/(n - 1 + e^delta) and has entropy at least "
    "ln n - delta: with bounded logits attention must disperse as n grows.",
    "P. Velickovic et al., softmax is not enough (for sharp size generalisation), arXiv 2410.01104 (2024)",
    check,
    title="Bounded logits must disperse",
    formula=r"\max_j a_j \le \frac{e^\delta}{n - 1 + e^\delta}, \quad H \ge \ln n - \delta",
    theory="10. Entropy",
)
