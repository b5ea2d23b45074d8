"""Outputs that are an input, each other, or a stream: refused before anything runs, or written where they belong."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.command_line import refused
from uncollapse.cli import output
from uncollapse.cli.commands import main
from uncollapse.errors import InputError
from uncollapse.sources import checkpoint_folder

GOLDEN = Path(__file__).parent.parent / "records" / "golden"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, where the analyses are forbidden: what is refused here was refused before they ran."""
    for name, function in {
        "diagnosis": "diagnose",
        "ablation": "ablate",
        "heads": "identify",
        "symmetries": "symmetries",
    }.items():

        def ran(*_: Any, **__: Any) -> None:
            raise AssertionError("the analysis ran")

        module = types.ModuleType(f"uncollapse.analyses.{name}")
        setattr(module, function, ran)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    transformers.BertConfig().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("about it")
    (folder / "shards").mkdir()
    (folder / "shards" / "a.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("command", ["diagnose", "ablate", "heads", "symmetries"])
@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("way", ["itself", "link", "hard link", "other name", "link to it given as text"])
def test_an_output_that_is_the_text_is_refused(run: Run, tmp_path: Path, command: str, option: str, way: str) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("a corpus")
    (tmp_path / "link").symlink_to("corpus.txt")
    os.link(text, tmp_path / "hard")
    (tmp_path / "folder").mkdir()
    given, output = {
        "itself": (text, text),
        "link": (text, tmp_path / "link"),
        "hard link": (text, tmp_path / "hard"),
        "other name": (text, f"{tmp_path}/folder/../corpus.txt"),
        "link to it given as text": (tmp_path / "link", text),
    }[way]
    refused(
        run(command, "--text", __file__, "--text", given, option, output),
        f"{option}: expected a file that is not read",
        "--text",
    )
    assert text.read_text() == "a corpus"


@pytest.mark.parametrize("command", ["diagnose", "ablate", "heads", "symmetries"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "README.md", "shards/a.safetensors", "tokenizer.json", "adapter_config.json"],
)
def test_an_output_that_belongs_to_the_checkpoint_is_refused(
    run: Run, checkpoint: Path, command: str, name: str
) -> None:
    """Also one that is not there yet: a new tokenizer.json beside the weights would be read with them the next time."""
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    outside = checkpoint.parent / "outside"
    outside.symlink_to(checkpoint / name)
    for place in (checkpoint / name, outside):
        refused(
            run(command, checkpoint, "--json", place),
            "--json: expected a file that is not read",
            "belongs to the model",
        )
    if (checkpoint / name).exists():
        os.link(checkpoint / name, checkpoint.parent / "hard")
        refused(run(command, checkpoint, "--html", checkpoint.parent / "hard"), "belongs to the model")
    assert {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()} == before


def test_a_file_that_the_checkpoint_links_to_belongs_to_it(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(tmp_path / "blob")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "blob")
    refused(run("heads", checkpoint, "--json", tmp_path / "blob"), "belongs to the model")
    assert (tmp_path / "blob").read_bytes() == b"weights"


def test_the_packaged_model_is_not_overwritten(run: Run) -> None:
    folder = checkpoint_folder("demo")
    assert folder is not None
    before = Path(folder, "config.json").read_bytes()
    refused(run("diagnose", "demo", "--json", f"{folder}/config.json"), "belongs to the model 'demo'")
    assert Path(folder, "config.json").read_bytes() == before


def test_a_report_may_lie_in_the_folder_of_its_model_and_be_written_again(checkpoint: Path) -> None:
    reads = output.Reads(models=["demo", str(checkpoint)])
    record = GOLDEN.joinpath("heads.json").read_bytes()
    for name, data in {
        "report.json": record,
        "report.json.gz": gzip.compress(record),
        "report.html": b"<!doctype html>",
    }.items():
        output.require_writable(output.Outputs(json=str(checkpoint / name)), quiet=True, reads=reads)
        (checkpoint / name).write_bytes(data)
        output.require_writable(output.Outputs(json=str(checkpoint / name)), quiet=True, reads=reads)
    assert sorted(os.listdir(checkpoint)) == [
        *("README.md", "config.json", "model.safetensors", "report.html", "report.json", "report.json.gz", "shards")
    ]
    (checkpoint / "report.json.gz").write_bytes(gzip.compress(b"of somebody else"))
    with pytest.raises(InputError, match="belongs to the model"):
        output.require_writable(output.Outputs(json=str(checkpoint / "report.json.gz")), reads=reads)


def test_a_record_is_not_written_over_itself(run: Run, tmp_path: Path) -> None:
    record = Path(shutil.copy(GOLDEN / "heads.json", tmp_path / "r.json"))
    refused(run("show", record, "--json", record), "--json: expected a file that is not read", "RECORD")
    refused(run("show", record, "--html", record), "--html: expected a file that is not read", "RECORD")
    assert record.read_bytes() == (GOLDEN / "heads.json").read_bytes()
    before, after = (Path(shutil.copy(GOLDEN / "diagnosis.json", tmp_path / name)) for name in ("a.json", "b.json"))
    refused(run("compare", before, after, "--json", before), "--json: expected a file that is not read", "BEFORE")
    refused(run("compare", before, after, "--html", after), "--html: expected a file that is not read", "AFTER")
    assert before.read_bytes() == after.read_bytes() == (GOLDEN / "diagnosis.json").read_bytes()


def test_one_of_two_records_may_come_from_stdin(tmp_path: Path) -> None:
    record = GOLDEN / "diagnosis.json"
    command = [sys.executable, "-m", "uncollapse", "compare", "-", str(record), "--json", "-", "--quiet"]
    done = subprocess.run(command, input=record.read_bytes(), capture_output=True, check=True)
    assert b'"schema": "uncollapse/comparison/1"' in done.stdout


def test_two_outputs_that_are_one_file_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one").touch()
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "link").symlink_to("new")
    for json, html in [("one", "two"), ("link", "new"), ("new", "./new")]:
        refused(run("verify", "--json", tmp_path / json, "--html", f"{tmp_path}/{html}"), "which are the same")
    for json in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        refused(run("verify", "--json", json, "--html", "/dev/stdout"), "which are the same")
    assert sorted(os.listdir(tmp_path)) == ["link", "one", "two"]


def shown(*arguments: str | Path, stdout: Any = subprocess.PIPE, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`uncollapse show` in a process of its own: it needs no torch and takes a second."""
    return subprocess.run(
        [sys.executable, "-m", "uncollapse", "show", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
        **options,
    )


RECORD = GOLDEN / "heads.json"


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "link"])
def test_a_record_on_stdout_is_alone_there_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    done = shown(RECORD, "--json", name, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0], done.stdout[-3:]) == (0, b"{", b"\n}\n")
    assert b"blocks of" in done.stderr  # the table
    assert b"\nwrote " not in done.stderr


def test_a_page_may_go_to_stdout_by_its_name_as_a_device() -> None:
    done = shown(RECORD, "--quiet", "--html", "/dev/stdout")
    assert (done.returncode, done.stdout[:15], done.stderr) == (0, b"<!doctype html>", b"")


@pytest.mark.parametrize("name", ["/dev/stdout", "-"])
def test_a_log_that_stdout_appends_to_keeps_its_lines(tmp_path: Path, name: str) -> None:
    log = tmp_path / "ci.log"
    log.write_text("yesterday\n")
    inode = log.stat().st_ino
    with log.open("ab") as stream:
        done = shown(RECORD, "--json", name, stdout=stream)
    assert done.returncode == 0
    assert log.read_text().startswith("yesterday\n{\n")
    assert log.stat().st_ino == inode


def test_the_file_that_stdout_was_redirected_to_is_no_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("yesterday\n")
    with log.open("ab") as stream:
        done = shown(RECORD, "--json", log, stdout=stream)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"to which stdout was redirected" in done.stderr
    assert log.read_text() == "yesterday\n"


def test_a_descriptor_that_was_handed_over_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    done = shown(RECORD, "--quiet", "--json", f"/dev/fd/{writer}", pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert (done.returncode, stream.read(12)) == (0, b'{\n "schema":')


def test_names_that_are_no_utf_8_are_written_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[31m.json")
    shutil.copy(RECORD, tmp_path / name)
    done = shown(name, "--json", f"new-{name}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, rb"wrote new-caf\xe9\x1b[31m.json" + b"\n")
    assert (tmp_path / f"new-{name}").read_bytes()[:1] == b"{"
    done = shown(f"missing-{name}", cwd=tmp_path)
    assert (done.returncode, b"\x1b" in done.stderr) == (2, False)
