"""Is there anything special about a feed-forward width of four times the model's, at initialisation?"""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor

from uncollapse.claims.intervals import Interval, interval
from uncollapse.claims.ledger import PAPER, Claim, Finding
from uncollapse.records.ledger import Evidence

RATIOS = (1, 2, 4, 8)
WIDTH, TOKENS = 16, 6144
# Of the variance of ReLU(g), g standard Gaussian, 1/2 - 1/(2 pi), the best affine map of g explains 1/4.
RELU_INNOVATION = (math.pi - 2) / (2 * math.pi - 2)


def innovation(x: Tensor, y: Tensor) -> float:
    """The share of y's variance on the second half of the tokens that an affine map fitted on the first leaves."""
    half = len(x) // 2
    given = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    fit = torch.linalg.lstsq(given[:half], y[:half]).solution
    rest = y[half:] - given[half:] @ fit
    return float(rest.square().sum() / (y[half:] - y[half:].mean(0)).square().sum())


def effective_rank(hidden: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred hidden layer."""
    values = torch.linalg.svdvals(hidden - hidden.mean(0))
    share = values / values.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def variances(up: Tensor, down: Tensor, activation: str) -> tuple[float, float]:
    """(variance, variance that no affine map explains) of phi(x W_up) W_down over Gaussian x, summed over width.

    Closed form, no tokens drawn: for hidden units with weights a, b at angle t, E relu(a.x) relu(b.x) =
    |a||b| (sin t + (pi - t) cos t)/(2 pi) (Cho and Saul 2009), their means multiply to |a||b|/(2 pi), and the best
    affine maps explain a.b/4 of the covariance.
    """
    inner = up.T @ up
    if activation == "identity":
        covariance, linear = inner, inner
    else:
        length = inner.diagonal().sqrt()
        sizes = length[:, None] * length
        cosine = (inner / sizes).clamp(-1, 1)
        angle = torch.arccos(cosine)
        covariance = sizes * (torch.sin(angle) + (math.pi - angle) * cosine - 1) / (2 * math.pi)
        linear = inner / 4
    mixing = down @ down.T
    return float((covariance * mixing).sum()), float(((covariance - linear) * mixing).sum())


def check(trials: int, seed: int, *, activation: str = "relu", expected: float = RELU_INNOVATION) -> Finding:
    """`activation="identity"` takes the nonlinearity away; `expected` corrupts the predicted share."""
    generator = torch.Generator().manual_seed(seed)
    evidence, context = [], []
    for ratio in RATIOS:
        excess, total, shares, ranks = [], [], [], []
        for turn in range(max(20, trials // 5)):
            up = torch.randn(WIDTH, ratio * WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
            down = torch.randn(ratio * WIDTH, WIDTH, generator=generator, dtype=torch.float64)
            variance, unexplained = variances(up, down, activation)
            # The mean over W_down of this is exactly 0 at the predicted share, for every W_up: no bias to outgrow.
            excess.append(unexplained - expected * variance)
            total.append(variance)
            if turn % 4 == 0:
                x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
                hidden = torch.relu(x @ up) if activation == "relu" else x @ up
                shares.append(innovation(x, hidden @ down))
                ranks.append(effective_rank(hidden[:1024]))
        gap = interval([e / fmean(total) for e in excess])
        seen = Interval(gap.mean + expected, gap.half)
        what = f"share of the MLP's output that no affine map explains, d_ff = {ratio} d"
        evidence.append(Evidence(what, str(seen), round(expected, 4), seen.below(expected) is None, exact=False))
        what = f"the same by least squares on held-out tokens, d_ff = {ratio} d"
        context.append(Evidence(what, str(interval(shares)), role="context", exact=False))
        what = f"effective rank of the hidden layer at d_ff = {ratio} d, of {ratio * WIDTH} attainable"
        context.append(Evidence(what, str(interval(ranks)), role="context", exact=False))
    return evidence + context, None


CLAIM = Claim(
    "ffn-width-four",
    "At initialisation the share of an MLP's output that no affine map of its input explains is (pi - 2)/(2 pi - 2) at d_ff "
    "= d, 2d, 4d and 8d alike (ReLU, Gaussian tokens): by this figure nothing distinguishes d_ff = 4d.",
    "derived in docs/theory.md; bears on the design corollary 'd_ff = 4d is a heuristic' of "
    + PAPER
    + ", introduction",
    check,
    title="Nothing is special about an MLP four times as wide",
    formula=r"1 - R^2 = \frac{\pi - 2}{2 \pi - 2} \approx 0.2665",
    theory="6. What the MLP adds",
    hypotheses=("Gaussian tokens and weights, ReLU",),
    kind="measured",
)
