"""The record of `identify`: what can be said about the heads of each attention call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import Finding, ModelInfo, Probe
from uncollapse.records.diagnosis import HeadsRecord

HEADS_SCHEMA: Literal["uncollapse/heads/1"] = "uncollapse/heads/1"


@dataclass(frozen=True)
class IdentifiabilityRecord:
    """Whether results can be attributed to the heads of one model: one record per attention call, and the rules that fired."""

    schema: Literal["uncollapse/heads/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    heads: list[HeadsRecord]
    findings: list[Finding]
    anatomy: AnatomyRecord | None = None
