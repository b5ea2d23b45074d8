"""What was observed: frozen dataclasses, their JSON, and the published JSON Schema.

A record is complete in itself: it carries the versions, the model, the probe and the resolved options, so that a page
can be drawn from it a year later on another machine. Pages and tables read records and nothing else.

* Every measured value is a `Statistic` {mean, min, max, n}: first the mean over a sequence's rows, then over sequences,
  of which there were `n`; `min` and `max` are the extreme sequences.
* A value that was not measured is `null`, and `unavailable` in the same object gives the reason under the same key.
* NaN and infinity never reach JSON: `Statistic.of` refuses them, and a numerics finding names where they came from.

`to_json` / `from_json` convert, `json_schema` publishes, and `load` reads a file whose record is not known beforehand. Pydantic
reads the annotations for all four; it is imported when `load` is called, so that the command line can know severities at once.
"""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from uncollapse.records.stored import AnyRecord


def load(source: str | os.PathLike[str] | IO[bytes]) -> AnyRecord:
    """The record in a file, whichever command wrote it.

    source: a path, or a binary stream such as `sys.stdin.buffer`. Keys that the record's version did not have yet take their
    defaults; keys that this version does not know are left out.

    Raises `InputError` where there is no such file, where it is not JSON in UTF-8 or too large for a record, where its schema is
    unknown, and where its content does not fit that schema.
    """
    from uncollapse.records.stored import load as read

    return read(source)
