"""Many seeds, in several processes, each result kept as a line of JSON."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from studies.random_models import counting
from studies.random_models.comparing import compared

ROOT = Path(__file__).parents[2]
CHUNK = 20  # models that a process is given at a time


def fingerprint() -> str:
    """Of the package and of this study."""
    digest = hashlib.sha256()
    for folder in (ROOT / "src" / "uncollapse", Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def lines_of(seeds: list[int]) -> list[dict[str, Any]]:
    """A few comparisons, in a process of their own."""
    torch.set_num_threads(1)
    lines = []
    for seed in seeds:
        try:
            lines.append(counting.line_of(compared(seed)))
        except Exception as error:  # the study's own fault, since the package's are items: say of which model
            raise RuntimeError(f"seed {seed}: the comparison itself failed") from error
    return lines


def run(seeds: list[int], jobs: int, path: Path) -> list[dict[str, Any]]:
    """The lines of all `seeds`: those that are saved, and those that are still to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {}
    if path.exists():
        for text in path.read_text().splitlines():
            if text.endswith("}"):  # the last one may have been cut
                line = json.loads(text)
                saved[line["seed"]] = line
    missing = [seed for seed in seeds if seed not in saved]
    chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
    begun = shown = time.perf_counter()
    done = 0
    with (
        path.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        for finished in concurrent.futures.as_completed([pool.submit(lines_of, chunk) for chunk in chunks]):
            for line in finished.result():
                saved[line["seed"]] = line
                file.write(json.dumps(line) + "\n")
                done += 1
            file.flush()
            now = time.perf_counter()
            if now - shown > 10 or done == len(missing):
                shown = now
                wrong = sum(line["verdict"] == "wrong" for line in saved.values())
                left = (now - begun) / done * (len(missing) - done)
                print(
                    f"{done}/{len(missing)} models, {wrong} wrong so far, {left:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
    return [saved[seed] for seed in seeds]
