"""One checkpoint of a sweep: what it is known by, and measuring it.

It holds nothing but plain data, so it can be sent to another machine. What comes back is a record in any case: a failure is one.
"""

from __future__ import annotations

import gc
import hashlib
import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from uncollapse import __version__
from uncollapse.errors import UncollapseError
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.sweep import SWEEP_SCHEMA, Failure, SweepRecord, SweptCheckpoint, SweptRun
from uncollapse.sources import Checkpoint

if TYPE_CHECKING:
    from uncollapse.probe.passes import Progress


@dataclass(frozen=True)
class Task:
    """What to measure, and how. `deciding` are the options that decide the figures, `machine` those that only say where and with
    how much; both are passed on to `diagnose` from `arguments`. `weights` is None where the weights could not be found, and
    `problem` says why."""

    checkpoint: Checkpoint
    weights: str | None
    deciding: Mapping[str, Any]
    machine: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(repr=False)
    problem: str = ""

    @property
    def fingerprint(self) -> str | None:
        """Of the weights, the options that decide the figures, and the version; None where the weights could not be found."""
        if self.weights is None:
            return None
        known = {"weights": self.weights, "options": dict(self.deciding), "version": __version__}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def file(self) -> str:
        """The name of its record."""
        known = self.fingerprint
        if known is None:  # several may have one label, and each its own reason
            name = hashlib.sha256(self.checkpoint.name.encode("utf-8", "surrogateescape")).hexdigest()
            known = f"unidentified-{name[:8]}"
        return f"{self.checkpoint.label}-{known}.json.gz"

    @property
    def options(self) -> dict[str, Any]:
        """All of them: a failure may not come again with others."""
        return {**self.deciding, **self.machine}


def measured(task: Task, progress: Progress | None = None) -> DiagnosisRecord | SweepRecord:
    """The checkpoint's diagnosis, or the record of its failure. Only what ends a process is let through."""
    from uncollapse.analyses.diagnosis import diagnose

    if task.problem:
        return failed(task, Failure("refused", task.problem))
    try:
        return diagnose(task.checkpoint.name, **task.arguments, progress=progress).record
    except UncollapseError as error:
        return failed(task, Failure("refused", " ".join(str(error).split())))
    except Exception as error:  # a sweep goes on: the record keeps what a single run would have shown
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return failed(task, Failure("crashed", said[:500], traceback.format_exc()))
    finally:
        _let_go()


def failed(task: Task, failure: Failure) -> SweepRecord:
    """The record of a checkpoint that could not be measured: a sweep of it alone."""
    from uncollapse.analyses.recording import versions

    checkpoint = SweptCheckpoint(
        task.checkpoint.name, task.checkpoint.step, task.fingerprint, task.file, failure=failure
    )
    return SweepRecord(SWEEP_SCHEMA, versions(), task.options, [SweptRun(task.checkpoint.run, [checkpoint])])


def _let_go() -> None:
    """One model after the other: the memory of the last one is given back before the next is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
