"""The record of `diagnose`: every site, attention call, head, norm and sublayer, and what the rules found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Probe, Stack, Statistic
from uncollapse.records.symmetries import SymmetryRecord

DIAGNOSIS_SCHEMA: Literal["uncollapse/diagnosis/1"] = "uncollapse/diagnosis/1"


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
