"""The cloud of the whole corpus and the experts of a mixture: their tables on the page, and a sentence each for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import CorpusRecord, DiagnosisRecord, RouterRecord
from uncollapse.report import wording
from uncollapse.report.healthy import References, corpus_part, references
from uncollapse.report.page.cells import Cell, Column, Measure, Table, field, severity_of, slug, table

POOLINGS = {
    "tokens": "every token",
    "mean": "mean of a sequence",
    "last": "last token",
    "first": "first token",
    "own": "the model's own pooling",
}
SAMPLED = {"tokens": "a sample of the tokens"}
CORPUS = [
    Measure("points", Column("points", "n"), lambda cloud: _points(cloud)),
    field("effective_rank", "effective rank", "RankMe"),
    field("attainable_rank", "attainable rank"),
    field("centred_effective_rank", "centred effective rank"),
    field("attainable_centred_rank", "attainable centred rank"),
    field("participation_ratio", "participation ratio"),
    field("stable_rank", "stable rank"),
    field("alpha", "decay of variances", "α"),
    field("k90", "directions for 90 %"),
    field("k95", "directions for 95 %"),
    field("top_share", "share of the first direction"),
    field("top_ten_share", "share of the first ten"),
    field("isoscore", "IsoScore"),
    field("mean_cosine", "mean cosine"),
    field("mean_share", "share of the mean", "‖x̄‖²/‖x‖²"),
    field("novelty", "novelty"),
    field("cka", "CKA"),
    field("unbiased_cka", "unbiased CKA"),
    field("cosine", "cosine to the block before"),
]
ROUTERS = [
    field("experts", "experts"),
    field("chosen", "chosen for a token"),
    field("tokens", "tokens"),
    field("entropy", "entropy of the load", "H/ln E"),
    field("effective_experts", "effective experts", "exp H"),
    Measure("load", Column("smallest load"), lambda router: None if router.load is None else min(router.load)),
    Measure("load", Column("largest load"), lambda router: None if router.load is None else max(router.load)),
    Measure("dead", Column("never chosen", numeric=False), lambda router: _numbers(router.dead)),
]


def corpus_tables(clouds: Sequence[CorpusRecord], findings: Sequence[Finding], healthy: References) -> list[Table]:
    """A table for each pooling, a row for each site. healthy: those of the corpus."""
    return [
        table(
            slug("corpus", pooling),
            f"The corpus as one cloud: {name if own[0].sampled is None else SAMPLED.get(pooling, name)}",
            [(Column("site", numeric=False), lambda cloud: Cell(_site(cloud), sort=_order(cloud)))],
            CORPUS,
            own,
            lambda cloud: slug("corpus", cloud.pooling, cloud.stack, cloud.site.replace(" ", "-")),
            lambda cloud: severity_of(findings, lambda f: _is_about(f, cloud)),
            references=healthy.columns(corpus_part(own[0])),
        )
        for pooling, name in POOLINGS.items()
        if (own := [cloud for cloud in clouds if cloud.pooling == pooling])
    ]


def _points(cloud: CorpusRecord) -> Cell:
    drawn = "" if cloud.sampled is None else f"{cloud.sampled:,} of them taken"
    return Cell(wording.number(cloud.points), drawn, float(cloud.points))


def routers_table(routers: Sequence[RouterRecord]) -> Table | None:
    """A row for each block whose experts have a router; None where none was found."""
    if not routers:
        return None
    return table(
        "routers",
        "How many tokens each expert gets",
        [(Column("block", numeric=False), lambda router: Cell(_block(router), sort=float(router.block)))],
        ROUTERS,
        routers,
        lambda router: slug("router", router.stack, router.block),
    )


def sentences(record: DiagnosisRecord) -> list[str]:
    """The corpus at the end of the last stack, and the experts, for the terminal."""
    found = []
    ends = [c for c in record.corpus if c.pooling == "mean" and c.centred_effective_rank is not None]
    if ends:
        last = ends[-1]
        found.append(
            f"All sequences together, a point each (the mean of its tokens): they use "
            f"{wording.number(last.centred_effective_rank)} of {last.attainable_centred_rank} directions at {_site(last)}, and "
            f"their mean cosine is {wording.number(last.mean_cosine)}."
        )
        healthy = references(record, "corpus")
        beside = {
            "directions": healthy.beside_attainable("corpus.mean.centred_effective_rank"),
            "mean cosine": healthy.words("corpus.mean.mean_cosine"),
        }
        found += filter(None, [healthy.said(beside)])
    known = [router for router in record.routers if router.entropy is not None]
    if known:
        worst = min(known, key=lambda router: router.entropy or 0.0)
        dead = sum(len(router.dead or ()) for router in known)
        never = f"{wording.count(dead, 'expert')} in all got no token" if dead else "every expert got some token"
        found.append(
            f"The experts' load is least even in {_block(worst)}: entropy {wording.number(worst.entropy)} of 1, "
            f"{wording.number(worst.effective_experts)} effective experts of {worst.experts}; {never}."
        )
    return found


def _is_about(finding: Finding, cloud: CorpusRecord) -> bool:
    return finding.phenomenon == "dimensional-collapse" and (
        (finding.block, finding.stack) == (cloud.block, cloud.stack) and cloud.pooling != "own"
    )


def _site(cloud: CorpusRecord) -> str:
    name = cloud.site if cloud.block is None else f"block {cloud.block}"
    return name + (f" ({cloud.stack})" if cloud.stack and cloud.block is not None else "")


def _order(cloud: CorpusRecord) -> float:
    return -1.0 if cloud.block is None else float(cloud.block)


def _block(router: RouterRecord) -> str:
    return f"block {router.block}" + (f" ({router.stack})" if router.stack else "")


def _numbers(dead: Sequence[int] | None) -> str | None:
    if dead is None:
        return None
    return "none" if not dead else wording.numbers_in_words(dead).partition(" ")[2]
