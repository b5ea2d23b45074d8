"""The cases of the validity benchmark: what is planted where, and what one run leaves to be scored.

Places are drawn at random, from the model's name as seed; each place goes through the whole ladder of severities, so that
every case has its own healthy value beside it. An order parameter is measured where the damage is, by itself.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from studies.validity import planting
from studies.validity.models import Batches, Subject
from uncollapse.analyses.recording import attention_records, site_records
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.judgement.identifiability import heads_records
from uncollapse.judgement.reading import as_read
from uncollapse.measures import heads
from uncollapse.probe.activity import embedding_records, part_records
from uncollapse.probe.passes import Watched, capture
from uncollapse.records.common import Phenomenon
from uncollapse.records.diagnosis import AttentionRecord, EmbeddingRecord, HeadsRecord, PartRecord, SiteRecord, stacks

RESIDUAL = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
COMMON = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
LOGITS_UP = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LOGITS_DOWN = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.0)
ALIKE = (0.0, 0.3, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0)
COPIED = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
LOST = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75)
LENGTHS = (2, 3, 5, 8, 16, 32)
OUTPUT_KEPT = "output kept"
TOLD_APART = "tokens told apart"  # by somebody who learns it anew
AS_BEFORE = "tokens told apart as before"  # by somebody who learnt it from the healthy model


@dataclass(frozen=True)
class Run:
    """One observed run, as records, to be judged whenever rules change. `orders` are the order parameters at the planted
    place. `trajectory` and `attention` are None where only weights were changed, `heads` holds the records that differ from the
    healthy model's."""

    orders: dict[str, float]
    trajectory: list[SiteRecord] | None
    attention: list[AttentionRecord] | None
    heads: list[HeadsRecord]
    parts: list[PartRecord] = field(default_factory=list)
    embeddings: list[EmbeddingRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One place of one model. `block` and `head` are where the damage is (None: everywhere, or no head), `head` two of a pair;
    `runs` belong to `severities`. A confounder has no phenomenon and no ladder; its one
    order parameter, where the model was changed, is what is left of the output."""

    subject: str
    number: int
    plant: str
    phenomenon: Phenomenon | None
    block: int | None
    head: list[int] | None
    severities: list[float]
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """All cases of one model. `fingerprint` is that of the code that measured them."""

    fingerprint: str
    subject: str
    parameters: int
    healthy: Run
    cases: list[Case]


class Bench:
    """A healthy model, observed again and again."""

    def __init__(self, subject: Subject, name: str) -> None:
        self.subject, self.name = subject, name
        self.model, self.batches = subject.open()
        self.anatomy = proved_anatomy(self.model, self.batches[0])
        # Where the model forms its logits itself, as MPNet does, nothing is planted at the attention.
        product = planting.attention_call(self.anatomy, 0).product
        self.has_operands = product.operation.startswith("scaled_dot_product_attention")
        self.random = random.Random(name)
        self.healthy = self.observe(heads_too=True)
        self.intact = planting.outputs(self.model, self.batches)
        self.reader = planting.reader(self.intact, self.batches)
        self.number = 0

    def draw(self, count: int, of: int) -> list[int]:
        return sorted(self.random.sample(range(of), min(count, of)))

    def observe(
        self,
        context: Any = None,
        *,
        model: nn.Module | None = None,
        batches: Batches | None = None,
        orders: Callable[[list[SiteRecord], list[AttentionRecord]], dict[str, float]] = lambda *_: {},
        heads_too: bool = False,
        parts_too: bool = False,
        kept_too: bool = False,
    ) -> Run:
        """`heads_too` also looks at the projections, `parts_too` at what each part does, `kept_too` at what the output has left."""
        anatomy: Anatomy = self.anatomy
        watch: list[Watched] = ["sites", "attention", "rows"]
        if heads_too:
            watch.append("projections")
        if parts_too:
            watch.append("parts")
        with context or contextlib.nullcontext():
            given = self.batches if batches is None else batches
            observed = capture(model or self.model, given, anatomy, watch=watch)
            outputs = planting.outputs(model or self.model, given) if kept_too else []
        kept = {}
        if kept_too:
            whole = self.reader.told_apart(self.intact, given)
            anew = planting.reader(outputs, given, self.reader.scale)
            kept = {
                OUTPUT_KEPT: planting.output_kept(self.intact, outputs, given),
                TOLD_APART: anew.told_apart(outputs, given) / whole,
                AS_BEFORE: self.reader.told_apart(outputs, given) / whole,
            }
        trajectory = site_records(observed.sites)
        attention = [record for s in observed.attention for record in attention_records(s, "core")]
        found = heads_records(observed.attention) if heads_too else []
        parts, embeddings = part_records(observed.parts), embedding_records(observed.embeddings)
        return Run({**orders(trajectory, attention), **kept}, trajectory, attention, found, parts, embeddings)

    def case(
        self, plant: str, phenomenon: Phenomenon | None, block: int | None, head: list[int] | None, ladder: Any
    ) -> Case:
        self.number += 1
        return Case(self.name, self.number, plant, phenomenon, block, head, list(ladder))


def measured(subject: Subject, name: str, fingerprint: str, scale: float = 1.0) -> Measured:
    """Every case of one model. `scale` shrinks the number of places, for a quick look, on top of the subject's own."""
    bench = Bench(subject, name)
    every = (
        [*confounded(bench), *damaged(bench, scale * subject.scale)]
        if subject.is_healthy
        else [next(confounded(bench))]
    )
    parameters = sum(p.numel() for p in bench.model.parameters())
    return Measured(fingerprint, name, parameters, bench.healthy, every)


# Planted damage -------------------------------------------------------------------------------------------------------


def damaged(bench: Bench, scale: float) -> Iterator[Case]:
    """Every planted case of one model, with its runs; none for a scale of 0."""
    if not scale:
        return
    blocks = len(bench.anatomy.blocks)

    def count(n: int) -> int:
        return max(1, round(n * scale))

    yield from (_depth(bench, first) for first in bench.draw(count(12), blocks))
    if bench.has_operands:
        for _ in range(count(8)):
            yield _entropy(bench, bench.random.randrange(blocks), True)
        yield from (_entropy(bench, block, False) for block in bench.draw(count(2), blocks))
        yield _entropy(bench, None, False)
        yield from (_width(bench, block, "logits to zero") for block in bench.draw(count(4), blocks))
        yield _width(bench, None, "logits to zero")
    if bench.has_operands and not all(
        p.is_causal for b in bench.anatomy.blocks for p in b.parts if p.kind == "attention"
    ):
        yield from (_width(bench, block, "queries alike") for block in bench.draw(count(2), blocks))
    yield from (_copies(bench) for _ in range(count(5)))
    yield from (_rank(bench, block) for block in bench.draw(count(2), blocks))
    yield from (_common(bench, block) for block in bench.draw(count(6), blocks))


def _depth(bench: Bench, first: int) -> Case:
    case = bench.case("residual scaled down", "rank-collapse-depth", first, None, RESIDUAL)

    def orders(trajectory: list[SiteRecord], _: Any) -> dict[str, float]:
        return {"consensus as read": consensus_as_read(trajectory, first)}

    for factor in RESIDUAL:
        context = planting.residual_scaled(bench.model, bench.anatomy, first, factor)
        case.runs.append(bench.observe(context, orders=orders, kept_too=True))
    return case


def _common(bench: Bench, block: int) -> Case:
    case = bench.case("a common part added", "rank-collapse-depth", block, None, COMMON)
    seed = bench.random.randrange(2**31)

    def orders(trajectory: list[SiteRecord], _: Any) -> dict[str, float]:
        return {"consensus as read": consensus_as_read(trajectory, block)}

    for dose in COMMON:
        context = planting.common_part_added(bench.model, bench.anatomy, block, dose, seed)
        case.runs.append(bench.observe(context, orders=orders, kept_too=True))
    return case


def consensus_as_read(trajectory: Sequence[SiteRecord], first: int) -> float:
    """What `DEPTH-CONSENSUS` holds against its threshold, at the worst place from block `first` on; 0 where nothing is finite."""
    read = as_read(stacks(trajectory)[0])
    return min((each.share for each in read if each.site.block is not None and each.site.block >= first), default=0.0)


def _entropy(bench: Bench, block: int | None, is_one_head: bool) -> Case:
    every = range(len(bench.anatomy.blocks))
    chosen = None
    if is_one_head:
        assert block is not None
        chosen = [bench.random.randrange(planting.attention_call(bench.anatomy, block).heads)]
    plant = "logits scaled up in " + ("one head" if is_one_head else "one block" if block is not None else "all blocks")
    case = bench.case(plant, "entropy-collapse", block, chosen, LOGITS_UP)
    places = list(every) if block is None else [block]
    real: list[Tensor] = []
    reach: list[Tensor] = []

    def orders(_: Any, attention: list[AttentionRecord]) -> dict[str, float]:
        there = [a for a in attention if a.block in places and (chosen is None or a.head in chosen)]
        return {
            "keys within reach": float(torch.cat(reach).nanmean()),
            "entropy": _mean(a.normalized_entropy.mean for a in there if a.normalized_entropy),
            "rest entropy": _mean(a.rest_entropy.mean for a in there if a.rest_entropy),
        }

    for factor in LOGITS_UP:
        reach.clear()

        def change(given: planting.Given, _: int, factor: float = factor) -> None:
            planting.logits_scaled(given, chosen, factor)
            reach.append(planting.keys_within_reach(given, chosen, real[0]))

        with _masks(bench.model, real):
            context = planting.at_attention(bench.model, bench.anatomy, places, change)
            case.runs.append(bench.observe(context, orders=orders))
    return case


@contextlib.contextmanager
def _masks(model: nn.Module, real: list[Tensor]) -> Iterator[None]:
    """The token mask of the batch that is running, as the one entry of `real`."""

    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        real[:] = [kwargs["attention_mask"].bool()]

    hook = model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _width(bench: Bench, block: int | None, plant: str) -> Case:
    ladder = LOGITS_DOWN if plant == "logits to zero" else ALIKE
    case = bench.case(plant, "rank-collapse-width", block, None, ladder)
    places = list(range(len(bench.anatomy.blocks))) if block is None else [block]
    real: list[Tensor] = []
    apart: list[Tensor] = []

    def orders(_: Any, attention: list[AttentionRecord]) -> dict[str, float]:
        alone = {"rows apart": float(torch.stack(apart).nanmean())}
        by_block = [[a for a in attention if a.block == place] for place in places]
        if plant == "logits to zero":
            unused = _mean(max(1 - a.key_share.mean for a in b if a.key_share) for b in by_block)
            return {"unused keys": unused, **alone}
        kept = _mean(max(a.value_contraction.mean for a in b if a.value_contraction) for b in by_block)
        return {"value contraction": kept, **alone}

    for step in ladder:
        apart.clear()

        def change(given: planting.Given, _: int, step: float = step) -> None:
            if plant == "logits to zero":
                planting.logits_scaled(given, None, step)
            else:
                planting.queries_alike(given, step)
            apart.append(planting.rows_apart(given, real[0]).nanmean())

        with _masks(bench.model, real):
            context = planting.at_attention(bench.model, bench.anatomy, places, change)
            case.runs.append(bench.observe(context, orders=orders))
    return case


def _few(batches: Batches) -> Batches:
    """Two sequences: what the weights say does not depend on them."""
    if "input_ids" not in batches[0]:
        return [{k: v[:2] for k, v in batches[0].items()}]
    return [{k: v[:2, :16] for k, v in batches[0].items()}]


def _copies(bench: Bench) -> Case:
    block = bench.random.randrange(len(bench.anatomy.blocks))
    call = planting.attention_call(bench.anatomy, block)
    source, target = bench.random.sample(range(call.heads), 2)
    case = bench.case(
        "one head made a copy of another", "head-channel-non-identifiability", block, [source, target], COPIED
    )
    for share in COPIED:

        def change(W: Tensor, share: float = share) -> Tensor:
            return planting.head_copied(W, call.head_width, source, target, share)

        case.runs.append(_weights_run(bench, block, change, (source, target)))
    return case


def _rank(bench: Bench, block: int) -> Case:
    case = bench.case("rank of the projection reduced", "head-channel-non-identifiability", block, None, LOST)
    for share in LOST:
        case.runs.append(_weights_run(bench, block, partial(planting.rank_reduced, share=share), None))
    return case


def _weights_run(bench: Bench, block: int, change: Callable[[Tensor], Tensor], pair: tuple[int, int] | None) -> Run:
    """Only the changed projection is decomposed again: the others' records are those of the healthy model."""
    context = planting.projection_changed(bench.model, bench.anatomy, block, change)
    call = planting.attention_call(bench.anatomy, block)
    with context:  # the matrix is a view of the weights, which are themselves again behind this
        observed = capture(bench.model, _few(bench.batches), bench.anatomy, watch={"attention", "projections"})
        there = [s for s in observed.attention if s.block == block and s.kind == "self"]
        (record,) = heads_records(there)
        assert there[0].matrix is not None
        matrix = there[0].matrix.double().clone()
    if pair is not None:
        overlap = float(heads.write_space_overlap(matrix, call.heads)[pair[0], pair[1]])
        angle = float(heads.smallest_principal_angle(matrix, call.heads)[pair[0], pair[1]])
        sine = (1 - overlap) / (1 - call.head_width / matrix.shape[1])
        return Run({"distinctness": sine, "smallest angle": math.sin(angle)}, None, None, [record])
    values = torch.linalg.svdvals(matrix)
    rank = int((values > 1e-5 * values[0]).sum())
    effective = float(torch.special.entr(values / values.sum()).sum().exp())
    attainable = min(matrix.shape)
    return Run({"rank": rank / attainable, "effective rank": effective / attainable}, None, None, [record])


# Confounders ----------------------------------------------------------------------------------------------------------


def confounded(bench: Bench) -> Iterator[Case]:
    """What is healthy and looks unusual. The first is the model as it is. Where the model itself is changed, what is left of its
    output says whether that was as harmless as it is meant to be."""

    def one(name: str, **options: Any) -> Case:
        case = bench.case(name, None, None, None, [0.0])
        is_changed = "context" in options or "model" in options
        case.runs.append(bench.observe(parts_too=True, kept_too=is_changed, **options))
        return case

    def sinking(heads: list[int]) -> Callable[[planting.Given, int], None]:
        return lambda given, _: planting.sink(given, heads, 15.0)

    def windowed(size: int) -> Callable[[planting.Given, int], None]:
        return lambda given, _: planting.windowed(given, size)

    model, anatomy, batches = bench.model, bench.anatomy, bench.batches
    blocks = len(anatomy.blocks)
    yield one("as it is", heads_too=True)
    if "input_ids" in batches[0]:
        for length in LENGTHS:
            cut = [{k: v[:, :length] for k, v in b.items()} for b in batches]
            yield one(f"context of {length} tokens", batches=cut)
        yield one("padding", batches=[_padded(b, bench.random) for b in batches])
        for period, name in ((1, "one token repeated"), (2, "two tokens in turn"), (8, "eight tokens repeated")):
            yield one(name, batches=[_repeated(b, period) for b in batches])
    else:
        for name, given in bench.subject.odd.items():
            yield one(name, batches=given())
    for place in bench.draw(2 * bench.has_operands, blocks):
        some = bench.draw(
            planting.attention_call(anatomy, place).heads // 2, planting.attention_call(anatomy, place).heads
        )
        context = planting.at_attention(model, anatomy, [place], sinking(some))
        yield one("attention sinks in half of a block's heads", context=context)
    everywhere = planting.at_attention(
        model, anatomy, range(blocks), lambda g, _: planting.sink(g, range(0, g["query"].shape[1], 2), 15.0)
    )
    if bench.has_operands:
        yield one("attention sinks in half of all heads", context=everywhere)
    ids = batches[0].get("input_ids")
    odd: dict[str, Callable[[planting.Given, int], None]] = {
        "half of all heads on the token before": lambda given, _: planting.on_offsets(given, (1,)),
        "half of all heads on two fixed offsets": lambda given, _: planting.on_offsets(given, (2, 5)),
    }
    if ids is not None:
        odd["half of all heads on what followed the same token"] = partial(_inducing, ids)
    for name, change in odd.items() if bench.has_operands else ():
        yield one(name, context=planting.at_attention(model, anatomy, range(blocks), change))
    if gains := planting.gains_before_readers(model, anatomy):
        yield one(
            "a feature that holds nearly all of the energy",
            context=planting.massive_feature(model, anatomy, gains, batches),
        )
    for size in (16, 8) if bench.has_operands else ():
        window = planting.at_attention(model, anatomy, range(blocks), windowed(size))
        yield one(f"a window of {size} tokens", context=window)
    yield one(
        "embedding of a quarter of the rank", context=planting.stream_changed(model, anatomy, 0, planting.low_rank)
    )
    if "post" not in anatomy.norm_placement:
        # Where a norm stands before every reader of the stream: ModernBERT's first block has none before its attention.
        norms = [sum(norm.role == "before" for norm in block.norms) for block in anatomy.blocks]
        behind = [i for i, count in enumerate(norms) if count == max(norms)]
        for place in bench.random.sample(behind, min(2, len(behind))):
            massive = planting.stream_changed(model, anatomy, place, planting.first_token_massive)
            yield one("a massive token", context=massive)
        if all(norm.kind == "layer" for block in anatomy.blocks for norm in block.norms):
            level = planting.stream_changed(model, anatomy, behind[0], lambda x: x + 30 * x.std())
            yield one("a large common mean", context=level)
    yield one("bfloat16", model=copy.deepcopy(model).to(torch.bfloat16), batches=_halved(batches), heads_too=True)


def _inducing(ids: Tensor, given: planting.Given, _: int) -> None:
    planting.inducing(given, ids)


def _halved(batches: Batches) -> Batches:
    """Inputs that are no numbers of tokens, in the precision of the model that gets them."""
    return [{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in b.items()} for b in batches]


def _padded(batch: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Each sequence cut at random, from 5 tokens on, and padded on the right."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    for i, length in enumerate(mask.sum(-1).tolist()):
        mask[i, draw.randint(min(5, length), length) :] = 0
    return {**batch, "input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _repeated(batch: dict[str, Tensor], period: int) -> dict[str, Tensor]:
    """The tokens after the first few of each sequence, over and over."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    start = 1 if ids.shape[1] > period else 0
    return {**batch, "input_ids": ids[:, start + torch.arange(ids.shape[1]) % period], "attention_mask": mask}
