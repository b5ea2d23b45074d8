"""What position gates cost, counted tensor by tensor.

The paper's body was not at hand. The form of the gate, one affine map of the position features per head, is our
reconstruction from its abstract, and so is the count.
"""

from __future__ import annotations

from flint import fmpq

from uncollapse.claims.ledger import ABSTRACT, Claim, Finding, shown, tally
from uncollapse.records.ledger import Counterexample

# (width d, heads H) of published architectures with d = H d_k.
SIXTY_FOUR = ((768, 12), (1024, 16), (512, 8), (1280, 20), (1600, 25), (2048, 32))
WIDER = ((4096, 32), (5120, 40), (8192, 64))
LIMIT = fmpq(16, 1000)
NARROWER = ((384, 12), (256, 8), (312, 12))


def overhead(width: int, heads: int, *, features: int | None = None, bias: bool = True) -> fmpq:
    """Parameters of the gates (W_g: H x d_phi, b_g: H) over those of the projection (W_O: d x d, and b_O: d)."""
    gates = [(heads, features if features is not None else width), (heads, 1)]
    projection = [(width, width)] + ([(width, 1)] if bias else [])
    return fmpq(sum(r * c for r, c in gates), sum(r * c for r, c in projection))


def check(
    trials: int, seed: int, *, limit: fmpq = LIMIT, shapes: tuple[tuple[int, int], ...] = SIXTY_FOUR + WIDER
) -> Finding:
    """`shapes=NARROWER` drops the hypothesis d_k >= 64, `limit` corrupts the figure."""
    below = [overhead(d, h, bias=bias) < limit for d, h in shapes for bias in (True, False)]
    exactly = [overhead(d, h) == fmpq(h, d) for d, h in shapes]
    without = [overhead(d, h, bias=False) == fmpq(h, d) * (1 + fmpq(1, d)) for d, h in shapes]
    thin = overhead(384, 12)
    few = overhead(384, 12, features=128)
    return [
        tally(f"the gates have less than {float(limit):.2%} of the projection's parameters", below),
        tally("with output bias and d_phi = d = D the share is exactly 1/d_k", exactly),
        tally("without output bias it is exactly (1 + 1/d)/d_k", without),
        shown("d = 384, H = 12 (d_k = 32): over the limit", f"{float(thin):.4%}", thin > limit),
        shown(
            "the same model with d_phi = 128 features: under it",
            f"{float(few):.4%}",
            few < limit,
            role="context",
        ),
    ], Counterexample(
        "the overhead is below 1.6 % for every model",
        {"d, H, d_k": [["384", "12", "32"]], "share of the projection": [[str(thin)]]},
        "(d + 1)H / ((d + 1)d) = 1/d_k = 1/32, which is 3.125 %.",
        "a packaged model's own sizes; 1/d_k < 0.016 needs d_k >= 63",
    )


CLAIM = Claim(
    "pgop-overhead",
    "A position-gated output projection costs less than 1.6 % of the standard output projection's parameters.",
    ABSTRACT,
    check,
    title="Position gates cost less than 1.6 % of the projection",
    formula=r"\frac{(d_\varphi + 1) H}{(D + 1) d} = \frac{1}{d_k} \;\; (d_\varphi = d = D)",
    theory="8. The position-gated output projection",
    hypotheses=(
        "the gate is one affine map of the position features per head (our reconstruction; only the abstract was at hand)",
        "head width d_k >= 64",
        "as many position features as the model is wide, d_phi = d = D (or fewer)",
    ),
)
