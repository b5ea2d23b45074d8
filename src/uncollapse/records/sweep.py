"""The record of `sweep`: many checkpoints, each with its worst figures and its findings.

Every checkpoint has a whole record of its own in the sweep's folder (`file`), which `compare` and `show` read. A checkpoint that
could not be measured has a record there too: one of this kind, with that checkpoint alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Probe, Stack

SWEEP_SCHEMA: Literal["uncollapse/sweep/1"] = "uncollapse/sweep/1"


@dataclass(frozen=True)
class Failure:
    """Why a checkpoint was not measured. `refused`: its message says what to do. `crashed`: an error that nobody expected, with
    its traceback."""

    kind: Literal["refused", "crashed"]
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class SweptFigure:
    """One measure of one checkpoint: `worst` over its blocks and heads, and where. `along` has one figure for each place of the
    run, that of its worst head where the measure is one of heads; null where it was not measured."""

    worst: float
    block: int | None
    head: int | None
    stack: Stack | None
    kind: AttentionKind | None
    along: list[float | None]


@dataclass(frozen=True)
class SweptCheckpoint:
    """One checkpoint. `fingerprint` is that of its weights, the options and the version, None where its weights could not be
    found. `file` is its record in the folder."""

    name: str
    step: int | None
    fingerprint: str | None = None
    file: str | None = None
    figures: dict[str, SweptFigure] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(frozen=True)
class SweptRun:
    """Checkpoints of one model, in order. `sites` and `attentions` are the places that `along` belongs to. `model` and `probe` are
    those of the first that was measured, None where none was. `is_causal`: whether its tokens see only earlier ones; None where
    that differs between attentions, or is not known."""

    name: str
    checkpoints: list[SweptCheckpoint]
    model: ModelInfo | None = None
    probe: Probe | None = None
    sites: list[str] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    is_causal: bool | None = None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep, as far as it has got. `options` decide the figures; they are the same for all checkpoints."""

    schema: Literal["uncollapse/sweep/1"]
    versions: dict[str, str]
    options: dict[str, Any]
    runs: list[SweptRun]

    @property
    def checkpoints(self) -> list[SweptCheckpoint]:
        """All of them, in order."""
        return [checkpoint for run in self.runs for checkpoint in run.checkpoints]

    @property
    def findings(self) -> list[Finding]:
        """What was found in any of them, as what a command judges by."""
        return [finding for checkpoint in self.checkpoints for finding in checkpoint.findings]
