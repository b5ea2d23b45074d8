"""Where results go, how a refusal becomes one line, and the exit codes."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from uncollapse.cli import launched, streams
from uncollapse.errors import InputError, UncollapseError
from uncollapse.files import reading, writing
from uncollapse.legible import legible
from uncollapse.records.common import SEVERITIES, Finding, Severity

if TYPE_CHECKING:
    from uncollapse.analyses.result import Recorded


FOUND, REFUSED, INTERRUPTED = 1, 2, 130
STDIN = STDOUT = "-"


def say(line: str) -> None:
    """One line on stderr."""
    print(legible(line), file=sys.stderr)


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Errors that the user can fix end in one line and exit code 2. Anything else is a bug and keeps its traceback."""
    try:
        yield
    except UncollapseError as error:
        if launched.speaks():
            say(f"uncollapse: {' '.join(str(error).split())}")
        raise typer.Exit(REFUSED) from None
    except KeyboardInterrupt:
        if launched.speaks():
            say("uncollapse: interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except launched.Stopped:
        if launched.speaks():
            say(launched.ENDED)
        raise typer.Exit(REFUSED) from None


@dataclass(frozen=True)
class Reads:
    """What a command reads: files by the argument that names them, and models by their names."""

    files: Sequence[tuple[str, str]] = ()
    models: Sequence[str] = ()


@dataclass(frozen=True)
class Outputs:
    """Where a result goes: files for the record and the page, folders for its tables."""

    json: str | None = None
    html: str | None = None
    csv: str | None = None
    parquet: str | None = None


def require_writable(outputs: Outputs, *, quiet: bool = False, reads: Reads | None = None) -> None:
    """Before the model is loaded, refuse outputs that cannot be written, or that would overwrite what is read, one another, or
    what stdout and stderr were redirected to. Tries what the writer will do later.
    """
    places: dict[str, writing.Destination] = {}
    for option, name in {"--json": outputs.json, "--html": outputs.html}.items():
        if name is None:
            continue
        try:
            if name == STDOUT and option == "--html":
                raise OSError("that is not a file")
            place = writing.stream(1) if name == STDOUT else writing.destination(name)
            writing.try_out(place)
        except OSError as error:
            if name == STDOUT and option == "--json":
                raise streams.stdout_refused(error, "the record") from None
            raise InputError(
                f"{option}: expected a file that can be written, got {name!r} ({error.strerror or error}). "
                f"{_LIKELY.get(error.errno or 0, 'The result would be lost there.')} Name another file."
            ) from None
        _require_not_read(option, name, place, reads or Reads())
        if place.descriptor is None:
            _require_not_a_stream(option, name, place)
        places[option] = place
    if len(places) == 2 and places["--json"].is_same_as(places["--html"]):
        raise InputError(
            f"--json, --html: expected two files, got {outputs.json!r} and {outputs.html!r}, which are the same. One would "
            "overwrite the other. Name another."
        )
    for option, folder in {"--csv": outputs.csv, "--parquet": outputs.parquet}.items():
        if folder is not None:
            _require_folder(option, folder, [*places.values()], reads or Reads())
    if not quiet and not any(place.descriptor == 1 for place in places.values()):
        streams.require_stdout("the table")


def _require_folder(option: str, name: str, places: Sequence[writing.Destination], reads: Reads) -> None:
    """Refuse a folder for tables that cannot be written, or where one of them may replace what is read or written otherwise."""
    if option == "--parquet":
        from uncollapse.records.frames import require_parquet

        require_parquet(option)
    ending = option.replace("--", ".")
    try:
        folder = os.path.realpath(name)
        above = folder if os.path.lexists(folder) else os.path.dirname(folder)
        writing.try_out(writing.destination(os.path.join(above, f"{secrets.token_hex(8)}{ending}")))
        for file in glob.glob(os.path.join(glob.escape(folder), f"*{ending}")):
            writing.try_out(writing.destination(file))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{option}: expected a folder that can be written, got {name!r} ({getattr(error, 'strerror', None) or error}). "
            "It may be a file, or the folder above it missing or read-only. Name another folder."
        ) from None
    read = [file for _, file in reads.files if file != STDIN]
    for taken in [*read, *(place.path for place in places if place.path is not None)]:
        real = os.path.realpath(taken)
        if os.path.dirname(real) == folder and real.endswith(ending):
            raise InputError(
                f"{option}: expected a folder of its own, got {name!r}, where {os.path.basename(taken)!r} is read or written too. "
                "A table might replace it. Name another folder."
            )


_LIKELY = dict.fromkeys(
    (errno.ENOENT, errno.EACCES, errno.EROFS, errno.EPERM), "The folder may be missing or read-only."
)


def _require_not_a_stream(option: str, name: str, place: writing.Destination) -> None:
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        with contextlib.suppress(OSError):
            there = writing.stream(descriptor)
            if there.is_file and place.is_same_as(there):
                raise InputError(
                    f"{option}: expected a file of its own, got {name!r}, to which {stream} was redirected. What stands there "
                    "would be lost. Name another file, or /dev/stdout to write in line."
                )


def _require_not_read(option: str, name: str, place: writing.Destination, reads: Reads) -> None:
    if not place.is_file:
        return
    for argument, file in reads.files:
        if place.existing is not None and _is_same(file, place.existing):
            raise InputError(
                f"{option}: expected a file that is not read, got {name!r}, which {argument} names, too. "
                "It would be overwritten. Name another file."
            )
    for model in reads.models:
        if _is_of_model(place, model):
            raise InputError(
                f"{option}: expected a file that is not read, got {name!r}, which belongs to the model {model!r}. "
                "The checkpoint would be damaged. Name a file in another folder."
            )


def _is_same(file: str, existing: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(0) if file == STDIN else os.stat(file), existing)
    except (OSError, ValueError):  # what cannot be found cannot be read either, which its reader says
        return False


# What a checkpoint may hold. A new file of such a name beside the weights would be read with them the next time.
_OF_A_CHECKPOINT = (
    "*config*.json",
    "*tokenizer*",
    "*.index.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "adapter_*",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
)
# How a record and a page of this program begin. They may lie in the folder of their model, and be written again.
_OWN = (b'{\n "schema": "uncollapse/', b"<!doctype html>")


def _is_of_model(place: writing.Destination, model: str) -> bool:
    folder = _checkpoint(model)
    if folder is None:
        return False
    real = os.path.realpath(folder)
    inside = place.path is not None and os.path.commonpath([real, place.path]) == real
    if place.existing is None:
        assert place.path is not None
        return inside and any(fnmatch.fnmatch(os.path.basename(place.path).lower(), each) for each in _OF_A_CHECKPOINT)
    for above, _, files in os.walk(folder):
        for file in files:
            if _is_same(os.path.join(above, file), place.existing):
                return not (inside and _is_own(place))
    return False


def _is_own(place: writing.Destination) -> bool:
    if place.path is None:
        return False
    with contextlib.suppress(OSError), open(place.path, "rb") as stream:
        head = stream.read(4096)
        if head.startswith(reading.GZIP):
            head = next(reading.unpacked([head], at_most=reading.PIECE), b"")
        return head.startswith(_OWN)
    return False


def _checkpoint(model: str) -> str | None:
    """The folder that a model is read from, None where there is none yet."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return path
    from uncollapse.sources import checkpoint_folder  # the packaged model, and those of the hub: known further down

    return checkpoint_folder(model)


@contextlib.contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function (what, done, total) that draws progress bars, or None if stderr is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        start = bars.add_task("starting", total=None)  # importing torch and transformers alone takes seconds
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            bars.update(start, visible=False)
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def deliver(result: "Recorded[Any]", outputs: Outputs, *, quiet: bool) -> None:
    """Write the tables, the page and the record, and show the table on the stream that carries neither of the last two."""
    from rich.console import Console

    json, html = outputs.json, outputs.html
    if outputs.csv is not None:
        result.to_csv(outputs.csv)
    if outputs.parquet is not None:
        result.to_parquet(outputs.parquet)
    in_line = [name for name in (json, html) if name is not None and _is_stdout(name)]
    if html is not None and html not in in_line:
        result.to_html(html)
    if json is not None and json not in in_line:
        result.to_json(json)
    try:
        if not quiet:
            result.show(Console(stderr=bool(in_line)))
            sys.stdout.flush()
            for name in (html, json):
                if name is not None and _is_written_alone(name):
                    say(f"wrote {name}")
            for folder in (outputs.csv, outputs.parquet):
                if folder is not None:
                    say(f"wrote tables into {folder}")
        if html in in_line:
            result.to_html(html)
        if json is not None and json in in_line:
            # As bytes, because JSON is UTF-8 whatever encoding the terminal or pipe was set to.
            typer.echo(result.to_json().encode(), nl=False)
            sys.stdout.flush()
    except OSError as error:
        if not streams.is_refused_write(error):
            raise
        streams.let_go_of_stdout()
        raise streams.stdout_refused(error) from None


def _is_stdout(name: str) -> bool:
    with contextlib.suppress(OSError):
        return name == STDOUT or writing.destination(name).descriptor == 1
    return False


def _is_written_alone(name: str) -> bool:
    """Whether a line about it on stderr is news, and no part of the output itself."""
    with contextlib.suppress(OSError):
        return name != STDOUT and writing.destination(name).is_file and writing.destination(name).descriptor is None
    return False


def reaches(findings: Sequence[Finding], fail_on: Severity) -> bool:
    """Whether a finding is at least as severe as `--fail-on`. `SEVERITIES` is in rising order."""
    return any(SEVERITIES.index(finding.severity) >= SEVERITIES.index(fail_on) for finding in findings)
