"""Records to JSON and back, their published schemas, and a file that is written completely or not at all."""

from __future__ import annotations

import gzip
import json
import os
import re
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from uncollapse.errors import InputError
from uncollapse.files import writing
from uncollapse.legible import legible

Record = TypeVar("Record")
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(record: object) -> str:
    """The record as JSON, keys in the order of the dataclass, non-ASCII kept, ends with a newline.

    Bytes of a file name that is not UTF-8 are written as `\\xff`: JSON has no other way to hold them.
    """
    text = json.dumps(
        TypeAdapter(type(record)).dump_python(record, mode="json"), indent=1, ensure_ascii=False, allow_nan=False
    )
    return without_surrogates(text) + "\n"


def without_surrogates(text: str) -> str:
    """JSON with the bytes of a file name that is not UTF-8 as `\\xff`."""
    return _SURROGATE.sub(lambda found: json.dumps(legible(found[0]))[1:-1], text)


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


def write_record(path: str | os.PathLike[str], text: str) -> None:
    """Write a record's JSON like `write_atomically`, gzipped where the path ends in `.gz`: then without the line breaks and spaces
    that are there for a reader. The same text gives the same bytes."""
    if not os.fspath(path).endswith(".gz"):
        _write(path, text.encode())
        return
    plain = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
    _write(path, gzip.compress(plain.encode(), 9, mtime=0))


def write_atomically(path: str | os.PathLike[str], text: str | bytes) -> None:
    """Write `text` to `path`, as UTF-8 where it is not bytes, so that a reader sees either the old file or the complete new one.

    Links are followed, and the permissions and the owner of an existing file are kept. A stream of this process, such as
    `/dev/stdout`, is written to where it stands.

    Raises `InputError` if the path cannot be written; no temporary file remains.
    """
    # Record and page hold no lone surrogates, but what a caller passes may.
    _write(path, text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace"))


def _write(path: str | os.PathLike[str], data: bytes) -> None:
    try:
        writing.write(writing.destination(path), data)
    except BrokenPipeError:
        raise  # whoever read our output has seen enough, which is no fault of the path
    except (OSError, TypeError) as error:
        raise InputError(
            f"write: expected a path that can be written, got {path!r} ({getattr(error, 'strerror', None) or error}). "
            "The folder may be missing or read-only. Name another path."
        ) from None
