"""What a result can do: show itself in a terminal or a notebook, and write itself as a page, as JSON or as tables.

`Diagnosis`, `Ablation` and the others build on it, each with short names for the parts of its record.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from uncollapse import report
from uncollapse.errors import InputError
from uncollapse.records import frames
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

    def frame(self, table: str, *, backend: str | None = None) -> Any:
        """One table of the record as a data frame: `"attention"`, `"findings"` or any other of `tables`.

        A figure's mean is in the column of its name, with `_min`, `_max` and `_n` beside it. backend: `"pandas"`, `"polars"` or
        `"pyarrow"`; by default the first of them that is installed. Raises `InputError` where none is, and for another table.
        """
        return frames.table_of(self.record, table).frame(backend)

    def to_frame(self, backend: str | None = None) -> Any:
        """The record's main table as a data frame: of a diagnosis the trajectory. See `frame`."""
        return frames.main_table(self.record).frame(backend)

    @property
    def tables(self) -> list[str]:
        """The names that `frame` takes."""
        return list(frames.tables(self.record))

    def to_csv(self, folder: str | Path) -> None:
        """Write every table as `<folder>/<table>.csv`, in UTF-8. A folder that is not there is made. An empty field is a figure
        that was not measured. Raises `InputError` where a file cannot be written; every file is whole or not there."""
        if not self.is_first:
            return
        self._write_tables(folder, {name: table.csv() for name, table in frames.tables(self.record).items()}, "csv")

    def to_parquet(self, folder: str | Path) -> None:
        """Write every table as `<folder>/<table>.parquet`. Needs pyarrow; otherwise like `to_csv`."""
        if not self.is_first:
            return
        frames.require_parquet("to_parquet")
        files = {name: table.parquet() for name, table in frames.tables(self.record).items()}
        self._write_tables(folder, files, "parquet")

    def _write_tables(self, folder: str | Path, files: Mapping[str, str | bytes], ending: str) -> None:
        try:
            Path(folder).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"to_{ending}: expected a folder that can be written, got {str(folder)!r} ({error.strerror or error}). "
                "The folder above it may be missing or read-only. Name another one."
            ) from None
        for name, content in files.items():
            write_atomically(Path(folder) / f"{name}.{ending}", content)

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
