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

TARGETS: dict[str, tuple[Callable[[int], str], float]] = {
    "pure functions": (pure_function, 0.963),
    "stored records": (stored_record, 0.015),
    "texts": (text_file, 0.01),
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
    lines = ["| target | cases | computed | refused | faults | seconds |", "|---|--:|--:|--:|--:|--:|"]
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
        lines.append(
            f"| {name} | {cases:,} | {counts['computed']:,} | {counts['refused']:,} | {counts['fault']:,} | "
            f"{time.monotonic() - begun:.0f} |"
        )
        print(lines[-1], flush=True)
    print(*faults[:40], sep="\n")
    if chosen.write:
        text = chosen.write.read_text()
        first, last = text.index(BEGIN), text.index(END)
        chosen.write.write_text(text[:first] + "\n".join([BEGIN, *lines, ""]) + text[last:])


if __name__ == "__main__":
    main()
