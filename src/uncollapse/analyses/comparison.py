"""`compare`: two diagnoses beside each other. Base against fine-tune, checkpoint against checkpoint, model against mended model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from uncollapse.analyses.recording import versions
from uncollapse.analyses.result import Recorded
from uncollapse.errors import InputError
from uncollapse.judgement import comparison
from uncollapse.records import load
from uncollapse.records.common import SEVERITIES, Finding
from uncollapse.records.comparison import COMPARISON_SCHEMA, Change, ComparisonRecord
from uncollapse.records.diagnosis import DiagnosisRecord

Given = DiagnosisRecord | Recorded[Any] | str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class Comparison(Recorded[ComparisonRecord]):
    """What `compare` found. `record` has all of it, as data."""

    @property
    def findings(self) -> list[Finding]:
        """What got worse, most severe first."""
        return self.record.findings

    @property
    def moved(self) -> list[Change]:
        """The figures that changed by more than two probes differ, block by block and head by head."""
        return [change for change in (*self.record.sites, *self.record.heads) if change.moved]


def compare(a: Given, b: Given) -> Comparison:
    """What changed from diagnosis `a` to diagnosis `b`, block by block and head by head.

    a, b: what `diagnose` returned, its record, or a path to one. Their models must have the same blocks and heads.

    If both were measured on the same probe (their records carry a fingerprint of it), every figure is compared. If not, noise is
    estimated from the sequences of each, and single heads are not compared: their figures depend on the text too much.

    Raises `InputError` for other records, and for models of different shape.
    """
    before, after = _diagnosis(a), _diagnosis(b)
    _require_alike(before, after)
    prints = before.probe.fingerprint, after.probe.fingerprint
    same = prints[0] == prints[1] if all(prints) else None
    sites = comparison.site_changes(before.trajectory, after.trajectory, same_probe=same is True)
    heads, unavailable = [], {}
    if same:
        heads = comparison.head_changes(before.attention, after.attention, same_probe=True)
    else:
        cause = (
            "the two were measured on different probes"
            if same is False
            else "a record is too old to say on which probe"
        )
        unavailable["heads"] = f"{cause}; diagnose both on the same texts to compare single heads"
    if not sites:
        unavailable["sites"] = "no figure of the stream is in both records"
    worse = [*comparison.worse([*sites, *heads])]
    appeared, gone = _only(after, before), _only(before, after)
    found = sorted(
        [*appeared, *worse], key=lambda f: (-SEVERITIES.index(f.severity), -1 if f.block is None else f.block)
    )
    return Comparison(
        ComparisonRecord(
            schema=COMPARISON_SCHEMA,
            versions=versions(),
            models=[before.model, after.model],
            probes=[before.probe, after.probe],
            same_probe=same,
            sites=sites,
            heads=heads,
            smallest=comparison.smallest([*sites, *heads]),
            appeared=appeared,
            gone=gone,
            findings=found,
            unavailable=unavailable,
            is_causal=_of_both(*(None if r.anatomy is None else r.anatomy.is_causal for r in (before, after))),
        )
    )


def _of_both(one: bool | None, other: bool | None) -> bool | None:
    return one if one == other else None


def _diagnosis(given: Given) -> DiagnosisRecord:
    record: object = load(given) if isinstance(given, str | os.PathLike) else given
    record = record.record if isinstance(record, Recorded) else record
    if isinstance(record, DiagnosisRecord):
        return record
    raise InputError(
        f"compare: expected two diagnoses, got {type(record).__name__}. Only they hold the figures of every block and head. "
        "Pass what `diagnose` returned, or a path that it was written to."
    )


def _require_alike(before: DiagnosisRecord, after: DiagnosisRecord) -> None:
    shapes = [(r.model.blocks, r.model.heads, r.model.width) for r in (before, after)]
    if shapes[0] != shapes[1]:
        words = [f"{blocks} blocks of {heads} heads and width {width}" for blocks, heads, width in shapes]
        raise InputError(
            f"compare: expected two models of the same shape, got {words[0]} and {words[1]}. Their blocks do not correspond. "
            "Compare checkpoints of one model."
        )


def _only(here: DiagnosisRecord, there: DiagnosisRecord) -> list[Finding]:
    """The findings of one that the other does not have at this place, or has less severely."""
    known = {_place(f): SEVERITIES.index(f.severity) for f in there.findings}
    return [
        f for f in here.findings if f.severity != "info" and known.get(_place(f), -1) < SEVERITIES.index(f.severity)
    ]


def _place(finding: Finding) -> tuple[object, ...]:
    """What a finding is about. Of most, the head is only the worst of its block; each dead one has a finding of its own."""
    head = finding.head if finding.phenomenon == "dead-component" else None
    return finding.code, finding.block, finding.stack, finding.kind, head
