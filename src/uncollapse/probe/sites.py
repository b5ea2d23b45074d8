"""What is measured at a site: the token cloud between two blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from uncollapse.measures.running import Running

PLAIN_MEASURES = [
    "rank",
    "affine_rank",
    "attainable_rank",
    "attainable_affine_rank",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
    "rank_gap",
]
MASSIVE_MEASURES = [
    "tokens_left_out",
    "effective_rank",
    "stable_rank",
    "participation_ratio",
    "consensus_distance",
    "token_similarity",
]
STREAM_MEASURES = ["consensus_after_norm", "stream_carried", "distinct_tokens"]


@dataclass
class SiteStatistics:
    """Running statistics of the token cloud at one site. `not_finite` counts sequences with NaN or infinity in a real token."""

    site: str
    block: int | None
    stack: Literal["encoder", "decoder"] | None
    plain: Running = field(default_factory=lambda: Running.empty(len(PLAIN_MEASURES)))
    massive: Running = field(default_factory=lambda: Running.empty(len(MASSIVE_MEASURES)))
    stream: Running = field(default_factory=lambda: Running.empty(len(STREAM_MEASURES)))
    not_finite: int = 0
    width: int = 0


def distinct_tokens(batch: Mapping[str, Any], name: str, mask: Tensor | None) -> Tensor | None:
    """How many different ids each sequence has, padding left out; None where the model is given none (images, sound)."""
    named = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()}
    ids = named.get(name, next((v for k, v in named.items() if "mask" not in k and v.dtype != torch.bool), None))
    if ids is None:
        return None
    real = mask if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    return torch.tensor([len(row[kept].unique()) for row, kept in zip(ids, real, strict=True)])
