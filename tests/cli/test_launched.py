"""The command line in two processes that torchrun started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import uncollapse as uc
from tests.helpers.several_processes import differences, llama
from tests.helpers.tokenizers import word_tokenizer
from uncollapse.cli.commands import main

WORDS = "a quick brown fox jumps over the lazy dog and then it rests for the fox"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = llama()
    tokenizer = word_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def torchrun(*arguments: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return [sys.executable, *launch, "--rdzv-endpoint", "127.0.0.1:0", "-m", "uncollapse", *arguments]


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("uncollapse: ")]


def test_torchrun_shares_out_the_text_and_writes_once(saved: Path, tmp_path: Path) -> None:
    text = "\n\n".join(" ".join(WORDS.split()[: 5 + number % 9]) for number in range(11))
    (tmp_path / "text").write_text(text)
    given = ["diagnose", str(saved), "--text", str(tmp_path / "text"), "--batch-size", "4", "--json"]
    two = subprocess.run(
        torchrun(*given, str(tmp_path / "two")),
        capture_output=True,
        text=True,
        env=_environment(),
        check=False,
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("LlamaModel: ") == 1
    assert two.stderr.count("wrote ") == 1
    one = json.loads(uc.diagnose(str(saved), text.split("\n\n"), batch_size=4, device="cpu").to_json())
    record = json.loads((tmp_path / "two").read_text())
    assert record["probe"].pop("command").startswith("uncollapse diagnose ")
    assert [each["probe"].pop("processes") for each in (one, record)] == [1, 2]
    for each in (one, record):
        each["probe"]["options"].pop("device")
    one["probe"].pop("command")
    assert differences(one, record, 1e-10) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_needs_no_model_is_done_by_the_first_alone(
    rank: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "pgop-overhead", "--trials", "1", "--json", str(tmp_path / "ledger.json")])
    assert ended.value.code == 0
    assert (tmp_path / "ledger.json").exists() == (rank == "0")
    assert capfd.readouterr().err.count("wrote ") == (1 if rank == "0" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["heads", "ablate", "symmetries", "attribute"])
def test_every_command_on_a_model_is_shared_out(command: str, saved: Path, tmp_path: Path) -> None:
    given = ["--prompt", "a quick brown fox", "--target", "the", "--against", "dog"] if command == "attribute" else []
    given = [command, str(saved), *given, "--quiet", "--device", "cpu", "--json"]
    subprocess.run(torchrun(*given, str(tmp_path / "two")), env=_environment(), check=True)
    alone = [sys.executable, "-m", "uncollapse", *given, str(tmp_path / "one")]
    subprocess.run(alone, env=_environment(), check=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert [each["probe"].pop("processes") for each in (one, two)] == [1, 2]
    for each in (one, two):
        each["probe"].pop("command")
    assert differences(one, two, 1e-10) == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["0", "1"])
def test_a_process_that_dies_ends_the_run_in_one_line(which: str, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n\n".join([WORDS] * 20000))
    given = ["diagnose", str(saved), "--text", str(tmp_path / "text"), "--batch-size", "1", "--level", "full"]
    command = torchrun(*given, "--json", str(tmp_path / "o.json"), "--quiet")
    with (tmp_path / "errors").open("w") as errors:
        run = subprocess.Popen(command, stderr=errors, env=_environment())
    time.sleep(25)
    victim = next(
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if _is_of(process, run.pid) and f"RANK={which}".encode() in (process / "environ").read_bytes().split(b"\0")
    )
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    assert len(said((tmp_path / "errors").read_text())) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["errors", "text"]


def _is_of(process: Path, launcher: int) -> bool:
    try:
        return f"PPid:\t{launcher}\n" in (process / "status").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_refusal_is_said_once(saved: Path, tmp_path: Path) -> None:
    for given in (["--json", str(tmp_path / "no" / "o.json")], ["--text", str(tmp_path / "none.txt")]):
        run = subprocess.run(
            torchrun("heads", str(saved), *given), capture_output=True, text=True, env=_environment(), check=False
        )
        assert run.returncode == 1
        assert len(said(run.stderr)) == 1, run.stderr
