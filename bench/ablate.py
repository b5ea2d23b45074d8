"""The eight runs of `ablate --grid` against one plain core diagnosis: speed and memory, as ratios taken in one run.

    make bench                     the packaged MiniLM, 64 real texts of up to 128 tokens
    python -m bench.ablate --help  other sizes

Both sides are the public calls, on the same loaded model whose anatomy is known, and take turns: each grid is held against
the mean of the diagnoses before and after it, and the median of these ratios is reported. Memory is the peak resident size
of a process of its own for each, in ratio to the diagnosis.
Bounds: 8.5 in time, 1.3 in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import uncollapse as uc
from bench.diagnose import highest_resident, seconds
from uncollapse import sources


def arguments(sequences: int, max_tokens: int) -> dict[str, Any]:
    loaded = sources.load_model("demo")
    texts = sources.default_texts(64, 0)
    texts = (texts * (sequences // len(texts) + 1))[:sequences]
    return {"model": loaded.model, "tokenizer": loaded.tokenizer, "texts": texts, "max_tokens": max_tokens}


def speed(sequences: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    given = arguments(sequences, max_tokens)
    uc.diagnose(**given)
    diagnoses, ratios = [seconds(lambda: uc.diagnose(**given))], []
    for _ in range(rounds):
        grid = seconds(lambda: uc.ablate(**given, grid=True))
        diagnoses.append(seconds(lambda: uc.diagnose(**given)))
        ratios.append(2 * grid / (diagnoses[-2] + diagnoses[-1]))
    return {
        "diagnosis_seconds": round(statistics.median(diagnoses), 3),
        "grid_over_diagnosis": round(statistics.median(ratios), 2),
        "grid_over_diagnosis_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def peak(what: str, sequences: int, max_tokens: int) -> float:
    """Peak resident MiB of a fresh process that does one thing."""
    command = [sys.executable, "-m", "bench.ablate", "--peak-of", what, "--sequences", str(sequences)]
    done = subprocess.run([*command, "--max-tokens", str(max_tokens)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(what: str, sequences: int, max_tokens: int) -> None:
    given = arguments(sequences, max_tokens)
    if what == "diagnosis":
        uc.diagnose(**given)
    else:
        uc.ablate(**given, grid=True)
    print(highest_resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", choices=["diagnosis", "grid"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options.sequences, options.max_tokens)
        return
    result = speed(options.sequences, options.max_tokens, options.rounds)
    peaks = {what: peak(what, options.sequences, options.max_tokens) for what in ("diagnosis", "grid")}
    result["grid_peak_over_diagnosis"] = round(peaks["grid"] / peaks["diagnosis"], 3)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
