"""A stored record, read back. Its `schema` field says which record it is.

A record may come from another machine, another version or another program. So nothing is read that cannot be one: at most
`LIMIT` bytes, from `{` on, in UTF-8, with finite numbers only. What does not fit is refused in one line. It may be gzipped.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import reprlib
from collections.abc import Iterator
from typing import IO, Any

from pydantic_core import from_json as parsed

from uncollapse.errors import InputError
from uncollapse.files import reading
from uncollapse.records import ablation, attribution, comparison, diagnosis, heads, ledger, sweep, symmetries, trail
from uncollapse.records.encoding import Record, from_json

AnyRecord = (
    diagnosis.DiagnosisRecord
    | ablation.AblationRecord
    | heads.IdentifiabilityRecord
    | symmetries.SymmetriesRecord
    | ledger.Ledger
    | trail.TrailRecord
    | comparison.ComparisonRecord
    | attribution.AttributionRecord
    | sweep.SweepRecord
)
SCHEMAS = (
    diagnosis.DIAGNOSIS_SCHEMA,
    ablation.ABLATION_SCHEMA,
    heads.HEADS_SCHEMA,
    symmetries.SYMMETRIES_SCHEMA,
    ledger.LEDGER_SCHEMA,
    trail.TRAIL_SCHEMA,
    comparison.COMPARISON_SCHEMA,
    attribution.ATTRIBUTION_SCHEMA,
    sweep.SWEEP_SCHEMA,
)
LIMIT = 512 * 2**20  # bytes: three times the record of 126 blocks with 128 heads, each pair of heads with its angle
_WRITTEN_BY = "Pass a file that --json or to_json wrote."


def load(source: str | os.PathLike[str] | IO[bytes]) -> AnyRecord:
    """See `uncollapse.records.load`."""
    name, text = _read(source)
    if trail.is_trail(text):
        for number, line in enumerate(text.split("\n")[:-1], 1):  # the last one may be in flight
            _document(f"line {number} of {name}", line)
        return trail.from_lines(text, name)
    schema = _document(name, text).get("schema")

    def as_a(kind: type[Record]) -> Record:
        return from_json(text, kind, function="load", source=name)

    match schema:
        case diagnosis.DIAGNOSIS_SCHEMA:
            return as_a(diagnosis.DiagnosisRecord)
        case ablation.ABLATION_SCHEMA:
            return as_a(ablation.AblationRecord)
        case heads.HEADS_SCHEMA:
            return as_a(heads.IdentifiabilityRecord)
        case symmetries.SYMMETRIES_SCHEMA:
            return as_a(symmetries.SymmetriesRecord)
        case ledger.LEDGER_SCHEMA:
            return as_a(ledger.Ledger)
        case trail.TRAIL_SCHEMA:
            return as_a(trail.TrailRecord)
        case comparison.COMPARISON_SCHEMA:
            return as_a(comparison.ComparisonRecord)
        case attribution.ATTRIBUTION_SCHEMA:
            return as_a(attribution.AttributionRecord)
        case sweep.SWEEP_SCHEMA:
            return as_a(sweep.SweepRecord)
        case _:
            named = "which names no schema" if schema is None else f"whose schema is {reprlib.repr(schema)}"
            raise InputError(
                f"load: expected a record of one of the schemas {', '.join(SCHEMAS)}, got {name}, {named}. "
                f"It may come from a later version, or be something else. {_WRITTEN_BY}"
            )


def _read(source: str | os.PathLike[str] | IO[bytes]) -> tuple[str, str]:
    """What the source is called in a refusal, and its text."""
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise InputError(
                f"load: expected a path, got {type(source).__name__}. What is in memory need not be read. {_WRITTEN_BY}"
            )
        name = "standard input" if getattr(source, "name", None) == "<stdin>" else "a stream"
        return name, _text(name, _pieces(source))
    path = os.fspath(source)
    with contextlib.closing(reading.pieces(path, at_most=LIMIT)) as pieces:
        return repr(path), _text(repr(path), pieces)


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    read = 0
    while piece := stream.read(reading.PIECE):
        read += len(piece)
        if read > LIMIT:
            raise reading.TooLarge
        yield piece


def _text(name: str, pieces: Iterator[bytes]) -> str:
    """The text, piece by piece: what is endless, or begins like no record, is not read to its end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # some editors add a byte-order mark; it is no content
    parts: list[str] = []
    try:
        for piece in reading.unpacked(pieces, at_most=LIMIT):
            parts.append(decoder.decode(piece))
            if not parts[0].lstrip().startswith("{"):
                break
        else:
            parts.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        raise InputError(
            f"load: expected JSON in UTF-8, got {name}, which is not UTF-8 ({error.reason}). "
            f"A shell or an editor may have converted it, or it is no text. {_WRITTEN_BY}"
        ) from None
    except reading.TooLarge:
        raise InputError(
            f"load: expected a record of at most {LIMIT // 2**20} MiB, got {name}, which is larger. "
            f"No model's record is. {_WRITTEN_BY}"
        ) from None
    except OSError as error:
        raise InputError(
            f"load: expected a file that can be read, got {name} ({error.strerror or error}). "
            f"The name may be misspelt, or the device gone. {_WRITTEN_BY}"
        ) from None
    text = "".join(parts)
    begin = text.lstrip()[:12]
    if not begin.startswith("{"):
        cause = "A page holds no record." if begin.startswith("<") else "It may be another file."
        raise InputError(
            f"load: expected a JSON object, got {name}, which {f'begins with {begin!r}' if begin else 'is empty'}. "
            f"{cause} {_WRITTEN_BY}"
        )
    return text


def _document(name: str, text: str) -> Any:
    """The JSON in a text, once every number in it is known to be finite."""
    try:
        document = parsed(text, allow_inf_nan=False)
        json.dumps(document, allow_nan=False)  # 1e999 is good JSON and no finite number
    except ValueError as error:
        raise InputError(
            f"load: expected JSON with finite numbers, got {name} ({error}). The file may have been cut short. {_WRITTEN_BY}"
        ) from None
    return document
