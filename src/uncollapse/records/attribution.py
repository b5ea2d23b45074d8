"""The record of `attribute`: what each part of a model does to one number of its output, and what may be said of its heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from uncollapse.measures.student import mean_and_half
from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import AttentionKind, ModelInfo, Probe, Stack
from uncollapse.records.diagnosis import HeadsRecord

ATTRIBUTION_SCHEMA: Literal["uncollapse/attribution/1"] = "uncollapse/attribution/1"
EffectKind = Literal[
    "embedding", "head", "attention", "attention_bias", "mlp", "mlp_bias", "mixer", "norm_bias", "output_bias"
]


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences, with half of its 95 % interval (Student's t; null for one sequence), the extremes, and their
    number."""

    mean: float
    half_width: float | None
    min: float
    max: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Estimate | None:
        """The estimate from one value for each sequence; `None` where one is not finite, or there is none."""
        if not values or not all(map(math.isfinite, values)):
            return None
        mean, half = mean_and_half(values) if len(values) > 1 else (values[0], None)
        return Estimate(mean, half, min(values), max(values), len(values))


@dataclass(frozen=True)
class MetricRecord:
    """The number that is attributed. `sum` is that of all direct effects, `remainder` the metric less that. `is_affine`: the
    metric is affine in what is added to the stream, so that the remainder is rounding; otherwise the direct effects are those of
    its linearisation, and `sum_of` says so. `left` names the norms on the stream's way that are passed by their derivative."""

    name: str
    value: Estimate
    sum: Estimate
    remainder: Estimate
    is_affine: bool
    sum_of: str
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EffectRecord:
    """One component. `direct` is its effect on the stream's own way to the output, norms at frozen scale; `exact` the same by a
    pass without it there, norms scaling anew; `first_order` through everything later, by gradients; `total` by taking it away.

    Of heads: an observer of the heads before W_O knows `direct` as it stands. One who sees the sum behind W_O, with an error of the
    share `noise` of its size, knows it to within `behind`; with random weights of that size it would be `behind_random` (median).
    Null where other heads can write part of what it writes. `indistinguishable_from`: heads that write into the same space at that
    noise.
    """

    kind: EffectKind
    block: int | None
    head: int | None
    stack: Stack | None
    attention: AttentionKind | None
    direct: Estimate | None
    exact: Estimate | None
    first_order: Estimate | None
    total: Estimate | None
    noise_gain: float | None = None
    behind: float | None = None
    behind_random: float | None = None
    indistinguishable_from: list[int] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The mean direct effect; NaN where there is none."""
        return math.nan if self.direct is None else self.direct.mean


@dataclass(frozen=True)
class AttributionRecord:
    """What each part of a model does to one number of its output. `ablated_as` says what stood in the place of a component that was
    taken away (null: none was). `noise` is the share that `behind` assumes. `heads` is what the output projections say."""

    schema: Literal["uncollapse/attribution/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    metric: MetricRecord
    effects: list[EffectRecord]
    noise: float
    ablated_as: Literal["zero", "mean", "resample"] | None
    heads: list[HeadsRecord]
    anatomy: AnatomyRecord | None = None
