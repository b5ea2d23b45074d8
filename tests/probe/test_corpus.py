"""The corpus as one cloud: against the model's own hidden states and NumPy, with padding, over batches, per pooling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, text_batch
from tests.reference import corpus as reference
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.passes import capture
from uncollapse.records.diagnosis import CorpusRecord

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


def test_at_core_the_tokens_are_left_to_level_full() -> None:
    poolings = {pooling for _, pooling in entries(model_of("gpt2"), [text_batch()])}
    assert {"mean", "last", "first"} <= poolings
    assert "tokens" not in poolings


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
            case _:  # of a shape that says nothing: a row for each of the first tokens
                rows = hidden.mean(0)[: len(hidden)]
        return {"last_hidden_state": hidden, "vector": rows}


@pytest.mark.parametrize("kind", ["own", "the batch's", "tokens"])
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
