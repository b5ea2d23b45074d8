"""The corpus as one cloud: against the model's own hidden states and NumPy, with padding, over batches, per pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, text_batch
from tests.reference import corpus as reference
from uncollapse import processes
from uncollapse.analyses.recording import corpus_records
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.measures.corpus import corpus_measures
from uncollapse.measures.running import RunningCloud
from uncollapse.probe import own_pooling
from uncollapse.probe.corpus import CorpusStatistics, Rows
from uncollapse.probe.own_pooling import OwnPooling
from uncollapse.probe.passes import capture
from uncollapse.probe.sites import SiteStatistics
from uncollapse.records.diagnosis import SAMPLED_TOKENS, CorpusRecord

EPS = float(torch.finfo(torch.float32).eps)
Batches = list[dict[str, Tensor]]


def model_of(family: str) -> nn.Module:
    return FAMILIES[family].build().eval()


def padded(left: bool) -> Batches:
    """Three batches, the sequences of all lengths, padded on one side."""
    batches = [text_batch(seed=seed) for seed in range(3)]
    for number, batch in enumerate(batches):
        tokens = batch["input_ids"].shape[1]
        for row in range(len(batch["input_ids"])):
            missing = (row + number) % (tokens - 2)
            if missing:
                batch["attention_mask"][row, :missing] = 0 if left else batch["attention_mask"][row, :missing]
                if not left:
                    batch["attention_mask"][row, -missing:] = 0
    return batches


def states(model: Any, batches: Batches) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """By site: for each batch the hidden states and which tokens are real. The last site of a model with a final norm is left out:
    transformers gives it behind that norm."""
    found: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for batch in batches:
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        for site, state in enumerate(hidden):
            if len(found) <= site:
                found.append([])
            found[site].append((state.double().numpy(), batch["attention_mask"].bool().numpy()))
    return found


def pooled(seen: list[tuple[np.ndarray, np.ndarray]], pooling: str) -> np.ndarray:
    rows = []
    for state, mask in seen:
        for tokens, real in zip(state, mask, strict=True):
            own = tokens[real]
            rows += {"mean": [own.mean(axis=0)], "last": [own[-1]], "first": [own[0]], "tokens": list(own)}[pooling]
    return np.stack(rows)


def entries(model: nn.Module, batches: Batches, **options: Any) -> dict[tuple[str, str], CorpusRecord]:
    record = uc.diagnose(model, batches=batches, **options).record
    return {(entry.site, entry.pooling): entry for entry in record.corpus}


@pytest.mark.parametrize(("family", "left"), [("bert", False), ("gpt2", True), ("llama", False)])
def test_every_pooling_is_that_of_the_models_own_hidden_states(family: str, left: bool) -> None:
    model, batches = model_of(family), padded(left)
    if left and family == "gpt2":
        for batch in batches:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found, sites = entries(model, batches, level="full"), states(model, batches)
    last = len(sites) - (1 if family != "bert" else 0)
    for number, seen in enumerate(sites[:last]):
        site = "embedding" if number == 0 else f"block.{number - 1}"
        for pooling in ("mean", "last", "first", "tokens"):
            x, entry = pooled(seen, pooling), found[site, pooling]
            assert (entry.points, entry.width) == x.shape
            centred = reference.centred(x, EPS)
            if not centred:
                assert entry.centred_effective_rank == 0
                continue
            assert entry.effective_rank == pytest.approx(reference.effective_rank(reference.whole(x, EPS)), rel=1e-4)
            assert entry.centred_effective_rank == pytest.approx(reference.effective_rank(centred), rel=1e-4)
            assert entry.participation_ratio == pytest.approx(reference.participation_ratio(x), rel=1e-4)
            assert entry.mean_cosine == pytest.approx(reference.mean_cosine(x), rel=1e-4, abs=1e-6)
            if number:
                before = pooled(sites[number - 1], pooling)
                if reference.centred(before, EPS):
                    assert entry.unbiased_cka == pytest.approx(reference.unbiased_cka(before, x), rel=1e-3, abs=1e-4)
                assert entry.cosine == pytest.approx(reference.cosine(before, x), rel=1e-4)
                assert entry.compared == len(x)
            else:
                assert entry.unavailable["cosine"] == "no block comes before"


def test_batches_make_no_difference_and_neither_does_what_padding_holds() -> None:
    model, batches = model_of("bert"), padded(False)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    other = {**whole, "input_ids": torch.where(whole["attention_mask"].bool(), whole["input_ids"], 7)}
    one, two, three = (entries(model, given) for given in (batches, [whole], [other]))
    for key, entry in one.items():
        for name, value in vars(entry).items():
            if isinstance(value, float):
                assert vars(two[key])[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, name)
                assert vars(three[key])[name] == pytest.approx(vars(two[key])[name], rel=1e-3, abs=1e-5), (key, name)


class InPlace(nn.Module):
    """A block that adds to its stream in place, and notes what entered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.LayerNorm(16), torch.empty(0)
        self.qkv, self.out, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().clone()
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x += self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        x += self.mlp(self.norm(x)).relu()
        return x


class InPlaceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(50, 16), nn.ModuleList([InPlace(), InPlace()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_what_was_taken_stays_what_it_was_where_the_stream_is_written_in_place() -> None:
    model = InPlaceModel().eval()
    given = {"input_ids": torch.randint(50, (6, 9), generator=torch.Generator().manual_seed(0))}
    found = entries(model, [given], level="full")
    with torch.no_grad():
        model(**given)
    for site, block in (("embedding", 0), ("block.0", 1)):
        seen = model.blocks[block].seen.double().numpy()
        for pooling, x in {
            "tokens": seen.reshape(-1, 16),
            "mean": seen.mean(1),
            "first": seen[:, 0],
            "last": seen[:, -1],
        }.items():
            assert found[site, pooling].mean_cosine == pytest.approx(reference.mean_cosine(x), abs=1e-5), (
                site,
                pooling,
            )


def test_at_core_the_tokens_are_a_sample_of_those_of_level_full() -> None:
    """All of them while there are no more than the sample has; beyond it those with the smallest keys."""
    model, batch = model_of("gpt2"), text_batch()
    few, every = entries(model, [batch]), entries(model, [batch], level="full")
    sites = [site for site, pooling in every if pooling == "tokens"]
    assert sites
    assert batch["attention_mask"].sum() <= SAMPLED_TOKENS
    for site in sites:
        assert few[site, "tokens"] == every[site, "tokens"]
    batches = [text_batch(seed=seed) for seed in range(9)]
    few, every = entries(model, batches), entries(model, batches, level="full")
    for site in sites:
        drawn, all_of_them = few[site, "tokens"], every[site, "tokens"]
        assert drawn.points == all_of_them.points == sum(int(each["attention_mask"].sum()) for each in batches)
        assert (drawn.sampled, all_of_them.sampled) == (SAMPLED_TOKENS, None)
        assert drawn.attainable_rank == min(SAMPLED_TOKENS, drawn.width)
        assert drawn.mean_cosine == pytest.approx(all_of_them.mean_cosine, abs=0.1)
        if site != "embedding":
            assert drawn.compared == SAMPLED_TOKENS
            assert drawn.cosine == pytest.approx(all_of_them.cosine, abs=0.1)


@pytest.mark.parametrize("most", [1, 7, 60])
def test_a_sample_is_that_of_the_smallest_keys_however_the_points_come(most: int) -> None:
    """Against NumPy, in one lot, in lots, and put together from two processes; points that are not finite are not drawn."""
    generator = torch.Generator().manual_seed(most)
    x, drawn = torch.randn(60, 9, generator=generator), torch.rand(60, generator=generator, dtype=torch.float64)
    x[[3, 20]] = torch.tensor([[math.nan], [math.inf]])
    finite = np.isfinite(x.numpy()).all(axis=1)
    chosen = np.flatnonzero(finite)[np.argsort(drawn.numpy()[finite])[:most]]
    expected = x.double().numpy()[np.sort(chosen)]

    def sampled(*lots: slice) -> CorpusStatistics:
        statistics = CorpusStatistics(SiteStatistics("block.0", 0, None, width=9), "tokens", None, most=most)
        for lot in lots:
            statistics.take(x[lot], drawn[lot], EPS)
        return statistics

    whole, parts = sampled(slice(60)), sampled(slice(5), slice(5, 40), slice(40, 60))
    one, other = sampled(slice(31)), sampled(slice(31, 60))
    assert one.cloud is not None
    assert other.cloud is not None
    merged = one.cloud.merge(other.cloud)
    one.put(merged)
    one.seen += other.seen
    for statistics in (whole, parts, one):
        (record,) = corpus_records([statistics])
        assert (record.points, record.sampled) == (58, most if most < 58 else None)
        assert statistics.cloud is not None
        order = np.lexsort(statistics.cloud.points.double().numpy().T)
        np.testing.assert_array_equal(statistics.cloud.points.double().numpy()[order], expected[np.lexsort(expected.T)])
        np.testing.assert_allclose(statistics.cloud.mean.numpy(), expected.mean(axis=0), atol=1e-12)


def test_a_pass_that_does_not_watch_it_holds_no_cloud() -> None:
    model, batch = model_of("gpt2"), text_batch()
    anatomy = proved_anatomy(model, batch)
    assert capture(model, [batch], anatomy, watch={"sites"}).corpus == []


def test_a_sequence_that_is_not_finite_is_left_out_of_the_cloud() -> None:
    model, batch = model_of("gpt2"), text_batch()
    with torch.no_grad():
        model.get_parameter("wte.weight")[batch["input_ids"][1, 0]] = math.inf  # type: ignore[index]
    broken = int((batch["input_ids"] == batch["input_ids"][1, 0]).any(1).sum())
    clean = [text_batch(seed=seed) for seed in range(1, 4)]
    total = sum(len(each["input_ids"]) for each in clean)
    others = sum(int((each["input_ids"] == batch["input_ids"][1, 0]).any(1).sum()) for each in clean)
    found = entries(model, [*clean, batch])
    assert found["embedding", "mean"].points == total - others + len(batch["input_ids"]) - broken
    # Of the tokens, whichever site and batch they are drawn from, only those that are not finite are left out.
    tokens = torch.cat([each["input_ids"].flatten() for each in (*clean, batch)])
    assert found["embedding", "tokens"].points == int((tokens != batch["input_ids"][1, 0]).sum())


def test_the_means_of_long_sequences_err_no_more_than_their_format() -> None:
    """Added one after another, 4,096 equal numbers of single precision err by hundreds of units in the last place."""
    generator = torch.Generator().manual_seed(0)
    x = (1 + 1e-7 * torch.randn(3, 1, 24, generator=generator)).expand(3, 4096, 24).clone()
    mask = torch.ones(3, 4096, dtype=torch.bool)
    mask[1, :900], x[1, :900] = False, math.nan
    for given in (mask, None):
        real = mask if given is not None else torch.ones_like(mask)
        keeps = slice(None) if given is not None else slice(0, 1)
        own = x[keeps]
        expected = torch.stack([row[kept].double().mean(0) for row, kept in zip(own, real[keeps], strict=True)])
        found = Rows.of(own, None if given is None else given[keeps]).pooled(own, "mean")
        assert float((found.double() / expected - 1).abs().max()) < 4 * EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_of_equal_tokens_is_as_coarse_as_one_of_them(dtype: torch.dtype) -> None:
    """Sequences that differ by less than the rounding of half precision are one point, in every pooling."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.finfo(dtype).eps * torch.randn(40, 1, 32, generator=generator)
    stream = (torch.randn(32, generator=generator) + noise).to(dtype).expand(40, 64, 32).contiguous()
    rows = Rows.of(stream, None)
    rounding = torch.finfo(dtype).eps * rows.lessened(stream)
    cloud = RunningCloud.of(rows.pooled(stream.float(), "mean"), torch.arange(40) / 40)
    assert corpus_measures([cloud], [rounding])[0].centred_effective_rank == 0
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :6] = False
    different = torch.arange(2 * 10 * 4).view(2, 10, 4).to(torch.float16)
    assert Rows.of(different, mask).lessened(different) == pytest.approx((10**-0.5 + 4**-0.5) / 2)


def test_points_that_are_one_up_to_rounding_are_not_compared() -> None:
    """Their directions are those of rounding; how far the point turned is known all the same."""
    generator = torch.Generator().manual_seed(0)
    keys, before = torch.rand(40, generator=generator), None
    known = []
    for number, size in enumerate((1.0, 1e-7, 1.0)):
        cloud = 1 + size * torch.randn(40, 16, generator=generator)
        site = SiteStatistics(f"block.{number}", number, None, width=16)
        statistics = CorpusStatistics(site, "first", before)
        statistics.take(cloud, keys, EPS)
        known.append(statistics)
        before = statistics
    for record in corpus_records(known)[1:]:
        assert (record.novelty, record.cka, record.unbiased_cka) == (None, None, None)
        assert record.unavailable["cka"] == "the points before and after are not the same ones, or have no spread"
        assert record.cosine is not None


# The model's own pooling ------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A tiny BERT with an output of two axes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.bert, self.kind = FAMILIES["bert"].build().eval(), kind

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        real = attention_mask.unsqueeze(-1).to(hidden)
        own = (hidden * real).sum(1) / real.sum(1)
        match self.kind:
            case "own":
                rows = own
            case "the batch's":
                rows = own.mean(0, keepdim=True).expand_as(own)
            case "a figure for each token":
                rows = hidden[..., 0]
            case _:  # of a shape that says nothing: a row for each of the first tokens
                rows = hidden.mean(0)[: len(hidden)]
        return {"last_hidden_state": hidden, "vector": rows}


@pytest.mark.parametrize("kind", ["own", "the batch's", "tokens", "a figure for each token"])
def test_an_output_is_a_pooling_if_each_sequence_alone_makes_its_row(kind: str) -> None:
    batches = padded(False)
    found = {site: entry for (site, pooling), entry in entries(Pooled(kind), batches).items() if pooling == "own"}
    if kind != "own":
        assert found == {}
        return
    mean = entries(Pooled(kind), batches)["block.1", "mean"]
    assert list(found) == ["vector"]
    assert found["vector"].points == sum(len(batch["input_ids"]) for batch in batches)
    assert found["vector"].centred_effective_rank == pytest.approx(mean.centred_effective_rank, rel=1e-4)


def test_an_input_with_one_number_for_each_sequence_does_not_hide_a_pooling() -> None:
    class Labelled(Pooled):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return super().forward(input_ids, attention_mask)

    batches = [batch | {"labels": torch.zeros(len(batch["input_ids"]), 1)} for batch in padded(False)]
    assert ("vector", "own") in entries(Labelled("own"), batches)


def test_an_output_of_another_width_on_another_process_is_no_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = OwnPooling(0), OwnPooling(0)
    one.take(text_batch(tokens=9), {"starts": torch.ones(3, 9), "vector": torch.ones(3, 8)})
    other.take(text_batch(tokens=12), {"starts": torch.ones(3, 12), "vector": torch.ones(3, 8)})
    sent: list[Any] = []

    def gathered(own: Any, _: str) -> list[Any]:
        sent.append(own)
        return sent

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", gathered)
    one.unite("diagnose")
    other.unite("diagnose")
    monkeypatch.setattr(own_pooling._Poking, "widths", lambda poking, names, anatomy: dict.fromkeys(names, 8))
    model = model_of("bert")
    found = other.statistics(model, text_batch(), 6, proved_anatomy(model, text_batch()))
    assert [statistics.site.site for statistics in found] == ["vector"]


@pytest.mark.parametrize("lengths", [(9, 12, 9), (7, 7), (5, 5)])
def test_where_an_answer_starts_is_no_pooling(lengths: tuple[int, ...]) -> None:
    """A row of logits for each sequence, as wide as the sequence is long: it once ended in a traceback of torch."""
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(FAMILIES["bert"].build().config).eval()
    batches = [{k: v[:, :tokens] for k, v in text_batch(tokens=12).items()} for tokens in lengths]
    assert [key for key in entries(model, batches) if key[1] == "own"] == []
