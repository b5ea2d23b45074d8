"""Long contexts and growth: what one attention call costs at 16,384 tokens, and how a diagnosis grows with what it depends on.

    python -m bench.long                       all of it, a few minutes
    python -m bench.long --parts call          only the attention call
    python -m bench.long --parts corpus --tokens 1000000

`call`: row statistics, and the leading singular values by products, against torch's fused kernel, causal, batch 1, width 64 per
head; memory is the peak resident size of a process of its own. `model`: GPT-2 small with its positions extended, one sequence.
`growth`: exponents of processor time, fitted over doublings of one size with the others kept, beside what the count in
docs/performance.md expects. `corpus`: peak memory of a diagnosis of ten thousand tokens and of many, with the packaged MiniLM.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import uncollapse as uc
from bench.calls import gpt2, minilm
from bench.diagnose import highest_resident, plain
from uncollapse import mixing
from uncollapse.measures.line_fit import line_fit

Action = Callable[[], object]
WIDTH = 64


def seconds(action: Action) -> float:
    """Processor time with one thread, wall time with several."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    action()
    return clock() - start


def ratio(action: Action, floor: Action, rounds: int) -> float:
    """Median over rounds, each between two of the floor."""
    found = []
    for _ in range(rounds):
        before, own, after = seconds(floor), seconds(action), seconds(floor)
        found.append(2 * own / (before + after))
    return statistics.median(found)


def operands(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, WIDTH) for _ in range(3))
    return q, k, v


def actions(tokens: int, heads: int) -> dict[str, Action]:
    q, k, v = operands(tokens, heads)
    rows = functools.partial(mixing.row_statistics, q, k, causal=True)
    return {
        "forward": functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True),
        "rows": rows,
        "rows_with_susceptibility": functools.partial(rows, susceptibility=True),
        "spectra": functools.partial(mixing.leading_spectrum, q, k, causal=True),
    }


def call(tokens: int, heads: int, rounds: int) -> dict[str, Any]:
    found = actions(tokens, heads)
    floor = found.pop("forward")
    floor()
    said: dict[str, Any] = {name: round(ratio(action, floor, rounds), 2) for name, action in found.items()}
    q, k, _ = operands(tokens, heads)
    said["spectra_error"] = float(mixing.leading_spectrum(q, k, causal=True).error.max())
    peaks = {name: _apart("peak", tokens, heads, name) for name in ("forward", *found)}
    said |= {f"{name}_memory": round(peaks[name] / peaks["forward"], 3) for name in found}
    return said


def model(tokens: int, blocks: int, rounds: int) -> dict[str, Any]:
    made, batches = gpt2(1, tokens, blocks)
    said: dict[str, Any] = {"tokens": tokens, "blocks": blocks}
    for level in ("core", "full"):
        diagnose = functools.partial(uc.diagnose, made, batches=batches, level=level)
        diagnose()
        said[level] = round(ratio(diagnose, functools.partial(plain, made, batches), rounds), 2)
    return said


EXPECTED = {  # of what a diagnosis adds to the pass
    "tokens": "1 (norms, Gram matrices) to 2 (rows of attention)",
    "width": "1 (norms, copies) to 2 (Gram matrices), 3 where the tokens are more (their eigenvalues)",
    "heads": "0 (the width stays) to 1 (rows)",
    "blocks": "1",
    "sequences": "1",
}
BASE = {"tokens": 256, "width": 256, "heads": 8, "blocks": 2, "sequences": 4}
SIZES = {
    "tokens": (256, 512, 1024, 2048),
    "width": (128, 256, 512, 1024),
    "heads": (4, 8, 16, 32),
    "blocks": (2, 4, 8),
    "sequences": (4, 8, 16, 32),
}


def growth() -> dict[str, Any]:
    said = {}
    for name, sizes in SIZES.items():
        points: dict[str, list[tuple[float, float]]] = {"forward": [], "diagnose": []}
        for size in sizes:
            own = {**BASE, name: size}
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                n_embd=own["width"], n_head=own["heads"], n_layer=own["blocks"], n_positions=2048, vocab_size=1000
            )
            made = transformers.AutoModel.from_config(config).eval()
            ids = torch.randint(5, 1000, (own["sequences"], own["tokens"]))
            batches = [{"input_ids": part} for part in ids.split(4)]
            uc.diagnose(made, batches=batches)
            passed = functools.partial(plain, made, batches)
            passed()
            calls = {"forward": passed, "diagnose": functools.partial(uc.diagnose, made, batches=batches)}
            for what, action in calls.items():
                points[what].append((math.log(size), math.log(min(seconds(action) for _ in range(3)))))
        slopes = {what: line_fit([x for x, _ in p], [y for _, y in p]).slope for what, p in points.items()}
        said[name] = {what: round(slope or math.nan, 2) for what, slope in slopes.items()} | {
            "expected": EXPECTED[name]
        }
    return said


def corpus(tokens: int) -> dict[str, Any]:
    few, many = (_apart("corpus", count) for count in (10_000, tokens))
    return {"tokens": tokens, "MiB_of_ten_thousand": round(few), "MiB": round(many), "ratio": round(many / few, 3)}


def _diagnose_corpus(tokens: int) -> None:
    _, texts = minilm(64, 128, None)
    each = sum(int(batch["attention_mask"].sum()) for batch in texts)
    made, batches = minilm(64 * math.ceil(tokens / each), 128, None)
    uc.diagnose(made, batches=batches)


def _apart(what: str, *arguments: Any) -> float:
    """MiB at the highest, of a process of its own."""
    command = [sys.executable, "-m", "bench.long", "--apart", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["call", "model", "growth", "corpus"])
    parser.add_argument("--tokens", type=int, help="of `call` (16,384), `model` (8,192) or `corpus` (200,000)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apart", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.apart:
        what, *rest = given.apart
        if what == "corpus":
            _diagnose_corpus(int(rest[0]))
        else:
            actions(int(rest[0]), int(rest[1]))[rest[2]]()
        print(highest_resident())
        return
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "call": lambda: call(given.tokens or 16_384, given.heads, given.rounds),
        "model": lambda: model(given.tokens or 8_192, given.blocks, max(1, given.rounds // 3)),
        "growth": growth,
        "corpus": lambda: corpus(given.tokens or 200_000),
    }
    for name in given.parts or parts:
        print(json.dumps({name: parts[name]()}, indent=1), flush=True)


if __name__ == "__main__":
    main()
