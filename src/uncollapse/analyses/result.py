"""What a result can do: show itself in a terminal or a notebook, and write itself as a page or as JSON.

`Diagnosis`, `Ablation` and the others build on it, each with short names for the parts of its record.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from uncollapse import report
from uncollapse.errors import InputError
from uncollapse.records.encoding import to_json, write_atomically, write_record
from uncollapse.records.stored import AnyRecord

if TYPE_CHECKING:
    from rich.console import Console

NOTEBOOK = 100  # characters of a line in a notebook
Held = TypeVar("Held", bound=AnyRecord, covariant=True)


@dataclass(frozen=True, repr=False)
class Recorded(Generic[Held]):
    """A result. `record` has all of it, as data. Where several processes measured together each has it, and only the one that
    `is_first` shows and writes it."""

    record: Held
    is_first: bool = field(default=True, repr=False, compare=False)

    def show(self, console: Console | None = None) -> None:
        """Print it. In a notebook the object also shows its page when it is evaluated."""
        if not self.is_first:
            return
        from rich.console import Console

        if console is None:
            console = Console()
            if console.is_jupyter:  # where rich would make an output of its own of every line
                console = Console(force_jupyter=False, force_terminal=False, color_system=None, width=NOTEBOOK)
        with _held_together("show"):
            report.show(self.record, console)

    def to_html(self, path: str | Path) -> None:
        """Write the page: one file, no network. Raises `InputError` where the path cannot be written."""
        if not self.is_first:
            return
        with _held_together("to_html"):
            page = report.draw(self.record)
        write_atomically(path, page)

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON; also written to `path` if given, gzipped where it ends in `.gz`."""
        text = to_json(self.record)
        if path is not None and self.is_first:
            write_record(path, text)
        return text

    def __repr__(self) -> str:
        """One line. A record of a large model is megabytes long, and a notebook would keep them beside the page."""
        return f"{type(self).__name__}({report.title(self.record)}; show() prints it, to_html(path) writes its page)"

    def _repr_html_(self) -> str:
        """The page, in a frame of its own: its style and scripts reach nothing of the notebook, and nothing reaches them."""
        with _held_together("_repr_html_"):
            page = html.escape(report.draw(self.record), quote=True)
        frame = "width:100%;height:800px;border:0"
        return f'<iframe srcdoc="{page}" style="{frame}" loading="lazy" title="uncollapse report"></iframe>'


@contextlib.contextmanager
def _held_together(function: str) -> Iterator[None]:
    """A record may fit its schema and still name a run or a block that it does not hold: somebody has edited it."""
    try:
        yield
    except LookupError as error:
        raise InputError(
            f"{function}: expected a record whose parts belong together, got one that names {error} and does not hold it. It may "
            "have been edited. Write the record again."
        ) from error
