"""The ledger: claims about Transformers, each with its source, its hypotheses in code, a check and one verdict.

`verify` runs them. Rank statements are decided in rational arithmetic, inequalities with exponentials in rigorous
interval arithmetic, and only what is a measurement (`width-collapse`, `ffn-width-four`) in floating point. What the
checks rest on is proved in docs/theory.md.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Callable, Sequence

import flint
import torch

from uncollapse import __version__
from uncollapse.bounds import SEED, TRIALS, require_between
from uncollapse.claims import (
    attention_is_affine_given_patterns,
    attention_never_gains_rank,
    attention_only_collapse,
    attention_weights_unidentifiable,
    causal_collapse_is_geometric,
    channel_gates,
    consensus_is_invariant,
    dispersion,
    entropy_floor,
    ffn_width_four,
    four_symmetries,
    gauge_with_norms,
    head_channel_ambiguity,
    head_observers,
    head_permutation,
    last_token_collapse,
    layernorm_affine_rank,
    layernorm_and_distance,
    layernorm_matrix_rank,
    layernorm_rank_formula,
    leaders,
    mlp_cannot_unmix,
    mlp_leaves_the_reachable_space,
    mlp_leaves_the_span,
    pgop_gauge,
    pgop_overhead,
    pgop_recovery,
    query_key_gauge,
    random_residuals_are_geometric,
    relative_bias_collapse_is_geometric,
    residual_needs_no_mlp,
    residual_obstructs_collapse,
    rmsnorm_rank,
    scaling_fixed_points,
    sinks_against_overmixing,
    token_permutation,
    value_output_gauge,
    width_collapse,
)
from uncollapse.claims.ledger import FEWEST, Claim
from uncollapse.errors import InputError
from uncollapse.records.ledger import Ledger

__all__ = [
    "CLAIMS",
    "Claim",
    "verify",
]

# In the order a reader meets them: collapse in depth, norms, residual, MLP, heads, gates, width, entropy, symmetries.
CLAIMS: dict[str, Claim] = {
    module.CLAIM.id: module.CLAIM
    for module in (
        attention_only_collapse,
        causal_collapse_is_geometric,
        relative_bias_collapse_is_geometric,
        leaders,
        attention_never_gains_rank,
        consensus_is_invariant,
        layernorm_affine_rank,
        layernorm_rank_formula,
        layernorm_matrix_rank,
        rmsnorm_rank,
        layernorm_and_distance,
        residual_obstructs_collapse,
        residual_needs_no_mlp,
        random_residuals_are_geometric,
        mlp_leaves_the_span,
        mlp_leaves_the_reachable_space,
        attention_is_affine_given_patterns,
        ffn_width_four,
        head_channel_ambiguity,
        head_observers,
        attention_weights_unidentifiable,
        mlp_cannot_unmix,
        pgop_overhead,
        pgop_gauge,
        pgop_recovery,
        channel_gates,
        width_collapse,
        last_token_collapse,
        entropy_floor,
        dispersion,
        scaling_fixed_points,
        sinks_against_overmixing,
        token_permutation,
        head_permutation,
        value_output_gauge,
        query_key_gauge,
        gauge_with_norms,
        four_symmetries,
    )
}


def verify(
    claims: Sequence[str] | None = None,
    *,
    trials: int = 200,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Ledger:
    """Check the named claims (default: all) and return the ledger.

    `trials` scales how many random cases each check draws (fewer than 12 count as 12: a verdict would stay open), and `seed` fixes
    them: the same seed gives the same ledger, bit for bit. `progress` is called with (claim id, claims done, total) before each
    claim and once after the last.

    >>> verify(["layernorm-affine-rank"], trials=20).claims[0].verdict
    'refuted as stated'

    Raises `InputError` for an unknown claim, for `trials` outside 1 to 100,000 and for a seed outside 0 to 2^32 - 1.
    """
    names = list(CLAIMS) if claims is None else ([claims] if isinstance(claims, str) else list(claims))
    for name in names:
        if name not in CLAIMS:
            close = difflib.get_close_matches(name, CLAIMS, 1, 0)[0]
            raise InputError(
                f"verify: expected the id of a claim, got {name!r}. The nearest is {close!r}. Ask for that one, or name "
                "no claim to check all of them."
            )
    require_between("verify", "trials", trials, 1, TRIALS)
    require_between("verify", "seed", seed, 0, SEED)
    threads, results = torch.get_num_threads(), []
    torch.set_num_threads(1)  # sums in one order: the measured figures do not depend on the machine's cores
    try:
        for done, name in enumerate(names):
            if progress is not None:
                progress(name, done, len(names))
            results.append(CLAIMS[name].run(trials, seed))
        if progress is not None and names:
            progress(names[-1], len(names), len(names))
    finally:
        torch.set_num_threads(threads)
    return Ledger(_versions(), max(trials, FEWEST), seed, results)  # as many as were drawn


def _versions() -> dict[str, str]:
    return {
        "uncollapse": __version__,
        "python": platform.python_version(),
        "python-flint": flint.__version__,
        "torch": torch.__version__,
    }
