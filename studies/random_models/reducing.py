"""From a model that is read wrongly to the fewest odd pieces with which it still is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from studies.random_models.comparing import compared
from studies.random_models.counting import kind_of
from studies.random_models.describing import odd_pieces
from studies.random_models.drawing import CHOICES, reconciled
from studies.random_models.specification import Specification


def faults(spec: Specification, verdict: str = "wrong") -> list[str]:
    """The kinds of items with this verdict, in the order in which they were met."""
    kinds = (kind_of((item.name,)) for item in compared(spec).items if item.verdict == verdict)
    return list(dict.fromkeys(kinds))


def reduced(spec: Specification, is_faulty: Callable[[Specification], bool]) -> Specification:
    """`spec` with as many pieces as possible put back to the plain choice, one after the other, while `is_faulty` holds."""
    before = None
    while before != spec:  # a piece may have been held by one that came later
        before = spec
        for name in odd_pieces(spec):
            plain: dict[str, Any] = {name: next(iter(CHOICES[name]))}
            plainer = reconciled(dataclasses.replace(spec, **plain))
            if len(odd_pieces(plainer)) < len(odd_pieces(spec)) and is_faulty(plainer):
                spec = plainer
    return spec


def causes(spec: Specification, verdict: str = "wrong") -> dict[str, Specification]:
    """For every kind of fault of one model the plainest model that still has it."""
    found: dict[str, Specification] = {}
    for kind in faults(spec, verdict):
        if not any(kind in faults(smaller, verdict) for smaller in found.values()):
            found[kind] = reduced(spec, lambda s, kind=kind: kind in faults(s, verdict))  # type: ignore[misc]
    return found
