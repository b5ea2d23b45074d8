"""The main job on the packaged MiniLM: healthy without a warning, planted damage named with its phenomenon and block."""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.tiny_models import FAMILIES, batch_for, text_batch
from uncollapse import sources
from uncollapse.analyses.preparation import DEFAULTS, ProbeOptions
from uncollapse.records.common import Finding
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import from_json, json_schema, to_json

SCHEMA = Path(uc.__file__).parent / "schemas" / "diagnosis-1.json"


@pytest.fixture(scope="module")
def minilm() -> sources.LoadedModel:
    return sources.load_model("demo")


@pytest.fixture(scope="module")
def healthy(minilm: sources.LoadedModel) -> uc.Diagnosis:
    return uc.diagnose(minilm.model, tokenizer=minilm.tokenizer, sequences=24, name="MiniLM")


def damaged(minilm: sources.LoadedModel, damage: Any) -> list[Finding]:
    model = copy.deepcopy(minilm.model)
    with torch.no_grad():
        damage(model.encoder.layer)
    found = uc.diagnose(model, tokenizer=minilm.tokenizer, sequences=24)
    return [f for f in found.findings if f.severity != "info"]


def test_the_healthy_model_has_no_warning(healthy: uc.Diagnosis) -> None:
    assert [f for f in healthy.findings if f.severity != "info"] == []


def test_the_record_says_what_the_model_is(healthy: uc.Diagnosis, minilm: sources.LoadedModel) -> None:
    model = healthy.record.model
    assert (model.blocks, model.heads, model.key_value_heads, model.width, model.head_width) == (6, 12, 12, 384, 32)
    assert model.norm_placement == "post"
    assert model.parameters == sum(p.numel() for p in minilm.model.parameters())
    assert (model.dtype, model.attention_backend) == ("float32", "sdpa")
    assert [s.site for s in healthy.trajectory] == ["embedding", *(f"block.{i}" for i in range(6))]
    assert len(healthy.record.attention) == 72
    assert [h.block for h in healthy.record.heads] == list(range(6))
    head = healthy.record.heads[0]
    assert head.ambiguous_degrees_of_freedom == 11 * 32
    assert head.kernel_dimension == 0
    assert head.output_projection_rank == 384
    assert head.gauge_dimension == 12 * 32 * 32 + 12 * 32  # MiniLM has value and output biases
    assert head.energy_share is not None
    assert sum(s.mean for s in head.energy_share if s) == pytest.approx(1)


def test_removed_residuals_are_rank_collapse_in_depth_from_the_first_block_without_on(
    minilm: sources.LoadedModel,
) -> None:
    uc.diagnose(minilm.model, tokenizer=minilm.tokenizer, sequences=2)
    with uc.without(minilm.model, "residual"):
        found = uc.diagnose(minilm.model, tokenizer=minilm.tokenizer, sequences=24)
    worst = next(f for f in found.findings if f.code == "DEPTH-CONSENSUS")
    assert (worst.phenomenon, worst.severity, worst.block) == ("rank-collapse-depth", "critical", 0)  # from there on
    assert uc.diagnose(minilm.model, tokenizer=minilm.tokenizer, sequences=24).findings == []  # and it is itself again


@pytest.mark.parametrize("block", [1, 4])
def test_logits_scaled_up_in_one_block_are_entropy_collapse_there(minilm: sources.LoadedModel, block: int) -> None:
    def scale(layers: Any) -> None:
        attention = layers[block].attention.self
        for projection in (attention.query, attention.key):
            projection.weight.mul_(30)
            projection.bias.mul_(30)

    found = damaged(minilm, scale)
    assert {(f.phenomenon, f.block, f.severity) for f in found} == {("entropy-collapse", block, "critical")}


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("bias_too", [False, True])
def test_zero_queries_in_one_block_are_rank_collapse_in_width_there(
    minilm: sources.LoadedModel, block: int, bias_too: bool
) -> None:
    def zero(layers: Any) -> None:
        layers[block].attention.self.query.weight.zero_()
        if bias_too:
            layers[block].attention.self.query.bias.zero_()

    found = damaged(minilm, zero)
    assert {(f.phenomenon, f.block) for f in found} == {("rank-collapse-width", block)}
    assert any(f.code == "WIDTH-RANK-ONE" for f in found)
    assert any(f.code == "WIDTH-UNIFORM" for f in found) == bias_too


def test_two_heads_with_the_same_output_weights_are_not_identifiable(minilm: sources.LoadedModel) -> None:
    def same(layers: Any) -> None:
        weight = layers[2].attention.output.dense.weight  # [width, head · head width]
        weight[:, 5 * 32 : 6 * 32] = weight[:, 32:64]

    found = damaged(minilm, same)
    assert {(f.phenomenon, f.block) for f in found} == {("head-channel-non-identifiability", 2)}
    identical = next(f for f in found if f.code == "HEADS-IDENTICAL")
    assert "Heads 1 and 5" in identical.message
    assert next(f for f in found if f.code == "HEADS-KERNEL").value == 32


def test_not_a_number_in_one_block_is_named_and_the_rest_is_measured(minilm: sources.LoadedModel) -> None:
    def poison(layers: Any) -> None:
        layers[3].output.dense.bias[7] = math.nan

    (finding,) = damaged(minilm, poison)
    assert (finding.code, finding.phenomenon, finding.block) == ("NUMERICS-NOT-FINITE", "numerics", 3)


def test_infinity_in_one_block_leaves_the_rest_of_the_record_finite(minilm: sources.LoadedModel) -> None:
    model = copy.deepcopy(minilm.model)
    with torch.no_grad():
        model.encoder.layer[4].output.dense.bias[7] = math.inf
    found = uc.diagnose(model, tokenizer=minilm.tokenizer, sequences=8)
    assert found.findings[0].block == 4
    assert all(s.rank is not None for s in found.trajectory[:5])
    assert found.trajectory[5].rank is None
    assert found.trajectory[5].unavailable["rank"] == "NaN or infinity in every sequence"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} reached JSON")

    json.loads(found.to_json(), parse_constant=refuse)


# Records --------------------------------------------------------------------------------------------------------------


def test_the_record_survives_json_and_satisfies_the_published_schema(healthy: uc.Diagnosis, tmp_path: Path) -> None:
    text = healthy.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    assert from_json(text, DiagnosisRecord) == healthy.record
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    assert list(json.loads(text)) == [
        "schema",
        "versions",
        "model",
        "probe",
        "trajectory",
        "attention",
        "heads",
        "norms",
        "updates",
        "symmetries",
        "findings",
        "anatomy",
        "parts",
        "embeddings",
        "corpus",
        "routers",
    ]


def test_the_shipped_schema_is_the_one_of_the_dataclasses() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(DiagnosisRecord)


def test_a_text_that_is_no_record_is_refused() -> None:
    with pytest.raises(uc.InputError, match="expected a DiagnosisRecord"):
        from_json("{}", DiagnosisRecord)
    with pytest.raises(uc.InputError, match="expected a DiagnosisRecord"):
        from_json("no json", DiagnosisRecord)


def test_missing_values_carry_their_reason(healthy: uc.Diagnosis) -> None:
    for record in (*healthy.trajectory, *healthy.record.attention, *healthy.record.heads):
        missing = {k for k, v in vars(record).items() if v is None and k not in {"block", "stack", "verdict"}}
        bounds = {"logit_range_bound", "disperses_beyond", "bound_part"} & missing
        assert not bounds or getattr(record, "bounded_by", "")
        assert missing - bounds == set(record.unavailable)


# Ways in --------------------------------------------------------------------------------------------------------------


def test_texts_and_their_batches_give_the_same_diagnosis(minilm: sources.LoadedModel) -> None:
    texts = sources.default_texts(6, 1)
    batches = sources.tokenize(texts, minilm.tokenizer)
    from_texts = uc.diagnose(minilm.model, texts, tokenizer=minilm.tokenizer)
    from_batches = uc.diagnose(minilm.model, batches=batches)
    assert from_texts.trajectory == from_batches.trajectory
    assert from_texts.record.attention == from_batches.record.attention


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", ["core", "full"])
def test_every_family_and_level_gives_a_record_that_fits_the_schema(family: str, level: Any) -> None:
    tiny = FAMILIES[family]
    found = uc.diagnose(tiny.build().eval(), batches=[batch_for(tiny)], level=level)
    jsonschema.validate(json.loads(found.to_json()), json.loads(SCHEMA.read_text()))
    measured = {a.contraction is not None for a in found.record.attention}
    assert measured == {level == "full"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_measured(dtype: torch.dtype) -> None:
    model = FAMILIES["gpt2"].build().eval().to(dtype)
    found = uc.diagnose(model, batches=[text_batch()])
    assert found.record.model.dtype == str(dtype).removeprefix("torch.")
    plain = uc.diagnose(FAMILIES["gpt2"].build().eval(), batches=[text_batch()])
    for a, b in zip(found.trajectory, plain.trajectory, strict=True):
        assert a.consensus_distance is not None
        assert b.consensus_distance is not None
        assert a.consensus_distance.mean == pytest.approx(b.consensus_distance.mean, rel=0.02)
        assert a.rank == b.rank


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    model = FAMILIES["bert"].build().train()
    uc.diagnose(model, batches=[text_batch()])
    assert all(m.training for m in model.modules())


def test_progress_is_reported_to_the_end(minilm: sources.LoadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    uc.diagnose(minilm.model, tokenizer=minilm.tokenizer, sequences=4, progress=lambda *step: seen.append(step))
    assert {what for what, _, _ in seen} == {"anatomy", "probe"}
    assert all((what, total, total) in seen for what, _, total in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "deep"}, "expected level 'core' or 'full', got 'deep'"),
        ({"texts": ["one two"], "batches": [text_batch()]}, "expected texts or batches, got both"),
        ({"texts": ["one two three"]}, "expected a tokenizer"),
        ({"batches": []}, "expected at least one batch"),
        ({"batches": [text_batch()], "dtype": "float16"}, "expected no dtype with a loaded model"),
        ({"sequences": 0}, "expected sequences as a whole number"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(uc.InputError, match=message):
        uc.diagnose(FAMILIES["bert"].build(), **arguments)


FUNCTIONS: list[Callable[..., Any]] = [uc.diagnose, uc.ablate, uc.identify, uc.symmetries]
on_each = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


@on_each
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["one two"], "batches": [text_batch()]}, "expected texts or batches, got both"),
        ({"batches": [text_batch()], "device_map": "auto"}, "expected no device_map with a loaded model"),
        ({"sequences": 0}, "expected sequences as a whole number"),
        ({"progress": False}, r"expected progress as a function of \(what, done, total\), got False"),
        ({"model": {}}, "expected a model, a name or a path, got dict"),
    ],
)
def test_refusals_name_the_function_that_was_called(
    function: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(uc.InputError, match=f"^{function.__name__}: {message}"):
        function(**{"model": FAMILIES["bert"].build(), **arguments})


@pytest.mark.parametrize("function", [uc.diagnose, uc.ablate])
def test_an_unknown_level_is_refused_by_the_function_that_was_called(function: Callable[..., Any]) -> None:
    with pytest.raises(uc.InputError, match=f"^{function.__name__}: expected level 'core' or 'full', got 'deep'"):
        function(FAMILIES["bert"].build(), level="deep")


@on_each
def test_an_unknown_option_is_refused_with_the_nearest(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"^{function.__name__}: .*got 'max_token'. The nearest is 'max_tokens'"):
        function("no-such-model", max_token=64)
    with pytest.raises(TypeError, match=rf"got 'zzz'. None of its options .*help\(uncollapse\.{function.__name__}\)"):
        function("no-such-model", zzz=64)


def test_the_nearest_option_may_be_one_of_the_functions_own() -> None:
    with pytest.raises(
        TypeError, match=r"^ablate: expected an option that it has, got 'witout'\. The nearest is 'without'"
    ):
        uc.ablate("no-such-model", witout=[("mlp",)])  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"^identify: expected an option that it has, got 'level'\. None of its options"
    ):
        uc.identify("no-such-model", level="full")  # type: ignore[call-arg]


@on_each
def test_help_names_every_option_and_its_default(function: Callable[..., Any]) -> None:
    words = re.findall(r"\w+(?:=\w+)?", function.__doc__ or "")
    for option, default in DEFAULTS.items():
        assert (f"{option}={default}" if default is not None and default != "" else option) in words
    own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert all(name in words for name in own)


def test_every_option_has_a_default_and_a_meaning() -> None:
    assert list(DEFAULTS) == list(ProbeOptions.__annotations__)
    described = [
        name for line in re.findall(r"^ *([\w, ]+):", ProbeOptions.__doc__ or "", re.M) for name in line.split(", ")
    ]
    assert sorted(described) == sorted(DEFAULTS)


@on_each
def test_the_record_has_the_options_as_they_were_resolved(function: Callable[..., Any]) -> None:
    found = function(FAMILIES["bert"].build(), batches=[text_batch()], seed=3)
    defaults = {
        "sequences": None,
        "max_tokens": 128,
        "batch_size": 16,
        "device": None,
        "dtype": None,
        "device_map": None,
        "max_memory": None,
    }
    options = found.record.probe.options
    assert {key: options[key] for key in [*defaults, "seed", "level", "layout"]} == {
        **defaults,
        "seed": 3,
        "level": "core",
        "layout": None,
    }
    assert not set(options) & {"tokenizer", "batches", "name", "command", "progress", "trust_remote_code"}


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(uc.InputError, match="expected a model, a name or a path, got dict"):
        uc.diagnose({})  # type: ignore[arg-type]


def test_a_model_in_a_notebook_shows_its_page_without_breaking_out(healthy: uc.Diagnosis) -> None:
    shown = healthy._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "<script" not in shown


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, uncollapse; print([m for m in ('torch', 'transformers', 'lightning', 'altair') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, uncollapse; uncollapse.diagnose; print([m for m in ('transformers', 'altair') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert set(dir(uc)) == set(uc.__all__)
    assert all(getattr(uc, name) is not None for name in uc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = uc.nonsense


def test_a_wrapped_model_of_ones_own_is_measured() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = FAMILIES["gpt2"].build()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(tokens).last_hidden_state

    found = uc.diagnose(Wrapper(), batches=[{"tokens": text_batch()["input_ids"]}])
    assert found.record.model.blocks == 3
    assert found.record.probe.tokens == 27


def test_written_records_do_not_depend_on_the_order_of_keys(healthy: uc.Diagnosis) -> None:
    assert to_json(from_json(to_json(healthy.record), DiagnosisRecord)) == to_json(healthy.record)
