"""Train, and write docs/early-warning.md.

python -m studies.early_warning          about an hour on one core; goes on where it stopped
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from studies.early_warning.document import CHOSEN_ON, SEEDS, document, picture
from studies.early_warning.runs import SCENARIOS, Run, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=CHOSEN_ON + 1 + SEEDS, help="the seed after the last")
    parser.add_argument("--first", type=int, default=CHOSEN_ON + 1, help="the first seed")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so many minutes")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument(
        "--runs", type=Path, default=Path(".cache/early-warning.jsonl"), help="finished runs are kept here"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    given.runs.parent.mkdir(parents=True, exist_ok=True)
    lines = given.runs.read_text("utf-8").splitlines() if given.runs.exists() else []
    done = {(r.scenario, r.seed): r for r in (Run(**json.loads(line)) for line in lines)}
    for seed in range(given.first, given.seeds):
        for scenario in SCENARIOS:
            is_late = time.monotonic() - started > 60 * given.minutes
            if is_late or given.only not in scenario.name or (scenario.name, seed) in done:
                continue
            begun = time.monotonic()
            found = done[scenario.name, seed] = run(scenario, seed)
            with given.runs.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(found)) + "\n")
            said = [f"{step} {code} {block} {against}" for step, _, code, _, block, against in found.alarms]
            took = time.monotonic() - begun
            print(f"{scenario.name}, seed {seed} ({took:.0f} s): {said or 'no alarm'} {found.others}", file=sys.stderr)
    if given.out is not None:
        given.out.write_text(document(list(done.values())), "utf-8")
        picture(list(done.values()), given.out.parent / "images" / "early-warning.svg")


if __name__ == "__main__":
    main()
