"""What the tests of the commands share: a result that stands in for one, how a refusal must look, and a terminal to draw on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


class Ablated:
    """What `ablate` returns, as far as the command line looks at it."""

    def show(self, console: Console) -> None:
        console.print("the runs")

    def to_json(self, path: str | None = None) -> str:
        if path is not None:
            Path(path).write_text("{}\n")
        return "{}\n"

    def to_html(self, path: str) -> None:
        Path(path).write_text("<!doctype html>")


def refused(outcome: tuple[int, str, str], *said: str) -> None:
    """Exit code 2, nothing on stdout, and exactly one line that says what is wrong."""
    code, out, err = outcome
    assert (code, out) == (2, "")
    assert err.startswith("uncollapse: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert all(part in err for part in said), err


def drawn_on_a_terminal(arguments: Sequence[str], env: dict[str, str]) -> tuple[int, bytes, bytes]:
    """Run Python with stderr on a terminal: (exit code, stdout, what was drawn).

    The terminal is read while the process runs. It holds a few thousand bytes, and a process on a busy machine, which draws its
    bar for longer, would otherwise wait for a reader who waits for the process.
    """
    terminal, stderr = pty.openpty()
    drawn = bytearray()

    def read() -> None:
        while True:
            try:
                drawn.extend(os.read(terminal, 65536))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | env,
            check=False,
            timeout=60,
        )
    finally:
        os.close(stderr)
        reader.join(10)
        os.close(terminal)
    return done.returncode, done.stdout, bytes(drawn)
