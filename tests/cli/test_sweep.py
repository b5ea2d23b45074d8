"""`uncollapse sweep`: what it passes on, what it refuses, and a run through to the files it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import TEXTS, run_of
from tests.helpers.command_line import refused
from uncollapse import records
from uncollapse.cli import commands
from uncollapse.records.sweep import SweepRecord

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of([0, 40], tmp_path_factory.mktemp("series") / "run")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main([str(argument) for argument in arguments])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of a stand-in for `sweep`."""
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Swept:
        findings: tuple[()] = ()

    def sweep(*arguments: Any, **options: Any) -> Swept:
        made.append((arguments, options))
        return Swept()

    monkeypatch.setattr("uncollapse.analyses.sweep.sweep", sweep)
    return made


def test_a_sweep_leaves_its_records_a_page_and_a_summary(series: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    out, page, summary = tmp_path / "out", tmp_path / "page.html", tmp_path / "summary.json.gz"
    arguments = ["sweep", series, "--out", out, "--text", tmp_path / "text.txt"]
    code, said, _ = run(*arguments, "--html", page, "--json", summary, "--fail-on", "warning")
    assert code == 1
    assert "The first warning: WIDTH-UNIFORM at step 40, block 1." in " ".join(said.split())
    whole = records.load(summary)
    assert isinstance(whole, SweepRecord)
    files = [str(checkpoint.file) for checkpoint in whole.checkpoints]
    assert sorted(files) == sorted(path.name for path in out.glob("*.json.gz"))
    assert all(file in page.read_text("utf-8") for file in files)
    code, said, _ = run("compare", *(out / file for file in files), "--json", "-")
    assert code == 0
    assert [model["name"] for model in json.loads(said)["models"]] == [c.name for c in whole.checkpoints]
    code, said, _ = run("show", out / files[0])
    assert code == 0
    assert "checkpoint-0" in said
    code, said, error = run(*arguments, "--quiet", "--fail-on", "critical")
    assert (code, said, error) == (0, "", "")


def test_options_are_passed_on(calls: list[Any], run: Run, tmp_path: Path) -> None:
    given = [
        "sweep",
        "a",
        "org/b@step1",
        "--out",
        tmp_path,
        "--shard",
        "2/8",
        "--retry",
        "--level",
        "full",
        "--ray",
        "-q",
    ]
    assert run(*given) == (0, "", "")
    (models, texts), options = calls[0]
    assert (models, texts) == (["a", "org/b@step1"], None)
    wanted = {"out": str(tmp_path), "shard": (2, 8), "retry": True, "ray": "auto", "level": "full", "max_tokens": 128}
    assert options.items() >= wanted.items()
    for address in ("local", "ray://head:10001", "head:6379"):
        run("sweep", "a", "--out", tmp_path, "-q", "--ray", address)
        run("sweep", "a", "--out", tmp_path, "-q", f"--ray={address}")
        assert [call[1]["ray"] for call in calls[-2:]] == [address, address]
    run("sweep", "a", "--out", tmp_path, "-q")
    assert (calls[-1][1]["shard"], calls[-1][1]["ray"]) == (None, None)


def test_what_cannot_be_meant_is_refused_in_one_line(calls: list[Any], run: Run, tmp_path: Path) -> None:
    refused(run("sweep", "a", "--out", tmp_path, "--shard", "3"), "--shard", "such as 2/8")
    refused(run("sweep", "a", "--ray", "b", "--out", tmp_path), "--ray", "'b'", "It may be a model")
    refused(run("sweep", "a"), "--out")
    refused(run("sweep", "--out", tmp_path), "MODEL")
    assert calls == []


def test_a_page_does_not_write_over_one_of_the_checkpoints(series: Path, tmp_path: Path, run: Run) -> None:
    config = series / "checkpoint-40" / "config.json"
    before = config.read_bytes()
    refused(run("sweep", "demo", series, "--out", tmp_path / "out", "--json", config), "belongs to the model")
    assert config.read_bytes() == before
