"""Dimensional collapse on a trained model: silent in health, found where a block keeps few directions, shown and written."""

from __future__ import annotations

import copy

import pytest
import torch

import uncollapse as uc
from uncollapse import report, sources
from uncollapse.records.diagnosis import DiagnosisRecord, widest_clouds
from uncollapse.records.encoding import from_json
from uncollapse.report import wording
from uncollapse.report.diagnosis import corpus


@pytest.fixture(scope="module")
def healthy() -> uc.Diagnosis:
    return uc.diagnose("demo", sequences=16, max_tokens=32)


def test_a_healthy_model_raises_no_finding(healthy: uc.Diagnosis) -> None:
    assert healthy.findings == []
    assert {entry.pooling for entry in healthy.record.corpus} == {"tokens", "mean", "last", "first", "own"}
    assert [entry.site for entry in healthy.record.corpus if entry.pooling == "own"] == ["pooler_output"]
    assert from_json(healthy.to_json(), DiagnosisRecord) == healthy.record


def test_a_block_that_keeps_three_directions_is_named() -> None:
    """The gains of all but three features are lowered there, and what later blocks add with them."""
    loaded = sources.load_model("demo")
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        norm = model.get_submodule("encoder.layer.3.output.LayerNorm")
        norm.weight[3:] *= 1e-5
        for later in (4, 5):
            for name in ("attention.output.dense", "output.dense"):
                dense = model.get_submodule(f"encoder.layer.{later}.{name}")
                dense.weight *= 1e-5
                dense.bias *= 0
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                model.get_submodule(f"encoder.layer.{later}.{name}").weight[3:] *= 1e-5
    found = uc.diagnose(model, tokenizer=loaded.tokenizer, sequences=16, max_tokens=32)
    (finding,) = [f for f in found.findings if f.code == "CORPUS-DIMENSIONS"]
    assert (finding.phenomenon, finding.block) == ("dimensional-collapse", 3)


def test_of_too_few_sequences_nothing_is_said(healthy: uc.Diagnosis) -> None:
    few = uc.diagnose("demo", sequences=7, max_tokens=32).record
    assert few.corpus
    assert "corpus" not in wording.headline([], wording.looked_at(few))
    assert len(widest_clouds(healthy.record.trajectory, healthy.record.corpus)) == 1


def test_the_page_and_the_terminal_show_it(healthy: uc.Diagnosis) -> None:
    page = report.draw(healthy.record)
    assert 'id="corpus"' in page
    assert 'id="experts"' not in page
    assert "The corpus as one cloud: mean of a sequence" in page
    assert "and the corpus (7 sites)." in wording.headline(healthy.findings, wording.looked_at(healthy.record))
    (sentence, beside), *own = corpus.of_corpus(healthy.record)
    assert [beside for _, beside in own if not beside] == []  # the model's own pooling has something beside it, too
    last = [entry for entry in healthy.record.corpus if entry.pooling == "mean"][-1]
    assert f"of {last.attainable_centred_rank} directions at block 5" in sentence
    assert beside.startswith("In 3 other healthy models with a full mask and post norm: directions ")
