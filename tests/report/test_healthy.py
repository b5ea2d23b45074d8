"""Every figure of a page has a reference beside it, and the references are what healthy models really gave."""

from __future__ import annotations

import doctest
import io
import json
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from studies import corpus_geometry
from studies.references import clouds, pooled_outputs
from studies.validity.models import SUBJECTS

import uncollapse as uc
from tests.helpers import heads_samples
from tests.helpers import records_samples as samples
from tests.helpers.own_models import OwnGPT
from tests.helpers.pages import Page, references_of
from tests.helpers.sweep_samples import swept
from tests.helpers.tiny_models import text_batch
from tests.report.test_anatomy import anatomy
from uncollapse.measures.random_projections import random_noise_gain
from uncollapse.records.diagnosis import SAMPLED_TOKENS, CorpusRecord
from uncollapse.report import draw, healthy, show
from uncollapse.report.healthy import (
    References,
    corpus_figures,
    figures,
    healthy_models,
    in_percent,
    in_words,
    references,
)

MODELS: list[dict[str, Any]] = json.loads(resources.files("uncollapse.report").joinpath("healthy.json").read_text())


def test_the_models_are_the_healthy_ones_of_the_study() -> None:
    assert [model["name"] for model in MODELS] == [name for name, each in SUBJECTS.items() if each.is_healthy]
    for model in MODELS:
        assert len(model["ranges"]) > 25
        for low, high in model["ranges"].values():
            assert math.isfinite(low)
            assert low <= high


def test_a_model_measured_again_gives_its_ranges() -> None:
    """MiniLM, on the same text; what the file holds has three digits."""
    model, batches = SUBJECTS["minilm"].open()
    record = uc.diagnose(model, batches=batches).record
    stored = next(each for each in healthy_models() if each.name == "minilm")
    found = figures(record)
    of_full = {"contraction", "spectral_gap", "susceptibility", "second_singular_value", "nonlinear_innovation"}
    of_corpus = {name for name in stored.ranges if name.startswith("corpus.")}
    others = stored.ranges.keys() - found.keys() - of_corpus
    assert {name.rpartition(".")[2] for name in others} <= {*of_full, *healthy.UPDATES}
    assert len(found) > 20
    for name, values in found.items():
        low, high = stored.ranges[name]
        assert min(values) == pytest.approx(low, rel=0.02, abs=1e-6), name
        assert max(values) == pytest.approx(high, rel=0.02, abs=1e-6), name
    assert (stored.causal, stored.norm_placement) == (healthy.is_causal(record), record.model.norm_placement)


def test_the_clouds_of_a_corpus_measured_again_have_their_ranges() -> None:
    """MiniLM on 64 texts."""
    stored = next(each for each in healthy_models() if each.name == "minilm").ranges
    found = clouds("minilm") | pooled_outputs("minilm", causal=False)
    assert found.keys() == {name for name in stored if name.startswith("corpus.")}
    assert {name.split(".")[1] for name in found} == {"mean", "last", "first", "tokens", "few tokens", "own"}
    for name, values in found.items():
        assert values == pytest.approx(stored[name], rel=0.02, abs=1e-3), name
    assert all(0 < high <= 1 for name, (_, high) in found.items() if name.rpartition(".")[2] in healthy.CORPUS_SHARES)


def test_beside_an_own_pooling_stand_the_models_outputs_pooled() -> None:
    """MiniLM's last states on 64 texts, pooled by hand in double precision."""
    model, batches = corpus_geometry.MODELS["minilm"][1]()
    means, firsts = [], []
    for batch in batches:
        with torch.no_grad():
            states = model(**batch).last_hidden_state.double().numpy()
        for sequence, mask in zip(states, batch["attention_mask"].bool().numpy(), strict=True):
            means.append(sequence[mask].mean(0))
            firsts.append(sequence[0])
    stored = next(each for each in healthy_models() if each.name == "minilm").ranges
    cosines, ranks = [], []
    for points in (np.stack(means), np.stack(firsts)):
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        n = len(points)
        cosines.append(((unit @ unit.T).sum() - n) / (n * (n - 1)))
        sizes = np.linalg.svd(points - points.mean(0), compute_uv=False)[: n - 1]
        shares = sizes / sizes.sum()
        ranks.append(np.exp(-(shares * np.log(shares)).sum()) / (n - 1))
    assert stored["corpus.own.mean_cosine"] == pytest.approx(sorted(cosines), rel=0.01)
    assert stored["corpus.own.centred_effective_rank"] == pytest.approx(sorted(ranks), rel=0.01)


def causal(is_causal: bool | None, placement: str, name: str = "a model") -> Any:
    record = samples.encoder(name)
    read = anatomy(0)
    blocks = [
        replace(block, parts=[replace(part, causal=is_causal) if part.attention else part for part in block.parts])
        for block in read.blocks
    ]
    model = replace(record.model, norm_placement=placement)
    return replace(record, model=model, anatomy=replace(read, blocks=blocks))


@pytest.mark.parametrize(
    ("is_causal", "placement", "kind"),
    [
        (False, "post", "6 healthy models with a full mask and post norm"),
        (True, "pre", "7 healthy models with a causal mask and pre norm"),
        (True, "sandwich", "9 healthy models with a causal mask"),
        (False, "pre", "3 healthy models with a full mask and pre norm"),
        (False, "sandwich", "9 healthy models with a full mask"),
        (None, "pre", "18 healthy models"),
    ],
)
def test_a_model_is_compared_with_those_of_its_kind(is_causal: bool | None, placement: str, kind: str) -> None:
    found = references(causal(is_causal, placement))
    assert found.kind == kind
    ranges = [
        model["ranges"]["attention.normalized_entropy"]
        for model in MODELS
        if is_causal is None
        or (model["causal"] == is_causal and (model["norm_placement"] == placement or "norm" not in kind))
    ]
    assert len(ranges) == int(kind.split()[0])
    entropy = found.of("attention.normalized_entropy")
    assert entropy is not None
    assert (entropy.low, entropy.high) == (min(low for low, _ in ranges), max(high for _, high in ranges))
    assert entropy.lows == (min(low for low, _ in ranges), max(low for low, _ in ranges))


@pytest.mark.parametrize(
    ("itself", "name"),
    [
        ("minilm", "all-MiniLM-L6-v2"),
        ("minilm", "sentence-transformers/all-minilm-l6-v2@main"),
        ("mpnet", "models/all-mpnet-base-v2/"),
    ],
)
def test_a_model_is_not_compared_with_itself(itself: str, name: str) -> None:
    found = references(causal(False, "post", name))
    assert found.kind == "5 other healthy models with a full mask and post norm"
    assert "the range in 5 other healthy models" in found.sentence
    wanted = {m["name"] for m in MODELS if not m["causal"] and m["norm_placement"] == "post"} - {itself}
    assert {each.name for each in found.models} == wanted


def test_a_record_without_a_name_is_compared_with_all_of_its_kind() -> None:
    assert references(causal(False, "post", "")).kind == "6 healthy models with a full mask and post norm"


def test_every_name_of_a_healthy_model_is_of_one() -> None:
    about = {model["name"]: model["about"].lower() for model in MODELS}
    for model, name in healthy.KNOWN_AS.items():
        assert about[model].startswith(name.lower())


def test_an_encoder_and_a_decoder_are_compared_with_all() -> None:
    """An encoder's attention is full and a decoder's causal: no model of the study is of both kinds."""
    record = causal(False, "post")
    blocks = [*record.anatomy.blocks[:3], *causal(True, "post").anatomy.blocks[3:]]
    mixed = replace(record, anatomy=replace(record.anatomy, blocks=blocks))
    assert references(mixed).kind == "18 healthy models"


def test_figures_are_shares_where_sizes_differ() -> None:
    record = samples.encoder()
    found = figures(record)
    site = record.trajectory[3]
    assert site.effective_rank is not None
    assert site.attainable_rank is not None
    assert found["trajectory.effective_rank"][3] == site.effective_rank.mean / site.attainable_rank.mean
    shares = [share.mean for share in record.heads[2].energy_share or [] if share]
    assert found["heads.largest_energy_share"][2] == max(shares) * 12
    overlap = record.heads[2].write_space_overlap
    assert overlap is not None
    assert found["heads.largest_overlap"][2] == max(overlap[g][h] for g in range(12) for h in range(12) if g != h)


def cloud(**changes: Any) -> CorpusRecord:
    spectrum = (12.0, 9.0, 5.0, 2.0, 1.2, 1.1, 1.3, 7, 8, 0.4, 0.9, 0.2, 0.7, 0.6)
    return replace(
        CorpusRecord("block.0", 0, None, "mean", 20, 32, None, 20, 19, *spectrum, 20, 0.1, 0.9, 0.8, 0.7), **changes
    )


def test_figures_of_the_corpus_are_shares_of_what_so_many_points_reach() -> None:
    found = corpus_figures([cloud(), cloud(pooling="tokens"), cloud(pooling="tokens", sampled=SAMPLED_TOKENS)])
    assert found["corpus.mean.effective_rank"] == [12 / 20]
    assert found["corpus.mean.centred_effective_rank"] == [9 / 19]
    assert found["corpus.mean.isoscore"] == [pytest.approx(0.2 * 31 / 18)]
    assert found["corpus.tokens.top_share"] == found["corpus.few tokens.top_share"] == [0.4]


def test_every_figure_of_the_corpus_stands_beside_that_of_models_whose_corpus_was_measured() -> None:
    record = replace(causal(False, "post"), corpus=[cloud(), cloud(pooling="tokens", sampled=64), cloud(pooling="own")])
    kind, page = references(record, "corpus"), Page(draw(record))
    assert kind.kind == "4 healthy models with a full mask and post norm"
    assert all(any(name.startswith("corpus.") for name in model.ranges) for model in kind.models)
    assert references(causal(False, "pre"), "corpus").kind == "5 healthy models with a full mask"
    for table, part in (("corpus-mean", "mean"), ("corpus-tokens", "few tokens")):
        beside = references_of(page, table)
        bare = {"site", "points", "attainable rank", "attainable centred rank"}
        assert {title for title, words in beside.items() if not words} == bare
        lows, highs = extremes(kind, f"corpus.{part}.centred_effective_rank")
        assert beside["centred effective rank"] == f"healthy {in_percent(min(lows), max(highs))} of attainable"
        assert beside["mean cosine"] == f"healthy {kind.words(f'corpus.{part}.mean_cosine')}"
    own = references_of(page, "corpus-own")
    between = {"novelty", "CKA", "unbiased CKA", "cosine to the block before"}
    assert {title for title, words in own.items() if not words} == bare | (between & own.keys())
    assert own["mean cosine"] == f"healthy {kind.words('corpus.own.mean_cosine')}" != beside["mean cosine"]
    assert kind.sentence in page.text
    assert "24 to 64 sequences of at most 64 tokens" in kind.sentence
    lows, highs = extremes(kind, "corpus.mean.centred_effective_rank")
    share = in_percent(min(lows), max(highs)).replace(" … ", " to ")
    cosine = kind.words("corpus.mean.mean_cosine").replace(" … ", " to ")
    assert f"In {kind.kind}: directions {share} of attainable, mean cosine {cosine}." in printed(record)


def test_every_figure_of_a_table_has_a_reference_under_its_title() -> None:
    page = Page(draw(replace(samples.translation(), anatomy=anatomy(0))))
    beside = references_of(page, "attention-encoder-self-table")
    bare = {"block", "head", "route", "entropy", "entropy floor"}  # the last two stand beside the normalized entropy
    assert {title for title, words in beside.items() if not words} == bare
    sites = references_of(page, "depth-encoder-table")
    assert {title for title, words in sites.items() if not words} == {
        "site",
        "attainable rank",  # what the ranks are compared with
        "attainable affine rank",
    }
    assert "% of attainable" in sites["effective rank"]
    heads = references_of(page, "heads-table")
    assert heads["kernel"] == "forced by the shape: 0"
    assert heads["largest overlap"].startswith("random pair 0.125; healthy ")
    assert heads["largest energy share"].startswith("even 0.125; healthy ")
    updates = references_of(page, "updates-encoder-table")
    assert updates["relative norm"].startswith("healthy: attention ")
    assert "; MLP " in updates["relative norm"]


def test_key_figures_and_maps_say_what_they_are_elsewhere() -> None:
    record = causal(False, "post")
    page = draw(record)
    entropy = references(record)
    assert f"healthy: {entropy.lowest('attention.normalized_entropy')}" in page
    assert f"healthy: {entropy.lowest('trajectory.consensus_distance')}" in page
    tiles = page.split('<dl class="tiles">')[1].split("</dl>")[0]
    assert tiles.count("<div>") == tiles.count('class="reference"') == 4
    figures = page.split("<figure")[1:]
    assert len(figures) == sum('class="reference"' in figure for figure in figures) == 6
    assert entropy.sentence.split(", each")[0] in page


def test_a_printout_says_what_its_figures_are_elsewhere() -> None:
    words = printed(causal(False, "post"))
    assert "In 6 healthy models with a full mask and post norm: consensus 0.55 to 0.98, effective rank" in words
    lowest = references(causal(False, "post")).lowest("attention.normalized_entropy")
    assert f"lowest head {lowest.replace(' … ', ' to ')}." in words


def printed(record: Any, width: int = 200) -> str:
    file = io.StringIO()
    show(record, Console(file=file, width=width))
    return " ".join(file.getvalue().split())


def extremes(kind: References, figure: str) -> tuple[list[float], list[float]]:
    """The lowest and the highest values of the models of a kind, from the file."""
    pairs = [m["ranges"][figure] for m in MODELS if m["name"] in {each.name for each in kind.models}]
    return [low for low, _ in pairs], [high for _, high in pairs]


def test_a_worst_value_is_compared_with_worst_values() -> None:
    """The lowest with the lowest of each model; the largest logit with the largest of each."""
    kind = references(causal(False, "post"))
    lows, _ = extremes(kind, "attention.rest_entropy")
    assert kind.worst("rest_entropy") == in_words(min(lows), max(lows))
    _, highs = extremes(kind, "attention.max_logit")
    assert kind.worst("max_logit") == kind.highest("attention.max_logit") == in_words(min(highs), max(highs))
    lows, _ = extremes(kind, "trajectory.affine_rank")
    assert kind.worst("affine_rank_share") == in_percent(min(lows), max(lows))
    assert kind.worst("effective_rank") == kind.worst("consensus_distance") == kind.worst("not_finite") == ""
    assert kind.beside("effective_rank").endswith("of attainable")
    assert kind.beside("dead_experts") == ""
    assert kind.said({"a b": "1 … 2", "c": ""}) == f"In {kind.kind}: a b 1 to 2."
    assert kind.said({"c": ""}) == ""


def test_the_page_and_the_printout_of_heads_say_what_is_healthy_and_what_is_random() -> None:
    record = heads_samples.healthy()
    kind, page = references(record), Page(draw(record))
    blocks = references_of(page, "blocks-table")
    assert blocks["relative noise gain"] == f"healthy {kind.words('heads.condition_number')}"
    assert blocks["largest overlap"].endswith(f"; healthy {kind.words('heads.largest_overlap')}")
    assert "times that" in blocks["largest energy share"]
    heads = references_of(page, "heads-table")
    assert "healthy" not in " ".join(heads.values())
    assert heads["energy share"] == blocks["largest energy share"].partition(";")[0]
    assert f"healthy: {kind.highest('heads.condition_number')}" in page.text
    assert kind.sentence.split(", each")[0] in page.text
    assert f"noise gain {kind.words('heads.condition_number').replace(' … ', ' to ')}," in printed(record)


def test_an_ablation_stands_beside_healthy_models_which_are_whole() -> None:
    record = samples.ablation()
    kind, page = references(record), Page(draw(record))
    consensus = kind.words("trajectory.consensus_distance")
    assert f"healthy: {consensus}" in page.text
    assert f"Healthy models: {consensus}." in page.text
    quality = references_of(page, "quality-table")
    assert quality["lowest consensus distance"] == f"healthy {consensus}"
    assert quality["lowest affine rank"].startswith("healthy lowest ")
    assert quality["output shift"] == ""  # a distance from the whole model
    assert references_of(page, "every-table")["token similarity"].startswith("healthy ")
    assert f"r {consensus.replace(' … ', ' to ')}," in printed(record)


def test_an_ablation_judged_without_the_largest_tokens_has_their_reference() -> None:
    record = samples.ablation()
    (run, *others) = record.runs
    sites = [replace(site, massive_tokens_left_out=left_out(site)) for site in run.trajectory]
    without = replace(record, runs=[replace(run, trajectory=sites), *others])
    kind = references(without)
    assert f"healthy: {kind.words('left_out.consensus_distance')}" in draw(without)


def left_out(site: Any) -> Any:
    read = samples.encoder().trajectory[1].massive_tokens_left_out
    assert read is not None
    return replace(read, consensus_distance=replace(site.consensus_distance, mean=site.consensus_distance.mean / 2))


def test_a_comparison_has_the_references_of_what_both_models_are() -> None:
    record = replace(samples.compared(causal(False, "post", "all-MiniLM-L6-v2")), is_causal=False)
    assert references(record).kind == "5 other healthy models with a full mask and post norm"
    one, other = record.models
    mixed = replace(record, models=[one, replace(other, norm_placement="pre", name="another")])
    assert references(mixed).kind == "8 other healthy models with a full mask"
    assert references(replace(record, is_causal=None)).kind == "17 other healthy models"
    kind, page = references(record), Page(draw(record))
    figures = page.text.split("<figure")[1:]
    beside = [figure for figure in figures if "Healthy models:" in figure]
    differences = [figure for figure in figures if "<b>Difference" in figure]
    assert len(beside) + len(differences) == len(figures)
    assert not any("Healthy" in figure for figure in differences)
    words = kind.beside("max_logit")
    assert f"Healthy models: {words}." in page.text
    assert f"largest logit {words.replace(' … ', ' to ')}" in printed(record)


def test_a_sweep_has_those_of_each_of_its_runs() -> None:
    record = swept()
    runs = [replace(run, is_causal=number == 1) for number, run in enumerate(record.runs)]
    record = replace(record, runs=runs)
    kinds = [references(run) for run in runs]
    page = Page(draw(record))
    titles = references_of(page, "checkpoints-table")
    assert titles["largest logit"] == "; or ".join(f"healthy {kind.worst('max_logit')}" for kind in kinds)
    assert titles["consensus distance after normalisation"].startswith("healthy ")
    assert titles["findings"] == titles["step"] == ""
    for kind in kinds:
        assert kind.sentence.split(", each")[0] in page.text
        assert f"In {kind.kind}: lowest consensus" in printed(record)
    assert f"Healthy models: highest {kinds[0].worst('max_logit')}." in page.text
    assert f"Healthy models: lowest {kinds[0].worst('consensus_after_norm')}." in page.text
    assert "rest entropy" not in printed(record).partition("In ")[2].partition(".")[0]  # no checkpoint has it


def test_a_run_has_those_of_the_model_that_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OwnGPT()
    monitor = uc.Monitor(model, [{"idx": torch.randint(60, (4, 9))}], every=1, trail=tmp_path / "run.jsonl")
    for step in range(3):
        monitor.step(step)
    record = monitor.record
    assert record is not None
    assert record.is_causal is True
    kind, page = references(record), Page(draw(record))
    assert kind.kind == "7 healthy models with a causal mask and pre norm"
    assert f"Healthy models: {kind.beside('max_logit')}." in page.text
    assert f"Healthy models: highest {kind.worst('max_logit')}." in page.text
    assert f"largest logit {kind.worst('max_logit').replace(' … ', ' to ')}." in printed(record)
    assert references(replace(record, is_causal=None)).kind == "18 healthy models"  # a trail of before


def test_an_attribution_says_what_random_weights_have() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    titles = references_of(
        Page(draw(uc.attribute(model, text_batch(), uc.logit_difference(5, 7)).record)), "heads-table"
    )
    median = random_noise_gain(4, 8, 32).single[1]
    assert float(titles["noise gain"].removeprefix("random ")) == pytest.approx(median, rel=0.01)
    assert titles["direct"] == titles["total"] == ""  # effects of this model on this metric


def test_examples() -> None:
    assert doctest.testmod(healthy).failed == 0
