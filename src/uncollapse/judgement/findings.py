"""Coded rules: which of the four collapses does this model show, where, and what can be done?

A rule looks at records only, so a newer rule can judge a stored record again. At each place it reads a *distance from collapse*,
which is 0 at the collapse. It fires if the distance at the worst place is below a threshold. It never averages over places,
which could hide the worst one. `readings` gives what every rule read, whether or not it fired.

The rules distinguish: a token cloud that shrinks to one point as the next norm sees it (`DEPTH-CONSENSUS`) or loses
dimensions it had (`DEPTH-RANK`); attention whose rows are all alike, uniform (`WIDTH-UNIFORM`) or not (`WIDTH-RANK-ONE`);
heads that write into the same space (`HEADS-IDENTICAL`) or a projection that forgets part of what it reads (`HEADS-KERNEL`);
attention frozen by logits that are too large as a whole (`ENTROPY-FROZEN`); sequences that all lie in few directions
(`CORPUS-DIMENSIONS`); and NaN or infinity (`NUMERICS-NOT-FINITE`).

A rule fires below half the smallest distance found in any healthy run of `studies/validity`. There, each model is scored by what
the others give (docs/validity.md). `CORPUS-DIMENSIONS` is not among them: its threshold comes from other runs, one model decides
it, and no damage was scored (docs/corpus-geometry.md). A distance also depends on the number of tokens, the width, the mask and
the precision. The measure or the rule corrects for that, and says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from uncollapse.judgement.dead_components import dead_components
from uncollapse.judgement.reading import Read, as_read
from uncollapse.records.common import SEVERITIES, Finding, Severity, Stack
from uncollapse.records.diagnosis import (
    HARDLY_TRAINED,
    AttentionRecord,
    CorpusRecord,
    EmbeddingRecord,
    HeadsRecord,
    PartRecord,
    SiteRecord,
    stacks,
    widest_clouds,
)

# All of these are distances from collapse: half the smallest distance in any healthy run of `studies/validity`. docs/validity.md
# says which run that is, and what each threshold would be without one of the models. Those runs say nothing of REST_ENTROPY alone:
# how it stands to WITHIN_REACH comes from older ones, and the two are moved together.
# Consensus distance after a norm, as a share of the embedding's.
CONSENSUS = 0.13
# Share of the attainable rank, as a share of the embedding's.
RANK = 0.38
# Share of the keys left unused by the least uniform head of an attention, 1 - (exp(H) - 1) / (T - 1).
UNUSED_KEYS = 0.083
# ||C A V|| / ||C V|| of the head that keeps most.
CONTRACTION = 0.066
# Normalised entropy of a row without its strongest key, for the most frozen head.
REST_ENTROPY = 0.043
# Share of the keys of a row, without its strongest, whose weight beside the strongest of them is not 0 in single precision.
WITHIN_REACH = 0.49
# Mean squared sine between two write spaces, relative to two random ones of the same size.
DISTINCTNESS = 0.09
# Dimensions that an output projection forgets beyond what its shape forces, in heads. Not a distance: twice the largest healthy
# value, and half a head at least, for healthy projections lose nothing.
LOST_HEADS = 0.5

# Centred effective rank of the corpus, a point per sequence, as a share of the embedding's. Half the smallest of the healthy models
# in docs/corpus-geometry.md, one of which decides it. Those are other runs than the validity study's, which have too few sequences.
DIMENSIONS = 0.21

# Below this many tokens, the spread that attention keeps is judged in proportion to the length; see `rank_one`.
FEW_TOKENS = 16
# Where did the fall begin? A block speaks for the fall as far as it carries on less than this share of the stream: the middle of
# the range that locates most of the damaged cases.
CARRIED = 0.7
# With fewer different tokens than this, attention has nothing to choose from and too few keys to freeze out.
DIFFERENT_TOKENS = 4
# If the embedded tokens are this much alike, the blocks have nothing to lose: a text that repeats one token looks like that.
APART_AT_ENTRY = 0.1

# At initialisation the largest logit of a head is several squared entries of a value; a factor of ten is left for scales of
# another kind, such as 1/d_k. Queries or keys that were made smaller give less.
SMALLEST_LOGIT = 1 / 16

_DONG = "Dong, Cordonnier, Loukas 2021, arXiv 2103.03404"
_CIRRINCIONE = "Cirrincione 2026, arXiv 2604.23681"
_NAIT_SAADA = "Nait Saada, Naderi, Tanner 2025, arXiv 2410.07799"
_ZHAI = "Zhai et al. 2023, arXiv 2303.06296"
_JING = "Jing, Vincent, LeCun, Tian 2022, arXiv 2110.09348"


@dataclass(frozen=True)
class Thresholds:
    """Where each rule fires, and where it looks for the beginning of a fall. Others than those in force serve to judge a model by
    what was derived without it (`studies/validity`)."""

    consensus: float = CONSENSUS
    rank: float = RANK
    unused_keys: float = UNUSED_KEYS
    contraction: float = CONTRACTION
    rest_entropy: float = REST_ENTROPY
    within_reach: float = WITHIN_REACH
    distinctness: float = DISTINCTNESS
    lost_heads: float = LOST_HEADS
    dimensions: float = DIMENSIONS
    carried: float = CARRIED


IN_FORCE = Thresholds()


@dataclass(frozen=True)
class Observed:
    """What the rules look at."""

    trajectory: Sequence[SiteRecord]
    attention: Sequence[AttentionRecord]
    heads: Sequence[HeadsRecord]
    parts: Sequence[PartRecord] = ()
    embeddings: Sequence[EmbeddingRecord] = ()
    thresholds: Thresholds = IN_FORCE
    corpus: Sequence[CorpusRecord] = ()


@dataclass(frozen=True)
class Reading:
    """What one rule read at its worst place in one stack or attention. `margin` is ln(threshold / distance): how far past the
    threshold, in factors of e. The rule fires if it is above 0, and then says `finding`."""

    margin: float
    finding: Finding


def findings(
    trajectory: Sequence[SiteRecord],
    attention: Sequence[AttentionRecord],
    heads: Sequence[HeadsRecord],
    parts: Sequence[PartRecord] = (),
    embeddings: Sequence[EmbeddingRecord] = (),
    corpus: Sequence[CorpusRecord] = (),
) -> list[Finding]:
    """The findings of all rules that fire: most severe first, then by depth."""
    read = readings(trajectory, attention, heads, parts, embeddings, corpus=corpus)
    fired = [reading.finding for reading in read if reading.margin > 0]
    # Attention that no token steers is said once: where its rows are alike already, by those.
    alike = {(f.block, f.kind) for f in fired if f.phenomenon == "rank-collapse-width"}
    fired = [f for f in fired if f.code != "HEAD-BLIND" or f.head is not None or (f.block, f.kind) not in alike]
    return sorted(fired, key=lambda f: (-SEVERITIES.index(f.severity), f.block is not None, f.block))


def readings(
    trajectory: Sequence[SiteRecord],
    attention: Sequence[AttentionRecord],
    heads: Sequence[HeadsRecord],
    parts: Sequence[PartRecord] = (),
    embeddings: Sequence[EmbeddingRecord] = (),
    thresholds: Thresholds = IN_FORCE,
    corpus: Sequence[CorpusRecord] = (),
) -> list[Reading]:
    """What every rule read: one reading for each stack, attention or output projection that it could judge."""
    observed = Observed(trajectory, attention, heads, parts, embeddings, thresholds, corpus)
    return [reading for rule in RULES for reading in rule(observed)]


def _margin(distance: float, threshold: float) -> float:
    return math.log(threshold / max(distance, 1e-12))


def _place(block: int | None, stack: Stack | None) -> str:
    where = "the embedding" if block is None else f"block {block}"
    return where + (f" ({stack})" if stack else "")


def _calls(attention: Iterable[AttentionRecord]) -> Iterator[tuple[int, list[AttentionRecord]]]:
    """The heads of each attention call, with its block."""
    by_call: dict[tuple[int, str], list[AttentionRecord]] = {}
    for record in attention:
        by_call.setdefault((record.block, record.kind), []).append(record)
    yield from ((block, records) for (block, _), records in by_call.items())


def not_finite(observed: Observed) -> Iterator[Reading]:
    for sites in stacks(observed.trajectory):
        bad = [s for s in sites if s.not_finite]
        if bad:
            first = bad[0]
            finding = Finding(
                code="NUMERICS-NOT-FINITE",
                phenomenon="numerics",
                severity="critical",
                block=first.block,
                head=None,
                value=float(first.not_finite),
                threshold=0.0,
                message=f"NaN or infinity first appears at {_place(first.block, first.stack)}, in {first.not_finite} "
                "sequences. Nothing after that place could be measured; everything before it was.",
                remedy="Run with --dtype float32. If that does not help, look for NaN in the weights of that block.",
                reference="IEEE 754",
                stack=first.stack,
            )
            yield Reading(math.inf, finding)


def consensus(observed: Observed) -> Iterator[Reading]:
    """Measured after a norm, where neither the size of the stream nor a massive token counts. And relative to the embedding:
    if a text repeats its tokens, they are alike from the start, which is not the model's doing."""
    limit = observed.thresholds.consensus
    for sites in stacks(observed.trajectory):
        measured = as_read(sites)
        if not measured or measured[0].site.block is not None:
            continue
        first, *after = measured
        start = first.distance
        if (said := _too_little_text(first.site)) is not None:
            yield said
            continue
        if start < APART_AT_ENTRY:
            yield _alike_from_the_start(first.site, start)
            continue
        if not after:
            continue
        crossed = next((i for i, read in enumerate(after) if read.share < limit), None)
        worst = min(after, key=lambda read: read.share)
        end = after.index(worst) if crossed is None else crossed
        at, began = after[end].site, _onset(after[: end + 1], observed.thresholds)
        sites_until = [read.site for read in after[: end + 1]]
        only_common = _only_a_common_part_grew(sites_until, began, observed.parts)
        severity: Severity = "info" if only_common else "critical" if worst.share < limit / 10 else "warning"
        finding = Finding(
            code="DEPTH-CONSENSUS",
            phenomenon="rank-collapse-depth",
            severity=severity,
            block=began.block,
            head=None,
            value=worst.share,
            threshold=limit,
            message=f"Tokens converge from {_place(began.block, began.stack)} on. After normalisation their consensus distance is "
            f"{start:.2g} at the embedding, under {limit:.0%} of that from {_place(at.block, at.stack)} on, and lowest "
            f"({worst.distance:.2g}) at {_place(worst.site.block, worst.site.stack)}{worst.by}.{only_common}",
            remedy="Run `uncollapse ablate` to see what keeps the tokens apart. From this block on, check that the residual "
            "connections are intact and not scaled down, and that no part that all tokens share outgrows the rest. On noise in "
            "place of pictures a healthy model may do the same: diagnose on real data.",
            reference=_DONG,
            stack=began.stack,
        )
        yield Reading(_margin(worst.share, limit), finding)


def _only_a_common_part_grew(sites: Sequence[SiteRecord], began: SiteRecord, parts: Sequence[PartRecord]) -> str:
    """Why tokens that come together are no fault yet; empty if they may be one. The first that training learns is what all tokens
    share, and for some steps that outgrows the rest. Then the block is hardly trained, and every block carries on all of its
    stream. Where less is carried on, tokens come together for want of a residual, however young the model is."""
    evidence = next((p.initial_evidence for p in parts if p.block == began.block and p.initial), "")
    carried = [1.0 if site.stream_carried is None else site.stream_carried.mean for site in sites]
    if not evidence.startswith(HARDLY_TRAINED) or min(carried) < 1:
        return ""
    return (
        f" Every block carries on all of its stream, and the block is young ({evidence}): what grew is a part that all tokens "
        "share, which is what training learns first. No fault yet."
    )


def _onset(until: Sequence[Read], thresholds: Thresholds) -> SiteRecord:
    """Where the fall that ends at the last of these places began. A fall spreads over several blocks, so the place where it passes
    a threshold comes too late. Each block falls short of the stream that it should carry on, or carries on more: the fall began at
    the block from which on the shortfalls add up to most (the change point of a cumulative sum, E. S. Page, "Continuous inspection
    schemes", Biometrika 41, 1954). So one block that writes its stream again does not end a fall, and one that is a little short
    does not begin it.

    Two things are no evidence. What comes after a block that made more than half of the fall by itself: the tokens were together by
    then. And what the first block carries on: many healthy models put something else in the place of the embedding there. It
    belongs to the fall where the second block does.

    If no shortfall is left, no residual is at fault. Something that all tokens share came in, and the block is meant at which the
    tokens came together most."""
    shares = [1.0, *(max(read.share, 1e-12) for read in until)]
    nearer = [math.log(before / share) for before, share in itertools.pairwise(shares)]
    steepest = nearer.index(max(nearer))
    if nearer[steepest] > sum(nearer) / 2:
        until = until[: steepest + 1]
    known = (read.site.stream_carried for read in until)
    short = [0.0 if each is None else thresholds.carried - min(max(each.mean, 0.0), 1.0) for each in known]
    summed = list(itertools.accumulate(reversed(short)))[::-1]
    began = max(range(1, len(until)), key=lambda i: (summed[i], i), default=0)
    if summed[began] <= 0:
        return until[steepest].site
    return until[0 if began == 1 and short[0] > 0 else began].site


def _alike_from_the_start(embedding: SiteRecord, value: float) -> Reading:
    return _not_judged(
        embedding,
        value,
        APART_AT_ENTRY,
        f"The tokens are already alike when they enter the first block (consensus distance {value:.2g} after "
        "normalisation). The blocks have nothing to lose, so collapse in depth and width is not judged.",
        "Use a text with different tokens. If this text has them, the embedding itself has collapsed.",
    )


def _too_little_text(embedding: SiteRecord) -> Reading | None:
    """That the text has nothing to lose; None if it has. One token repeated differs by its position alone, and a model may let go
    of that. Two tokens are one pair, and a model may take two tokens for the same."""
    different, most = embedding.distinct_tokens, _most_tokens(embedding)
    if different is not None and different.max == 1:
        value, threshold, what = 1.0, 2.0, "is one token repeated, so its tokens differ by their position alone"
    elif most <= 2:
        value, threshold, what = 2.0, 3.0, "has at most two tokens, and one pair may mean the same"
    else:
        return None
    return _not_judged(
        embedding,
        value,
        threshold,
        f"No text here can show whether tokens converge: each {what}. That they come together is not judged.",
        "Use a text with more tokens that differ.",
    )


def _not_judged(embedding: SiteRecord, value: float, threshold: float, message: str, remedy: str) -> Reading:
    """A text that gives the tokens of this stack nothing to lose."""
    finding = Finding(
        code="DEPTH-CONSENSUS",
        phenomenon="rank-collapse-depth",
        severity="info",
        block=None,
        head=None,
        value=value,
        threshold=threshold,
        message=message,
        remedy=remedy,
        reference=_DONG,
        stack=embedding.stack,
    )
    return Reading(_margin(value, threshold), finding)


def _most_tokens(site: SiteRecord) -> float:
    """The tokens of the longest sequence; infinite where the width hides it. A cloud of n tokens attains rank min(n, d) and affine
    rank min(n - 1, d), which differ by 1 in every sequence just if none has more tokens than the stream has dimensions."""
    attainable, affine = site.attainable_rank, site.attainable_affine_rank
    if attainable is None or affine is None or attainable.mean - affine.mean < 1:
        return math.inf
    return attainable.max


def rank_lost(observed: Observed) -> Iterator[Reading]:
    """Relative to the rank that so many tokens of this width can have, and to the embedding, whose table may have low rank."""
    for sites in stacks(observed.trajectory):
        shares = [
            (s, s.affine_rank.mean / s.attainable_affine_rank.mean)
            for s in sites
            if s.affine_rank is not None and s.attainable_affine_rank is not None and s.attainable_affine_rank.mean
        ]
        if len(shares) < 2 or not shares[0][1]:
            continue
        start = shares[0][1]
        lost = [(s, share) for s, share in shares[1:] if share < observed.thresholds.rank * start]
        first, share = lost[0] if lost else min(shares[1:], key=lambda pair: pair[1])
        finding = Finding(
            code="DEPTH-RANK",
            phenomenon="rank-collapse-depth",
            severity="critical" if share < observed.thresholds.rank**2 * start else "warning",
            block=first.block,
            head=None,
            value=share / start,
            threshold=observed.thresholds.rank,
            message=f"Dimensions are lost. At {_place(first.block, first.stack)} the tokens span {share:.0%} of the "
            f"dimensions they could span; at the embedding it was {start:.0%}.",
            remedy="Look for a rank-deficient weight or a missing residual in this block. `uncollapse ablate` helps to find it.",
            reference=_CIRRINCIONE,
            stack=first.stack,
        )
        yield Reading(_margin(share / start, observed.thresholds.rank), finding)


def dimensions_lost(observed: Observed) -> Iterator[Reading]:
    """Relative to the embedding, for a corpus may have few directions of its own: texts that say the same, an alphabet of four
    letters. Centred, so that what all sequences share does not count, however large.

    A site is judged by the pooling that keeps most directions. Any one of them may have few in good health: the first token is
    often the same in all sequences, the last one too, and a massive token whose size varies a little dominates the means (SmolLM2
    keeps a fifth of the embedding's directions there, and all of them at its last token)."""
    for kept in widest_clouds(observed.trajectory, observed.corpus):
        entry = _directions(kept[0][1])
        # Where sequences were lost (NaN) or the stream is narrower, fewer directions can be had.
        shares = [(site, cloud, _directions(cloud) / min(entry, cloud.attainable_centred_rank)) for site, cloud in kept]
        limit = observed.thresholds.dimensions
        at, worst, share = min(shares[1:], key=lambda each: each[2])
        first = next((site for site, _, each in shares[1:] if each < limit), at)
        finding = Finding(
            code="CORPUS-DIMENSIONS",
            phenomenon="dimensional-collapse",
            severity="critical" if share < limit**2 else "warning",
            block=first.block,
            head=None,
            value=share,
            threshold=limit,
            message=f"All sequences lie in few directions from {_place(first.block, first.stack)} on. Pooled in the way that keeps "
            f"most ({worst.pooling}), they use {_directions(worst):.1f} of {worst.attainable_centred_rank} directions at "
            f"{_place(at.block, at.stack)} (centred effective rank); at the embedding it was {entry:.1f}.",
            remedy="Compare with a healthy run of this model, if there is one: a single model decides this threshold "
            "(docs/corpus-geometry.md). Look at what this block adds: a gain or an update that few directions dominate. In "
            "contrastive training, check the temperature, the negatives and the weight decay of the last layers.",
            reference=_JING,
            stack=first.stack,
        )
        yield Reading(_margin(share, limit), finding)


def _directions(cloud: CorpusRecord) -> float:
    return cloud.centred_effective_rank or 0.0


def _with_different_tokens(observed: Observed) -> Iterator[tuple[int, list[AttentionRecord]]]:
    """The attention calls of stacks whose text has enough different tokens, and is not one, two or three of them repeated."""
    distinct = {
        site.block: sites[0].distinct_tokens.mean
        for sites in stacks(observed.trajectory)
        for site in sites
        if sites[0].distinct_tokens is not None
    }
    for block, records in _calls(observed.attention):
        if distinct.get(block, math.inf) >= DIFFERENT_TOKENS:
            yield block, records


def _with_tokens_apart(observed: Observed) -> Iterator[tuple[list[AttentionRecord], float | None]]:
    """Those of them whose input tokens can be told apart, and how far apart those are as a share of the embedding's distance, if
    that is known. No attention can choose among equal keys, and `consensus` already reports tokens that have converged."""
    entering: dict[int | None, Read] = {}
    for sites in stacks(observed.trajectory):
        read = {id(each.site): each for each in as_read(sites)}
        if id(sites[0]) in read:
            pairs = itertools.pairwise(sites)
            entering |= {site.block: read[id(before)] for before, site in pairs if id(before) in read}
    for block, records in _with_different_tokens(observed):
        enters = entering.get(block)
        if enters is None:
            yield records, None
        elif enters.share >= observed.thresholds.consensus and enters.distance >= APART_AT_ENTRY:
            yield records, enters.share


def uniform(observed: Observed) -> Iterator[Reading]:
    """The share of unused keys rather than the entropy: at a given variance of the logits it does not depend on how many keys
    there are.

    If the tokens that enter are only a share s as far apart as at the embedding, so are the keys, and so are the logits of a row.
    Of small logits of variance v, v/2 of the keys are left unused, so it is s^2 times what it would be. Where that alone
    explains the finding, the finding says so: the attention is uniform, but the cause lies before it."""
    for records, apart in _with_tokens_apart(observed):
        measured = [(r, 1 - r.key_share.mean) for r in records if r.key_share is not None]
        if not measured:
            continue
        least, unused = max(measured, key=lambda pair: pair[1])
        message = (
            f"attends to all keys almost equally: even its least uniform head ({least.head}) leaves only {unused:.2g} of them "
            "unused."
        )
        initial = _initial(observed, least, records)
        finding = _width_finding("WIDTH-UNIFORM", least, unused, observed.thresholds.unused_keys, message, initial)
        if apart is not None and apart < 1 and unused >= observed.thresholds.unused_keys * apart**2:
            finding = replace(
                finding,
                message=f"{finding.message} The tokens that enter it are at {apart:.0%} of their distance at the "
                "embedding; were they as far apart as there, it should not be uniform.",
                remedy="Look before this block first: what brings the tokens together there also makes this attention uniform.",
            )
        yield Reading(_margin(unused, observed.thresholds.unused_keys), finding)


def rank_one(observed: Observed) -> Iterator[Reading]:
    """For full masks. A causal mask keeps the rows different even if every logit is 0; `uniform` sees that case.

    Below 16 tokens the distance is relative to the length. The fewer other keys a row has, the larger the share that a sink on
    the first token takes: healthy language models keep 0.04 of the spread of two tokens and 0.2 of that of sixteen."""
    tokens: dict[int | None, float] = {}
    for sites in stacks(observed.trajectory):
        known = next((s.attainable_rank.mean for s in sites if s.attainable_rank is not None), math.inf)
        tokens |= dict.fromkeys([site.block for site in sites], known)
    for records, _ in _with_tokens_apart(observed):
        measured = [(r, r.value_contraction.mean) for r in records if r.value_contraction is not None]
        if not measured:
            continue
        most, kept = max(measured, key=lambda pair: pair[1])
        distance = kept / min(1.0, tokens.get(most.block, math.inf) / FEW_TOKENS)
        message = (
            f"gives every token almost the same mixture: even the head that keeps most ({most.head}) keeps only {kept:.2g} of "
            "the spread of its values."
        )
        initial = _initial(observed, most, records)
        finding = _width_finding("WIDTH-RANK-ONE", most, distance, observed.thresholds.contraction, message, initial)
        yield Reading(_margin(distance, observed.thresholds.contraction), finding)


def _initial(observed: Observed, head: AttentionRecord, records: Sequence[AttentionRecord]) -> str:
    """Why the attention of this head, whose `records` these are, is as an initialisation makes it; empty if it is not. Its weights
    must look so, and its logits must have the size that such queries and keys give: drawn like the values, a logit is about as
    large as a squared entry of a value."""
    for part in observed.parts:
        if (part.block, part.kind) != (head.block, head.kind) or not part.initial:
            continue
        largest = max((r.max_logit.mean for r in records if r.max_logit is not None), default=None)
        expected = None if part.typical_value is None else part.typical_value**2
        is_small = largest is not None and expected is not None and largest < SMALLEST_LOGIT * expected
        return "" if is_small else part.initial_evidence
    return ""


def _width_finding(
    code: str, record: AttentionRecord, value: float, threshold: float, message: str, initial: str = ""
) -> Finding:
    """About all heads of an attention: the one that was read is the best of them, and is not at fault more than the others."""
    if initial:
        message += f" The block looks as it was initialised, or nearly so ({initial}). Attention starts like this: no fault yet."
    return Finding(
        code=code,
        phenomenon="rank-collapse-width",
        severity="info" if initial else "warning",
        block=record.block,
        head=None,
        value=value,
        threshold=threshold,
        message=f"The {record.kind}-attention of {_place(record.block, record.stack)} {message}",
        remedy="Check the query and key weights of this block: are they zero, or untrained? At initialisation, raise the "
        "query-key gain or remove the rank-one part of the attention.",
        reference=_NAIT_SAADA,
        stack=record.stack,
        kind=record.kind,
    )


def frozen(observed: Observed) -> Iterator[Reading]:
    """A frozen head has put its other keys out of reach: their weights are 0 beside the strongest of them, and so are their
    gradients. The entropy of the whole row would mislead: a head that looks only at the first token, or at itself, has none and
    is healthy. So would the entropy of the rest alone: a head that looks at two fixed positions leaves one clear winner there, and
    every other key within reach. And so would the reach alone: a bias that falls with distance puts far keys out of reach and
    spreads the near ones. A head is frozen if both say so, and not judged where the reach is not known: healthy heads have rest
    entropies down to 0.024, and records from before the reach was kept took theirs from weights, where small ones had underflowed.
    """
    for _, records in _with_different_tokens(observed):
        judged = [(r, thaw) for r in records if (thaw := _thaw(r, observed.thresholds)) is not None]
        if not judged:
            continue
        hit = sum(thaw < 1 for _, thaw in judged)
        worst, least = min(judged, key=lambda each: each[1])
        rest, reach = worst.rest_entropy, worst.keys_within_reach
        assert rest is not None  # otherwise not judged
        assert reach is not None
        logit = "" if worst.max_logit is None else f", largest logit {worst.max_logit.mean:.3g}"
        finding = Finding(
            code="ENTROPY-FROZEN",
            phenomenon="entropy-collapse",
            severity="critical" if 2 * hit >= len(records) else "warning",
            block=worst.block,
            head=worst.head,
            value=reach.mean,
            threshold=observed.thresholds.within_reach,
            message=f"In {_place(worst.block, worst.stack)}, {hit} of {len(records)} heads are frozen onto single keys by their "
            f"logits. The worst is head {worst.head}: even without the strongest key of each row, one key takes nearly all of "
            f"the weight ({1 - reach.mean:.0%} of the other keys have a weight of 0 beside it, normalised entropy {rest.mean:.2g}"
            f"{logit}).",
            remedy="Lower the learning rate, or bound the logits with query-key normalisation, sigma-reparametrisation or "
            "soft-capping.",
            reference=_ZHAI,
            stack=worst.stack,
            kind=worst.kind,
        )
        yield Reading(_margin(least, 1.0), finding)


def _thaw(record: AttentionRecord, thresholds: Thresholds) -> float | None:
    """How far a head is from frozen, 1 at the threshold: by the keys within reach or by the entropy of the rest, whichever is
    farther. None where the reach is not known."""
    if record.rest_entropy is None or record.keys_within_reach is None:
        return None
    spread = record.rest_entropy.mean / thresholds.rest_entropy
    return max(spread, record.keys_within_reach.mean / thresholds.within_reach)


def identical_heads(observed: Observed) -> Iterator[Reading]:
    """Relative to two random write spaces of this size, whose mean squared sine is 1 - d_k/d: wide heads must overlap."""
    for record in observed.heads:
        expected = 1 - record.head_width / record.width if record.width else 0.0
        if record.write_space_overlap is None or expected <= 0:
            continue
        pairs = [
            (record.write_space_overlap[g][h], g, h) for g in range(record.heads) for h in range(g + 1, record.heads)
        ]
        if not pairs:
            continue
        # Random spaces scatter by sqrt(2) (1 - d_k/d) / sqrt((d - 1)(d + 2)), which is too much in a stream of a few dimensions.
        if 1 - 6 * math.sqrt(2 / ((record.width - 1) * (record.width + 2))) < observed.thresholds.distinctness:
            continue
        overlap, first, second = max(pairs)
        distance = (1 - overlap) / expected
        finding = Finding(
            code="HEADS-IDENTICAL",
            phenomenon="head-channel-non-identifiability",
            severity="warning",
            block=record.block,
            head=second,
            value=distance,
            threshold=observed.thresholds.distinctness,
            message=f"Heads {first} and {second} of {_place(record.block, record.stack)} write into the same space "
            f"(overlap {overlap:.4f}). What one of them adds the other could add too, so the layer's output hardly tells them "
            "apart.",
            remedy="Attribute to the pair, not to either head. Position-gated output projections separate heads in training.",
            reference=_CIRRINCIONE,
            stack=record.stack,
            kind=record.kind,
        )
        yield Reading(_margin(distance, observed.thresholds.distinctness), finding)


def projection_kernel(observed: Observed) -> Iterator[Reading]:
    """What is lost beyond what the shape forces, in heads. A few single directions do not count: in half precision the weakest
    directions of a healthy projection are lost to rounding."""
    for record in observed.heads:
        if record.kernel_dimension is None:
            continue
        mixed = record.heads * record.head_width
        forced = max(0, mixed - record.width)
        lost = record.kernel_dimension - forced
        finding = Finding(
            code="HEADS-KERNEL",
            phenomenon="head-channel-non-identifiability",
            severity="warning",
            block=record.block,
            head=None,
            value=float(record.kernel_dimension),
            threshold=forced + observed.thresholds.lost_heads * record.head_width,
            message=f"The output projection of {_place(record.block, record.stack)} loses {record.kernel_dimension} of "
            f"the {mixed} dimensions that its heads write. Its shape accounts for {forced} of them.",
            remedy="Head outputs cannot be recovered here. Attribute to the sublayer, and look for duplicated or dead heads.",
            reference=_CIRRINCIONE,
            stack=record.stack,
            kind=record.kind,
        )
        yield Reading(-_margin(max(lost, 0) / record.head_width, observed.thresholds.lost_heads), finding)


def dead(observed: Observed) -> Iterator[Reading]:
    for finding in dead_components(observed.parts, observed.embeddings):
        yield Reading(math.inf, finding)


RULES: tuple[Callable[[Observed], Iterator[Reading]], ...] = (
    not_finite,
    consensus,
    rank_lost,
    dimensions_lost,
    uniform,
    rank_one,
    frozen,
    identical_heads,
    projection_kernel,
    dead,
)
