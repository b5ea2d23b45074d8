"""The cloud of the whole corpus and the experts of a mixture: their tables on the page, and a sentence each for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
# What healthy models have beside a pooling of the model's own.
POOLED_OUTPUT = "the mean of the output over tokens, or its first token, its last where the mask is causal"
CHANCE = "“By chance” is what is expected where every token chooses at random, each expert as likely as any other."
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
# So few experts without a token, as expected by chance, are said to be none.
HARDLY_ANY = 0.005


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
    drawn = "" if cloud.sampled is None else f"{cloud.sampled:,} taken"
    return Cell(wording.number(cloud.points), drawn, float(cloud.points))


def routers_table(routers: Sequence[RouterRecord]) -> Table | None:
    """A row for each block whose experts have a router; None where none was found."""
    if not routers:
        return None
    even = _loads_by_chance(routers)
    return table(
        "routers",
        "How many tokens each expert gets",
        [(Column("block"), lambda router: Cell(_block(router).removeprefix("block "), sort=float(router.block)))],
        [
            field("experts", "experts"),
            field("chosen", "chosen for a token"),
            field("tokens", "tokens"),
            field("entropy", "entropy of the load", "H/ln E"),
            field("effective_experts", "effective experts", "exp H"),
            Measure("load", Column("smallest load", reference=even[0]), lambda r: r.load and min(r.load)),
            Measure("load", Column("largest load", reference=even[1]), lambda r: r.load and max(r.load)),
            Measure("dead", Column("never chosen", numeric=False), lambda router: _numbers(router.dead)),
        ],
        routers,
        lambda router: slug("router", router.stack, router.block),
        references={
            name: f"by chance {words}"
            for name, words in {
                "entropy": _range(router.random_entropy for router in routers),
                "effective_experts": _range(map(_effective_by_chance, routers)),
                "dead": _never(router.random_dead for router in routers),
            }.items()
            if words
        },
    )


def _loads_by_chance(routers: Sequence[RouterRecord]) -> tuple[str, str]:
    """What stands under the smallest and under the largest load."""
    even = f"even {_range(1 / router.experts for router in routers)}"
    least, most = (_range(r.random_load[end] for r in routers if r.random_load) for end in (0, 1))
    return (
        (f"{even}; by chance at least {least}", f"{even}; by chance at most {most}") if least and most else (even, even)
    )


def _effective_by_chance(router: RouterRecord) -> float | None:
    """exp H where the entropy is the expected one."""
    return None if router.random_entropy is None else router.experts**router.random_entropy


def _range(values: Iterable[float | None]) -> str:
    """From the least to the most, in print; empty where there is none."""
    known = [value for value in values if value is not None]
    return " … ".join(dict.fromkeys((wording.number(min(known)), wording.number(max(known))))) if known else ""


def _never(expected: Iterable[float | None]) -> str:
    """How many experts get no token by chance."""
    known = [0.0 if value < HARDLY_ANY else value for value in expected if value is not None]
    return "none" if known and not any(known) else _range(known)


def sentences(record: DiagnosisRecord) -> list[str]:
    """The corpus at the end of the last stack, and the experts, for the terminal: each fact, and then what it is elsewhere."""
    return [sentence for pair in [*of_corpus(record), *of_experts(record.routers)] for sentence in pair if sentence]


def of_corpus(record: DiagnosisRecord) -> list[tuple[str, str]]:
    """The directions that all sequences together use at the end of the last stack, and in the model's own pooling; beside each
    sentence that of healthy models, empty where nothing is known."""
    found, healthy = [], references(record, "corpus")
    ends = [c for c in record.corpus if c.pooling == "mean" and c.centred_effective_rank is not None]
    if ends:
        last = ends[-1]
        found.append(
            (
                f"All sequences together, a point each (the mean of its tokens): they use "
                f"{wording.number(last.centred_effective_rank)} of {last.attainable_centred_rank} directions at {_site(last)}, and "
                f"their mean cosine is {wording.number(last.mean_cosine)}.",
                _said(healthy, "mean"),
            )
        )
    for own in (c for c in record.corpus if c.pooling == "own" and c.centred_effective_rank is not None):
        found.append(
            (
                f"The model's own pooling, {own.site}, uses {wording.number(own.centred_effective_rank)} of "
                f"{own.attainable_centred_rank} directions; its mean cosine is {wording.number(own.mean_cosine)}.",
                _said(healthy, "own", POOLED_OUTPUT),
            )
        )
    return found


def of_experts(routers: Sequence[RouterRecord]) -> list[tuple[str, str]]:
    """The least even load and how many experts got no token; beside it what “by chance” means."""
    known = [router for router in routers if router.entropy is not None]
    if not known:
        return []
    worst = min(known, key=lambda router: router.entropy or 0.0)
    dead = sum(len(router.dead or ()) for router in known)
    never = f"{wording.count(dead, 'expert')} in all got no token" if dead else "every expert got some token"
    by_chance = [router.random_dead for router in known if router.random_dead is not None]
    beside = f" (by chance {wording.number(worst.random_entropy)})" if worst.random_entropy is not None else ""
    alone = f" (by chance {_never([sum(by_chance)])})" if len(by_chance) == len(known) else ""
    least = (
        f"The experts' load is least even in {_block(worst)}: entropy {wording.number(worst.entropy)} of 1{beside}, "
        f"{wording.number(worst.effective_experts)} effective experts of {worst.experts}; {never}{alone}."
    )
    return [(least, CHANCE if beside or alone else "")]


def _said(healthy: References, pooling: str, of_what: str = "") -> str:
    """What the figures of the terminal are in healthy models."""
    directions = healthy.beside_attainable(f"corpus.{pooling}.centred_effective_rank")
    beside = {"directions": directions, "mean cosine": healthy.words(f"corpus.{pooling}.mean_cosine")}
    return healthy.said(beside, of_what)


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
