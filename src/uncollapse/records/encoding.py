"""Records to JSON and back, their published schema, and a file that is written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from uncollapse.errors import InputError

Record = TypeVar("Record")


def to_json(record: object) -> str:
    """The record as JSON, keys in the order of the dataclass, non-ASCII kept, ends with a newline."""
    return (
        json.dumps(
            TypeAdapter(type(record)).dump_python(record, mode="json"), indent=1, ensure_ascii=False, allow_nan=False
        )
        + "\n"
    )


def from_json(text: str, kind: type[Record]) -> Record:
    """The record that `text` holds. Raises `InputError` where the text is no such record."""
    try:
        record: Record = TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise InputError(
            f"from_json: expected a {kind.__name__}, got a JSON text whose {where} does not fit ({first['msg'].lower()}). "
            "It may have been written by another command or an older version. Write it again with --json."
        ) from None
    return record


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record, as shipped in `uncollapse/schemas/`."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 so that a reader sees the old file or the whole new one, never a part.

    Raises `InputError` where the place cannot be written; nothing is left behind then.
    """
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            raise OSError("that is no file")
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"write: expected a path that can be written, got {str(target)!r} ({error.strerror or error}). "
            "The folder may be missing or read-only. Name another path."
        ) from None
