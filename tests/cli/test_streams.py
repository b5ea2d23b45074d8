"""Streams in any state: closed, full, broken, in another encoding; and terminals of any width."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "records" / "golden"
COMMAND = f"{sys.executable} -m uncollapse"
SHOW = f"{COMMAND} show {GOLDEN / 'ledger.json'}"


def sh(line: str, **env: str) -> tuple[int, bytes, bytes]:
    """What a shell's command line ends with: exit code of its first command, stdout, stderr."""
    done = subprocess.run(
        ["bash", "-c", line + "\nexit ${PIPESTATUS[0]}"],
        capture_output=True,
        env=os.environ | env,
        timeout=60,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("given", ["", "--quiet --json -", "--quiet --html /dev/stdout"])
def test_a_broken_pipe_ends_as_a_shell_reports_it_and_never_as_a_finding(given: str) -> None:
    assert sh(f"{SHOW} {given} | true") == (141, b"", b"")


@pytest.mark.parametrize("given", ["--help", "verify --help", "--version"])
def test_a_broken_pipe_of_the_help(given: str) -> None:
    code, _, err = sh(f"{COMMAND} {given} | true")
    assert (code, err) == (141, b"")


@pytest.mark.parametrize("stdout", [">&-", "> /dev/full"])
@pytest.mark.parametrize("command", [SHOW, f"{SHOW} --quiet --json -", f"{COMMAND} --help", f"{COMMAND} --version"])
def test_a_stdout_that_takes_nothing_is_one_line_and_2(stdout: str, command: str) -> None:
    code, _, err = sh(f"{command} {stdout}")
    assert (code, err.count(b"\n")) == (2, 1)
    assert err.startswith(b"uncollapse: stdout: expected a stream that takes")


def test_a_disk_that_fills_up_under_stdout_is_one_line_and_2(tmp_path: Path) -> None:
    code, _, err = sh(f"ulimit -f 1; {SHOW} --quiet --html /dev/stdout > {tmp_path}/o")
    assert (code, err.count(b"\n")) == (2, 1)
    assert b"File too large" in err


@pytest.mark.parametrize("stdout", [">&-", "> /dev/full"])
def test_a_stdout_that_is_not_needed_may_be_anything(stdout: str, tmp_path: Path) -> None:
    assert sh(f"{SHOW} --quiet --json {tmp_path}/r.json {stdout}") == (0, b"", b"")
    assert (tmp_path / "r.json").read_bytes()[:1] == b"{"


@pytest.mark.parametrize("stderr", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_a_stderr_that_takes_nothing_changes_no_result(stderr: str, tmp_path: Path) -> None:
    code, out, _ = sh(f"{SHOW} --json - {stderr}")
    assert (code, out[:1]) == (0, b"{")
    assert sh(f"{COMMAND} show {tmp_path}/missing {stderr}")[0] == 2
    assert sh(f"{COMMAND} --no-such-option {stderr}")[0] == 2


def test_a_closed_stdin_cannot_be_read() -> None:
    code, _, err = sh(f"{COMMAND} show - <&-")
    assert (code, err.count(b"\n")) == (2, 1)


def test_all_streams_closed_still_ends_with_its_code(tmp_path: Path) -> None:
    assert sh(f"{COMMAND} show {tmp_path}/missing <&- >&- 2>&-")[0] == 2
    assert sh(f"{SHOW} --quiet --json {tmp_path}/r.json <&- >&- 2>&-")[0] == 0
    assert (tmp_path / "r.json").read_bytes()[:1] == b"{"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("command", [SHOW, f"{COMMAND} --help", f"{COMMAND} diagnose --help"])
def test_any_encoding(encoding: str, command: str) -> None:
    code, out, err = sh(command, PYTHONIOENCODING=encoding, COLUMNS="60")
    assert (code, err) == (0, b"")
    text = out.decode(encoding)
    assert "�" not in text
    assert ("verdict" in text.lower()) or ("Usage" in text)


@pytest.mark.parametrize(
    ("record", "columns"),
    [(record, columns) for record in ("diagnosis", "ablation", "heads", "symmetries") for columns in ("0", "1", "20")]
    + [("ledger", columns) for columns in ("0", "2", "10", "-3", "many", "²", "99999999999999999999", "")],
)
def test_any_width(record: str, columns: str) -> None:
    code, out, err = sh(
        f"{COMMAND} show {GOLDEN / record}.json", COLUMNS=columns, TERMINAL_WIDTH=columns, LINES=columns
    )
    assert (code, err) == (0, b"")
    assert len(out) > 200


def test_a_dumb_terminal_and_no_home() -> None:
    code, out, err = sh(f"env -u HOME TERM=dumb {SHOW}")
    assert (code, err) == (0, b"")
    assert b"\x1b" not in out


@pytest.mark.parametrize("home", ["-u HOME", "HOME=/no/such/home", "HOME=relative", "HOME="])
def test_no_home_and_no_folder_for_temporary_files(home: str, tmp_path: Path) -> None:
    code, out, err = sh(f"env {home} TMPDIR=/proc XDG_CACHE_HOME=/proc {SHOW} --quiet --html {tmp_path}/page.html")
    assert (code, out, err) == (0, b"", b"")
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    "given",
    [
        *("no-such-command", "--no-such-option", "verify --trials", "verify --trials 0", "verify --trials 100001"),
        *("show", "show a b", "diagnose --seed -1", "diagnose --seed 4294967296", "diagnose --max-tokens 99999999999"),
        *("diagnose --level deep", "diagnose --text", "diagnose --max-parameters 0", "diagnose $'--a\\nb\\e[31m'"),
        "heads --level full",
    ],
)
def test_a_usage_error_is_one_line_and_2(given: str) -> None:
    code, out, err = sh(f"{COMMAND} {given}")
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"uncollapse: ")
    assert b"--help`." in err
    assert b"\x1b" not in err


def test_a_variable_that_would_ask_for_completions_changes_nothing() -> None:
    assert sh(f"{COMMAND} --version", _UNCOLLAPSE_COMPLETE="bash_source")[0] == 0
