"""Where results go, how a refusal is worded in one line, and the exit codes."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from uncollapse.errors import InputError, UncollapseError
from uncollapse.records.common import SEVERITIES, Finding, Severity

if TYPE_CHECKING:
    from uncollapse.analyses.result import Recorded


FOUND, REFUSED, INTERRUPTED = 1, 2, 130
STDOUT = "-"


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """What the user can mend ends in one line and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except UncollapseError as error:
        typer.echo(f"uncollapse: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(REFUSED) from None
    except KeyboardInterrupt:
        typer.echo("uncollapse: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def require_writable(*, json: str | None, html: str | None) -> None:
    """Refuse an output that cannot be written before the model is loaded, by trying what the writer will do."""
    targets = {"--json": None if json == STDOUT else json, "--html": html}
    for option, name in targets.items():
        if name is None:
            continue
        target = Path(name)
        try:
            if name == STDOUT or target.is_dir():
                raise OSError("that is no file")
            if target.exists() and not target.is_file():
                raise OSError("that is a device or a pipe, and would be replaced by a file")
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}."):
                pass
        except OSError as error:
            raise InputError(
                f"{option}: expected a file that can be written, got {name!r} ({error.strerror or error}). "
                "The folder may be missing or read-only. Name another file."
            ) from None
    if json and html and Path(json).resolve() == Path(html).resolve():
        raise InputError(
            f"--json, --html: expected two files, got {json!r} for both. One would overwrite the other. Name another."
        )


@contextlib.contextmanager
def progress_on_stderr(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function (what, done, total) that draws bars on a terminal, or None where nobody is watching one."""
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


def deliver(result: "Recorded[Any]", *, json: str | None, html: str | None, quiet: bool) -> None:
    """Write the page and the record, and show the table on whichever stream is free of JSON."""
    from rich.console import Console

    if html is not None:
        result.to_html(html)
    if json is not None and json != STDOUT:
        result.to_json(json)
    if not quiet:
        result.show(Console(stderr=json == STDOUT))
        for name in (html, json):
            if name is not None and name != STDOUT:
                typer.echo(f"wrote {name}", err=True)
    if json == STDOUT:
        # As bytes, because JSON is UTF-8 whatever encoding the terminal or pipe was set to.
        typer.echo(result.to_json().encode(), nl=False)


def reaches(findings: Sequence[Finding], fail_on: Severity) -> bool:
    """Whether a finding is at least as severe as `--fail-on`. Severities stand in rising order."""
    return any(SEVERITIES.index(finding.severity) >= SEVERITIES.index(fail_on) for finding in findings)
