"""The figures of a diagnosis as lists: for each measure one figure for each place. A trail keeps them look by look, a sweep
checkpoint by checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from uncollapse.records.common import Finding, Statistic
from uncollapse.records.diagnosis import AttentionRecord, CorpusRecord, RouterRecord, SiteRecord
from uncollapse.records.trail import HeadPlace, SitePlace

# Of these the largest is the worst; of all others the smallest.
WORST_IS_LARGEST: Final = frozenset(
    {
        "not_finite",
        "corpus_mean_cosine",
        "dead_experts",
        "dead_parts",
        "max_logit",
        "query_key_norm",
        "update_queries",
        "update_keys",
        "update_values",
        "update_projection",
        "update_gains",
    }
)


def _mean(statistic: Statistic | None) -> float | None:
    return None if statistic is None else statistic.mean


def _share(site: SiteRecord) -> float | None:
    rank, most = _mean(site.affine_rank), _mean(site.attainable_affine_rank)
    return rank / most if rank is not None and most else None


SITE_FIGURES: Final[Mapping[str, Callable[[SiteRecord], float | None]]] = {
    "consensus_distance": lambda site: _mean(site.consensus),
    "consensus_after_norm": lambda site: _mean(site.consensus_after_norm),
    "affine_rank_share": _share,
    "effective_rank": lambda site: _mean(site.effective_rank),
    "stream_carried": lambda site: _mean(site.stream_carried),
    "not_finite": lambda site: float(site.not_finite),
}
DEAD_PARTS: Final = "dead_parts"
HEAD_FIGURES: Final = ("normalized_entropy", "rest_entropy", "key_share", "value_contraction", "max_logit")


def site_figures(trajectory: Sequence[SiteRecord]) -> dict[str, list[float | None]]:
    """A list for each measure that some site has."""
    found = {name: [figure(site) for site in trajectory] for name, figure in SITE_FIGURES.items()}
    return {name: values for name, values in found.items() if any(v is not None for v in values)}


def corpus_figures(trajectory: Sequence[SiteRecord], corpus: Sequence[CorpusRecord]) -> dict[str, list[float | None]]:
    """Of the cloud of the sequences' means at each site: its centred effective rank and its mean cosine."""
    clouds = {cloud.site: cloud for cloud in corpus if cloud.pooling == "mean"}
    if not clouds:
        return {}
    at = [clouds.get(site.site) for site in trajectory]
    return {
        "corpus_effective_rank": [None if cloud is None else cloud.centred_effective_rank for cloud in at],
        "corpus_mean_cosine": [None if cloud is None else cloud.mean_cosine for cloud in at],
    }


def expert_figures(trajectory: Sequence[SiteRecord], routers: Sequence[RouterRecord]) -> dict[str, list[float | None]]:
    """Of each block's router: the entropy of the experts' load beside its largest, and how many experts got no token."""
    by_block = {router.block: router for router in routers if router.load is not None}
    if not by_block:
        return {}
    at = [None if site.block is None else by_block.get(site.block) for site in trajectory]
    return {
        "expert_load_entropy": [None if router is None else router.entropy for router in at],
        "dead_experts": [None if router is None else float(len(router.dead or ())) for router in at],
    }


def dead_parts(
    trajectory: Sequence[SiteRecord], measured: Collection[int | None], found: Sequence[Finding]
) -> dict[str, list[float | None]]:
    """How many parts of each block do nothing, as `found` says; None for a block that is not among those `measured`."""
    if not measured:
        return {}
    dead = [(f.block, f.stack) for f in found if f.phenomenon == "dead-component"]
    counts = [float(dead.count((s.block, s.stack))) if s.block in measured else None for s in trajectory]
    return {DEAD_PARTS: counts}


def head_figures(attention: Sequence[AttentionRecord]) -> dict[str, list[float | None]]:
    """A list for each measure that some head has."""
    found = {name: [_mean(getattr(head, name)) for head in attention] for name in HEAD_FIGURES}
    return {name: values for name, values in found.items() if any(v is not None for v in values)}


def places(trajectory: Sequence[SiteRecord]) -> list[SitePlace]:
    """The places that the lists of `site_figures` belong to."""
    return [SitePlace(site.site, site.block, site.stack) for site in trajectory]


def head_places(attention: Sequence[AttentionRecord]) -> list[HeadPlace]:
    """The places that the lists of `head_figures` belong to."""
    return [HeadPlace(r.block, r.head, r.stack, r.kind) for r in attention]
