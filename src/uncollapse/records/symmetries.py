"""The record of `symmetries`: where a model stands among its symmetries, and what the acting groups showed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Phenomenon, Probe, Stack, Statistic

SYMMETRIES_SCHEMA: Literal["uncollapse/symmetries/1"] = "uncollapse/symmetries/1"


@dataclass(frozen=True)
class WidthScaling:
    """How the second singular value of one attention's patterns moves with the context length n: sigma_2 ~ n^slope.

    `second_singular_value` has for each of `context_lengths` the mean over heads and the extreme heads (`n` heads), each head's
    own value being its mean over the windows of that length. The least-squares slope of ln sigma_2 on ln n has its 95 % interval
    beside it (null below three lengths). `regime` says in words which law that is.
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
    """One of the four symmetries: where this model stands, and what holds it there.

    `order_parameter` is the distance from the collapsed set along depth, named by `measure`, one value for each of `places`; a
    collapse is arrival at `collapsed_value`. `equivariance_defect` comes from `uncollapse symmetries` only: how far the model as
    it is departs from the symmetry, relative to its output. `slope` (width only) is the mean over attention calls of
    the slopes in `scaling`, measured with context lengths. `breakers` and `stabilisers` are those this model has.
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

    `defect` is ||f(g x) - g f(x)|| / ||f(x)|| of the model's output over real tokens, `rounding` the same ratio when every
    block's output is moved by one unit of rounding: what no symmetry can be tested below. `holds` says that the defect is
    at that level, whatever was expected; `is_symmetry` is what theory says of this action on any model without the components
    named in `without`. `surviving` is the subgroup that this architecture leaves, `dimension` the number of its continuous
    directions on one attention call (0 for a finite group, null where that is not the same on all, or not known).
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
    """The four symmetries of the forward pass on one model: the groups acting on it, and where it stands."""

    schema: Literal["uncollapse/symmetries/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    symmetries: list[SymmetryRecord]
    tests: list[SymmetryTest]
    findings: list[Finding]
