"""The record of `ablate`: every run's sites, its rates, and how the predictions came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.common import ModelInfo, Probe, Statistic
from uncollapse.records.diagnosis import NormRecord, SiteRecord, UpdateRecord

ABLATION_SCHEMA: Literal["uncollapse/ablation/1"] = "uncollapse/ablation/1"


@dataclass(frozen=True)
class RateRecord:
    """How fast the consensus distance r_l falls along depth, followed only while it is above the rounding `floor`.

    kind: `none` (less than a decade is lost), `geometric` (ln r falls by a constant a block: `factor` is that ratio) or
    `doubly exponential` (ln r itself grows by a factor a block). `slope` is that of ln r_{l+1} against ln r_l: 1 is geometric,
    3 cubic (Dong et al.); `slope_low`, `slope_high` its 95 % interval, null with fewer than three pairs above the floor.
    `floor_block` is the first block at the floor: what is drawn from there on is rounding, not a level.
    """

    kind: Literal["none", "geometric", "doubly exponential"]
    factor: float | None
    slope: float | None
    slope_low: float | None
    slope_high: float | None
    floor: float
    floor_block: int | None


@dataclass(frozen=True)
class AblationRun:
    """The model without some components. `output_shift` is 1 - cosine between a sequence's mean output vector here and in the
    whole model; `loss` the next-token loss in nats where there is a language-model head and a causal mask.
    `attention_contraction` holds, for each self-attention in order of depth, ||C A V||/||C V|| of its most alive head.
    """

    without: list[str]
    trajectory: list[SiteRecord]
    rate: RateRecord | None
    loss: Statistic | None
    output_shift: Statistic | None
    attention_contraction: list[Statistic | None]
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VerdictRecord:
    """A prediction held against a run, in one measure; exact rank and consensus distance can disagree. `agrees` is null where
    the run leaves it open."""

    prediction: str
    source: str
    without: list[str]
    measure: Literal["affine_rank", "consensus_distance"]
    predicted: str
    observed: str
    agrees: bool | None
    rate: str | None
    block: int | None


@dataclass(frozen=True)
class AblationRecord:
    """What happens to one model without its components; the first run is the whole model."""

    schema: Literal["uncollapse/ablation/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    blocks: list[int]
    is_causal: bool
    runs: list[AblationRun]
    verdicts: list[VerdictRecord]
    norms: list[NormRecord]
    updates: list[UpdateRecord]
