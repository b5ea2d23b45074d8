"""Records as a diagnosis would write them, made up but of realistic shape: for tests of what is drawn from records.

`encoder` is a small bidirectional model in good health but for one sharp head, `translation` an encoder–decoder with
cross-attention and absent values, `collapsed` one that falls to the rounding floor, `single_block` the smallest and
`large` the largest thing a page has to bear. `quiet` has no finding. `with_corpus` is the encoder with what is said of a corpus and
of experts. `ablation` is the grid of eight runs on the encoder,
`causal_ablation` a language model whose loss is known, with a run that could not be followed. `symmetries` is what the four
groups did to the encoder, `two_stacks` to the encoder–decoder, `deep` to a model of 40 blocks with the context lengths tried,
`lengths` a diagnosis that tried them too.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np

from uncollapse.analyses.comparison import compare
from uncollapse.records.ablation import AblationRecord, AblationRun, RateRecord, VerdictRecord
from uncollapse.records.common import Finding, ModelInfo, Probe, Statistic
from uncollapse.records.comparison import ComparisonRecord
from uncollapse.records.diagnosis import (
    AttentionRecord,
    CorpusRecord,
    DiagnosisRecord,
    HeadsRecord,
    MassiveTokensLeftOut,
    NormRecord,
    RouterRecord,
    SiteRecord,
    UpdateRecord,
)
from uncollapse.records.symmetries import SymmetriesRecord, SymmetryRecord, SymmetryTest, WidthScaling

NOT_AT_CORE = "measured at --level full only"
BETWEEN = ("novelty", "cka", "unbiased_cka", "cosine")


def statistic(mean: float, part: float = 0.0, n: int = 64, top: float = float("inf")) -> Statistic:
    """A statistic whose sequences reach `part` of the mean below and above it, at most up to `top`."""
    mean = float(mean)
    if part == 0.0:
        return Statistic(mean, mean, mean, n)
    return Statistic(mean, mean * (1 - part), min(mean * (1 + part), top), n)


def site(
    name: str,
    consensus: float,
    *,
    share: float = 1.0,
    n: int = 43,
    width: int = 384,
    effective: float = 0.62,
    stack: str | None = None,
    massive: float | None = None,
) -> SiteRecord:
    """A site whose affine rank is `share` of the attainable; `massive` is its consensus without the largest tokens."""
    ceiling = min(n, width)
    similarity = 1 - consensus**2 * n / (n - 1)
    left_out = None
    if massive is not None:
        left_out = MassiveTokensLeftOut(
            statistic(1.0),
            statistic(effective * ceiling * 1.1, 0.3),
            statistic(4.2, 0.3),
            statistic(9.0, 0.3),
            statistic(massive, 0.1, top=1.0),
            statistic(1 - massive**2, 0.1, top=1.0),
        )
    return SiteRecord(
        site=name,
        block=int(name.removeprefix("block.")) if name.startswith("block.") else None,
        stack=stack,  # type: ignore[arg-type]
        rank=statistic(max(1.0, share * ceiling), 0.5, top=width),
        affine_rank=statistic(share * (ceiling - 1), 0.5, top=width),
        attainable_rank=statistic(ceiling, 0.5, top=width),
        attainable_affine_rank=statistic(ceiling - 1, 0.5, top=width),
        effective_rank=statistic(max(1.0, effective * share * ceiling), 0.4),
        stable_rank=statistic(max(1.0, 0.1 * share * ceiling), 0.2),
        participation_ratio=statistic(max(1.0, 0.2 * share * ceiling), 0.2),
        consensus_distance=statistic(consensus, 0.12, top=1.0),
        token_similarity=statistic(similarity, 0.1, top=1.0),
        rank_gap=None if share < 0.5 else statistic(3.1e4, 0.8),
        massive_tokens_left_out=left_out,
        consensus_after_norm=statistic(consensus, 0.1, top=1.0),
        stream_carried=statistic(0.9, 0.05) if name.startswith("block.") else None,
        distinct_tokens=None if name.startswith("block.") else statistic(0.7 * n, 0.1),
        unavailable=({"rank_gap": "no singular value lies below the cut"} if share < 0.5 else {})
        | ({"distinct_tokens": "counted at the embedding"} if name.startswith("block.") else {})
        | ({} if name.startswith("block.") else {"stream_carried": "no block comes before"}),
    )


def attention(
    block: int,
    heads: int,
    rng: np.random.Generator,
    *,
    stack: str | None = None,
    kind: str = "self",
    full: bool = False,
) -> list[AttentionRecord]:
    """One block's heads, sharper and more diverse with depth, as in trained models."""
    records = []
    for head in range(heads):
        share = float(np.clip(rng.beta(6, 2.2) - 0.01 * block * rng.random(), 0.02, 0.995))
        records.append(
            AttentionRecord(
                block=block,
                head=head,
                stack=stack,  # type: ignore[arg-type]
                kind=kind,  # type: ignore[arg-type]
                entropy=statistic(share * 3.76, 0.15),
                normalized_entropy=statistic(share, 0.1, top=1.0),
                entropy_floor=statistic(share * 0.8, 0.3),
                max_logit=statistic(2 + 9 * (1 - share), 0.2),
                rest_entropy=statistic(0.3 + 0.6 * share, 0.1, top=1.0),
                key_share=statistic(share**2, 0.1, top=1.0),
                value_contraction=statistic(0.3 + 0.6 * (1 - share), 0.1),
                susceptibility=statistic(0.9 * (1 - share), 0.2) if full else None,
                contraction=statistic(0.5 + 0.7 * (1 - share), 0.1) if full else None,
                spectral_gap=statistic(0.2 + 0.6 * share, 0.1) if full else None,
                route="logits",
                unavailable={}
                if full
                else dict.fromkeys(("susceptibility", "contraction", "spectral_gap"), NOT_AT_CORE),
            )
        )
    return records


def heads_record(
    block: int,
    heads: int,
    head_width: int,
    width: int,
    rng: np.random.Generator,
    *,
    stack: str | None = None,
    kind: str = "self",
    verdict: str = "attributable",
) -> HeadsRecord:
    """The output projection of one block, with a symmetric overlap matrix of unit diagonal."""
    overlap = np.clip(head_width / width + 0.05 * rng.standard_normal((heads, heads)), 0.01, 1)
    overlap = (overlap + overlap.T) / 2
    np.fill_diagonal(overlap, 1.0)
    energy = rng.dirichlet(np.full(heads, 4.0))
    return HeadsRecord(
        block=block,
        stack=stack,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        heads=heads,
        head_width=head_width,
        width=width,
        ambiguous_degrees_of_freedom=(heads - 1) * head_width,
        kernel_dimension=max(0, heads * head_width - width),
        gauge_dimension=heads * head_width**2,
        output_projection_rank=min(heads * head_width, width),
        condition_number=float(12 + 40 * rng.random()),
        write_space_overlap=overlap.tolist(),
        energy_share=[statistic(float(share), 0.25, top=1.0) for share in energy],
        verdict=verdict,
    )


SHARP_HEAD = Finding(
    code="sharp-head",
    phenomenon="entropy-collapse",
    severity="warning",
    block=4,
    head=7,
    value=0.031,
    threshold=0.05,
    message="This head puts nearly all its weight on one key, whatever the text.",
    remedy="Watch the largest logit of this head; normalise queries and keys or lower the learning rate.",
    reference="Zhai et al. 2023, arXiv 2303.06296",
)
FALLING = Finding(
    code="consensus-falls",
    phenomenon="rank-collapse-depth",
    severity="critical",
    block=3,
    head=None,
    value=2.9e-3,
    threshold=1e-2,
    message="The tokens come together: the consensus distance falls, and ever faster.",
    remedy="Check that the residual connection is whole; without one every bidirectional model measured collapses.",
    reference="Dong et al. 2021, arXiv 2103.03404",
)
AMBIGUOUS = Finding(
    code="heads-ambiguous",
    phenomenon="head-channel-non-identifiability",
    severity="info",
    block=None,
    head=None,
    value=352,
    threshold=None,
    message="352 degrees of freedom a token are ambiguous to whoever sees only the sum of the heads.",
    remedy="Attribute to a head only with the output projection known; see the head panel for where that suffices.",
    reference="Cirrincione 2026, arXiv 2604.23681",
)


def model_info(name: str = "all-MiniLM-L6-v2", **changes: object) -> ModelInfo:
    """A small encoder."""
    info = ModelInfo(
        name=name,
        revision=None,
        architecture="BertModel",
        blocks=6,
        heads=12,
        key_value_heads=12,
        width=384,
        head_width=32,
        norm_placement="post",
        parameters=22_713_216,
        dtype="float32",
        attention_backend="sdpa",
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def encoder(name: str = "all-MiniLM-L6-v2") -> DiagnosisRecord:
    """Six blocks of twelve heads, a sharp head, a massive first token."""
    rng = np.random.default_rng(0)
    consensus = [0.971, 0.923, 0.918, 0.912, 0.893, 0.884, 0.879]
    massive = [0.971, 0.951, 0.948, 0.944, 0.931, 0.925, 0.922]
    trajectory = [
        site("embedding" if i == 0 else f"block.{i - 1}", c, massive=m)
        for i, (c, m) in enumerate(zip(consensus, massive, strict=True))
    ]
    heads = [record for block in range(6) for record in attention(block, 12, rng)]
    heads = [
        replace(record, normalized_entropy=statistic(0.031, 0.4), entropy=statistic(0.117, 0.4))
        if (record.block, record.head) == (4, 7)
        else record
        for record in heads
    ]
    verdicts = ["attributable"] * 5 + ["attributable with care (noise gain 35)"]
    return DiagnosisRecord(
        schema="uncollapse/diagnosis/1",
        versions={"uncollapse": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        model=model_info(name),
        probe=Probe(
            sequences=64,
            tokens=2752,
            max_tokens=128,
            source="packaged text",
            seed=0,
            device="cpu",
            command="uncollapse diagnose demo --html report.html",
            options={"batch_size": 8, "text": ["packaged text"], "fail_on": None},
        ),
        trajectory=trajectory,
        attention=heads,
        heads=[heads_record(block, 12, 32, 384, rng, verdict=verdicts[block]) for block in range(6)],
        norms=[],
        updates=[],
        symmetries=[],
        findings=[AMBIGUOUS, SHARP_HEAD],
    )


def quiet() -> DiagnosisRecord:
    """The encoder with nothing to complain about."""
    return replace(encoder(), findings=[])


def with_corpus() -> DiagnosisRecord:
    """The encoder at level `full`, with the clouds of its corpus at every site, in every pooling and its own, and with experts in
    every block."""
    record = encoder()
    corpus = []
    poolings: tuple[tuple[Literal["tokens", "mean", "last", "first"], int, int | None], ...] = (
        ("tokens", 2752, 64),
        ("mean", 64, None),
        ("last", 64, None),
        ("first", 64, None),
    )
    for pooling, points, sampled in poolings:
        for number, site in enumerate(record.trajectory):
            spectrum = (
                41.2,
                39.5 - number,
                20.1,
                6.21,
                1.27,
                1.13,
                1.41,
                31,
                39,
                0.0818,
                0.431,
                0.0494,
                0.0530,
                0.0587,
            )
            beside: dict[str, Any] = {} if site.block is None else {"compared": 64, "novelty": 0.258, "cka": 0.958}
            beside |= {} if site.block is None else {"unbiased_cka": 0.94, "cosine": 0.865}
            most = min(points, 64)
            cloud = CorpusRecord(
                site.site, site.block, None, pooling, points, 384, sampled, most, most - 1, *spectrum, **beside
            )
            corpus.append(replace(cloud, unavailable={} if beside else dict.fromkeys(BETWEEN, "no block comes before")))
    alone: dict[str, Any] = dict.fromkeys(("compared", *BETWEEN))
    own = replace(corpus[-1], site="pooler_output", block=None, pooling="own", **alone)
    corpus.append(replace(own, unavailable=dict.fromkeys(BETWEEN, "no block comes before")))
    load = [0.31, 0.24, 0.2, 0.13, 0.07, 0.04, 0.01, 0.0]
    routers = [
        RouterRecord(block, None, 8, 2, 2752, load, 0.795, 5.22, [7], {}, 0.9997, 0.0, [0.107, 0.144])
        for block in range(record.model.blocks)
    ]
    rng = np.random.default_rng(0)
    heads = [
        replace(head, second_singular_value=head.contraction)
        for block in range(record.model.blocks)
        for head in attention(block, 12, rng, full=True)
    ]
    return replace(record, corpus=corpus, routers=routers, attention=heads)


def collapsed() -> DiagnosisRecord:
    """The encoder without its residual connections: consensus at the rounding floor, exactly zero in the end."""
    consensus = [0.97, 0.68, 0.23, 1.6e-2, 2.9e-3, 5.5e-6, 0.0]
    share = [1.0, 1.0, 1.0, 1.0, 0.9, 0.4, 0.0]
    trajectory = [
        site("embedding" if i == 0 else f"block.{i - 1}", c, share=s)
        for i, (c, s) in enumerate(zip(consensus, share, strict=True))
    ]
    return replace(encoder(), trajectory=trajectory, findings=[AMBIGUOUS, FALLING, SHARP_HEAD])


SURVIVING = "S_n: every permutation of the tokens"
NOT_ACTED = "measured by `uncollapse symmetries`"


def symmetry_records(
    sites: list[str],
    consensus: list[Statistic | None],
    calls: list[str],
    rng: np.random.Generator,
) -> list[SymmetryRecord]:
    """The four records of a diagnosis: the order parameters along depth, and no group has acted."""

    def over_heads(low: float, high: float) -> list[Statistic | None]:
        means = low + (high - low) * rng.random(len(calls))
        return [Statistic(float(m), float(0.3 * m), float(min(1.0, 1.3 * m)), 12) for m in means]

    rows: list[tuple[str, str, str, list[str], list[Statistic | None], list[str], list[str]]] = [
        (
            "rank-collapse-depth",
            "S_n: permutations of the tokens",
            "consensus distance",
            sites,
            consensus,
            ["positions"],
            ["12 residual additions", "6 MLPs"],
        ),
        (
            "rank-collapse-width",
            "S_n: permutations of the keys alone",
            "1 - normalised entropy",
            calls,
            over_heads(0.15, 0.4),
            ["query and key weights", "positions"],
            [],
        ),
        (
            "head-channel-non-identifiability",
            "S_H and GL(d_k): permutations of the heads, a change of basis in each",
            "1 - overlap of write spaces",
            calls,
            over_heads(0.85, 0.95),
            [],
            [],
        ),
        (
            "entropy-collapse",
            "R and R+: shifts and scalings of the logits",
            "normalised entropy",
            calls,
            over_heads(0.6, 0.85),
            [],
            [],
        ),
    ]
    return [
        SymmetryRecord(
            phenomenon=phenomenon,  # type: ignore[arg-type]
            group=group,
            equivariance_defect=None,
            measure=measure,
            places=places,
            order_parameter=values,
            collapsed_value=0.0,
            slope=None,
            breakers=breakers,
            stabilisers=stabilisers,
            unavailable={
                "equivariance_defect": NOT_ACTED,
                "slope": "measured with --context-lengths"
                if phenomenon == "rank-collapse-width"
                else "only collapse in width depends on the context length",
            },
        )
        for phenomenon, group, measure, places, values, breakers, stabilisers in rows
    ]


def translation() -> DiagnosisRecord:
    """Encoder and decoder, cross-attention, the panels that `full` adds, and values that could not be measured."""
    rng = np.random.default_rng(1)
    trajectory = [
        site(name, 0.95 * floor ** (i / 4), stack=stack, width=512, n=60, share=1 - 0.04 * i)
        for stack, floor, names in (
            ("encoder", 0.7, ["embedding", *(f"block.{b}" for b in range(4))]),
            ("decoder", 0.35, ["decoder.embedding", *(f"block.{b}" for b in range(4, 8))]),
        )
        for i, name in enumerate(names)
    ]
    trajectory[7] = replace(trajectory[7], effective_rank=None, unavailable={"effective_rank": "one sequence held NaN"})
    calls = [
        *(("encoder", "self", block) for block in range(4)),
        *(("decoder", kind, block) for block in range(4, 8) for kind in ("self", "cross")),
    ]
    heads = [r for stack, kind, b in calls for r in attention(b, 8, rng, stack=stack, kind=kind, full=True)]
    one_key = "one allowed key in every row"
    heads = [
        replace(
            record,
            normalized_entropy=None,
            entropy=None,
            unavailable={"normalized_entropy": one_key, "entropy": one_key},
        )
        if (record.kind, record.block, record.head) == ("cross", 6, 5)
        else record
        for record in heads
    ]
    projections = [heads_record(b, 8, 64, 512, rng, stack=stack, kind=kind) for stack, kind, b in calls]
    projections[5] = replace(
        projections[5],
        write_space_overlap=None,
        condition_number=None,
        energy_share=None,
        unavailable=dict.fromkeys(
            ("write_space_overlap", "condition_number", "energy_share"), "the projection is quantised"
        ),
    )
    norms = [
        NormRecord(
            block=block,
            norm=norm,
            affine_rank_before=statistic(59 - block, 0.1),
            affine_rank_after=statistic(59 - block, 0.1),
            brackets=[statistic(0), statistic(0), statistic(0)],
        )
        for block in range(4)
        for norm in ("layer.0.layer_norm", "layer.1.layer_norm")
    ]
    norms[3] = replace(
        norms[3], affine_rank_after=statistic(57, 0.1), brackets=[statistic(0), statistic(0), statistic(1)]
    )
    updates = [
        UpdateRecord(
            block=block,
            sublayer=sublayer,  # type: ignore[arg-type]
            stack=stack,  # type: ignore[arg-type]
            kind=kind,  # type: ignore[arg-type]
            out_of_span_energy=statistic(float(0.4 + 0.4 * rng.random()), 0.1),
            null_out_of_span_energy=statistic(float(0.3 + 0.1 * rng.random()), 0.1),
            nonlinear_innovation=statistic(float(0.2 * rng.random())) if sublayer == "mlp" else None,
            hidden_effective_rank=statistic(240.0, 0.1) if sublayer == "mlp" else None,
            relative_norm=statistic(float(0.2 + 0.3 * rng.random()), 0.1),
            unavailable={}
            if sublayer == "mlp"
            else {"nonlinear_innovation": "defined for the MLP", "hidden_effective_rank": "no hidden layer"},
        )
        for stack, blocks in (("encoder", range(4)), ("decoder", range(4, 8)))
        for block in blocks
        for sublayer, kind in (("attention", "self"), ("attention", "cross"), ("mlp", None))
        if not (stack == "encoder" and kind == "cross")
    ]
    return replace(
        encoder(),
        model=model_info(
            "opus-mt-de-en",
            architecture="MarianMTModel",
            blocks=8,
            heads=8,
            key_value_heads=8,
            width=512,
            head_width=64,
            norm_placement="post",
            parameters=74_410_496,
        ),
        trajectory=trajectory,
        attention=heads,
        heads=projections,
        norms=norms,
        updates=updates,
        symmetries=symmetry_records(
            [s.site for s in trajectory],
            [s.consensus_distance for s in trajectory],
            [f"block.{b}" + (".cross" if kind == "cross" else "") for _, kind, b in calls],
            rng,
        ),
        findings=[
            replace(FALLING, block=7, stack="decoder", severity="warning"),
            replace(SHARP_HEAD, block=5, head=3, stack="decoder"),
        ],
    )


def alone(part: Any) -> Any:
    """The same record measured on one sequence: every statistic its own lowest and highest."""
    if isinstance(part, Statistic):
        return Statistic(part.mean, part.mean, part.mean, 1)
    if isinstance(part, list):
        return [alone(each) for each in part]
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{each.name: alone(getattr(part, each.name)) for each in fields(part)})
    return part


def single_block() -> DiagnosisRecord:
    """One block of one head, one sequence."""
    rng = np.random.default_rng(2)
    record = encoder("one-block")
    record = replace(
        record,
        model=model_info("one-block", blocks=1, heads=1, key_value_heads=1, head_width=384, parameters=1_200_000),
        probe=replace(record.probe, sequences=1, tokens=43),
        trajectory=[site("embedding", 0.97), site("block.0", 0.9)],
        attention=attention(0, 1, rng),
        heads=[heads_record(0, 1, 384, 384, rng)],
        findings=[],
    )
    return alone(record)


def large() -> DiagnosisRecord:
    """80 blocks of 64 heads with 8 key/value heads, causal."""
    rng = np.random.default_rng(3)
    sharp = [replace(SHARP_HEAD, block=b, head=h) for b, h in ((12, 40), (13, 3), (71, 63), (0, 0))]
    consensus = 0.95 * np.exp(-np.linspace(0, 1.6, 81)) + 0.02 * rng.random(81)
    return replace(
        encoder("a-model-of-70-billion-parameters"),
        model=model_info(
            "a-model-of-70-billion-parameters",
            architecture="LlamaForCausalLM",
            blocks=80,
            heads=64,
            key_value_heads=8,
            width=8192,
            head_width=128,
            norm_placement="pre",
            parameters=70_553_706_496,
            dtype="bfloat16",
        ),
        trajectory=[
            site(
                "embedding" if i == 0 else f"block.{i - 1}",
                float(c),
                n=1024,
                width=8192,
                effective=0.5 - 0.004 * i,
                massive=float(min(1.0, 1.4 * c)),
            )
            for i, c in enumerate(consensus)
        ],
        attention=[record for block in range(80) for record in attention(block, 64, rng)],
        heads=[heads_record(block, 64, 128, 8192, rng) for block in range(80)],
        findings=[AMBIGUOUS, *sharp],
    )


def sized(blocks: int, heads: int) -> DiagnosisRecord:
    """`large`, cut to so many blocks of so many heads."""
    record, rng = large(), np.random.default_rng(5)
    return replace(
        record,
        model=replace(record.model, name=f"{blocks}-blocks", blocks=blocks, heads=heads, width=128 * heads),
        trajectory=record.trajectory[: blocks + 1],
        attention=[each for each in record.attention if each.block < blocks and each.head < heads],
        heads=[heads_record(block, heads, 128, 128 * heads, rng) for block in range(blocks)],
        findings=[f for f in record.findings if (f.block or 0) < blocks and (f.head or 0) < heads],
    )


def compared(record: DiagnosisRecord | None = None) -> ComparisonRecord:
    """A diagnosis (the encoder, if none is given) beside the same model later: head 1 of the second last block has logits four
    times as large, and head 0 of the first sees only one key."""
    before = record or encoder()
    before = replace(before, probe=replace(before.probe, fingerprint="the same text"))
    block = before.model.blocks - 2
    later = [
        replace(each, max_logit=each.max_logit and statistic(4 * each.max_logit.mean, 0.2))
        if (each.block, each.head) == (block, 1)
        else replace(each, normalized_entropy=statistic(0.01))
        if (each.block, each.head) == (0, 0)
        else each
        for each in before.attention
    ]
    return compare(before, replace(before, attention=later)).record


def compared_three() -> ComparisonRecord:
    """An encoder, the same again, and the same with a head whose logits are four times as large."""
    first, probe = encoder(), replace(encoder().probe, fingerprint="the same text")
    named = [replace(first, model=replace(first.model, name=n), probe=probe) for n in ("first", "second", "third")]
    grown = [
        replace(each, max_logit=each.max_logit and statistic(4 * each.max_logit.mean, 0.2))
        if (each.block, each.head) == (2, 1)
        else each
        for each in first.attention
    ]
    return compare(*named[:2], replace(named[2], attention=grown)).record


FLOOR = 3.552713678800501e-15
NO_COLLAPSE = RateRecord("none", 0.95, 0.8, 0.5, 1.1, FLOOR, None)


def run(
    without: list[str],
    consensus: list[float],
    share: list[float],
    rate: RateRecord | None,
    *,
    shift: float | None = None,
    loss: float | None = None,
    massive: bool = False,
    first: int = 0,
) -> AblationRun:
    """One run; with `massive`, the distances are those without the largest tokens, and the plain ones are a tenth of them."""
    trajectory = [
        site(
            "embedding" if i == 0 else f"block.{first + i - 1}",
            c * (0.1 if massive else 1.0),
            share=s,
            massive=c if massive else None,
        )
        for i, (c, s) in enumerate(zip(consensus, share, strict=True))
    ]
    unavailable = {"loss": "the model has no language-model head with a causal mask"} if loss is None else {}
    unavailable |= {"output_shift": "this is the whole model"} if shift is None else {}
    unavailable |= {"rate": "the consensus distance is not finite"} if rate is None else {}
    return AblationRun(
        without=without,
        trajectory=trajectory,
        rate=rate,
        loss=None if loss is None else statistic(loss, 0.1),
        output_shift=None if shift is None else statistic(shift, 0.1),
        attention_contraction=[statistic(0.9 - 0.1 * i, 0.1, top=1.0) for i in range(len(consensus) - 1)],
        unavailable=unavailable,
    )


def verdict(prediction: str, without: list[str], agrees: bool | None, **changes: object) -> VerdictRecord:
    """A verdict in rank, unless told otherwise."""
    record = VerdictRecord(
        prediction=prediction,
        source="Dong, Cordonnier, Loukas 2021, arXiv 2103.03404",
        without=without,
        measure="affine_rank",
        predicted="dimensions are lost",
        observed="100% of the share is left",
        agrees=agrees,
        rate=None,
        block=None,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def ablation() -> AblationRecord:
    """The eight runs of the grid on a small encoder in float64: whatever lacks the residual falls to the rounding floor."""
    full, fallen = [1.0] * 7, [1.0, 1.0, 1.0, 1.0, 0.9, 0.1, 0.0]
    level = [0.96, 0.92, 0.91, 0.89, 0.87, 0.86, 0.85]
    doubly = RateRecord("doubly exponential", 0.0076, 2.74, 2.68, 2.8, FLOOR, 5)
    base = encoder()
    return AblationRecord(
        schema="uncollapse/ablation/1",
        versions=base.versions,
        model=model_info(dtype="float64"),
        probe=replace(base.probe, command="uncollapse ablate demo --grid", options={"grid": True, "blocks": [0, 1]}),
        blocks=list(range(6)),
        is_causal=False,
        runs=[
            run([], level, full, NO_COLLAPSE, massive=True),
            run(["norm"], [0.96, 0.9, 0.56, 0.32, 0.76, 0.49, 0.38], full, NO_COLLAPSE, shift=0.978),
            run(["residual"], [0.96, 0.75, 0.32, 0.043, 1.4e-4, 2.4e-11, 1e-15], fallen, doubly, shift=1.0),
            run(["mlp"], [0.96, 0.88, 0.85, 0.78, 0.75, 0.78, 0.7], full, NO_COLLAPSE, shift=0.89),
            run(
                ["norm", "residual"],
                [0.96, 0.76, 0.13, 0.012, 1.3e-4, 3.1e-9, 8.1e-16],
                fallen,
                replace(doubly, slope=2.09, slope_low=1.75, slope_high=2.43),
                shift=1.02,
            ),
            run(["norm", "mlp"], [0.96, 0.94, 0.89, 0.79, 0.64, 0.55, 0.5], full, NO_COLLAPSE, shift=0.87),
            run(
                ["residual", "mlp"],
                [0.96, 0.75, 0.091, 0.0042, 1.2e-6, 6e-16, 3.4e-16],
                fallen,
                replace(doubly, slope=2.31, slope_low=1.33, slope_high=3.28, floor_block=4),
                shift=1.0,
            ),
            run(  # a value above the floor behind one at the floor is rounding all the same
                ["norm", "residual", "mlp"],
                [0.96, 2e-6, 0.0, 4.9e-16, 5e-14, 2.3e-16, 2.5e-16],
                fallen,
                RateRecord("doubly exponential", 2.1e-6, None, None, None, FLOOR, 1),
                shift=1.03,
            ),
        ],
        verdicts=[
            verdict("The MLP prevents the collapse", ["mlp"], False),
            verdict(
                "The MLP prevents the collapse",
                ["mlp"],
                True,
                measure="consensus_distance",
                predicted="falls",
                observed="consensus distance 0.96 → 0.7",
                block=5,
            ),
            verdict("Without residual connections the tokens collapse", ["residual"], True, block=5),
            verdict("Layer normalisation is rank-neutral", ["norm"], None, source="Cirrincione 2026, arXiv 2604.23681"),
        ],
        norms=[],
        updates=[],
    )


def causal_ablation() -> AblationRecord:
    """Three runs in float32 on a causal model, in two of its blocks: a geometric fall, and one that could not be followed."""
    share = [1.0, 1.0, 1.0, 0.8, 0.6]
    geometric = RateRecord("geometric", 0.55, 1.02, 0.97, 1.07, 1.9073486328125e-06, None)
    lost = run(["norm", "attention"], [0.9, 0.8, 0.7, 0.6, 0.5], share, None, shift=0.3, loss=9.1)
    gone = replace(lost.trajectory[-1], consensus_distance=None, unavailable={"consensus_distance": "NaN or infinity"})
    whole = replace(NO_COLLAPSE, floor=geometric.floor)
    base = translation()
    return replace(
        ablation(),
        model=model_info("small-gpt", blocks=4, architecture="GPT2LMHeadModel", norm_placement="pre"),
        blocks=[0, 1, 3],
        is_causal=True,
        probe=replace(base.probe, command=""),
        runs=[
            run([], [0.9, 0.9, 0.9, 0.9, 0.9], [1.0] * 5, whole, loss=3.2),
            run(["residual"], [0.9, 0.5, 0.27, 0.15, 0.08], share, geometric, shift=0.7, loss=7.5),
            replace(lost, trajectory=[*lost.trajectory[:-1], gone], attention_contraction=[]),
        ],
        verdicts=[verdict("Without residual connections the tokens collapse", ["residual"], True)],
        norms=base.norms,
        updates=base.updates,
    )


def acted(
    phenomenon: str,
    action: str,
    defect: float | None,
    *,
    holds: bool | None,
    surviving: str = SURVIVING,
    dimension: int | None = None,
    without: tuple[str, ...] = (),
    is_symmetry: bool = True,
    reason: str = "",
) -> SymmetryTest:
    """A test on 16 sequences, beside rounding of 4.1e-7."""
    return SymmetryTest(
        phenomenon=phenomenon,  # type: ignore[arg-type]
        action=action,
        is_symmetry=is_symmetry,
        surviving=surviving,
        dimension=dimension,
        without=list(without),
        defect=None if defect is None else statistic(defect, 0.2, 16),
        rounding=None if defect is None else statistic(4.1e-7, 0.1, 16),
        holds=holds,
        unavailable={"defect": reason} if reason else {},
    )


def symmetries() -> SymmetriesRecord:
    """The encoder in float32: positions alone break the order of tokens, one gauge could not be applied."""
    base = encoder()
    rng = np.random.default_rng(4)
    calls = [f"block.{b}" for b in range(6)]
    four = symmetry_records([s.site for s in base.trajectory], [s.consensus for s in base.trajectory], calls, rng)
    defects = [0.312, 0.874, 3.9e-7, None]
    four = [
        replace(
            each,
            equivariance_defect=None if defect is None else statistic(defect, 0.1, 16),
            unavailable={**each.unavailable, "equivariance_defect": "scaling the logits is not a symmetry"},
        )
        for each, defect in zip(four, defects, strict=True)
    ]
    heads, entropy = "head-channel-non-identifiability", "entropy-collapse"
    return SymmetriesRecord(
        schema="uncollapse/symmetries/1",
        versions=base.versions,
        model=base.model,
        probe=replace(
            base.probe, sequences=16, tokens=688, command="uncollapse symmetries demo --html symmetries.html"
        ),
        symmetries=four,
        tests=[
            acted("rank-collapse-depth", "token permutation", 0.312, holds=False),
            acted("rank-collapse-depth", "token permutation", 4.3e-7, holds=True, without=("positions",)),
            acted("rank-collapse-depth", "token permutation", 0.298, holds=False, without=("mlp",)),
            acted(
                "rank-collapse-width",
                "key permutation",
                0.874,
                holds=None,
                is_symmetry=False,
                surviving="nothing: only in the limit of long contexts",
            ),
            acted(heads, "head permutation", 0.0, holds=True, surviving="S_12 in every block"),
            acted(
                heads,
                "value-output gauge",
                6.2e-7,
                holds=True,
                surviving="GL(32) and shifts in each of 12 heads",
                dimension=12_672,
            ),
            acted(
                heads,
                "query-key gauge",
                None,
                holds=None,
                surviving="not known here",
                dimension=None,
                reason="the queries and keys come out of one quantised weight",
            ),
            acted(entropy, "logit shift", 2.9e-7, holds=True, surviving="R for each row", dimension=43),
            acted(entropy, "logit scaling", 0.127, holds=None, is_symmetry=False, surviving="nothing", dimension=0),
        ],
        findings=[
            replace(SHARP_HEAD, code="ENTROPY-FROZEN"),
            replace(AMBIGUOUS, code="HEADS-KERNEL", block=2),
        ],
    )


def scaling(
    block: int, slope: float | None, regime: str, *, stack: str | None = None, kind: str = "self"
) -> WidthScaling:
    """sigma_2 at 32, 64, 128 and 256 tokens, on a power law but for a little wobble."""
    lengths = [32, 64, 128, 256]
    values = [0.6 * (n / 32) ** (slope or 0.0) * (1 + 0.03 * (-1) ** i) for i, n in enumerate(lengths)]
    return WidthScaling(
        block=block,
        stack=stack,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        context_lengths=lengths,
        second_singular_value=[None if slope is None else Statistic(v, 0.5 * v, 1.4 * v, 12) for v in values],
        slope=slope,
        slope_low=None if slope is None else slope - 0.09,
        slope_high=None if slope is None else slope + 0.09,
        regime=regime,
    )


INDEPENDENT = "falls like independent logits: attention tends to one mixture for all tokens as the context grows"
SLOWER = "falls slower than independent logits"
NO_TREND = "no trend: the patterns keep a second direction at every length"


def with_scaling(four: list[SymmetryRecord], fitted: list[WidthScaling]) -> list[SymmetryRecord]:
    """The four records with context lengths tried."""
    slopes = [each.slope for each in fitted if each.slope is not None]
    slope = Statistic(sum(slopes) / len(slopes), min(slopes), max(slopes), len(slopes))
    return [
        replace(each, scaling=fitted, slope=slope, unavailable={"equivariance_defect": NOT_ACTED})
        if each.phenomenon == "rank-collapse-width"
        else each
        for each in four
    ]


def deep() -> SymmetriesRecord:
    """40 blocks, causal, with context lengths tried; critically low in depth."""
    rng = np.random.default_rng(5)
    consensus = 0.95 * np.exp(-np.linspace(0, 5, 41)) + 0.003 * rng.random(41)
    fitted = [
        scaling(b, float(s), SLOWER if s < -0.25 else NO_TREND)
        for b, s in enumerate(-0.25 - 0.2 * rng.standard_normal(40))
    ]
    fitted[7] = scaling(7, None, "no slope: the second singular value could not be measured at two lengths")
    fitted[9] = replace(fitted[9], slope_low=None, slope_high=None)
    four = symmetry_records(
        ["embedding", *(f"block.{b}" for b in range(40))],
        [statistic(float(c), 0.2, top=1.0) for c in consensus],
        [f"block.{b}" for b in range(40)],
        rng,
    )
    four[0] = replace(four[0], breakers=["positions", "causal mask"], stabilisers=["80 residual additions", "40 MLPs"])
    return replace(
        symmetries(),
        model=model_info("forty-blocks", blocks=40, norm_placement="pre", architecture="LlamaForCausalLM"),
        symmetries=with_scaling(four, fitted),
        findings=[
            replace(FALLING, code="DEPTH-CONSENSUS", block=37),
            *(replace(SHARP_HEAD, code="ENTROPY-FROZEN", block=b, head=b % 12) for b in (3, 12, 38)),
        ],
    )


def two_stacks() -> SymmetriesRecord:
    """The encoder–decoder: cross-attention, a place without a value, an order parameter that was not measured at all."""
    base = translation()
    four = list(base.symmetries)
    four[1] = replace(four[1], order_parameter=[None, *four[1].order_parameter[1:]])
    nothing: list[Statistic | None] = [None] * len(four[2].places)
    four[2] = replace(
        four[2],
        order_parameter=nothing,
        unavailable={**four[2].unavailable, "order_parameter": "the projection is quantised"},
    )
    fitted = [
        scaling(0, -0.52, INDEPENDENT, stack="encoder"),
        scaling(4, -0.1, NO_TREND, stack="decoder"),
        scaling(4, -0.31, SLOWER, stack="decoder", kind="cross"),
    ]
    return replace(
        symmetries(),
        model=base.model,
        symmetries=with_scaling(four, fitted),
        tests=[],
        findings=[replace(FALLING, block=7, stack="decoder", severity="warning")],
    )


def lengths() -> DiagnosisRecord:
    """The encoder with the four symmetries, context lengths tried, and findings about two of them."""
    base = encoder()
    rng = np.random.default_rng(6)
    four = symmetry_records(
        [s.site for s in base.trajectory], [s.consensus for s in base.trajectory], [f"block.{b}" for b in range(6)], rng
    )
    fitted = [scaling(b, -0.05 - 0.1 * b, INDEPENDENT if b > 3 else SLOWER if b > 1 else NO_TREND) for b in range(6)]
    return replace(base, symmetries=with_scaling(four, fitted), findings=[AMBIGUOUS, FALLING, SHARP_HEAD])
