"""The command line: what it passes on, where it writes, how it ends."""

from __future__ import annotations

import json
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
import typer
from rich.console import Console

from tests.helpers.command_line import drawn_on_a_terminal, refused
from uncollapse import __version__
from uncollapse.analyses.preparation import DEFAULTS
from uncollapse.bounds import PARAMETERS
from uncollapse.cli.commands import app, main
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.sources import load_model, tokenize

RECORD = {"schema": "uncollapse/diagnosis/1", "findings": [], "name": "naïve ☃"}
BERT = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=24
)


class Diagnosed:
    """What `diagnose` returns, as far as the command line looks at it."""

    def __init__(self, *severities: str) -> None:
        self.findings = [types.SimpleNamespace(severity=severity) for severity in severities]

    def show(self, console: Console) -> None:
        console.print("the table")

    def to_json(self, path: str | None = None) -> str:
        text = json.dumps(RECORD, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str) -> None:
        Path(path).write_text("<!doctype html>the page", encoding="utf-8")


class Diagnose:
    """Stands in for `uncollapse.analyses.diagnosis.diagnose`: remembers its calls, and does what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.act: Callable[..., Diagnosed] = lambda *_, **__: Diagnosed()

    def __call__(self, *arguments: Any, **options: Any) -> Diagnosed:
        self.calls.append((arguments, options))
        return self.act(*arguments, **options)


@pytest.fixture
def diagnose(monkeypatch: pytest.MonkeyPatch) -> Diagnose:
    module, stand_in = types.ModuleType("uncollapse.analyses.diagnosis"), Diagnose()
    module.diagnose = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "uncollapse.analyses.diagnosis", module)
    return stand_in


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capfd.readouterr()

    return command


# What is passed on


def test_everything_left_out_has_its_default(diagnose: Diagnose, run: Run) -> None:
    assert run("diagnose")[0] == 0
    assert diagnose.calls == [
        (
            ("demo", None),
            {
                "level": "core",
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
                "command": "uncollapse diagnose",
                "progress": None,  # nobody is watching a bar
            },
        )
    ]


def test_every_option_arrives(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("one\n\ntwo")
    (tmp_path / "c.txt").write_text("three")
    texts = ["--text", str(tmp_path / "a b.txt"), "--text", str(tmp_path / "c.txt")]
    given = """
        --level full --sequences 8 --max-tokens 32 --batch-size 4 --seed 7 --context-lengths 64,16
        --device cpu --dtype float64 --device-map auto --max-memory 3GiB --max-parameters 1000000000 --trust-remote-code
    """
    assert run("diagnose", "org/model", *texts, *given.split())[0] == 0
    ((positional, options),) = diagnose.calls
    assert positional == ("org/model", ["one", "two", "three"])
    assert options.pop("command").startswith(f"uncollapse diagnose org/model --text '{tmp_path}/a b.txt' --text ")
    assert options == {
        "level": "full",
        "context_lengths": [64, 16],
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
    "arguments",
    [
        ["--sequences", "0"],
        ["--max-tokens", "1"],
        ["--batch-size", "none"],
        ["--seed", "-1"],
        ["--level", "deep"],
        ["--fail-on", "fatal"],
        ["--no-such-option"],
        ["demo", "demo"],
    ],
)
def test_usage_errors_end_with_2(diagnose: Diagnose, run: Run, arguments: list[str]) -> None:
    code, out, err = run("diagnose", *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "--help" in err or "-h" in err
    assert not diagnose.calls


@pytest.mark.parametrize("lengths", ["64;128", "64,", "-8,16", "many"])
def test_context_lengths_that_are_no_numbers_end_with_2_in_one_line(diagnose: Diagnose, run: Run, lengths: str) -> None:
    code, out, err = run("diagnose", f"--context-lengths={lengths}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--context-lengths: expected numbers of tokens" in err
    assert not diagnose.calls


def test_unknown_command_ends_with_2(run: Run) -> None:
    assert run("diagnoze")[:2] == (2, "")


# What is shown and written


def test_table_goes_to_stdout_and_files_are_written(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    code, out, err = run("diagnose", "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert (code, out) == (0, "the table\n")
    assert err == f"wrote {tmp_path}/r.html\nwrote {tmp_path}/r.json\n"
    assert json.loads((tmp_path / "r.json").read_text("utf-8")) == RECORD
    assert (tmp_path / "r.html").read_text("utf-8") == "<!doctype html>the page"
    assert sorted(os.listdir(tmp_path)) == ["r.html", "r.json"]


def test_json_on_stdout_is_alone_there(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    def chatty(*_: Any, **__: Any) -> Diagnosed:
        print("a library has something to say")
        return Diagnosed("critical")

    diagnose.act = chatty
    code, out, err = run("diagnose", "--json", "-", "--html", tmp_path / "r.html", "--fail-on", "info")
    assert code == 1
    assert json.loads(out) == RECORD
    assert "☃" in out
    for line in ("a library has something to say", "the table", f"wrote {tmp_path}/r.html"):
        assert line in err.splitlines()


def test_quiet_prints_nothing(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    assert run("diagnose", "--quiet", "--html", tmp_path / "r.html") == (0, "", "")
    code, out, err = run("diagnose", "-q", "--json", "-")
    assert (code, json.loads(out), err) == (0, RECORD, "")


def test_json_is_utf_8_in_a_pipe_of_any_encoding() -> None:
    done = in_new_process("diagnose", "--json", "-", env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8")) == RECORD


@pytest.mark.parametrize(
    ("found", "fail_on", "code"),
    [
        ([], "info", 0),
        (["info"], "info", 1),
        (["info"], "warning", 0),
        (["info", "warning"], "warning", 1),
        (["warning"], "critical", 0),
        (["critical", "info"], "warning", 1),
        (["critical"], None, 0),
    ],
)
def test_exit_code_says_whether_a_finding_reaches_the_severity(
    diagnose: Diagnose, run: Run, tmp_path: Path, found: list[str], fail_on: str | None, code: int
) -> None:
    diagnose.act = lambda *_, **__: Diagnosed(*found)
    ended, out, _ = run("diagnose", "--json", tmp_path / "r.json", *(["--fail-on", fail_on] if fail_on else []))
    assert ended == code
    assert out == "the table\n"  # a finding is a result: it is shown and written all the same
    assert (tmp_path / "r.json").exists()


# Outputs that cannot be written


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("missing/folder/r.out", "No such file or directory"),
        ("folder", "not a file"),
        ("file/r.out", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/r.out", ""),
        ("/dev/full", "a device"),
        ("", "not a file"),
    ],
)
def test_unwritable_output_is_refused_before_the_work(
    diagnose: Diagnose, run: Run, tmp_path: Path, option: str, place: str, said: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    target = place and str(tmp_path / place)
    refused(run("diagnose", option, target), f"{option}: expected a file", repr(target), said)
    assert not diagnose.calls
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert Path("/dev/null").is_char_device()


def test_page_on_stdout_and_two_outputs_in_one_file_are_refused(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    refused(run("diagnose", "--html", "-"), "--html", "not a file")
    (tmp_path / "link").symlink_to(tmp_path)
    refused(run("diagnose", "--json", tmp_path / "r", "--html", tmp_path / "link" / "r"), "two files")
    assert not diagnose.calls
    assert os.listdir(tmp_path) == ["link"]


def test_existing_output_stays_until_there_is_a_new_one(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    old = tmp_path / "r.json"
    old.write_text("old")

    def fail(*_: Any, **__: Any) -> Diagnosed:
        raise InputError("diagnose: expected one thing, got another.")

    diagnose.act = fail
    refused(run("diagnose", "--json", old, "--html", tmp_path / "r.html"))
    assert old.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


# How it ends


def test_refusal_is_one_line_even_where_the_message_has_several(diagnose: Diagnose, run: Run) -> None:
    def fail(*_: Any, **__: Any) -> Diagnosed:
        raise UnsupportedModel("anatomy: expected blocks,\n  got none.", layout="Layout(\n...)")

    diagnose.act = fail
    code, out, err = run("diagnose", "--json", "-")
    assert (code, out, err) == (2, "", "uncollapse: anatomy: expected blocks, got none.\n")


def test_interrupt_is_one_line_and_130(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Diagnosed:
        raise KeyboardInterrupt

    diagnose.act = interrupted
    assert run("diagnose", "--json", tmp_path / "r.json") == (130, "", "uncollapse: interrupted\n")
    assert not os.listdir(tmp_path)


def test_bug_keeps_its_traceback(diagnose: Diagnose) -> None:
    def bug(*_: Any, **__: Any) -> Diagnosed:
        raise ZeroDivisionError("a bug")

    diagnose.act = bug
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["diagnose"])


def test_bug_ends_with_pythons_own_traceback() -> None:
    done = in_new_process("diagnose", "bug")
    assert done.returncode == 1
    assert b"Traceback (most recent call last)" in done.stderr
    assert b"ZeroDivisionError" in done.stderr
    assert "╭".encode() not in done.stderr  # no box around it, and so no values of local variables in it


# Every bad input ends in one line, with the real loader and tokenizer behind the command


def measure(model: str, texts: list[str] | None, **options: Any) -> Diagnosed:
    loaded = load_model(
        model, **{name: options[name] for name in ("device", "dtype", "device_map", "trust_remote_code")}
    )
    tokenize(
        texts or ["A quick brown fox."],
        loaded.tokenizer,
        max_tokens=options["max_tokens"],
        batch_size=options["batch_size"],
        tokenizer_problem=loaded.tokenizer_problem,
    )
    return Diagnosed()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "bert"
    transformers.BertModel(BERT).save_pretrained(folder)
    return folder


def test_good_input_goes_through(diagnose: Diagnose, run: Run, tmp_path: Path) -> None:
    diagnose.act = measure
    (tmp_path / "text.txt").write_text("A fox.\n\nA dog.")
    assert run("diagnose", "--text", tmp_path / "text.txt", "--device", "cpu") == (0, "the table\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such-model"], "no/such-model"),
        (["./no-such-folder"], "does not exist"),
        (["demo", "--dtype", "int3"], "int3"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--device-map", "gpu"], "gpu"),
        (["demo", "--device", "cpu", "--device-map", "auto"], "both"),
        (["demo", "--device", "cpu", "--max-tokens", "4096"], "up to 512"),
    ],
)
def test_bad_model_or_machine(diagnose: Diagnose, run: Run, arguments: list[str], said: str) -> None:
    diagnose.act = measure
    refused(run("diagnose", *arguments), said)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b" \n\n ", "no word"),
        (b"caf\xe9", "offset 3"),
        (b"A fox.\n\n\x01\x02", "text 2 of 2"),
        (None, "No such file"),
    ],
)
def test_bad_text(diagnose: Diagnose, run: Run, tmp_path: Path, data: bytes | None, said: str) -> None:
    diagnose.act = measure
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    refused(run("diagnose", "--device", "cpu", "--text", path), said)


def test_model_without_a_tokenizer(diagnose: Diagnose, run: Run, saved: Path) -> None:
    diagnose.act = measure
    refused(run("diagnose", saved, "--device", "cpu"), "no tokenizer files", "batches=")


def test_pickled_and_truncated_weights(diagnose: Diagnose, run: Run, saved: Path, tmp_path: Path) -> None:
    diagnose.act = measure
    folder = Path(shutil.copytree(saved, tmp_path / "bert"))
    os.truncate(folder / "model.safetensors", 900)
    refused(run("diagnose", folder, "--device", "cpu"), "cut short")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(run("diagnose", folder, "--device", "cpu"), "only pytorch_model.bin", "save_pretrained")


# Help, version, speed


def options_of(command: str) -> dict[str, Any]:
    """The parameters of a command by name, in the order of its help."""
    group = typer.main.get_command(app)
    return {p.name: p for p in group.commands[command].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["diagnose", "ablate", "heads", "symmetries"])
def test_the_shared_options_are_the_same_everywhere_with_the_defaults_of_python(command: str) -> None:
    names = [
        "text",
        "sequences",
        "max_tokens",
        "seed",
        "json",
        "html",
        "csv",
        "parquet",
        "quiet",
        "device",
        "dtype",
        "device_map",
        "max_memory",
        "batch_size",
        "max_parameters",
        "trust_remote_code",
    ]
    here, there = options_of(command), options_of("diagnose")
    assert next(iter(here)) == "model"
    assert list(here)[-len(names) :] == names
    for name in ("model", *names):
        assert here[name].opts == there[name].opts
        assert here[name].help == there[name].help
        assert here[name].default == DEFAULTS.get(name, there[name].default)
    assert ("fail_on" in here) == (command in {"diagnose", "heads"})


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"uncollapse {__version__}\n", "")


def test_help_teaches(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("diagnose", "--help")
    assert (code, err) == (0, "")
    for panel in ("What to measure", "On what text", "Output", "Machine", "Examples", "Exit codes"):
        assert panel in out
    options = "level fail-on text sequences max-tokens seed json html quiet device dtype device-map"
    for option in [*options.split(), "batch-size", "trust-remote-code"]:
        assert f"--{option} " in out
    assert "uncollapse diagnose --html report.html" in out
    assert "uncollapse[large]" in out  # square brackets are no markup


def test_bare_command_shows_its_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "diagnose" in out


STAND_IN = """
import json, sys, types
from uncollapse.cli.commands import main
def diagnose(model, texts, *, progress=None, **options):
    if model == "bug":
        1 / 0
    if progress is not None:
        for done in range(4):
            progress("blocks measured", done, 3)
    print("bars" if progress else "no bars")
    return types.SimpleNamespace(
        findings=[], show=lambda console: console.print("the table"), to_json=lambda path=None: RECORD + "\\n"
    )
RECORD = RECORD_HERE
sys.modules["uncollapse.analyses.diagnosis"] = types.SimpleNamespace(diagnose=diagnose)
main()
""".replace("RECORD_HERE", ascii(json.dumps(RECORD, ensure_ascii=False)))


def in_new_process(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", STAND_IN, *arguments],
        capture_output=True,
        env=os.environ | (env or {}),
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(("quiet", "bars"), [(False, True), (True, False)])
def test_bars_are_drawn_on_a_terminal_unless_quiet(quiet: bool, bars: bool) -> None:
    given = ["diagnose", "--json", "-", *(["--quiet"] if quiet else [])]
    code, out, drawn = drawn_on_a_terminal(["-c", STAND_IN, *given], {"TERM": "xterm"})
    assert code == 0
    assert json.loads(out.decode("utf-8")) == RECORD
    assert (b"blocks measured" in drawn) is bars
    assert (b"3/3" in drawn) is bars
    assert (b"no bars" in drawn) is not bars


@pytest.mark.parametrize("arguments", [["--help"], ["diagnose", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom uncollapse.cli.commands import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'altair', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_module_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uncollapse", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"uncollapse {__version__}\n")
