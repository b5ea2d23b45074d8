"""`identify`: the heads' part of a diagnosis by itself, as data, and the same for every way of asking."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from tests.helpers.projections import hooked, projections
from tests.helpers.tiny_models import FAMILIES as SMALL
from tests.helpers.tiny_models import text_batch
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import from_json, json_schema
from uncollapse.records.heads import HEADS_SCHEMA, IdentifiabilityRecord

SCHEMA = Path(uc.__file__).parent / "schemas" / "heads-1.json"

# The keys of heads[] that others rely on since the first version of the schema.
CONTRACT = {
    *("block", "stack", "kind", "heads", "head_width", "width", "ambiguous_degrees_of_freedom", "kernel_dimension"),
    *(
        "gauge_dimension",
        "output_projection_rank",
        "condition_number",
        "write_space_overlap",
        "energy_share",
        "verdict",
    ),
    "unavailable",
}


def copied() -> torch.nn.Module:
    """A GPT-2 whose heads 0 and 1 of block 1 write into the same space."""
    model = SMALL["gpt2"].build().eval()
    weight = model.h[1].attn.c_proj.weight
    with torch.no_grad():
        weight[8:16] = weight[:8]
    return model


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bart", "vit"])
def test_it_is_the_heads_of_a_diagnosis(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build(), inputs_for(family)
    found, diagnosed = uc.identify(model, batches=[batch], name="m"), uc.diagnose(model, batches=[batch], name="m")
    assert found.heads == found.record.heads == diagnosed.record.heads
    assert found.record.schema == HEADS_SCHEMA
    assert found.record.model == diagnosed.record.model
    options = {key: value for key, value in diagnosed.record.probe.options.items() if key != "context_lengths"}
    assert found.record.probe == replace(diagnosed.record.probe, options=options)


def test_findings_are_the_ones_about_heads() -> None:
    found = uc.identify(copied(), batches=[text_batch()])
    whole = uc.diagnose(copied(), batches=[text_batch()])
    codes = {f.code for f in found.findings}
    assert {"HEADS-IDENTICAL", "HEADS-KERNEL"} <= codes
    assert {f.phenomenon for f in found.findings} == {"head-channel-non-identifiability"}
    assert {f.phenomenon for f in whole.findings} > {"head-channel-non-identifiability"}  # others there are left out


def test_numbers_that_are_none_are_a_finding_here_too() -> None:
    model = SMALL["gpt2"].build().eval()
    with torch.no_grad():
        model.h[1].attn.c_proj.weight[0, 0] = float("nan")
    found = uc.identify(model, batches=[text_batch()])
    assert [f.code for f in found.findings] == ["NUMERICS-NOT-FINITE"]


def test_the_record_survives_json_and_fits_the_published_schema(tmp_path: Path) -> None:
    for model, batch in ((copied(), text_batch()), (FAMILIES["t5"].build(), inputs_for(FAMILIES["t5"]))):
        found = uc.identify(model, batches=[batch])
        text = found.to_json(tmp_path / "heads.json")
        assert (tmp_path / "heads.json").read_text("utf-8") == text
        jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
        assert from_json(text, IdentifiabilityRecord) == found.record
        assert list(json.loads(text)) == ["schema", "versions", "model", "probe", "heads", "findings", "anatomy"]
    with pytest.raises(uc.InputError, match="expected a DiagnosisRecord"):
        from_json(text, DiagnosisRecord)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(text), "heads": None}, json.loads(SCHEMA.read_text()))


def test_the_shipped_schema_is_the_one_of_the_dataclasses() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(IdentifiabilityRecord)


def test_a_record_of_before_these_keys_can_be_read() -> None:
    """Every key of the contract is there, and the new ones may be missing."""
    text = uc.diagnose(copied(), batches=[text_batch()]).to_json()
    old: dict[str, Any] = json.loads(text)
    new = {"tokens", "contribution_ambiguity", "factorization_ambiguity", "smallest_principal_angle"}
    new |= {"head_noise_gain", "head_verdict", "absolute_noise_gain", "random_noise_gain", "random_head_noise_gain"}
    for heads in old["heads"]:
        assert set(heads) - new == CONTRACT
        for key in new:
            del heads[key]
    read = from_json(json.dumps(old), DiagnosisRecord)
    assert read.heads[0].verdict is not None
    assert read.heads[0].head_noise_gain is None


def test_a_float64_model_stays_in_float64() -> None:
    """Llama's norms ask for single precision; the energies of a float64 model would otherwise carry its rounding."""
    family = FAMILIES["llama"]
    model, batch = family.build().double(), inputs_for(family)
    dtypes = set()
    model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: dtypes.add(args[0].dtype))
    exact = uc.identify(model, batches=[batch]).heads[2].energy_share
    plain = uc.diagnose(model, batches=[batch]).record.heads[2].energy_share
    assert dtypes == {torch.float64}
    assert exact is not None
    assert plain is not None
    gaps = [abs(a.mean - b.mean) for a, b in zip(exact, plain, strict=True) if a is not None and b is not None]
    assert 0 < max(gaps) < 1e-5


def test_the_arguments_are_those_of_a_diagnosis() -> None:
    family = FAMILIES["bert"]
    model = family.build()
    layout = uc.Layout(tuple(f"encoder.layer.{i}" for i in range(3)))
    found = uc.identify(model, batches=[inputs_for(family)], layout=layout, name="mine", command="uncollapse heads")
    assert found.record.model.name == "mine"
    assert found.record.probe.command == "uncollapse heads"
    assert found.record.probe.options["layout"] == list(layout.blocks)
    with pytest.raises(uc.InputError, match="expected texts or batches, got both"):
        uc.identify(model, ["a text"], batches=[inputs_for(family)])


def test_the_text_decides_the_energies_and_nothing_else() -> None:
    family = FAMILIES["gpt2"]
    model = family.build()
    one, other = (uc.identify(model, batches=[inputs_for(family, seed=seed)]).heads for seed in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert a.energy_share != b.energy_share
        assert {k: v for k, v in vars(a).items() if k != "energy_share"} == {
            k: v for k, v in vars(b).items() if k != "energy_share"
        }


def test_the_model_is_left_as_it_was() -> None:
    family = FAMILIES["gpt2"]
    model, batch = family.build(), inputs_for(family)
    before = hooked(model, projections(model, "attn.c_proj"), batch)
    uc.identify(model, batches=[batch])
    after = hooked(model, projections(model, "attn.c_proj"), batch)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_it_shows_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = uc.identify(copied(), batches=[text_batch()])
    found.show()
    assert "not in block 1" in capsys.readouterr().out
    found.to_html(tmp_path / "heads.html")
    assert (tmp_path / "heads.html").read_text("utf-8").startswith("<!doctype html>")
