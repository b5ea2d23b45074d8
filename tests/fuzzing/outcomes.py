"""How a case may end."""

from __future__ import annotations

from collections.abc import Callable

import uncollapse as uc

COMPUTED, REFUSED = "computed", "refused"


def ended(case: Callable[[], object]) -> str:
    """Run a case: `computed`, or `refused` in one line. Anything else is raised."""
    try:
        case()
    except uc.UncollapseError as refusal:
        if "\n" in str(refusal):
            raise AssertionError(f"a refusal of several lines: {refusal}") from refusal
        return REFUSED
    return COMPUTED
