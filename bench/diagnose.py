"""Speed and memory of a diagnosis against the plain forward passes it is made of, in one run.

    make bench                       the packaged MiniLM, 64 real texts of up to 128 tokens
    python -m bench.diagnose --help  other sizes

What is compared: `capture` on a proved anatomy, against the same model run plainly over the same length-sorted batches with
the same backend. The two take turns, so that a machine whose speed drifts slows both; the median of the pairwise ratios
is reported. The anatomy's own cost is shown beside, cold (first time for a model object) and warm (remembered). Memory is
the peak resident size of a process of its own for each variant, in ratio to the plain one.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from uncollapse import sources
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.passes import capture


def prepared(sequences: int, max_tokens: int) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    loaded = sources.load_model("demo")
    texts = sources.default_texts(64, 0)
    texts = (texts * (sequences // len(texts) + 1))[:sequences]
    return loaded.model, sources.tokenize(texts, loaded.tokenizer, max_tokens=max_tokens)


def plain(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    with probing(model):
        for batch in batches:
            model(**batch)


def highest_resident() -> float:
    """MiB of memory that this process held at the highest. Not what `getrusage` says: on Linux that begins with the peak of the
    process that started this one."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def speed(sequences: int, max_tokens: int, rounds: int) -> dict[str, Any]:
    model, batches = prepared(sequences, max_tokens)
    plain(model, batches)
    cold = seconds(lambda: proved_anatomy(model, batches[0]))
    warm = seconds(lambda: proved_anatomy(model, batches[0]))
    anatomy = proved_anatomy(model, batches[0])
    ratios: dict[str, list[float]] = {"core": [], "full": []}
    forwards = []
    for _ in range(rounds):
        for level, measured in ratios.items():
            forwards.append(seconds(lambda: plain(model, batches)))
            observing = seconds(functools.partial(capture, model, batches, anatomy, level=level))
            measured.append(observing / forwards[-1])
    return {
        "forward_seconds": round(statistics.median(forwards), 3),
        "core_ratio": round(statistics.median(ratios["core"]), 3),
        "core_ratio_range": [round(min(ratios["core"]), 3), round(max(ratios["core"]), 3)],
        "full_ratio": round(statistics.median(ratios["full"]), 3),
        "anatomy_cold_over_forward": round(cold / statistics.median(forwards), 3),
        "anatomy_warm_over_forward": round(warm / statistics.median(forwards), 4),
    }


def peak(what: str, sequences: int, max_tokens: int) -> float:
    """Peak resident MiB of a fresh process that does one thing."""
    command = [sys.executable, "-m", "bench.diagnose", "--peak-of", what, "--sequences", str(sequences)]
    done = subprocess.run([*command, "--max-tokens", str(max_tokens)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(what: str, sequences: int, max_tokens: int) -> None:
    model, batches = prepared(sequences, max_tokens)
    if what == "plain":
        plain(model, batches)
    else:
        capture(model, batches, proved_anatomy(model, batches[0]), level="core")
    print(highest_resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", choices=["plain", "core"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options.sequences, options.max_tokens)
        return
    result = speed(options.sequences, options.max_tokens, options.rounds)
    peaks = {what: peak(what, options.sequences, options.max_tokens) for what in ("plain", "core")}
    doubled = peak("core", 2 * options.sequences, options.max_tokens)
    result["core_peak_ratio"] = round(peaks["core"] / peaks["plain"], 3)
    result["core_peak_ratio_of_a_doubled_corpus"] = round(doubled / peaks["core"], 3)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
