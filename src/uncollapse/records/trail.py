"""The record of a monitor: a file that grows by one line a reading.

The first line is the record itself without readings: versions, model, probe, the sites and heads that the figures belong to.
Every further line is one `TrailReading`. A whole line is written at once, so a process that is killed loses at most the line in
flight, and the file can be read while it grows. After a restart from a checkpoint the steps begin again at an earlier one: what
was read beyond it belongs to a run that was given up, and is left out (`continued`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from uncollapse.errors import InputError
from uncollapse.records.common import AttentionKind, Finding, ModelInfo, Probe, Stack

TRAIL_SCHEMA: Literal["uncollapse/trail/1"] = "uncollapse/trail/1"
_BEGIN = b'{"schema":"uncollapse/trail/'
Against = Literal["threshold", "baseline", "trend"]


@dataclass(frozen=True, kw_only=True)
class Alarm(Finding):
    """A finding of a monitor. It was raised at `step`; what it is about began at `onset`.

    `against` says what was compared. `threshold`: the rules of a diagnosis. `baseline`: a given record, or this head's own history.
    `trend`: a rule's threshold as it will be met if the figure goes on as it does. `key` names the rule and the place; an alarm
    stands until its key is among a reading's `cleared`.
    """

    step: int
    onset: int
    against: Against
    key: str


@dataclass(frozen=True)
class SitePlace:
    """A site of the stream: which entry of every list in `TrailReading.sites` is its."""

    site: str
    block: int | None
    stack: Stack | None


@dataclass(frozen=True)
class HeadPlace:
    """A head: which entry of every list in `TrailReading.heads` is its."""

    block: int
    head: int
    stack: Stack | None
    kind: AttentionKind


@dataclass(frozen=True)
class TrailReading:
    """What was read at one step. `sites` and `heads` hold a list for each measure, one entry for each place of the record, null
    where it was not measured. `margins`: for each rule and place ln(threshold / distance), which is above 0 where the rule fires.
    `loss` is that of the training step, if the monitor was told."""

    step: int
    sites: dict[str, list[float | None]] = field(default_factory=dict)
    heads: dict[str, list[float | None]] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    alarms: list[Alarm] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrailRecord:
    """A monitored run. `options` are those of the monitor. `is_causal`: whether tokens see only earlier ones; null where that
    differs between attentions, or is not known."""

    schema: Literal["uncollapse/trail/1"]
    versions: dict[str, str]
    model: ModelInfo
    probe: Probe
    options: dict[str, Any]
    sites: list[SitePlace]
    heads: list[HeadPlace]
    readings: list[TrailReading] = field(default_factory=list)
    is_causal: bool | None = None

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms that were raised, in order."""
        return [alarm for reading in self.readings for alarm in reading.alarms]

    @property
    def findings(self) -> list[Alarm]:
        """The alarms, as what a command judges by."""
        return self.alarms


def line(record: TrailRecord | TrailReading) -> str:
    """One line of the file, with its newline."""
    from pydantic import TypeAdapter

    from uncollapse.records.encoding import without_surrogates

    plain = TypeAdapter(type(record)).dump_python(record, mode="json")
    if isinstance(record, TrailRecord):
        del plain["readings"]
    text = json.dumps(_rounded(plain), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return without_surrogates(text) + "\n"


def _rounded(value: Any) -> Any:
    """Figures to six digits: more says nothing about a run, and the file is a third of the size."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case list():
            return [_rounded(v) for v in value]
        case dict():
            return {k: _rounded(v) for k, v in value.items()}
    return value


def is_trail(text: str) -> bool:
    """Whether a text is a trail as a monitor writes it, line by line."""
    first, newline, _ = text.partition("\n")
    if not newline or not first.startswith('{"schema"'):
        return False
    try:
        return json.loads(first).get("schema") == TRAIL_SCHEMA
    except (ValueError, RecursionError):  # no JSON, or nested without end
        return False


def from_lines(text: str, source: str, *, function: str = "load") -> TrailRecord:
    """The trail that a text holds. A last line without its end is one in flight, and is left out.

    Raises `InputError` for any other line that is no reading, naming it and `function`.
    """
    from uncollapse.records.encoding import from_json

    first, *lines = text.split("\n")
    record = from_json(first, TrailRecord, function=function, source=f"line 1 of {source}")
    lines.pop()  # behind the last newline: nothing, or a line in flight
    readings = [
        from_json(one, TrailReading, function=function, source=f"line {number} of {source}")
        for number, one in enumerate(lines, 2)
    ]
    return replace(record, readings=continued(readings))


def continued(readings: Iterable[TrailReading]) -> list[TrailReading]:
    """The readings of the run as it went on: a step that comes again replaces all that was read from there."""
    kept: list[TrailReading] = []
    for reading in readings:
        while kept and kept[-1].step >= reading.step:
            kept.pop()
        kept.append(reading)
    return kept


class TrailFile:
    """A trail that is being written. Lines are appended whole. Raises `InputError` where the path cannot be written, or holds
    something else than a trail of this model on this probe."""

    def __init__(self, path: str | os.PathLike[str], record: TrailRecord) -> None:
        self.path = Path(path)
        self.earlier: list[TrailReading] = []  # read in an earlier part of the same run
        try:
            with open(self.path, "ab+", buffering=0) as stream:
                self._resume(record, stream)
        except OSError as error:
            raise InputError(
                f"Monitor: expected a trail that can be written, got {str(path)!r} ({error.strerror or error}). "
                "The folder may be missing or read-only. Name another path."
            ) from None

    def _resume(self, record: TrailRecord, stream: IO[bytes]) -> None:
        stream.seek(0)
        there = stream.read()
        whole = there[: there.rfind(b"\n") + 1]
        if not (there.startswith(_BEGIN) or _BEGIN.startswith(there)):
            raise InputError(
                f"Monitor: expected a new path or a trail to go on with, got {str(self.path)!r}, which is another file. "
                "It would be spoilt. Name another path."
            )
        if whole != there:  # the process was killed in the middle of a line
            stream.truncate(len(whole))
        if not whole:
            _write(stream, line(record))
            return
        earlier = from_lines(whole.decode("utf-8", "replace"), repr(str(self.path)), function="Monitor")
        if (earlier.sites, earlier.heads) != (record.sites, record.heads):
            raise InputError(
                f"Monitor: expected the trail of this model, got {str(self.path)!r}, whose blocks or heads are others. "
                "It belongs to another run. Name another path."
            )
        if earlier.probe.fingerprint != record.probe.fingerprint:
            raise InputError(
                f"Monitor: expected the probe of the trail {str(self.path)!r}, got other batches. Figures of two probes do not "
                "make one curve. Pass the batches it began with, or name another path."
            )
        was_on, is_on = (each.options.get("on", "probe") for each in (earlier, record))
        if was_on != is_on:
            raise InputError(
                f"Monitor: expected a trail that was read on={is_on!r} and not on={was_on!r}, got {str(self.path)!r}. Figures of a "
                "fixed probe and of training batches do not make one curve. Name another path."
            )
        self.earlier = earlier.readings

    def readings(self) -> list[TrailReading]:
        """What the file holds, as far as it can be read."""
        try:
            text = self.path.read_text("utf-8", "replace")
        except OSError:
            return []
        return from_lines(text, repr(str(self.path)), function="Monitor").readings if is_trail(text) else []

    def append(self, reading: TrailReading) -> None:
        """Add one reading. The file is open for that long only, so nothing has to be closed when a run ends or dies.

        Raises `OSError` where it takes no more, or is gone: a new one would lack its first line."""
        with open(self.path, "ab", buffering=0, opener=_existing) as stream:
            end = stream.seek(0, os.SEEK_END)
            try:
                _write(stream, line(reading))
            except OSError:
                stream.truncate(end)  # the part that fitted on the disk would spoil the next line
                raise


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def _write(stream: IO[bytes], text: str) -> None:
    """All of it: a raw write may take only a part."""
    data = text.encode()
    while data:
        data = data[stream.write(data) :]
