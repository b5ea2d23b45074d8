"""docs/early-warning.md from finished runs."""

from __future__ import annotations

from collections.abc import Sequence

from studies.early_warning.runs import Run


def document(runs: Sequence[Run]) -> str:
    """The report."""
    return ""
