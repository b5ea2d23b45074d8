"""Every figure of a page has a reference beside it, and the references are what healthy models really gave."""

from __future__ import annotations

import doctest
import io
import json
import math
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
from rich.console import Console
from studies.validity.models import SUBJECTS

import uncollapse as uc
from tests.helpers import records_samples as samples
from tests.helpers.pages import Page
from tests.report.test_anatomy import anatomy
from uncollapse.report import draw, healthy, show
from uncollapse.report.healthy import figures, healthy_models, references

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
    assert {name.rpartition(".")[2] for name in stored.ranges.keys() - found.keys()} <= {*of_full, *healthy.UPDATES}
    assert len(found) > 20
    for name, values in found.items():
        low, high = stored.ranges[name]
        assert min(values) == pytest.approx(low, rel=0.02, abs=1e-6), name
        assert max(values) == pytest.approx(high, rel=0.02, abs=1e-6), name
    assert (stored.causal, stored.norm_placement) == (healthy.is_causal(record), record.model.norm_placement)


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


def titles_with_reference(page: Page, table: str) -> dict[str, str]:
    """The reference under each title of a table."""
    head = page.text.split(f'<table id="{table}"')[1].split("</thead>")[0]
    found = {}
    for cell in head.split("<th ")[1:]:
        title = cell.split("<span>")[1].split("</span>")[0]
        found[title] = cell.split('class="reference">')[1].split("</small>")[0] if "reference" in cell else ""
    return found


def test_every_figure_of_a_table_has_a_reference_under_its_title() -> None:
    page = Page(draw(replace(samples.translation(), anatomy=anatomy(0))))
    beside = titles_with_reference(page, "attention-encoder-self-table")
    bare = {"block", "head", "route", "entropy", "entropy floor"}  # the last two stand beside the normalized entropy
    assert {title for title, words in beside.items() if not words} == bare
    sites = titles_with_reference(page, "depth-encoder-table")
    assert {title for title, words in sites.items() if not words} == {
        "site",
        "attainable rank",  # what the ranks are compared with
        "attainable affine rank",
    }
    assert "% of attainable" in sites["effective rank"]
    heads = titles_with_reference(page, "heads-table")
    assert heads["kernel"] == "forced by the shape: 0"
    assert heads["largest overlap"].startswith("random pair 0.125; healthy ")
    assert heads["largest energy share"].startswith("even 0.125; healthy ")
    updates = titles_with_reference(page, "updates-encoder-table")
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
    console = Console(file=io.StringIO(), width=200)
    show(causal(False, "post"), console)
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "In 6 healthy models with a full mask and post norm: consensus 0.55 to 0.98, effective rank" in printed
    lowest = references(causal(False, "post")).lowest("attention.normalized_entropy")
    assert f"lowest head {lowest.replace(' … ', ' to ')}." in printed


def test_examples() -> None:
    assert doctest.testmod(healthy).failed == 0
