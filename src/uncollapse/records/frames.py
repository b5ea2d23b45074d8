"""Records as tables: one row per record, one column per figure. As columns for a CSV file, as a data frame of pandas, polars or
pyarrow, or as a Parquet file.

A record holds lists of records, and each such list is a table under the name of its field: `attention`, `heads`, `findings`. A list
inside a row is a table of its own, and carries what tells that row from the others (`OUTER`). So are records by name, such as the
figures of a sweep's checkpoint. A table has the same columns and the same types whatever was measured, so that the tables of many
runs can be put together.

None of the three libraries is needed to install this package, and which one is there decides what comes out. Narwhals, which the
charts bring along, makes it.

When not to use it: to store a record. A table leaves out the reasons why something was not measured; the JSON has them.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import importlib.util
import io
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin

from uncollapse.errors import InputError
from uncollapse.records.ablation import AblationRun
from uncollapse.records.comparison import Further
from uncollapse.records.diagnosis import SiteRecord
from uncollapse.records.ledger import ClaimResult
from uncollapse.records.sweep import SweptCheckpoint, SweptFigure, SweptRun
from uncollapse.records.symmetries import SymmetryRecord
from uncollapse.records.trail import Alarm, HeadPlace, SitePlace, TrailRecord

Backend = Literal["pandas", "polars", "pyarrow"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Cell = type[float] | type[int] | type[bool] | type[str]
# What tells a row from the others of its table: by column in the tables of the lists inside it, the row's own column.
OUTER: Final[Mapping[type[Any], Mapping[str, str]]] = {
    AblationRun: {"without": "without"},
    ClaimResult: {"id": "id"},
    Further: {"after": "name"},
    SiteRecord: {"site": "site"},
    SweptCheckpoint: {"checkpoint": "name"},
    SweptRun: {"run": "name"},
    SymmetryRecord: {"phenomenon": "phenomenon"},
}
# The column of the names, where records stand under names.
NAMED: Final[Mapping[type[Any], str]] = {SweptFigure: "measure"}
# The table that `to_frame` gives; of a record with none of these names its first one.
MAIN: Final = ("trajectory", "effects", "tests", "sites", "claims", "checkpoints")


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and the type of each; a cell is of that type or None."""

    columns: dict[str, list[Any]]
    types: dict[str, Cell]

    def csv(self) -> str:
        """As CSV with a line of names (RFC 4180); an empty field is a figure that was not measured."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows(zip(*self.columns.values(), strict=True))
        return text.getvalue()

    def parquet(self) -> bytes:
        """As a Parquet file. Raises `InputError` where pyarrow is not installed."""
        require_parquet("Table.parquet")
        import pyarrow
        import pyarrow.parquet

        into = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(self.frame("pyarrow"), into)
        return into.getvalue().to_pybytes()

    def frame(self, backend: str | None = None) -> Any:
        """As a data frame. Raises `InputError` where none of the libraries, or not the given one, is installed."""
        chosen = _backend(backend)
        import narwhals

        of: dict[Any, Any] = {
            float: narwhals.Float64,
            int: narwhals.Int64,
            bool: narwhals.Boolean,
            str: narwhals.String,
        }
        schema: dict[str, Any] = {name: of[kind] for name, kind in self.types.items()}
        if chosen == "pandas":  # its integers and booleans have no missing ones: they become numbers and objects
            for name, kind in self.types.items():
                if None in self.columns[name] and kind in (int, bool):
                    schema[name] = narwhals.Float64 if kind is int else narwhals.Object
        return narwhals.from_dict(self.columns, schema=schema, backend=chosen).to_native()


def require_parquet(function: str) -> None:
    """Raises `InputError` in the name of `function` where pyarrow, which writes Parquet files, is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            f"{function}: expected pyarrow to be installed, got none. Parquet files are written by it. Install pyarrow, or "
            "write CSV files."
        )


def frame(records: Sequence[Any], kind: type[Any], *, backend: str | None = None) -> Any:
    """A data frame of records, all of the dataclass `kind`.

    A figure that is itself a record (`Statistic`, `Estimate`) has its mean in a column of its own name, and each further field in
    `name_field`. Lists are written as text, reasons (`unavailable`) are left out. backend: `"pandas"`, `"polars"` or
    `"pyarrow"`; by default the first of them that is installed. Raises `InputError` where it is not.
    """
    return table(records, kind).frame(backend)


def columns(records: Sequence[Any], kind: type[Any]) -> dict[str, list[Any]]:
    """The columns of `frame`, as lists."""
    return table(records, kind).columns


def table(records: Sequence[Any], kind: type[Any], *, outer: Mapping[str, Sequence[str | None]] | None = None) -> Table:
    """The table of `frame`. `outer`: further columns of text before the others."""
    before = {name: list(values) for name, values in (outer or {}).items()}
    found = {name: (cell, path) for name, (cell, path) in _cells(kind).items() if name not in before}
    values = {name: [_at(record, path) for record in records] for name, (_, path) in found.items()}
    kinds: dict[str, Cell] = dict.fromkeys(before, str)
    kinds |= {name: cell for name, (cell, _) in found.items()}
    cells = {name: [_cell(v, kinds[name]) for v in column] for name, column in values.items()}
    return Table(before | cells, kinds)


def tables(record: Any) -> dict[str, Table]:
    """Every table of a record, by name."""
    if isinstance(record, TrailRecord):
        return _trail_tables(record)
    found: dict[str, Table] = {}
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        kind = _record_in_list(hints[field.name])
        if kind is not None:
            _collect(found, field.name, getattr(record, field.name), kind, {})
    return found


def table_of(record: Any, name: str) -> Table:
    """One table of a record. Raises `InputError` where the record has none of that name."""
    found = tables(record)
    if name not in found:
        close = difflib.get_close_matches(name, found, 1)
        hint = f"The nearest is {close[0]!r}" if close else "None of its tables is spelt like that"
        raise InputError(f"frame: expected one of {', '.join(found)}, got {name!r}. {hint}. Pass one of them.")
    return found[name]


def main_table(record: Any) -> Table:
    """The table that says most about a record."""
    found = tables(record)
    return found[next((name for name in MAIN if name in found), next(iter(found)))]


def _collect(
    found: dict[str, Table], name: str, rows: Sequence[Any], kind: type[Any], outer: Mapping[str, Sequence[str | None]]
) -> None:
    """The table of these rows, and behind it those of the lists inside them."""
    found[name] = made = table(rows, kind, outer=outer)
    hints = typing.get_type_hints(kind)
    keys = {**{key: key for key in outer}, **OUTER.get(kind, {})}
    for field in dataclasses.fields(kind):
        inner = _record_in_list(hints[field.name]) or _record_by_name(hints[field.name])
        if inner is None:
            continue
        lengths = [len(getattr(row, field.name) or ()) for row in rows]
        repeated = {
            key: [str(made.columns[own][i]) for i, many in enumerate(lengths) for _ in range(many)]
            for key, own in keys.items()
        }
        inside = [one for row in rows for one in getattr(row, field.name) or ()]
        if inner in NAMED:
            repeated[NAMED[inner]] = inside
            inside = [one for row in rows for one in getattr(row, field.name).values()]
        _collect(found, field.name if field.name not in found else f"{name}_{field.name}", inside, inner, repeated)


# Columns ------------------------------------------------------------------------------------------------------------


def _cells(kind: type[Any]) -> dict[str, tuple[Cell, tuple[str, ...]]]:
    """By column the type of its cells, and the fields on the way to it."""
    hints = typing.get_type_hints(kind)
    found: dict[str, tuple[Cell, tuple[str, ...]]] = {}
    for field in dataclasses.fields(kind):
        hint = _given(hints[field.name])
        if field.name == "unavailable" or _record_in_list(hint) is not None or _record_by_name(hint) is not None:
            continue
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            for name, (cell, path) in _cells(hint).items():
                # The mean of a figure bears the figure's own name.
                whole = field.name if name == "mean" else f"{field.name}_{name}"
                found[whole] = cell, (field.name, *path)
        else:
            found[field.name] = _cell_type(hint), (field.name,)
    return found


def _given(hint: Any) -> Any:
    """The type without `None`."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        left = [each for each in get_args(hint) if each is not type(None)]
        return left[0] if len(left) == 1 else tuple(left)
    return hint


def _cell_type(hint: Any) -> Cell:
    if get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])
    return hint if hint in (float, int, bool) else str


def _record_in_list(hint: Any) -> type[Any] | None:
    """The kind of records that a field is a list of, if it is one. A list of figures is none: they belong to places, in order."""
    hint = _given(hint)
    if get_origin(hint) is not list:
        return None
    inner = get_args(hint)[0]
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _record_by_name(hint: Any) -> type[Any] | None:
    """The kind of records that a field has under names, if it has such."""
    inner = get_args(hint)[1] if get_origin(hint) is dict else None
    return inner if inner in NAMED else None


def _at(record: Any, path: Sequence[str]) -> Any:
    for name in path:
        record = None if record is None else getattr(record, name)
    return record


def _cell(value: Any, cell: Cell) -> Any:
    if value is None:
        return None
    if cell is float:
        return float(value)
    return _text(value) if cell is str else value


def _text(value: Any) -> str:
    if isinstance(value, list) and not any(
        isinstance(each, list | dict) or dataclasses.is_dataclass(each) for each in value
    ):
        return ", ".join("" if each is None else str(each) for each in value)
    if isinstance(value, list | dict):
        return json.dumps(value, default=dataclasses.asdict, ensure_ascii=False)
    return str(value)


# A trail ------------------------------------------------------------------------------------------------------------


def _trail_tables(record: TrailRecord) -> dict[str, Table]:
    """A reading has a list for each measure, one entry for each place: here a place at a step is a row."""
    steps = [reading.step for reading in record.readings]
    alarms = table(record.alarms, Alarm)
    return {
        "readings": Table({"step": steps, "loss": [r.loss for r in record.readings]}, {"step": int, "loss": float}),
        "sites": _places(steps, record.sites, SitePlace, [reading.sites for reading in record.readings]),
        "heads": _places(steps, record.heads, HeadPlace, [reading.heads for reading in record.readings]),
        "margins": _margins(record),
        "alarms": alarms,
    }


def _places(
    steps: Sequence[int], rows: Sequence[Any], kind: type[Any], measured: Sequence[Mapping[str, Sequence[float | None]]]
) -> Table:
    places = table(rows, kind)
    known = [name for name in dict.fromkeys(name for one in measured for name in one) if name not in places.types]
    found: dict[str, list[Any]] = {"step": [step for step in steps for _ in rows]}
    found |= {name: column * len(steps) for name, column in places.columns.items()}
    for name in known:
        found[name] = [value for one in measured for value in one.get(name, [None] * len(rows))]
    return Table(found, {"step": int, **places.types, **dict.fromkeys(known, float)})


def _margins(record: TrailRecord) -> Table:
    rows: Iterator[tuple[int, str, float]] = (
        (reading.step, key, margin) for reading in record.readings for key, margin in reading.margins.items()
    )
    listed = list(rows)
    names: tuple[tuple[str, Cell], ...] = (("step", int), ("key", str), ("margin", float))
    return Table({name: [row[i] for row in listed] for i, (name, _) in enumerate(names)}, dict(names))


def _backend(backend: str | None) -> Backend:
    if backend is not None and backend not in BACKENDS:
        raise InputError(
            f"to_frame: expected a backend among {', '.join(BACKENDS)}, got {backend!r}. Check the spelling."
        )
    wanted = [name for name in BACKENDS if backend in (None, name)]
    found = next((name for name in wanted if importlib.util.find_spec(name) is not None), None)
    if found is None:
        raise InputError(
            f"to_frame: expected {' or '.join(wanted)} to be installed, got none. A data frame is made by one of them. "
            "Install pandas, or write the tables with --csv."
        )
    return found
