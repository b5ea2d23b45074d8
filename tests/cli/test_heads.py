"""`uncollapse heads`: what it passes on, what it refuses, and one real run through to the files it leaves."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

import uncollapse as uc
from tests.helpers.command_line import refused
from tests.helpers.heads_samples import COPIES
from uncollapse.bounds import PARAMETERS
from uncollapse.cli import commands
from uncollapse.records.common import Finding
from uncollapse.records.encoding import from_json
from uncollapse.records.heads import IdentifiabilityRecord

SCHEMA = Path(uc.__file__).parent / "schemas" / "heads-1.json"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main(["heads", *map(str, arguments)])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


class Identified:
    """What `identify` returns, as far as the command line looks at it."""

    findings: list[Finding] = [COPIES]  # noqa: RUF012 - a stand-in

    def show(self, console: Console) -> None:
        console.print("the heads")

    def to_json(self, path: str | None = None) -> str:
        if path is not None:
            Path(path).write_text("{}\n")
        return "{}\n"

    def to_html(self, path: str) -> None:
        Path(path).write_text("<!doctype html>")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of a stand-in for `uncollapse.analyses.heads.identify`."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def identify(*arguments: Any, **options: Any) -> Identified:
        made.append((arguments, options))
        return Identified()

    module = types.ModuleType("uncollapse.analyses.heads")
    module.identify = identify  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uncollapse.analyses.heads", module)
    return made


DEFAULTS: dict[str, Any] = {
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
    "command": "uncollapse heads",
    "progress": None,
}


def test_everything_left_out_has_its_default(calls: list[Any], run: Run) -> None:
    assert run() == (0, "the heads\n", "")
    assert calls == [(("demo", None), DEFAULTS)]


def test_every_option_arrives(calls: list[Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    given = """
        --sequences 8 --max-tokens 32 --batch-size 4 --seed 7 --device cpu --dtype float64 --device-map auto --max-memory 3GiB
        --max-parameters 1000000000 --trust-remote-code
    """
    assert run("org/model", "--text", tmp_path / "a.txt", *given.split())[0] == 0
    ((positional, options),) = calls
    assert positional == ("org/model", ["one", "two"])
    assert options.pop("command").startswith("uncollapse heads org/model --text ")
    assert options == {
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


@pytest.mark.parametrize(("severity", "code"), [("info", 1), ("warning", 1), ("critical", 0)])
def test_a_finding_at_or_above_fail_on_is_exit_code_1(calls: list[Any], run: Run, severity: str, code: int) -> None:
    assert run("--fail-on", severity) == (code, "the heads\n", "")


def test_outputs_are_those_of_a_diagnosis(calls: list[Any], run: Run, tmp_path: Path) -> None:
    code, out, err = run("--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert (code, out) == (0, "the heads\n")
    assert err == f"wrote {tmp_path}/r.html\nwrote {tmp_path}/r.json\n"
    assert run("--json", "-") == (0, "{}\n", "the heads\n")
    assert run("--quiet", "--json", "-") == (0, "{}\n", "")
    calls.clear()
    refused(run("--html", tmp_path / "missing" / "r.html"), "--html: expected a file", "No such file")
    assert not calls


def test_a_model_that_is_not_there_ends_in_one_line(run: Run, tmp_path: Path) -> None:
    refused(run(tmp_path / "nothing", "--device", "cpu"), "expected")


def test_help_teaches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    options = "fail-on text sequences max-tokens seed json html quiet device dtype device-map batch-size"
    for option in options.split():
        assert f"--{option} " in out
    assert "uncollapse heads demo --html heads.html" in out
    assert "attributable with care (noise gain)" in out
    assert "--level" not in out


def test_a_real_run_leaves_a_page_and_a_record(run: Run, tmp_path: Path) -> None:
    given = "demo --sequences 2 --max-tokens 24 --device cpu"
    code, out, err = run(*given.split(), "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert (code, err) == (0, f"wrote {tmp_path}/r.html\nwrote {tmp_path}/r.json\n")
    text = (tmp_path / "r.json").read_text("utf-8")
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    record = from_json(text, IdentifiabilityRecord)
    assert [heads.block for heads in record.heads] == list(range(6))
    assert all(len(heads.head_noise_gain or []) == 12 for heads in record.heads)
    assert record.probe.command.startswith("uncollapse heads demo --sequences 2")
    assert "Yes, with care: in every block" in " ".join(out.split())
    page = (tmp_path / "r.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("data-chart=") == 2
