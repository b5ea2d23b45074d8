"""The record of `symmetries`: how far a model is from each symmetric state, and what the acting groups showed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Phenomenon, Probe, Stack, Statistic

SYMMETRIES_SCHEMA: Literal["uncollapse/symmetries/1"] = "uncollapse/symmetries/1"


@dataclass(frozen=True)
class WidthScaling:
    """How the second singular value of one attention's patterns changes with the context length n: sigma_2 ~ n^slope.

    For each of `context_lengths`, `second_singular_value` has the mean over heads, the extreme heads, and the number of heads
    `n`. The value of one head is its mean over the windows of that length. `slope` is the least-squares slope of ln sigma_2 on
    ln n, with its 95 % interval (null below three lengths). `regime` says in words which law that is.
    """

    block: int
    stack: Stack | None
    kind: AttentionKind
    context_lengths: list[int]
    second_singular_value: list[Statistic | None]
    slope: float | None
    slope_low: float | None
    slope_high: float | None
    regime: str


@dataclass(frozen=True)
class SymmetryRecord:
    """One of the four symmetries: how far this model is from the collapse, and what keeps it there.

    `order_parameter` is the distance from the collapsed set along depth: one value for each of `places`, measured as `measure`
    says. At a collapse it reaches `collapsed_value`. `equivariance_defect` comes from `uncollapse symmetries` only: how far the
    model as it is departs from the symmetry, relative to its output. `slope` (width only) is the mean of the slopes in `scaling`
    over attention calls; it needs context lengths. `breakers` and `stabilisers` are those that this model has.
    """

    phenomenon: Phenomenon
    group: str
    equivariance_defect: Statistic | None
    measure: str
    places: list[str]
    order_parameter: list[Statistic | None]
    collapsed_value: float
    slope: Statistic | None
    breakers: list[str]
    stabilisers: list[str]
    scaling: list[WidthScaling] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SymmetryTest:
    """One group acting on the live model, perhaps without some of its components.

    `defect` is ||f(g x) - g f(x)|| / ||f(x)|| of the model's output over real tokens. `rounding` is the same ratio if every
    block's output is moved by one unit of rounding: below it nothing can be tested. `holds` says whether the defect is at that
    level, whatever was expected. `is_symmetry` is what theory says about this action on any model without the components in
    `without`. `surviving` is the subgroup that this architecture leaves. `dimension` is the number of its continuous directions
    on one attention call: 0 for a finite group, null if it differs between calls or is not known.
    """

    phenomenon: Phenomenon
    action: str
    is_symmetry: bool
    surviving: str
    dimension: int | None
    without: list[str]
    defect: Statistic | None
    rounding: Statistic | None
    holds: bool | None
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SymmetriesRecord:
    """The four symmetries of the forward pass on one model: what the acting groups showed, and how far it is from each
    collapse."""

    schema: Literal["uncollapse/symmetries/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    symmetries: list[SymmetryRecord]
    tests: list[SymmetryTest]
    findings: list[Finding]
    anatomy: AnatomyRecord | None = None
