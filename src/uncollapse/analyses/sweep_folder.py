"""The folder of a sweep: one record a checkpoint, and who is at work on which.

A record is written whole or not at all, so what is there can be believed. A lock is held by a process and not by a file: the
system lets go of it when the process ends, however it ends. The empty files in `.locks` stay; one whose record is missing tells
that somebody began with it and did not finish.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from uncollapse import records
from uncollapse.analyses.sweep_task import Task
from uncollapse.errors import InputError
from uncollapse.files import writing
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.encoding import to_json, write_record
from uncollapse.records.sweep import SweepRecord


class SweepFolder:
    """A folder that several sweeps may share. Raises `InputError` where nothing can be written to it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._locks = self.path / ".locks"
        self.remembered = self.path / ".weights"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            writing.try_out(writing.destination(self.path / "record.json.gz"))
            with contextlib.suppress(Timeout), FileLock(self._locks / "try.lock", timeout=0) as lock:
                if isinstance(lock, SoftFileLock):  # what filelock takes instead; a dead process would keep it
                    raise NotImplementedError("no locks there")
        except (OSError, ValueError, NotImplementedError) as error:
            raise InputError(
                f"sweep: expected a folder that can be written to and locked, got {str(path)!r} "
                f"({getattr(error, 'strerror', None) or error}). It may be a file, read-only, or on a file system without locks. "
                "Name another folder."
            ) from None

    def read(self, task: Task) -> DiagnosisRecord | SweepRecord | None:
        """The record of a checkpoint; None where there is none, where it is damaged, and where it is a failure that other options
        than these have met."""
        path = self.path / task.file
        if not path.exists():
            return None
        try:
            found = records.load(path)
        except InputError:  # damaged, or something else under that name: measured again, and written over
            return None
        if isinstance(found, DiagnosisRecord):
            return found
        if not isinstance(found, SweepRecord) or found.options != task.options:
            return None
        return found if any(each.failure for each in found.checkpoints) else None

    def write(self, task: Task, record: DiagnosisRecord | SweepRecord) -> None:
        """Raises `InputError` where it cannot be written, because the disk is full for example."""
        write_record(self.path / task.file, to_json(record))

    def was_begun(self, task: Task) -> bool:
        """Whether somebody began with it, and either is at it or did not finish."""
        return self._lock_file(task).exists()

    def locked(self, task: Task) -> FileLock | None:
        """A lock to be released when the record is written; None where another process has it. Raises `InputError` where nobody
        can lock it."""
        lock = FileLock(self._lock_file(task), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        except OSError as error:
            raise InputError(
                f"sweep: expected a folder in which {lock.lock_file!r} can be locked, got {error.strerror or error}. It may belong "
                "to somebody else, or the disk may be full. Make it writable, or name another folder."
            ) from None
        return lock

    def _lock_file(self, task: Task) -> Path:
        return self._locks / f"{task.file}.lock"
