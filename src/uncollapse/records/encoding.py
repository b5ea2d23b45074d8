"""Records to JSON and back, their published schemas, and a file that is written completely or not at all."""

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


def from_json(text: str, kind: type[Record], *, function: str = "from_json", source: str = "a JSON text") -> Record:
    """The record that `text` holds. A refusal names `function` and `source`, where the text came from.

    Raises `InputError` if the text is not such a record.
    """
    try:
        record: Record = TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise InputError(
            f"{function}: expected {'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}, got {source} whose {where} does "
            f"not fit ({first['msg'].lower()}). It may have been written by another command or an older version. "
            "Write it again with --json."
        ) from None
    return record


def json_schema(kind: type[Any]) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record, as shipped in `uncollapse/schemas/`."""
    schema = TypeAdapter(kind).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 so that a reader sees either the old file or the complete new one.

    Raises `InputError` if the path cannot be written; no temporary file remains.
    """
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            raise OSError("that is not a file")
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
