"""Whole public calls on several models, as one table of ratios to the plain forward, with the JSON beside it.

    make bench                                 the models that a laptop runs
    python -m bench.table --out FOLDER         where the table and the JSON go
    python -m bench.table --device cuda        bfloat16, contexts up to 32,768

Each row is a run of `bench.calls` in a process of its own: ratios are taken within it, call and plain passes in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CPU = [
    ["--model", "minilm", "--calls", "diagnose", "identify", "ablate_grid", "diagnose_full", "--rounds", "5"],
    ["--model", "gpt2", "--sequences", "16", "--tokens", "128", "--calls", "diagnose", "identify", "--rounds", "3"],
    ["--model", "gpt2", "--sequences", "4", "--tokens", "1024", "--calls", "diagnose", "--rounds", "2"],
]
LARGE = [["--model", "llama", "--sequences", "2", "--tokens", "512", "--calls", "diagnose", "--rounds", "1"]]
CUDA = [
    ["--model", "minilm", "--calls", "diagnose", "identify", "ablate_grid", "diagnose_full", "--rounds", "7"],
    *(
        f"--model {model} --sequences {max(1, 8192 // n)} --tokens {n} --calls diagnose --rounds 5".split()
        for model in ("gpt2", "llama")
        for n in (512, 2048, 8192, 32768)
    ),
]
COLUMNS = ["diagnose", "diagnose_cold", "diagnose_full", "identify", "ablate_grid", "peak_ratio"]


def row(options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.calls", *options, "--peaks"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"options": options, "failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown; processor time where there is one thread, wall time otherwise."""
    lines = ["| model | batch | forward, s | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 3)]
    for found in rows:
        if "failed" in found:
            lines.append(f"| {' '.join(found['options'])} | did not run: {' '.join(found['failed'])} |")
            continue
        on_one = " 1 threads, cpu" in found["machine"]
        figures = [found.get(f"{name}_cpu" if on_one else name, found.get(name, "")) for name in COLUMNS]
        size = f"{found['sequences']} × {found['tokens']}"
        named = f"{found['model']}, {found['blocks']} blocks, {found['dtype']}"
        lines.append(f"| {named} | {size} | {found['forward_seconds']} | " + " | ".join(map(str, figures)) + " |")
    known = next((found for found in rows if "machine" in found), None)
    return "\n".join([*lines, "", "" if known is None else f"{known['machine']}; {known['versions']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--large", action="store_true", help="also a model of 1.1 billion parameters (5 GB)")
    given = parser.parse_args()
    wanted = CPU + LARGE * given.large
    if given.device == "cuda":
        wanted = [[*options, "--device", "cuda", "--dtype", "bfloat16"] for options in CUDA]
    rows = []
    given.out.mkdir(parents=True, exist_ok=True)
    for options in wanted:
        rows.append(row(options))
        print(table(rows).splitlines()[len(rows) + 1], file=sys.stderr, flush=True)
        (given.out / f"bench-{given.device}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (given.out / f"bench-{given.device}.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
