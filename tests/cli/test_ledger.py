"""`uncollapse verify`: what it passes on, prints and writes, how it ends, and what its help knows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uncollapse
from tests.helpers.command_line import drawn_on_a_terminal
from uncollapse import claims, report
from uncollapse.claims import CLAIMS
from uncollapse.cli.commands import main
from uncollapse.records.encoding import from_json
from uncollapse.records.ledger import Ledger

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["verify", *map(str, arguments)])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the checks are asked for, in place of checking; the ledger is that of one quick claim."""
    seen: list[Any] = []
    ledger = claims.verify(["pgop-overhead"], trials=1)

    def stand_in(names: Any = None, **options: Any) -> Ledger:
        seen.append((names, options))
        return ledger

    monkeypatch.setattr(claims, "verify", stand_in)
    return seen


def test_everything_left_out_has_its_default(calls: list[Any], run: Run) -> None:
    assert run()[0] == 0
    assert calls == [(None, {"trials": 200, "seed": 0, "progress": None})]


def test_every_option_arrives_and_a_claim_named_twice_is_checked_once(calls: list[Any], run: Run) -> None:
    assert run("entropy-floor", "rmsnorm-rank", "entropy-floor", "--trials", "7", "--seed", "3")[0] == 0
    assert calls == [(["entropy-floor", "rmsnorm-rank"], {"trials": 7, "seed": 3, "progress": None})]


def test_a_person_reads_claim_source_verdict_evidence_and_counterexample(run: Run) -> None:
    code, out, err = run("layernorm-matrix-rank", "--trials", "20")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    assert "layernorm-matrix-rank refuted as stated" in words
    assert "With zero bias, layer normalisation preserves the matrix rank." in words
    assert "arXiv 2604.23681" in words
    line = re.search(
        r"Evidence: rank LN X = rank X .*?: (\d+) exceptions in 20 cases \(expected: 0 exceptions\)", words
    )
    assert line is not None
    assert int(line[1]) > 0
    assert "X = [[0, 1], [1, 0]]" in words
    assert "LN X (eps = 0) = [[-1, 1], [1, -1]]" in words


def test_json_on_stdout_is_alone_there_and_is_the_ledger(run: Run) -> None:
    code, out, err = run("rmsnorm-rank", "entropy-floor", "--trials", "5", "--seed", "2", "--json", "-")
    assert code == 0
    assert from_json(out, Ledger) == claims.verify(["rmsnorm-rank", "entropy-floor"], trials=5, seed=2)
    assert "Claims ledger" in err


def test_files_are_written_and_quiet_prints_nothing(run: Run, tmp_path: Path) -> None:
    targets = ["--json", tmp_path / "l.json", "--html", tmp_path / "l.html"]
    code, out, err = run("pgop-overhead", "--trials", "2", *targets)
    assert code == 0
    assert "pgop-overhead" in out
    assert err == f"wrote {tmp_path}/l.html\nwrote {tmp_path}/l.json\n"
    ledger = claims.verify(["pgop-overhead"], trials=2)
    assert from_json((tmp_path / "l.json").read_text("utf-8"), Ledger) == ledger
    assert (tmp_path / "l.html").read_text("utf-8") == report.draw(ledger)
    (tmp_path / "l.json").unlink()
    assert run("pgop-overhead", "--trials", "2", "--quiet", *targets) == (0, "", "")
    assert sorted(os.listdir(tmp_path)) == ["l.html", "l.json"]


def test_an_unknown_claim_is_one_line_that_names_the_nearest(run: Run, tmp_path: Path) -> None:
    code, out, err = run("layernorm-affinerank", "--json", tmp_path / "l.json")
    assert (code, out) == (2, "")
    assert err.startswith("uncollapse: verify: expected the id of a claim, got 'layernorm-affinerank'.")
    assert "'layernorm-affine-rank'" in err
    assert (err.count("\n"), err[-1]) == (1, "\n")
    assert not os.listdir(tmp_path)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(calls: list[Any], run: Run) -> None:
    for option in ("--json", "--html"):
        code, out, err = run(option, "/proc/ledger")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"uncollapse: {option}: expected a file that can be written")
    assert not calls


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--seed", "-1"], ["--model", "demo"]])
def test_usage_errors_end_with_2(calls: list[Any], run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert not calls


def test_interrupt_is_one_line_and_130(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Ledger:
        raise KeyboardInterrupt

    monkeypatch.setattr(claims, "verify", interrupted)
    assert run("--json", tmp_path / "l.json") == (130, "", "uncollapse: interrupted\n")
    assert not os.listdir(tmp_path)


def test_help_teaches_and_names_every_claim_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for part in ("--trials ", "--seed ", "--json ", "--html ", "--quiet ", "Examples", "Verdicts", "Exit codes"):
        assert part in out
    # Every hyphenated word below the examples is the id of a claim, and every claim is there.
    listed = re.findall(r"(?<![\w-])[a-z]+(?:-[a-z]+)+(?![\w-])", out[out.index("Collapse in depth") :])
    assert sorted(listed) == sorted(claim for claim in CLAIMS if "-" in claim)
    assert all(re.search(rf"\b{claim}\b", out) for claim in CLAIMS)


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom uncollapse.cli.commands import main\n"
        "try: main(['verify', '--help'])\nexcept SystemExit as ended: assert ended.code == 0\n"
        "sys.exit(', '.join(sorted({'torch', 'flint', 'numpy', 'jinja2', 'uncollapse.claims'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("quiet", "bars"), [(False, True), (True, False)])
def test_one_bar_is_drawn_on_a_terminal_unless_quiet(quiet: bool, bars: bool) -> None:
    ids = ["pgop-overhead", "rmsnorm-rank", "mlp-cannot-unmix"]
    given = ["verify", *ids, "--trials", "2", "--json", "-", *(["--quiet"] if quiet else [])]
    code, out, drawn = drawn_on_a_terminal(["-m", "uncollapse", *given], {"TERM": "xterm", "COLUMNS": "100"})
    assert code == 0
    assert [claim["id"] for claim in json.loads(out)["claims"]] == ids
    assert (b"3/3" in drawn) is bars
    bar = drawn[: drawn.find(b"Claims ledger")] if bars else drawn
    assert not [name for name in ids if name.encode() in bar]  # one bar for all of them


def test_verify_is_a_public_name() -> None:
    found = uncollapse.verify(["rmsnorm-rank"], trials=2, seed=3)
    assert found.record == claims.verify(["rmsnorm-rank"], trials=2, seed=3)
    assert found.claims == found.record.claims
    assert "verify" in dir(uncollapse)
