"""`uncollapse ablate`: what it passes on, what it refuses, and one real run through to the files it leaves."""

from __future__ import annotations

import doctest
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import torch

import uncollapse as uc
from tests.helpers.command_line import Ablated, refused
from tests.helpers.tiny_models import FAMILIES, text_batch
from uncollapse.bounds import PARAMETERS
from uncollapse.cli import commands, options
from uncollapse.cli.options import block_numbers
from uncollapse.interventions.without import Component
from uncollapse.records.ablation import AblationRecord
from uncollapse.records.encoding import from_json, json_schema

SCHEMA = Path(uc.__file__).parent / "schemas" / "ablation-1.json"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main(["ablate", *map(str, arguments)])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of a stand-in for `uncollapse.analyses.ablation.ablate`."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def ablate(*arguments: Any, **options: Any) -> Ablated:
        made.append((arguments, options))
        return Ablated()

    module = types.ModuleType("uncollapse.analyses.ablation")
    module.ablate = ablate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uncollapse.analyses.ablation", module)
    return made


DEFAULTS: dict[str, Any] = {
    "without": None,
    "grid": False,
    "blocks": None,
    "level": "core",
    "sequences": None,
    "max_tokens": 128,
    "batch_size": 16,
    "seed": 0,
    "device": None,
    "dtype": None,
    "device_map": None,
    "max_memory": None,
    "max_parameters": PARAMETERS,
    "trust_remote_code": False,
    "command": "uncollapse ablate",
    "progress": None,
}


def test_everything_left_out_has_its_default(calls: list[Any], run: Run) -> None:
    assert run() == (0, "the runs\n", "")
    assert calls == [(("demo", None), DEFAULTS)]


def test_every_option_arrives(calls: list[Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    given = """
        --without mlp --without residual,mlp --blocks 3-5,1 --level full --sequences 8 --max-tokens 32 --batch-size 4 --seed 7
        --device cpu --dtype float64 --device-map auto --max-memory 3GiB --max-parameters 1000000000 --trust-remote-code
    """
    assert run("org/model", "--text", tmp_path / "a.txt", *given.split())[0] == 0
    ((positional, options),) = calls
    assert positional == ("org/model", ["one", "two"])
    assert options.pop("command").startswith("uncollapse ablate org/model --text ")
    assert options == {
        "without": [("mlp",), ("residual", "mlp")],
        "grid": False,
        "blocks": [1, 3, 4, 5],
        "level": "full",
        "sequences": 8,
        "max_tokens": 32,
        "batch_size": 4,
        "seed": 7,
        "device": "cpu",
        "dtype": "float64",
        "device_map": "auto",
        "max_memory": "3GiB",
        "max_parameters": 10**9,
        "trust_remote_code": True,
        "progress": None,
    }


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (None, None),
        ("all", "all"),
        ("all+outer", "all+outer"),
        ("3-6", [3, 4, 5, 6]),
        ("5, 3", [3, 5]),
        ("0", [0]),
        ("2-2,1-3", [1, 2, 3]),
    ],
)
def test_blocks_are_numbers_ranges_or_a_word(text: str | None, blocks: Any) -> None:
    assert block_numbers(text) == blocks


def test_the_example_of_the_docstring() -> None:
    done = doctest.testmod(options)
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize("text", ["", "6-3", "1,,2", "a", "-1", "1-2-3", "all-outer", "1;2", "99999", "1.5", "³"])
def test_what_is_no_block_is_refused_before_the_work(calls: list[Any], run: Run, text: str) -> None:
    refused(run("--blocks", text), "--blocks: expected block numbers such as 3-6", repr(text))
    assert not calls


def test_the_grid_is_a_flag(calls: list[Any], run: Run) -> None:
    assert run("--grid")[0] == 0
    assert calls[0][1]["grid"] is True


def test_outputs_are_those_of_a_diagnosis(calls: list[Any], run: Run, tmp_path: Path) -> None:
    code, out, err = run("--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert (code, out) == (0, "the runs\n")
    assert err == f"wrote {tmp_path}/r.html\nwrote {tmp_path}/r.json\n"
    assert run("--json", "-") == (0, "{}\n", "the runs\n")
    assert run("--quiet", "--json", "-") == (0, "{}\n", "")
    calls.clear()
    refused(run("--html", tmp_path / "missing" / "r.html"), "--html: expected a file", "No such file")
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--without", "mlps"], "got 'mlps'"),
        (["--without", "mlp,"], "got ''"),
        (["--without", ""], "got ''"),
        (["--grid", "--without", "mlp"], "expected grid or without, got both"),
        (["--blocks", "9", "--sequences", "1", "--device", "cpu"], "block numbers from 0 to 5, got [9]"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(run: Run, arguments: list[str], said: str) -> None:
    refused(run(*arguments), said)


def test_help_teaches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    options = "without grid blocks text sequences max-tokens seed json html quiet device dtype batch-size"
    for option in options.split():
        assert f"--{option} " in out
    assert "uncollapse ablate demo --grid --dtype float64 --html grid.html" in out
    assert "not the same as training without it" in out
    parts = out.split("Parts to remove in one run: ")[1].split(".")[0]
    assert set(parts.split(", ")) == set(get_args(Component))


def test_a_real_run_leaves_a_page_and_a_record(run: Run, tmp_path: Path) -> None:
    given = "demo --without residual --blocks 2-5 --sequences 2 --max-tokens 24 --device cpu --dtype float64"
    code, out, err = run(*given.split(), "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert (code, err) == (0, f"wrote {tmp_path}/r.html\nwrote {tmp_path}/r.json\n")
    text = (tmp_path / "r.json").read_text("utf-8")
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    record = from_json(text, AblationRecord)
    assert [run.without for run in record.runs] == [[], ["residual"]]
    assert record.blocks == [2, 3, 4, 5]
    assert "Components were removed in blocks 2–5 only." in " ".join(out.split())
    assert "1·0·1" in out
    assert "✓ agrees" in out
    page = (tmp_path / "r.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("data-chart=") == 3


# Schema ---------------------------------------------------------------------------------------------------------------


def test_the_shipped_schema_is_the_one_of_the_dataclasses() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema(AblationRecord)


def test_a_record_of_the_grid_satisfies_the_schema_and_survives_json(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build().eval().to(torch.float64)
    found = uc.ablate(model, batches=[text_batch()], grid=True)
    text = found.to_json()
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    assert from_json(text, AblationRecord) == found.record
    assert list(json.loads(text)) == [
        "schema",
        "versions",
        "model",
        "probe",
        "blocks",
        "is_causal",
        "runs",
        "verdicts",
        "norms",
        "updates",
        "contraction_at_consensus",
        "anatomy",
    ]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**json.loads(text), "blocks": "all"}, json.loads(SCHEMA.read_text()))
