"""`compare`: diagnoses beside each other, the first as the base. Base against fine-tune, checkpoint against checkpoint, model
against mended model."""

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
from uncollapse.records.comparison import COMPARISON_SCHEMA, Change, ComparisonRecord, Further
from uncollapse.records.diagnosis import DiagnosisRecord

Given = DiagnosisRecord | Recorded[Any] | str | os.PathLike[str]


@dataclass(frozen=True, repr=False)
class Comparison(Recorded[ComparisonRecord]):
    """What `compare` found. `record` has all of it, as data."""

    @property
    def findings(self) -> list[Finding]:
        """What got worse, most severe first; with several records, record after record."""
        return [finding for pair in self.record.pairs for finding in pair.findings]

    @property
    def moved(self) -> list[Change]:
        """The figures that changed by more than two probes differ, block by block and head by head."""
        return [change for pair in self.record.pairs for change in (*pair.sites, *pair.heads) if change.moved]

    @property
    def pairs(self) -> list[Comparison]:
        """The first record beside each other one."""
        return [Comparison(pair) for pair in self.record.pairs]


def compare(a: Given, b: Given, *more: Given) -> Comparison:
    """What changed from diagnosis `a` to diagnosis `b`, block by block and head by head.

    a, b: what `diagnose` returned, its record, or a path to one. Their models must have the same blocks and heads. more: further
    ones. `a` is the base: each of the others is compared with it, and `pairs` has them one by one. For checkpoint after
    checkpoint, call `compare` for each two neighbours.

    If both were measured on the same probe (their records carry a fingerprint of it), every figure is compared. If not, noise is
    estimated from the sequences of each, and single heads are not compared: their figures depend on the text too much.

    Raises `InputError` for other records, and for models of different shape.
    """
    before, after, *others = (_diagnosis(given) for given in (a, b, *more))
    names = _names([before, after, *others])
    return Comparison(
        ComparisonRecord(
            schema=COMPARISON_SCHEMA,
            versions=versions(),
            models=[each.model for each in (before, after, *others)],
            probes=[each.probe for each in (before, after, *others)],
            **_beside(before, after),
            further=[Further(name, **_beside(before, other)) for name, other in zip(names[2:], others, strict=True)],
            is_causal=_of_all([None if r.anatomy is None else r.anatomy.is_causal for r in (before, after, *others)]),
        )
    )


def _names(records: list[DiagnosisRecord]) -> list[str]:
    """What each is called: its model's name, numbered where several bear the same."""
    own = [record.model.name for record in records]
    return [name if own.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(own, 1)]


def _beside(before: DiagnosisRecord, after: DiagnosisRecord) -> dict[str, Any]:
    """What a comparison says of two: the fields of `Further`."""
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
    return {
        "same_probe": same,
        "sites": sites,
        "heads": heads,
        "smallest": comparison.smallest([*sites, *heads]),
        "appeared": appeared,
        "gone": gone,
        "findings": found,
        "unavailable": unavailable,
    }


def _of_all(said: list[bool | None]) -> bool | None:
    return said[0] if len(set(said)) == 1 else None


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
