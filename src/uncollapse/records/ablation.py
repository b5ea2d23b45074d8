"""The record of `ablate`: the sites and the rate of every run, and how the predictions came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import ModelInfo, Probe, Statistic
from uncollapse.records.diagnosis import NormRecord, SiteRecord, UpdateRecord

ABLATION_SCHEMA: Literal["uncollapse/ablation/1"] = "uncollapse/ablation/1"


Kind = Literal["none", "geometric", "doubly exponential", "open"]


@dataclass(frozen=True)
class RateRecord:
    """How fast the consensus distance r_l falls along depth. Only values above the rounding `floor` are used.

    kind: `none` (r loses less than a factor of ten), `geometric` (ln r falls by a constant per block; `factor` is the ratio of
    r), `doubly exponential` (ln r itself grows by a factor per block) or `open` (it falls, and the figures do not say how).
    `slope` is that of ln r_{l+1} against ln r_l: 1 is geometric, 3 is cubic (Dong et al.). `slope_low` and `slope_high` are its
    95 % interval, null with fewer than three pairs above the floor; `factor_low` and `factor_high` that of the factor, null with
    fewer than two steps. `floor_block` is the first block at the floor: from there on, values are rounding error.
    """

    kind: Kind
    factor: float | None
    slope: float | None
    slope_low: float | None
    slope_high: float | None
    floor: float
    floor_block: int | None
    factor_low: float | None = None
    factor_high: float | None = None


@dataclass(frozen=True)
class AblationRun:
    """The model without some components. `output_shift` is 1 - cosine between a sequence's mean output vector here and in the
    whole model. `loss` is the next-token loss in nats, if the model has a language-model head and a causal mask.
    `attention_contraction` has for each self-attention, in order of depth, ||C A V||/||C V|| of the head that keeps most.
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
    """A prediction compared with a run, in one measure: exact rank and consensus distance can disagree. `agrees` is null if
    the run does not decide it."""

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
    """What happens to one model without its components; the first run is the whole model.

    `contraction_at_consensus` is ||CA||_2 of each self-attention, in order of depth, if all tokens of a sequence are made equal:
    0 up to rounding where nothing but the tokens tells keys apart. It is measured where a run goes without residual connections.
    """

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
    contraction_at_consensus: list[float] | None = None
    anatomy: AnatomyRecord | None = None
