"""What all records are made of: measured values, the model and the probe they were measured on, and findings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Phenomenon = Literal[
    "rank-collapse-depth",
    "rank-collapse-width",
    "head-channel-non-identifiability",
    "entropy-collapse",
    "numerics",
    "dead-component",
    "dimensional-collapse",
]
Severity = Literal["info", "warning", "critical"]
Stack = Literal["encoder", "decoder"]
AttentionKind = Literal["self", "cross"]
BoundPart = Literal["soft cap", "query-key norm"]  # what bounds the logits of an attention whatever the text
PHENOMENA: tuple[Phenomenon, ...] = get_args(Phenomenon)[:4]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Statistic:
    """One measured value over the probe's sequences. `mean`, `min`, `max` in the measure's unit; `n` sequences."""

    mean: float
    min: float
    max: float
    n: int

    @staticmethod
    def of(mean: float, low: float, high: float, n: int) -> Statistic | None:
        """The statistic, or `None` where nothing finite was observed."""
        if n == 0 or not all(map(math.isfinite, (mean, low, high))):
            return None
        return Statistic(mean, low, high, n)


@dataclass(frozen=True)
class ModelInfo:
    """Which model was measured. `width` is the token dimension d, `head_width` the value width d_k per head."""

    name: str
    revision: str | None
    architecture: str
    blocks: int
    heads: int
    key_value_heads: int
    width: int
    head_width: int
    norm_placement: str
    parameters: int
    dtype: str
    attention_backend: str


@dataclass(frozen=True)
class Probe:
    """Which tokens it was measured on, and how. `tokens` counts real tokens of the stream, `max_tokens` those of the longest
    sequence; these and `sequences` are null where the stream's axes or padding could not be told, and `unavailable` says why.
    `options` are the resolved ones. `fingerprint` is the same for the same batches: names, shapes, formats and every bit of their
    tensors. `processes` is how many took part."""

    sequences: int | None
    tokens: int | None
    max_tokens: int | None
    source: str
    seed: int
    level: Literal["core", "full"] = "core"
    device: str = "cpu"
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    processes: int = 1
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One rule that fired. `value` is what was measured at the worst place, and `threshold` what it was compared with. `kind`
    says which attention of a decoder block a finding about heads refers to."""

    code: str
    phenomenon: Phenomenon
    severity: Severity
    block: int | None
    head: int | None
    value: float | None
    threshold: float | None
    message: str
    remedy: str
    reference: str
    stack: Stack | None = None
    kind: AttentionKind | None = None
