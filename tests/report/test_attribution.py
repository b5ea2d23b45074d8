"""The page and the printout of an attribution say what the record says."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers as hf
from rich.console import Console

import uncollapse as uc
from tests.helpers.pages import Page
from tests.helpers.tiny_models import text_batch
from uncollapse.analyses.attribution import LINEARISED
from uncollapse.records.attribution import AttributionRecord, Estimate
from uncollapse.report.attribution import charts


@pytest.fixture(scope="module")
def found() -> uc.Attribution:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    return uc.attribute(hf.GPT2LMHeadModel(config).eval(), text_batch(), uc.logit_difference(5, 7))


def test_every_component_stands_in_a_table(found: uc.Attribution, tmp_path: Path) -> None:
    found.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    rows = {row for row, _ in page.cells if row.startswith("effect-")}
    assert len(rows) == len(found.direct)
    assert sum(row.startswith("effect-head-") for row in rows) == len(found.heads) == 8
    head = found.heads[3]
    cell = page.cells["effect-head-self-0-3", "direct"]
    assert float(cell["v"]) == pytest.approx(head.value, rel=1e-5)
    assert "May an effect be attributed to a single head?" in text
    assert "add up to it" in text
    assert 'data-chart="map-all-self"' in text
    assert 'data-chart="repair"' in text


def test_the_largest_comes_first_in_the_terminal(found: uc.Attribution) -> None:
    stream = io.StringIO()
    found.show(Console(file=stream, width=120))
    said = stream.getvalue()
    largest = max(found.heads, key=lambda head: abs(head.value))
    assert f"block {largest.block}, head {largest.head}" in said
    assert "add up to it" in said


def test_the_record_goes_to_json_and_back(found: uc.Attribution, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    text = found.to_json(path)
    schema = json.loads((Path(uc.__file__).parent / "schemas" / "attribution-1.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(text), schema)
    loaded = uc.load(path)
    assert isinstance(loaded, uc.Attribution)
    assert loaded.record == found.record


def test_what_is_not_affine_is_said(found: uc.Attribution) -> None:
    record: AttributionRecord = found.record
    rest = Estimate(0.5, None, 0.5, 0.5, 1)
    metric = dataclasses.replace(record.metric, is_affine=False, sum_of=LINEARISED, remainder=rest)
    other = dataclasses.replace(record, metric=metric)
    stream = io.StringIO()
    uc.Attribution(other).show(Console(file=stream, width=200))
    assert "not affine" in stream.getvalue()
    assert "0.500 is no component’s" in stream.getvalue()


def test_an_attention_whose_heads_cannot_be_told_is_not_drawn_as_an_mlp(found: uc.Attribution) -> None:
    effects = [dataclasses.replace(e, kind="attention", head=None) if e.kind == "head" else e for e in found.direct]
    chart = charts.direct_against_total(dataclasses.replace(found.record, effects=effects))
    assert chart is not None
    assert [key.label for key in chart.legend] == ["attention", "MLP", "direct = total"]
    assert '"kind": "attention"' in json.dumps(chart.spec)
