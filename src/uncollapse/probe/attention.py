"""What is measured at an attention call: its matrices, row by row and head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.vocabulary import AttentionCall
from uncollapse.measures import mixing
from uncollapse.measures.running import Running
from uncollapse.probe.activity import PartActivity

ATTENTION_MEASURES = [
    "entropy",
    "normalized_entropy",
    "entropy_floor",
    "max_logit",
    "rest_entropy",
    "key_share",
    "value_contraction",
    "susceptibility",
    "contraction",
    "spectral_gap",
    "second_singular_value",
]


@dataclass(frozen=True)
class Forbidding:
    """What forbade pairs in a pass: an operation between logits and weights, or the `argument` of a fused call. `axes` says of each
    axis of the operation's result what it holds."""

    point: Point
    argument: str | None = None
    axes: tuple[str | None, ...] = ()


@dataclass
class AttentionStatistics:
    """Running statistics of one attention call: `values` is [measure, head], `energy` [head] the share of the centred
    output energy. `reasons` says of a measure why it is missing. `matrix` is W_O as [mixed, width], as met in the pass: effective,
    with adapters in it and quantised weights expanded; `reasons["matrix"]` says why it is missing. `tokens` are the real ones
    that the projection reads; `features` are those of `Part`; `sinks` says that the softmax also ran over columns that belong to
    no key. `deviation` and `row_sums` are what the pass bore out, and `forbids` what forbade pairs in each of the sublayer's
    calls, see `AttentionRows`. `activity` is what the part does."""

    block: int
    kind: Literal["self", "cross"]
    stack: Literal["encoder", "decoder"] | None
    call: AttentionCall
    values: Running
    energy: Running
    route: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    matrix: Tensor | None = None
    tokens: Running = field(default_factory=Running.empty)
    sinks: bool = False
    features: tuple[int, ...] = ()
    deviation: float = 0.0
    row_sums: tuple[float, float] = (math.inf, -math.inf)
    forbids: dict[int, list[Forbidding]] = field(default_factory=dict)
    activity: PartActivity | None = None


def spread(x: Tensor, mask: Tensor | None) -> Tensor:
    """||C X||_F over real tokens for x [batch, head, token, width], as [batch, head] in float64."""
    x = x.float() if x.dtype != torch.float64 else x
    if mask is None:
        return (x - x.mean(-2, keepdim=True)).square().sum((-2, -1)).sqrt().double()
    real = mask[:, None, :, None]
    x = torch.where(real, x, 0.0)
    mean = x.sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
    return torch.where(real, x - mean, 0.0).square().sum((-2, -1)).sqrt().double()


def pattern_spectra(weights: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> dict[str, Tensor]:
    """Contraction and leading singular values [batch, head] of weights [batch, head, query, key], sequence by sequence."""
    found: dict[str, list[Tensor]] = {"contraction": [], "spectral_gap": [], "second_singular_value": []}
    for i in range(weights.shape[0]):
        one = weights[i]
        if query_mask is not None:
            one = one[:, query_mask[i]]
        if key_mask is not None:
            one = one[:, :, key_mask[i]]
        first, second = mixing.leading_singular_values(one).unbind(-1)
        found["contraction"].append(mixing.contraction(one))
        found["spectral_gap"].append(1 - second / first)
        found["second_singular_value"].append(second)
    return {name: torch.stack(values) for name, values in found.items()}
