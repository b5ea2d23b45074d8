"""The record of `compare`: two diagnoses or more beside each other, figure by figure, and what got worse."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Probe, Stack

COMPARISON_SCHEMA: Literal["uncollapse/comparison/1"] = "uncollapse/comparison/1"


@dataclass(frozen=True)
class Change:
    """One figure before and after. `noise` is the standard error of `after - before` that comes from drawing two probes, 0 if both
    were measured on the same one; null where a single sequence does not tell it. `moved`: the change is beyond the noise at a
    false-alarm rate of 1 % for each figure, and more than a twentieth of the larger value."""

    measure: str
    site: str
    block: int | None
    head: int | None
    stack: Stack | None
    kind: AttentionKind | None
    before: float
    after: float
    noise: float | None
    moved: bool

    @property
    def factor(self) -> float | None:
        """after / before; null where one of them is not positive."""
        return self.after / self.before if self.before > 0 and self.after > 0 else None


@dataclass(frozen=True)
class Further:
    """A third diagnosis, a fourth, … beside the first: the same as `ComparisonRecord` says of the second. `name` is unique."""

    name: str
    same_probe: bool | None
    sites: list[Change]
    heads: list[Change]
    smallest: dict[str, float]
    appeared: list[Finding]
    gone: list[Finding]
    findings: list[Finding]
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonRecord:
    """Two diagnoses, the earlier one first. `same_probe` is null if a record is too old to say. `sites` and `heads` hold what could
    be compared, `unavailable` says what could not and why. `smallest`: by measure the smallest relative change that the two probes
    can show. `appeared` and `gone` are findings of the diagnoses that only one has; `findings` is what got worse.
    `is_causal`: whether in all models tokens see only earlier ones; null where they differ, or it is not known.

    Where more than two were given, `models` and `probes` hold all of them, and `further` what each after the second is beside the
    first."""

    schema: Literal["uncollapse/comparison/1"]
    versions: dict[str, str]
    models: list[ModelInfo]
    probes: list[Probe]
    same_probe: bool | None
    sites: list[Change]
    heads: list[Change]
    smallest: dict[str, float]
    appeared: list[Finding]
    gone: list[Finding]
    findings: list[Finding]
    unavailable: dict[str, str] = field(default_factory=dict)
    is_causal: bool | None = None
    further: list[Further] = field(default_factory=list)

    @property
    def pairs(self) -> list[ComparisonRecord]:
        """The first diagnosis beside each other one, as a comparison of two."""
        rest = [
            replace(
                self,
                models=[self.models[0], self.models[number]],
                probes=[self.probes[0], self.probes[number]],
                further=[],
                **{f.name: getattr(each, f.name) for f in fields(each) if f.name != "name"},
            )
            for number, each in enumerate(self.further, 2)
        ]
        return [replace(self, models=self.models[:2], probes=self.probes[:2], further=[]), *rest]
