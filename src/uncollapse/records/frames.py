"""Records as a table that pandas, polars or pyarrow can go on with: one row per record, one column per figure.

None of the three is needed to install this package, and which one is there decides what comes out. Narwhals, which the charts
bring along, makes it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, get_args

from uncollapse.errors import InputError

Backend = Literal["pandas", "polars", "pyarrow"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def frame(records: Sequence[Any], kind: type[Any], *, backend: str | None = None) -> Any:
    """A data frame of records, all of the dataclass `kind`.

    A figure that is itself a record (`Statistic`, `Estimate`) has its mean in a column of its own name, and each further field in
    `name_field`. Lists are written as text, reasons (`unavailable`) are left out. backend: `"pandas"`, `"polars"` or
    `"pyarrow"`; by default the first of them that is installed. Raises `InputError` where it is not.
    """
    chosen = _backend(backend)
    import narwhals

    table = columns(records, kind)
    return narwhals.from_dict(table, backend=chosen).to_native()


def columns(records: Sequence[Any], kind: type[Any]) -> dict[str, list[Any]]:
    """The columns of `frame`, as lists."""
    rows = [_row(record, kind) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row)) or list(_row(None, kind))
    return {name: [row.get(name) for row in rows] for name in names}


def _row(record: Any, kind: type[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name == "unavailable":
            continue
        value = None if record is None else getattr(record, field.name)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            row[field.name] = ", ".join(map(str, value)) if isinstance(value, list) else value
            continue
        for inner in dataclasses.fields(value):
            row[field.name if inner.name == "mean" else f"{field.name}_{inner.name}"] = getattr(value, inner.name)
    return row


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
            "Install pandas, or use the record itself."
        )
    return found
