"""`uncollapse symmetries`: what it passes on, what it refuses, and one real run through to the files it leaves."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import uncollapse as uc
from tests.helpers.command_line import Ablated, refused
from uncollapse.bounds import PARAMETERS
from uncollapse.cli import commands
from uncollapse.records.encoding import from_json
from uncollapse.records.symmetries import SymmetriesRecord

SCHEMA = Path(uc.__file__).parent / "schemas" / "symmetries-1.json"


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The command in this process: (exit code, stdout, stderr)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        commands.main(["symmetries", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capfd.readouterr()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of a stand-in for `uncollapse.analyses.symmetries.symmetries`."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def symmetries(*arguments: Any, **options: Any) -> Ablated:
        made.append((arguments, options))
        return Ablated()

    module = types.ModuleType("uncollapse.analyses.symmetries")
    module.symmetries = symmetries  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uncollapse.analyses.symmetries", module)
    return made


DEFAULTS: dict[str, Any] = {
    "context_lengths": None,
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
    "command": "uncollapse symmetries",
    "progress": None,
}


def test_everything_left_out_has_its_default(calls: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd) == (0, "the runs\n", "")
    assert calls == [(("demo", None), DEFAULTS)]


def test_every_option_arrives(calls: list[Any], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    given = """
        --context-lengths 16,32 --sequences 8 --max-tokens 32 --batch-size 4 --seed 7
        --device cpu --dtype float64 --device-map auto --max-memory 3GiB --max-parameters 1000000000 --trust-remote-code
    """
    assert run(capfd, "org/model", "--text", tmp_path / "a.txt", *given.split())[0] == 0
    ((positional, options),) = calls
    assert positional == ("org/model", ["one", "two"])
    assert options.pop("command").startswith("uncollapse symmetries org/model --text ")
    assert options == {
        "context_lengths": [16, 32],
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
    ("arguments", "said"),
    [
        (["--context-lengths", "a"], "expected numbers of tokens such as 64,128,256, got 'a'"),
        (["--context-lengths", "64"], "two or more different lengths"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    refused(run(capfd, *arguments), said)


def test_help_teaches(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    code, out, err = run(capfd, "--help")
    assert (code, err) == (0, "")
    options = "context-lengths text sequences max-tokens seed json html quiet device dtype batch-size"
    for option in options.split():
        assert f"--{option} " in out
    assert "uncollapse symmetries --html symmetries.html" in out
    assert "restored bit for bit" in out


def test_a_real_run_leaves_a_page_and_a_record(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = "demo --sequences 4 --max-tokens 24 --device cpu --dtype float64 --context-lengths 8,16,32"
    page, file = tmp_path / "r.html", tmp_path / "r.json"
    code, out, err = run(capfd, *given.split(), "--json", file, "--html", page)
    assert (code, err) == (0, f"wrote {page}\nwrote {file}\n")
    text = file.read_text("utf-8")
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    record = from_json(text, SymmetriesRecord)
    assert record.model.name in out
    assert record.model.name in page.read_text("utf-8")
    exact = [t for t in record.tests if t.is_symmetry]
    assert exact
    assert all(t.holds for t in exact)
    assert [s.slope is not None for s in record.symmetries] == [False, True, False, False]
