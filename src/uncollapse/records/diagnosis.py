"""The record of `diagnose`: every site, attention call, head, norm and sublayer, and what the rules found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import AttentionKind, BoundPart, Finding, ModelInfo, Probe, Stack, Statistic
from uncollapse.records.symmetries import SymmetryRecord

DIAGNOSIS_SCHEMA: Literal["uncollapse/diagnosis/1"] = "uncollapse/diagnosis/1"

Pooling = Literal["tokens", "mean", "last", "first", "own"]
SAMPLED_TOKENS = (
    64  # that stand for all tokens of a corpus at level `core`; their spectra cost what those of 64 sequences cost
)
HARDLY_TRAINED = "hardly trained"  # what the evidence begins with where the start was left, but not far behind


@dataclass(frozen=True)
class MassiveTokensLeftOut:
    """The norm-sensitive measures of a site, without the largest-norm tokens of each sequence (`tokens_left_out` of them).

    Trained language models have a few tokens of enormous norm, above all the first one. These tokens alone decide the plain
    figures. Both are reported, and a finding says which one it is about.
    """

    tokens_left_out: Statistic | None
    effective_rank: Statistic | None
    stable_rank: Statistic | None
    participation_ratio: Statistic | None
    consensus_distance: Statistic | None
    token_similarity: Statistic | None


@dataclass(frozen=True)
class ReaderRecord:
    """A norm that reads the stream at a site, and the consensus distance of what it makes of it, with its own gain and shift."""

    norm: str
    consensus: Statistic | None


@dataclass(frozen=True)
class StreamRecord:
    """One of several streams side by side at a site (hyper-connections): its own token cloud."""

    stream: int
    rank: Statistic | None
    affine_rank: Statistic | None
    attainable_rank: Statistic | None
    attainable_affine_rank: Statistic | None
    effective_rank: Statistic | None
    stable_rank: Statistic | None
    participation_ratio: Statistic | None
    consensus_distance: Statistic | None
    token_similarity: Statistic | None


@dataclass(frozen=True)
class SiteRecord:
    """The token cloud at one site: `embedding` (what enters the first block) or the output of `block.<i>`.

    `rank_gap` is sigma_r / sigma_{r+1} at the cut that decided `rank` (null where nothing lies below the cut);
    `consensus_after_norm` is the consensus distance after normalisation, with every token scaled to unit length;
    `stream_carried` is the factor by which the block carries each token's stream on (null at an embedding);
    `distinct_tokens` counts the different token ids of a sequence (at embeddings, if the model is given ids);
    `not_finite` counts the sequences with NaN or infinity in a real token. `readers` are the norms that read the stream here: those
    before the sublayers of the next block, or the last one. Empty where none was met. `streams`: where several run side by side,
    the figures of the site are those of all together, with what they hold of a token side by side; here is each by itself.
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
    readers: list[ReaderRecord] = field(default_factory=list)
    streams: list[StreamRecord] = field(default_factory=list)

    @property
    def clearest_reader(self) -> ReaderRecord | None:
        """The norm that sees the tokens farthest apart; None where none was met."""
        met = [(each.consensus.mean, each) for each in self.readers if each.consensus is not None]
        return max(met, key=lambda pair: pair[0])[1] if met else None

    @property
    def consensus(self) -> Statistic | None:
        """The consensus distance that a collapse is judged by: without the largest-norm tokens, if the model has such tokens."""
        left_out = self.massive_tokens_left_out
        return (left_out.consensus_distance if left_out is not None else None) or self.consensus_distance


def followed(trajectory: Sequence[SiteRecord]) -> list[SiteRecord]:
    """The sites of the stack along which a collapse is followed: the last stack, so the decoder if there are two."""
    return stacks(trajectory)[-1] if trajectory else []


def stacks(trajectory: Sequence[SiteRecord]) -> list[list[SiteRecord]]:
    """The sites of each stack: an embedding and the blocks behind it. Two towers are two stacks, though neither is called an
    encoder or a decoder."""
    found: list[list[SiteRecord]] = []
    for site in trajectory:
        if not found or site.block is None or site.stack != found[-1][-1].stack:
            found.append([])
        found[-1].append(site)
    return found


@dataclass(frozen=True)
class AttentionRecord:
    """One head of one attention call. Entropies in nats; logits after scaling, bias and mask, as the softmax saw them.

    `rest_entropy` is the normalised entropy of a row without its strongest key, `keys_within_reach` the share of those other keys
    whose weight beside the strongest of them is not 0 in single precision. `key_share` = (exp(entropy) - 1)/(T - 1) is the
    share of the other T - 1 allowed keys that a row uses besides one. `value_contraction` is ||C A V||_F / ||C V||_F on the
    probe: how much of the spread of the values survives the mixing, at most `contraction` = ||C A||_2. `route` says where the
    figures came from: `logits` (recomputed tile by tile from the queries and keys of a fused call and its own mask or bias; never
    n x n) or `weights` (the softmax that the model ran itself).

    `logit_range_bound` is the most that the logits of a row can differ on *any* text, where a soft cap or a norm on queries and
    keys was shown to bound them; null where not: what a text shows is no bound. Over more than `disperses_beyond` = 1 + e^range
    allowed keys this head can then give no key more than half of a row's weight. `bound_part` is the part that bounds them, and
    `bounded_by` says on what condition, or that nothing was shown.
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
    keys_within_reach: Statistic | None = None
    logit_range_bound: float | None = None
    disperses_beyond: float | None = None
    bounded_by: str = ""
    bound_part: BoundPart | None = None


@dataclass(frozen=True)
class HeadsRecord:
    """What the output projection of one attention call says about its heads. The figures come from the weights, except
    `energy_share` and `tokens` (the mean number n of real tokens per sequence), which come from the probe.

    Per token, an observer who sees only the heads' sum in one channel space cannot know
    `ambiguous_degrees_of_freedom` = (H-1)d_k numbers. An observer who knows W_O and sees Y cannot know
    `kernel_dimension` = D - rank W_O numbers of the head outputs, and `contribution_ambiguity` = sum of rank W_h - rank W_O
    numbers of the contributions O_h W_h. In total, `factorization_ambiguity` numbers stay open if only Y of n tokens is seen,
    and `gauge_dimension` if only the function is known.

    `write_space_overlap[g][h]` is the mean squared cosine of the principal angles between the write spaces of two heads, 1 for
    identical ones. `smallest_principal_angle[g][h]` is the smallest of these angles in radians, null if one of the heads writes
    nothing. Both have ten digits where the weights are in single precision, which has seven, or less. `condition_number` is the
    relative noise gain of all heads together, `absolute_noise_gain` the absolute one, and `head_noise_gain[h]` that of one head
    (absolute), null if its contribution is not determined. `head_verdict[h]` says the same in words. `random_noise_gain` and
    `random_head_noise_gain` are what `condition_number` and `head_noise_gain` would be for random
    weights of this size: the 5 %, 50 % and 95 % points.
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
    absolute_noise_gain: float | None = None
    random_noise_gain: list[float] | None = None
    random_head_noise_gain: list[float] | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NormRecord:
    """One norm call inside a block: the affine rank before and after it, and the three brackets of the exact formula."""

    block: int
    norm: str
    affine_rank_before: Statistic | None
    affine_rank_after: Statistic | None
    brackets: list[Statistic | None] | None
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRecord:
    """What one sublayer adds to the stream: how much of it lies outside the span of the embeddings, next to a null value."""

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
class PartRecord:
    """What one sublayer does at all. Every figure is the largest over all real tokens of all sequences; null where it was not met.

    `update_size` is ||u|| / ||x + u|| of its update u and the stream x. The variations are the largest distance from the first
    vector seen, over the largest size: 0 for vectors that are zero or all equal; for queries, keys and values one per head of
    that operand. `update_directions` is sigma_3 / sigma_1 of the vectors (1, u), and 0 if the updates lie on a straight line.
    `head_output` is the size of what each head writes beside that of the stream, `logit_range` how far the logits of a row
    lie apart beside the largest of them, `value_size` the largest norm of a value vector, `typical_value` the root mean
    square of its entries. `copied_heads` are pairs with equal outputs and equal patterns. `dead_units` are hidden units that carry
    nothing. `epsilon` is that of the number format. `initial` says whether the block's weights look as an initialisation makes
    them; null where nothing asked.
    """

    block: int
    sublayer: Literal["attention", "mlp"]
    stack: Stack | None
    kind: AttentionKind | None
    heads: int | None = None
    key_value_heads: int | None = None
    epsilon: float = 0.0
    tokens: int = 0
    update_size: float | None = None
    update_variation: float | None = None
    update_directions: float | None = None
    stream_variation: float | None = None
    stream_directions: float | None = None
    block_change: float | None = None
    query_variation: list[float] | None = None
    key_variation: list[float] | None = None
    value_variation: list[float] | None = None
    value_size: list[float] | None = None
    typical_value: float | None = None
    logit_range: list[float] | None = None
    head_output: list[float] | None = None
    copied_heads: list[list[int]] | None = None
    hidden_units: int | None = None
    dead_units: list[int] | None = None
    initial: bool | None = None
    initial_evidence: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingRecord:
    """What enters a stack: `apart` is the largest distance between two tokens at one position with different ids, over their
    size, over `pairs` such pairs; null where no such pair was met."""

    stack: Stack | None
    block: int
    apart: float | None
    pairs: int
    epsilon: float


@dataclass(frozen=True)
class RouterRecord:
    """The router of one block's experts: each real token is sent to `chosen` of `experts`. `load` is the share of all choices that
    fell on each expert, `entropy` that of the load beside ln(experts) (1: all alike), `effective_experts` exp H, `dead` the
    experts that none of the `tokens` was sent to.

    `random_entropy`, `random_dead` and `random_load` are what these would be if so many tokens chose at random, each expert as
    likely as any other: the expected entropy, the expected number of dead experts, and two shares between which all loads lie in
    95 % of the cases."""

    block: int
    stack: Stack | None
    experts: int
    chosen: int | None
    tokens: int
    load: list[float] | None = None
    entropy: float | None = None
    effective_experts: float | None = None
    dead: list[int] | None = None
    unavailable: dict[str, str] = field(default_factory=dict)
    random_entropy: float | None = None
    random_dead: float | None = None
    random_load: list[float] | None = None


@dataclass(frozen=True)
class CorpusRecord:
    """The cloud of the whole corpus at one site: a point a sequence (`mean` of its tokens, `last` token, `first`, or the model's
    `own` pooling, where `site` names its output), or a point a token. Plain numbers, for there is one cloud.

    `points` n; `sampled` says how many of them the spectrum comes from, null where all. `effective_rank` is that of the uncentred
    cloud (RankMe without its epsilon), at most `attainable_rank` = min(n, d). All that follows is of the centred one, at most
    `attainable_centred_rank` = min(n - 1, d): `centred_effective_rank` (0 where all points are equal up to rounding),
    `participation_ratio`, `stable_rank`, `alpha` (the variances fall as i^-alpha; with the interval of that line), `k90` and `k95`
    (how many principal directions hold that much of the variance), the share of the first and the first ten, `isoscore`.
    `mean_cosine` is that between different points, `mean_share` the share of the points' energy that is their common mean.

    Between the site that enters the block and this one, of the same points (`compared` of them): `novelty`, the share of the
    variance outside the principal directions that held 90 % of it before; `cka`, and without the bias of few points `unbiased_cka`;
    `cosine`, the mean cosine of a point before and after (1 less it is the block influence). Null at an embedding.
    """

    site: str
    block: int | None
    stack: Stack | None
    pooling: Pooling
    points: int
    width: int
    sampled: int | None
    attainable_rank: int
    attainable_centred_rank: int
    effective_rank: float | None
    centred_effective_rank: float | None
    participation_ratio: float | None
    stable_rank: float | None
    alpha: float | None
    alpha_low: float | None
    alpha_high: float | None
    k90: int | None
    k95: int | None
    top_share: float | None
    top_ten_share: float | None
    isoscore: float | None
    mean_cosine: float | None
    mean_share: float | None
    compared: int | None = None
    novelty: float | None = None
    cka: float | None = None
    unbiased_cka: float | None = None
    cosine: float | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The centred effective rank, as a share of the attainable one."""
        if self.centred_effective_rank is None or not self.attainable_centred_rank:
            return None
        return self.centred_effective_rank / self.attainable_centred_rank


# With fewer sequences than this a corpus has too few directions to lose, and so has one whose embeddings use no more than these.
FEW_SEQUENCES, FEW_DIRECTIONS = 8, 4.0


def widest_clouds(
    trajectory: Sequence[SiteRecord], corpus: Sequence[CorpusRecord]
) -> list[list[tuple[SiteRecord, CorpusRecord]]]:
    """By stack its sites, each with the cloud of the sequences in the pooling that keeps most directions. Without the stacks whose
    corpus has nothing to lose, and those whose embedding or whose every block has no such cloud."""
    by_site: dict[str, list[tuple[float, CorpusRecord]]] = {}
    for cloud in corpus:
        if cloud.pooling not in ("tokens", "own") and cloud.centred_effective_rank is not None:
            by_site.setdefault(cloud.site, []).append((cloud.centred_effective_rank, cloud))
    found = []
    for sites in stacks(trajectory):
        widest = [(site, max(by_site[site.site], key=lambda pair: pair[0])) for site in sites if site.site in by_site]
        if len(widest) < 2 or widest[0][0].block is not None:
            continue
        directions, entry = widest[0][1]
        if entry.points >= FEW_SEQUENCES and directions >= FEW_DIRECTIONS:
            found.append([(site, cloud) for site, (_, cloud) in widest])
    return found


@dataclass(frozen=True)
class DiagnosisRecord:
    """One diagnosis, complete."""

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
    anatomy: AnatomyRecord | None = None
    parts: list[PartRecord] = field(default_factory=list)
    embeddings: list[EmbeddingRecord] = field(default_factory=list)
    corpus: list[CorpusRecord] = field(default_factory=list)
    routers: list[RouterRecord] = field(default_factory=list)
