"""Findings in a terminal: the worst first, grouped by rule."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rich.console import Console

from uncollapse.records.common import Finding
from uncollapse.report import wording
from uncollapse.report.terminal import plain

SIGNS = {"critical": "!!", "warning": "!", "info": "i"}
STYLES = {"critical": "bold red", "warning": "bold yellow", "info": "blue"}


SPELLED_OUT = 3  # how many findings of one rule are printed in full; of the rest only the places


def print_findings(found: Sequence[Finding], looked: wording.LookedAt, console: Console) -> None:
    """Print the verdict on what was looked at, then each rule that fired: where, what to do, and which symmetry it is about."""
    text = functools.partial(plain.plain, console)
    say = functools.partial(plain.say, console)
    findings = wording.worst_first(found)
    say(wording.headline(findings, looked), "bold")
    for group in wording.alike(findings):
        for finding in group[:SPELLED_OUT]:
            head = text(f"{SIGNS[finding.severity]:<3}{finding.severity}", STYLES[finding.severity])
            head.append_text(text(f"  {finding.code} ({wording.finding_place(finding)})", "bold"))
            console.print(head, highlight=False)
            say(finding.message, indent=3)
        if rest := group[SPELLED_OUT:]:
            say(f"The same at {len(rest)} more places: {wording.finding_places(rest)}.", indent=3)
        if group[0].remedy:
            say(f"Remedy: {group[0].remedy}", indent=3)
        phenomenon = group[0].phenomenon
        if phenomenon in wording.SYMMETRY_NAMES:
            symmetry = wording.SYMMETRY_NAMES[phenomenon]
            say(f"Symmetry: {symmetry} ({wording.PHENOMENON_NAMES[phenomenon]}).", "dim", 3)
