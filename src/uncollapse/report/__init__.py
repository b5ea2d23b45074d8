"""Show a record: as one self-contained HTML page or as lines in a terminal.

Each command has a package with two functions, `page(record)` and `printout(record, console)`. They read nothing but the
record, so a page can be drawn from a JSON file on a machine that never saw the model. What several commands share is in
`page/` (each template next to the code that fills it), in `terminal/` and in `wording`.

Nothing is measured or judged here. The findings decide what is dangerous and the claims decide what is true; both are only
repeated.

Importing this package loads no drawing library. The first call of `draw` loads Altair and Jinja, the first call of `show` rich.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from uncollapse.errors import InputError
from uncollapse.legible import legible
from uncollapse.records.ablation import ABLATION_SCHEMA, AblationRecord
from uncollapse.records.attribution import ATTRIBUTION_SCHEMA, AttributionRecord
from uncollapse.records.common import Finding, ModelInfo, Probe
from uncollapse.records.comparison import COMPARISON_SCHEMA, ComparisonRecord
from uncollapse.records.diagnosis import DIAGNOSIS_SCHEMA, DiagnosisRecord
from uncollapse.records.heads import HEADS_SCHEMA, IdentifiabilityRecord
from uncollapse.records.ledger import LEDGER_SCHEMA, Ledger
from uncollapse.records.sweep import SWEEP_SCHEMA, SweepRecord
from uncollapse.records.symmetries import SYMMETRIES_SCHEMA, SymmetriesRecord
from uncollapse.records.trail import TRAIL_SCHEMA, TrailRecord
from uncollapse.report import (
    ablation,
    attribution,
    comparison,
    diagnosis,
    heads,
    ledger,
    sweep,
    symmetries,
    trail,
    wording,
)

if TYPE_CHECKING:
    from rich.console import Console

    from uncollapse.records.stored import AnyRecord


def draw(record: AnyRecord) -> str:
    """The record as one HTML file. It opens from disk, fetches nothing, and can be read without JavaScript.

    Raises `InputError` if it is not a record of a schema that this version knows.
    """
    return _shown("draw", record).page()


def title(record: AnyRecord) -> str:
    """What the record is about, in a few words: the model, the models of a comparison, or how many claims a ledger has and how
    many checkpoints a sweep."""
    match record:
        case Ledger():
            return wording.count(len(record.claims), "claim")
        case SweepRecord():
            return wording.count(len(record.checkpoints), "checkpoint")
        case ComparisonRecord():
            base, *others = (legible(model.name) for model in record.models)
            return f"{base} → {', '.join(others)}"
    return legible(record.model.name)


def show(record: AnyRecord, console: Console) -> None:
    """Print a diagnosis (one row per block, then the findings), an ablation (one row per run, then the predictions), the
    heads' identifiability (the answer, then one row per block), symmetries (one paragraph per phenomenon, then one row per
    test), a ledger (one paragraph per claim, then the verdicts), a trail (one row per look, then the
    alarms), a comparison (one row per block, then what got worse), a sweep (one row per checkpoint, then the first finding of each
    kind) or an attribution (the largest effects, then what may be said of the heads).

    Raises `InputError` if it is not a record of a schema that this version knows.
    """
    _shown("show", record).printout(console)


class _Shown(NamedTuple):
    schema: str
    page: Callable[[], str]
    printout: Callable[[Console], None]


def _shown(function: str, record: AnyRecord) -> _Shown:
    """The two functions for this kind of record, with the record filled in and its texts made safe to show."""
    record = _legible(record, str if isinstance(record, Ledger | SweepRecord) else wording.in_digits)
    match record:
        case DiagnosisRecord():
            shown = _Shown(DIAGNOSIS_SCHEMA, partial(diagnosis.page, record), partial(diagnosis.printout, record))
        case AblationRecord():
            shown = _Shown(ABLATION_SCHEMA, partial(ablation.page, record), partial(ablation.printout, record))
        case IdentifiabilityRecord():
            shown = _Shown(HEADS_SCHEMA, partial(heads.page, record), partial(heads.printout, record))
        case SymmetriesRecord():
            shown = _Shown(SYMMETRIES_SCHEMA, partial(symmetries.page, record), partial(symmetries.printout, record))
        case ComparisonRecord():
            shown = _Shown(COMPARISON_SCHEMA, partial(comparison.page, record), partial(comparison.printout, record))
        case AttributionRecord():
            shown = _Shown(ATTRIBUTION_SCHEMA, partial(attribution.page, record), partial(attribution.printout, record))
        case TrailRecord():
            shown = _Shown(TRAIL_SCHEMA, partial(trail.page, record), partial(trail.printout, record))
        case SweepRecord():
            shown = _Shown(SWEEP_SCHEMA, partial(sweep.page, record), partial(sweep.printout, record))
        case Ledger():
            shown = _Shown(LEDGER_SCHEMA, partial(ledger.page, record), partial(ledger.printout, record))
        case _:
            raise InputError(
                f"{function}: expected the record of a command, got {type(record).__name__}. "
                "A result of `diagnose` or `ablate` holds its record in `.record`. Pass that, or read a file with `load`."
            )
    if record.schema != shown.schema:
        raise InputError(
            f"{function}: expected a record of the schema {shown.schema}, got {record.schema}. "
            "It may come from another version. Run the command again, or read the file with `load`."
        )
    return shown


def _legible(held: Any, said: Callable[[str], str]) -> Any:
    """A record, or a part of one, with every text in it legible, and its figures as the tables have them (`said`). What a ledger
    holds is evidence, and names and commands are not ours: these keep their digits. A part in which nothing changes is itself what
    comes back."""
    if isinstance(held, str):
        return said(legible(held))
    if isinstance(held, (ModelInfo, Probe)):
        said = str
    if isinstance(held, Finding):  # of a sweep, whose other texts are names
        said = wording.in_digits
    if isinstance(held, list):
        parts = [part if isinstance(part, float) else _legible(part, said) for part in held]
        return held if all(map(operator.is_, parts, held)) else parts
    if isinstance(held, dict):
        pairs = {_legible(key, said): _legible(value, said) for key, value in held.items()}
        return held if all(map(operator.is_, pairs.values(), held.values())) and list(pairs) == list(held) else pairs
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        changed = dict(_changed(held, said))
        return dataclasses.replace(held, **changed) if changed else held
    return held


def _changed(held: Any, said: Callable[[str], str]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(held):
        value = getattr(held, field.name)
        shown = _legible(value, said)
        if shown is not value:
            yield field.name, shown
