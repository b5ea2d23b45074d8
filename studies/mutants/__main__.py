"""Draw, run, report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from studies import mutants
from studies.mutants.drawing import PACKAGES, ROOT, Mutant, change, drawn, equivalents, modules, mutated
from studies.mutants.reaching import reached
from studies.mutants.running import Outcome, outcome, preload


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant, the line it changed, and how many tests it met at most."""

    mutant: Mutant
    outcome: Outcome
    before: str
    after: str
    tests: int
    seconds: float

    @property
    def at(self) -> tuple[str, str, str]:
        """What names the change in equivalents.toml."""
        return self.mutant.path, self.before, self.after


def main() -> None:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(
        description=mutants.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="studies.mutants"
    )
    parser.add_argument("--count", type=int, default=200, help="how many mutants to draw (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], help="a path below src/uncollapse, or how it begins")
    parser.add_argument("--out", type=Path, help="one JSON line a mutant; goes on where it stopped")
    parser.add_argument("--again", action="store_true", help="with --out: try anew those that survived")
    parser.add_argument(
        "--reach", type=Path, help="keep here which test reaches which line; delete it when tests change"
    )
    given = parser.parse_args()
    os.chdir(ROOT)
    sample, total = drawn(modules(given.only), given.count, given.seed)
    if not sample:
        sys.exit(
            f"mutants: expected modules of {', '.join(PACKAGES)}, got --only {' '.join(given.only)}. Nothing to draw."
        )
    known = {v.mutant: v for v in _read(given.out) if not (given.again and v.outcome == "survived")}
    preload()
    start, verdicts = time.monotonic(), []
    reach = reached(given.reach) if any(mutant not in known for mutant in sample) else None
    for number, mutant in enumerate(sample, 1):
        verdict = known.get(mutant)
        if verdict is None:
            assert reach is not None
            begun, source, tests = time.monotonic(), mutated(mutant), reach.asked(mutant)
            limit = 30 + 10 * sum(reach.seconds[test] for test in tests)
            found = outcome(mutant, source, tests, limit) if tests else "survived"
            verdict = Verdict(mutant, found, *change(mutant, source), len(tests), time.monotonic() - begun)
            if given.out is not None:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
        verdicts.append(verdict)
        if number % 20 == 0:
            print(f"{number} of {len(sample)}", file=sys.stderr, flush=True)
    _report(verdicts, total, given.seed, (time.monotonic() - start) / 60)


def _report(verdicts: list[Verdict], total: int, seed: int, minutes: float) -> None:
    reasons = {(each.path, each.before, each.after): each.why for each in equivalents()}
    alive = [v for v in verdicts if v.outcome == "survived"]
    for v in sorted(alive, key=lambda v: (v.mutant.path, v.mutant.line)):
        name = "equivalent" if v.at in reasons else "survived" if v.tests else "no test  "
        print(f"{name}  {v.mutant.path}:{v.mutant.line}: {v.before}  →  {v.after}")
    same = Counter(v.mutant.path.partition("/")[0] for v in alive if v.at in reasons)
    left = Counter(v.mutant.path.partition("/")[0] for v in alive if v.at not in reasons)
    every = Counter(v.mutant.path.partition("/")[0] for v in verdicts)
    for package in every:
        count = every[package] - same[package]
        print(f"{package}: {count - left[package]} of {count} die; {same[package]} more are equivalent")
    count = len(verdicts) - same.total()
    print(
        f"{count - left.total()} of {count} mutants die ({1 - left.total() / max(1, count):.1%}); {same.total()} more are "
        f"equivalent. Drawn from {total} with seed {seed}; {minutes:.0f} minutes."
    )


def _read(path: Path | None) -> Iterator[Verdict]:
    if path is None or not path.exists():
        return
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that was cut short
            found = json.loads(line)
            yield Verdict(Mutant(**found.pop("mutant")), **found)


if __name__ == "__main__":
    main()
