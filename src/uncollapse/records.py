"""What was observed: frozen dataclasses, their JSON, and the published JSON Schema.

A record is complete in itself: it carries the versions, the model, the probe and the resolved options, so that a page
can be drawn from it a year later on another machine. Pages and tables read records and nothing else.

* Every measured value is a `Statistic` {mean, min, max, n}: first the mean over a sequence's rows, then over sequences,
  of which there were `n`; `min` and `max` are the extreme sequences.
* A value that was not measured is `null`, and `unavailable` in the same object gives the reason under the same key.
* NaN and infinity never reach JSON: `Statistic.of` refuses them, and a numerics finding names where they came from.

`to_json` / `from_json` convert, `json_schema` publishes. Pydantic reads the annotations for all three.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from uncollapse.errors import InputError

Phenomenon = Literal[
    "rank-collapse-depth", "rank-collapse-width", "head-channel-non-identifiability", "entropy-collapse", "numerics"
]
Severity = Literal["info", "warning", "critical"]
Stack = Literal["encoder", "decoder"]
AttentionKind = Literal["self", "cross"]
PHENOMENA: tuple[Phenomenon, ...] = get_args(Phenomenon)[:4]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
ABLATION_SCHEMA: Literal["uncollapse/ablation/1"] = "uncollapse/ablation/1"
HEADS_SCHEMA: Literal["uncollapse/heads/1"] = "uncollapse/heads/1"
SYMMETRIES_SCHEMA: Literal["uncollapse/symmetries/1"] = "uncollapse/symmetries/1"
DIAGNOSIS_SCHEMA: Literal["uncollapse/diagnosis/1"] = "uncollapse/diagnosis/1"


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
    """Which model was measured. `width` is the token dimension d, `head_width` the value width d_k of a head."""

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
    """Which tokens it was measured on, and how. `tokens` counts real tokens; `options` are the resolved ones."""

    sequences: int
    tokens: int
    max_tokens: int
    source: str
    seed: int
    level: Literal["core", "full"] = "core"
    device: str = "cpu"
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MassiveTokensLeftOut:
    """The norm-sensitive measures of a site again, without each sequence's largest-norm tokens (`tokens_left_out` each).

    Trained language models carry a few tokens of enormous norm, the first one above all; they alone decide the plain
    figures. Both are reported, and a finding says which one it is about.
    """

    tokens_left_out: Statistic | None
    effective_rank: Statistic | None
    stable_rank: Statistic | None
    participation_ratio: Statistic | None
    consensus_distance: Statistic | None
    token_similarity: Statistic | None


@dataclass(frozen=True)
class SiteRecord:
    """The token cloud at one site: `embedding` (what enters the first block) or the output of `block.<i>`.

    `rank_gap` is sigma_r / sigma_{r+1} at the cut that decided `rank` (null where nothing lies below the cut);
    `consensus_after_norm` is the consensus distance as a reader behind a norm sees it, token by token of unit length;
    `stream_carried` the factor by which the block passes each token's stream on (null at an embedding);
    `distinct_tokens` the different token ids of a sequence (at embeddings, where the model is given ids);
    `not_finite` counts the sequences with NaN or infinity in a real token.
    """

    site: str
    block: int | None
    stack: Stack | None
    rank: Statistic | None
    affine_rank: Statistic | None
    attainable_rank: Statistic | None
    attainable_affine_rank: Statistic | None
    effective_rank: Statistic | None
    stable_rank: Statistic | None
    participation_ratio: Statistic | None
    consensus_distance: Statistic | None
    token_similarity: Statistic | None
    rank_gap: Statistic | None = None
    massive_tokens_left_out: MassiveTokensLeftOut | None = None
    consensus_after_norm: Statistic | None = None
    stream_carried: Statistic | None = None
    distinct_tokens: Statistic | None = None
    not_finite: int = 0
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def consensus(self) -> Statistic | None:
        """The consensus distance that collapses are judged by: without the largest-norm tokens where those were left out."""
        left_out = self.massive_tokens_left_out
        return (left_out.consensus_distance if left_out is not None else None) or self.consensus_distance


def followed(trajectory: Sequence[SiteRecord]) -> list[SiteRecord]:
    """The sites of the stack along which a collapse is followed: the last one, which is the decoder where there are two."""
    return [site for site in trajectory if site.stack == trajectory[-1].stack]


@dataclass(frozen=True)
class AttentionRecord:
    """One head of one attention call. Entropies in nats; logits after scaling, bias and mask, as the softmax saw them.

    `rest_entropy` is the normalised entropy of a row without its strongest key, `key_share` = (exp(entropy) - 1)/(T - 1) the
    share of the other T - 1 allowed keys that a row uses beside one. `value_contraction` is ||C A V||_F / ||C V||_F on the
    probe: how much of the values' spread survives the mixing, at most `contraction` = ||C A||_2. `route` says where the figures
    came from: `logits` (recomputed tile by tile from the queries and keys of a fused call and its own mask or bias; never
    n x n) or `weights` (the softmax the model ran itself).
    """

    block: int
    head: int
    stack: Stack | None
    kind: AttentionKind
    entropy: Statistic | None
    normalized_entropy: Statistic | None
    entropy_floor: Statistic | None
    max_logit: Statistic | None
    rest_entropy: Statistic | None = None
    key_share: Statistic | None = None
    value_contraction: Statistic | None = None
    susceptibility: Statistic | None = None
    contraction: Statistic | None = None
    spectral_gap: Statistic | None = None
    second_singular_value: Statistic | None = None
    route: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadsRecord:
    """The output projection of one attention call: what it says of its heads. Figures from the weights; `energy_share` and
    `tokens`, the mean number n of real tokens a sequence, from the probe.

    What stays ambiguous, per token: `ambiguous_degrees_of_freedom` = (H-1)d_k for who sees the heads' sum in one channel space,
    `kernel_dimension` = D - rank W_O of the head outputs and `contribution_ambiguity` = sum of rank W_h - rank W_O of the
    contributions O_h W_h for who knows W_O and sees Y. In all: `factorization_ambiguity` for who sees Y of n tokens alone;
    `gauge_dimension` for who knows the function alone.

    `write_space_overlap[g][h]` is the mean squared cosine of the principal angles between the two heads' write spaces,
    1 for identical ones; `smallest_principal_angle[g][h]` the smallest of these angles in radians, null beside a head that writes
    nothing. `condition_number` is the noise gain of all heads together; `head_noise_gain[h]` that of one head, null where its
    contribution is not determined; `head_verdict[h]` says so in words.
    """

    block: int
    stack: Stack | None
    kind: AttentionKind
    heads: int
    head_width: int
    width: int
    ambiguous_degrees_of_freedom: int | None
    kernel_dimension: int | None
    gauge_dimension: int | None
    output_projection_rank: int | None
    condition_number: float | None
    write_space_overlap: list[list[float]] | None
    energy_share: list[Statistic | None] | None
    verdict: str | None
    tokens: int | None = None
    contribution_ambiguity: int | None = None
    factorization_ambiguity: int | None = None
    smallest_principal_angle: list[list[float | None]] | None = None
    head_noise_gain: list[float | None] | None = None
    head_verdict: list[str] | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NormRecord:
    """One norm call inside a block: affine rank before and after, and the three brackets of the exact formula."""

    block: int
    norm: str
    affine_rank_before: Statistic | None
    affine_rank_after: Statistic | None
    brackets: list[Statistic | None] | None
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRecord:
    """What one sublayer adds to the stream: how much of it lies outside the span of the embeddings, beside its null."""

    block: int
    sublayer: Literal["attention", "mlp"]
    stack: Stack | None
    kind: AttentionKind | None
    out_of_span_energy: Statistic | None
    null_out_of_span_energy: Statistic | None
    nonlinear_innovation: Statistic | None
    hidden_effective_rank: Statistic | None
    relative_norm: Statistic | None
    unavailable: dict[str, str] = field(default_factory=dict)


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
class Finding:
    """One rule that fired. `value` is what was measured at the worst place, `threshold` what it was held against; `kind` says
    which attention of a decoder block a finding about heads means."""

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


@dataclass(frozen=True)
class DiagnosisRecord:
    """The whole of one diagnosis."""

    schema: Literal["uncollapse/diagnosis/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    trajectory: list[SiteRecord]
    attention: list[AttentionRecord]
    heads: list[HeadsRecord]
    norms: list[NormRecord]
    updates: list[UpdateRecord]
    symmetries: list[SymmetryRecord]
    findings: list[Finding]


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


@dataclass(frozen=True)
class IdentifiabilityRecord:
    """Whether results can be attributed to the heads of one model: one record an attention call, and the rules that fired."""

    schema: Literal["uncollapse/heads/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    heads: list[HeadsRecord]
    findings: list[Finding]


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


Record = TypeVar("Record")


def to_json(record: object) -> str:
    """The record as JSON, keys in the order of the dataclass, non-ASCII kept, ends with a newline."""
    return (
        json.dumps(
            TypeAdapter(type(record)).dump_python(record, mode="json"), indent=1, ensure_ascii=False, allow_nan=False
        )
        + "\n"
    )


def from_json(text: str, kind: type[Record]) -> Record:
    """The record that `text` holds. Raises `InputError` where the text is no such record."""
    try:
        record: Record = TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise InputError(
            f"from_json: expected a {kind.__name__}, got a JSON text whose {where} does not fit ({first['msg'].lower()}). "
            "It may have been written by another command or an older version. Write it again with --json."
        ) from None
    return record


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record, as shipped in `uncollapse/schemas/`."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 so that a reader sees the old file or the whole new one, never a part.

    Raises `InputError` where the place cannot be written; nothing is left behind then.
    """
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            raise OSError("that is no file")
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"write: expected a path that can be written, got {str(target)!r} ({error.strerror or error}). "
            "The folder may be missing or read-only. Name another path."
        ) from None
