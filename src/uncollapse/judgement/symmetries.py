"""What the action of a group on a live model says about the symmetry behind each collapse: who breaks it, who holds against it.

`uncollapse symmetries` lets the groups act, once on the model as it is and once without each set of components, and records a
`SymmetryTest` each time. Here these tests are read; no model runs.

When not to use it: to judge health. A broken symmetry is often the point of an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from uncollapse.records.common import Phenomenon
from uncollapse.records.symmetries import SymmetryRecord, SymmetryTest

# In rounding levels. An exact symmetry reorders sums and rounds weights anew: on MiniLM (four number formats) and SmolLM2 its
# defect was at most 2 levels. In bfloat16, where a level is 0.02, a break below 0.1 cannot be told from rounding.
EXACT = 5.0


def completed(
    record: SymmetryRecord, tests: Sequence[SymmetryTest], stabilisers: Mapping[Phenomenon, Sequence[str]]
) -> SymmetryRecord:
    """The record with what the groups' action says: the defect of the model as it is, the breakers that were found by taking
    them away, in place of those that the anatomy suggests, and further `stabilisers`."""
    held = [*record.stabilisers, *stabilisers.get(record.phenomenon, ())]
    record = replace(record, stabilisers=list(dict.fromkeys(held)))
    mine = [t for t in tests if t.phenomenon == record.phenomenon]
    whole = next((t for t in mine if not t.without), None)
    if whole is None or whole.defect is None:
        reason = "no group of this symmetry could act" if whole is None else whole.unavailable["defect"]
        return replace(record, unavailable={**record.unavailable, "equivariance_defect": reason})
    unavailable = {k: v for k, v in record.unavailable.items() if k != "equivariance_defect"}
    found = breakers(mine)
    kept = record.breakers if found is None else [*found, *(b for b in record.breakers if b == "position gates")]
    if record.phenomenon == "rank-collapse-depth" and is_broken_otherwise(mine):
        kept = [*kept, "order told in another way"]
    shift = next((t for t in mine if t.action == "logit shift"), None)
    if shift is not None and shift.holds is False:
        kept = [*kept, "sink columns"]
    return replace(record, equivariance_defect=whole.defect, breakers=kept, unavailable=unavailable)


def breakers(tests: Sequence[SymmetryTest]) -> list[str] | None:
    """The components that break a symmetry: with all the others away, the defect is still there. `None` where that was not
    found out: no test took anything away, one of them could not, or something else breaks the symmetry as well."""
    every = max((t.without for t in tests), key=len, default=[])
    alone = {c: next((t for t in tests if set(t.without) == set(every) - {c}), None) for c in every}
    if not every or any(t is None or t.defect is None for t in alone.values()) or is_broken_otherwise(tests):
        return None
    return [c for c, test in alone.items() if test is not None and not at_rounding(test)]


def is_broken_otherwise(tests: Sequence[SymmetryTest]) -> bool:
    """Whether a symmetry is still broken with everything away: by a relative bias, say, when positions are carried along."""
    whole = max(tests, key=lambda t: len(t.without), default=None)
    return whole is not None and bool(whole.without) and whole.holds is False


def at_rounding(test: SymmetryTest) -> bool:
    """Whether a measured defect is no larger than what rounding causes."""
    assert test.defect is not None
    assert test.rounding is not None
    return test.defect.max <= EXACT * test.rounding.max
