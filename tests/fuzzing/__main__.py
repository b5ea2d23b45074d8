"""`python -m tests.fuzzing`: so many cases, their figures on the screen and in a document."""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.fuzzing.checkpoints import checkpoint
from tests.fuzzing.command_line import command_line
from tests.fuzzing.functions import pure_function
from tests.fuzzing.models import borrowed_model
from tests.fuzzing.readers import text_file
from tests.fuzzing.records import stored_record

BEGIN, END = "<!-- written by python -m tests.fuzzing -->", "<!-- to here -->"
HEAD = "| target | cases | computed | refused | faults | seconds |\n|---|--:|--:|--:|--:|--:|"

TARGETS: dict[str, tuple[Callable[[int], str], float]] = {
    "pure functions": (pure_function, 0.97),
    "stored records": (stored_record, 0.01),
    "texts": (text_file, 0.008),
    "command lines": (command_line, 0.005),
    "checkpoints": (checkpoint, 0.004),
    "borrowed models": (borrowed_model, 0.003),
}
"""Each with its share of the cases: about as many as it can do in a minute."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--write", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, str] = {}
    faults: list[str] = []
    for name, (target, share) in TARGETS.items():
        if chosen.only not in {None, name}:
            continue
        counts: collections.Counter[str] = collections.Counter()
        begun, cases = time.monotonic(), max(1, round(chosen.count * share))
        for seed in range(chosen.seed, chosen.seed + cases):
            try:
                counts[target(seed)] += 1
            except Exception as error:  # whatever it is: that is what is looked for
                counts["fault"] += 1
                faults.append(f"{name}, seed {seed}: {type(error).__name__}: {str(error)[:600]}")
        rows[name] = (
            f"| {name} | {cases:,} | {counts['computed']:,} | {counts['refused']:,} | {counts['fault']:,} | "
            f"{time.monotonic() - begun:.0f} |"
        )
        print(rows[name], flush=True)
    print(*faults[:40], sep="\n")
    if chosen.write:
        write(chosen.write, rows)


def write(document: Path, rows: dict[str, str]) -> None:
    """Put the rows into the document's table, in the place of those of the same targets; the others stay."""
    before, rest = document.read_text().split(BEGIN)
    old, after = rest.split(END)
    kept = {name: line for line in old.splitlines() for name in TARGETS if line.startswith(f"| {name} |")} | rows
    table = [HEAD, *(kept[name] for name in TARGETS if name in kept)]
    document.write_text(before + "\n".join([BEGIN, *table, ""]) + END + after)


if __name__ == "__main__":
    main()
