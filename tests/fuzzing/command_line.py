"""Command lines of any arguments, on streams in any state, each in a process of its own.

The analyses are stood in for by stored results: what is tried is the parsing, the outputs, the streams and the exit code; of a
sweep also which checkpoints it finds, its share of them, and its folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

import uncollapse as uc
from tests.fuzzing.checkpoints import saved
from tests.fuzzing.outcomes import COMPUTED, REFUSED
from tests.fuzzing.records import GOLDEN, damaged_record
from tests.helpers.sweep_samples import swept
from uncollapse import sources
from uncollapse.analyses import sweep
from uncollapse.analyses.sweep_folder import SweepFolder
from uncollapse.cli.commands import main

CRASHED, LATE = 70, 60  # an exit code that no command has; seconds
_COMMANDS = ("diagnose", "ablate", "heads", "symmetries", "verify", "show", "compare", "sweep")
_STREAMS = ("file", "file", "file", "file", "pipe", "closed", "full", "gone", "null", "read only")
_NUMBERS = ("0", "1", "-1", "16", "4294967296", "1e9", "²", "99999999999999999999", "", "0x10", "nan")
_WORDS = (
    "",
    "a",
    "--",
    "-",
    "mlp",
    "norm,residual",
    "3-6",
    "6-3",
    "all+outer",
    "critical",
    "full",
    "\x1b[31m",
    "‮",
    "caf\udce9",
    "x" * 300,
    "a\nb",
)


def command_line(seed: int) -> str:
    """One command in a process of its own: it ends with a code that it documents, says what is wrong in one line, and loses no
    file."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inputs = _inputs(folder, draw)
        arguments = _arguments(folder, draw)
        inputs = _named(inputs, arguments)
        streams = {1: draw.choice(_STREAMS), 2: draw.choice(_STREAMS)}
        before = {name: _digest(name) for name in inputs}
        code = _run(folder, arguments, streams, _environment(draw), draw.choice(["utf-8", "utf-8", "ascii", "latin-1"]))
        said = {number: _read(folder / f"stream{number}") for number in (1, 2)}
        _require_an_end(code, arguments, streams, said)
        changed = [str(name) for name in inputs if _digest(name) != before[name]]
        if changed:
            raise AssertionError(f"{arguments}: an input was written to: {changed}")
        for name in ("new.json", "new.html"):
            written = folder / name
            if (
                written.exists()
                and written.stat().st_size
                and not written.read_bytes().rstrip().endswith((b"}", b"</html>"))
            ):
                raise AssertionError(f"{arguments}: {name} is half-written")
        if list(folder.rglob(".uncollapse-*")):
            raise AssertionError(f"{arguments}: a temporary file is left")
    return REFUSED if code == 2 else COMPUTED


def _require_an_end(code: int, arguments: list[str], streams: dict[int, str], said: dict[int, bytes]) -> None:
    shown = f"{arguments} {streams}: exit {code}, {said[2][-400:]!r}"
    if code not in {0, 1, 2, 141}:
        raise AssertionError(shown)
    if code == 1 and not any(each.startswith("--fail-on") for each in arguments):
        raise AssertionError(f"the code of a finding: {shown}")
    if code == 141 and "gone" not in streams.values():
        raise AssertionError(f"the code of a broken pipe: {shown}")
    if b"Traceback" in said[2]:
        raise AssertionError(shown)
    if code == 2 and streams[2] == "file" and not (said[2].startswith(b"uncollapse: ") and said[2].count(b"\n") == 1):
        raise AssertionError(f"a refusal of other than one line: {shown}")
    if any(mark in said[2] for mark in (b"\x1b", "‮".encode())):
        raise AssertionError(f"a control character: {shown}")


def _inputs(folder: Path, draw: random.Random) -> list[Path]:
    (folder / "text.txt").write_text("the quick brown fox jumps\n\nover the lazy dog\n")
    (folder / "record.json").write_bytes(damaged_record(draw))
    (folder / "diagnosis.json").write_bytes((GOLDEN / "diagnosis.json").read_bytes())
    (folder / "link").symlink_to("text.txt")
    (folder / "circle").symlink_to("circle")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    shutil.copytree(saved("bert"), folder / "checkpoint")
    files = sorted((folder / "checkpoint").iterdir())
    return [folder / "text.txt", folder / "record.json", folder / "diagnosis.json", *files]


def _named(inputs: list[Path], arguments: list[str]) -> list[Path]:
    """Those of them that the arguments name, as themselves or with their checkpoint. Whatever else is there may be written anew."""
    pairs = zip(["", *arguments], arguments, strict=False)
    read = [each for before, each in pairs if not {before, each.split("=")[0]} & {"--json", "--html"}]
    given = {each.removeprefix("--text=") for each in read}
    named = {os.path.realpath(each) for each in given if "\0" not in each}
    return [file for file in inputs if {str(file.resolve()), str(file.parent.resolve())} & named]


def _arguments(folder: Path, draw: random.Random) -> list[str]:
    model = folder / "checkpoint"
    files = [
        str(folder / name) for name in ("text.txt", "record.json", "diagnosis.json", "link", "circle", "folder", "pipe")
    ]
    files += [
        str(folder / "new.json"),
        str(folder / "new.html"),
        str(folder / "no" / "such"),
        "-",
        "/dev/stdout",
        "/dev/null",
    ]
    files += [
        "/dev/full",
        "/dev/fd/1",
        "/dev/fd/9",
        "/proc/self/fd/2",
        str(model / "config.json"),
        str(model / "new.safetensors"),
    ]
    command = draw.choice(_COMMANDS)
    given = [command] if draw.random() < 0.97 else [draw.choice(_WORDS)]
    match command:
        case "show":
            given += [draw.choice(files[1:3])] if draw.random() < 0.8 else draw.choices(files, k=draw.randint(0, 2))
        case "compare":
            given += (
                [files[2], draw.choice(files[1:3])]
                if draw.random() < 0.8
                else draw.choices(files, k=draw.randint(0, 3))
            )
        case "verify":
            given += [draw.choice(["head-permutation", "rmsnorm-rank", "no-such-claim"]), "--trials", "1"]
        case "sweep":
            models = [str(model)] if draw.random() < 0.7 else [str(folder), "demo", *files, *_WORDS]
            given += draw.choices(models, k=draw.choice([0, 1, 1, 1, 2]))
            outs = ["out"] if draw.random() < 0.7 else [str(folder), "/proc", "/no/such", "out\0", *files, *_WORDS]
            given += ["--out", draw.choice(outs)] if draw.random() < 0.95 else []
            given += (
                ["--shard", draw.choice(["1/2", "2/2", "2/1", "0/0", "1/", *_NUMBERS])] if draw.random() < 0.3 else []
            )
            given += ["--retry"] if draw.random() < 0.2 else []
        case _:
            given += [draw.choice([str(model), str(model), "demo", *_WORDS])]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        option = draw.choice(
            ["--json", "--html", "--text", "--quiet", "--fail-on", "--seed", "--max-tokens", "--batch-size"]
        )
        option = draw.choice(
            [option, option, "--without", "--blocks", "--level", "--context-lengths", "--device", "--dtype", "--no"]
        )
        if option in {"--json", "--html", "--text"}:
            value = draw.choice(files)
        else:
            value = draw.choice([*_NUMBERS, *_WORDS, "cpu", "float64", "info"])
        given += [option] if option == "--quiet" else [option, value] if draw.random() < 0.95 else [f"{option}={value}"]
    return given


def _environment(draw: random.Random) -> dict[str, str | None]:
    return {
        "COLUMNS": draw.choice([None, "0", "1", "20", "-3", "many", "99999999999999999999", ""]),
        "TERM": draw.choice([None, "dumb", "xterm", ""]),
        "HOME": draw.choice([None, "/no/such/home", "relative", os.environ.get("HOME")]),
        "TMPDIR": draw.choice([None, "/proc", "/no/such"]),
        "FORCE_COLOR": draw.choice([None, None, "1"]),
    }


def _run(
    folder: Path, arguments: list[str], streams: dict[int, str], environment: dict[str, str | None], encoding: str
) -> int:
    results = _results()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads; these hold no lock
        child = os.fork()
    if child == 0:
        code = CRASHED
        try:
            signal.alarm(LATE)
            os.chdir(folder)
            _stand_in(results)
            for name, value in environment.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
            _open_streams(folder, streams, encoding)
            code = _ended(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _ended(arguments: list[str]) -> int:
    """What Python would end with."""
    try:
        main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else CRASHED
    except BaseException:
        traceback.print_exc()
        return CRASHED
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return 120
    return code


def _open_streams(folder: Path, streams: dict[int, str], encoding: str) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        match streams[number]:
            case "file":
                found = os.open(folder / f"stream{number}", os.O_WRONLY | os.O_CREAT)
            case "read only":
                found = os.open(os.devnull, os.O_RDONLY)
            case "full":
                found = os.open("/dev/full", os.O_WRONLY)
            case "pipe" | "gone" as kind:
                reader, found = os.pipe()
                if kind == "gone":
                    os.close(reader)
            case _:
                found = os.open(os.devnull, os.O_WRONLY)
        os.dup2(found, number)
        os.close(found)
    for number in (1, 2):  # at last: what is opened takes the lowest number that is free
        if streams[number] == "closed":
            os.close(number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the process ends with it
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = None
        if streams[number] != "closed":
            stream = io.TextIOWrapper(
                open(number, "wb", closefd=False),  # noqa: SIM115
                encoding=encoding,
                errors="strict",
                line_buffering=number == 2,
            )
        setattr(sys, name, stream)


def _stand_in(results: dict[str, Any]) -> None:
    for module, (function, result) in results.items():
        stand_in = types.ModuleType(f"uncollapse.analyses.{module}")
        setattr(stand_in, function, lambda *_, result=result, **__: result)
        sys.modules[stand_in.__name__] = stand_in
    sys.modules[sweep.__name__] = types.ModuleType(sweep.__name__)
    vars(sys.modules[sweep.__name__])["sweep"] = _swept


def _swept(models: list[str], *_: Any, out: str, shard: tuple[int, int] | None, **__: Any) -> Any:
    sweep._share(sources.series(models), shard)
    SweepFolder(out)
    return sweep.Sweep(swept())


@functools.cache
def _results() -> dict[str, Any]:
    functions = {"diagnosis": "diagnose", "ablation": "ablate", "heads": "identify", "symmetries": "symmetries"}
    return {name: (function, uc.load(GOLDEN / f"{name}.json")) for name, function in functions.items()}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"
