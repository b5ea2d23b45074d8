"""The measures of a site, in the order of the tables."""

from __future__ import annotations

from uncollapse.report.page.cells import field

TRAJECTORY = [
    field("rank", "rank"),
    field("attainable_rank", "attainable rank", "min(n, d)"),
    field("affine_rank", "affine rank"),
    field("attainable_affine_rank", "attainable affine rank", "min(n − 1, d)"),
    field("effective_rank", "effective rank"),
    field("stable_rank", "stable rank"),
    field("participation_ratio", "participation ratio"),
    field("consensus_distance", "consensus distance"),
    field("token_similarity", "token similarity"),
    field("rank_gap", "gap at the cut", "σᵣ/σᵣ₊₁"),
    field("consensus_after_norm", "consensus distance behind a norm"),
    field("stream_carried", "stream carried on"),
]
NOT_FINITE = field("not_finite", "sequences with NaN or infinity")
