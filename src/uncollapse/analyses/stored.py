"""`load`: a stored record becomes the result that it was written from."""

from __future__ import annotations

import os
from dataclasses import dataclass

from uncollapse import records
from uncollapse.analyses.ablation import Ablation
from uncollapse.analyses.attribution import Attribution
from uncollapse.analyses.comparison import Comparison
from uncollapse.analyses.diagnosis import Diagnosis
from uncollapse.analyses.heads import Identifiability
from uncollapse.analyses.ledger import Verification
from uncollapse.analyses.result import Recorded
from uncollapse.analyses.sweep import Sweep
from uncollapse.analyses.symmetries import Symmetries
from uncollapse.records.ablation import AblationRecord
from uncollapse.records.attribution import AttributionRecord
from uncollapse.records.comparison import ComparisonRecord
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.records.ledger import Ledger
from uncollapse.records.sweep import SweepRecord
from uncollapse.records.symmetries import SymmetriesRecord
from uncollapse.records.trail import Alarm, TrailReading, TrailRecord


@dataclass(frozen=True, repr=False)
class Trail(Recorded[TrailRecord]):
    """What a `Monitor` wrote. `record` has all of it, as data."""

    @property
    def findings(self) -> list[Alarm]:
        """The alarms, in the order in which they were raised."""
        return self.record.alarms

    @property
    def readings(self) -> list[TrailReading]:
        """What was read, step by step."""
        return self.record.readings


def load(
    path: str | os.PathLike[str],
) -> Diagnosis | Ablation | Identifiability | Symmetries | Verification | Attribution | Comparison | Sweep | Trail:
    """A stored record, as the result that wrote it: it can be shown, drawn as a page and written again.

    path: a file that `to_json` or `--json` wrote, by this version or an earlier one. The record's `schema` says what comes back:
    what `diagnose`, `ablate`, `identify`, `symmetries`, `sweep` or `compare` return, and for the ledger of `verify` and the
    trail of a `Monitor` a result of the same kind.
    Keys that the record's version did not have yet take their defaults; keys that this version does not know are left out.

    Raises `InputError` where there is no such file, where it is not JSON in UTF-8 or too large for a record, where its schema is
    unknown, and where its content does not fit that schema.
    """
    match records.load(path):
        case DiagnosisRecord() as record:
            return Diagnosis(record)
        case AblationRecord() as record:
            return Ablation(record)
        case IdentifiabilityRecord() as record:
            return Identifiability(record)
        case SymmetriesRecord() as record:
            return Symmetries(record)
        case Ledger() as record:
            return Verification(record)
        case ComparisonRecord() as record:
            return Comparison(record)
        case AttributionRecord() as record:
            return Attribution(record)
        case SweepRecord() as record:
            return Sweep(record)
        case TrailRecord() as record:
            return Trail(record)
