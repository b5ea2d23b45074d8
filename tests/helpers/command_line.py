"""What the tests of the commands share: a result that stands in for one, and how a refusal must look."""

from __future__ import annotations

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
