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
from uncollapse.records.encoding import to_json, write_atomically
from uncollapse.records.stored import AnyRecord

if TYPE_CHECKING:
    from rich.console import Console

Held = TypeVar("Held", bound=AnyRecord, covariant=True)


@dataclass(frozen=True)
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

        with _held_together("show"):
            report.show(self.record, console or Console())

    def to_html(self, path: str | Path) -> None:
        """Write the page: one file, no network. Raises `InputError` where the path cannot be written."""
        if not self.is_first:
            return
        with _held_together("to_html"):
            page = report.draw(self.record)
        write_atomically(path, page)

    def to_json(self, path: str | Path | None = None) -> str:
        """The record as JSON; also written to `path` if given."""
        text = to_json(self.record)
        if path is not None and self.is_first:
            write_atomically(path, text)
        return text

    def _repr_html_(self) -> str:
        page = html.escape(report.draw(self.record), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:800px;border:0" title="uncollapse report"></iframe>'


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
