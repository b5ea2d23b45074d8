"""Position gates (PG-OP): every run, and their section in docs/results.md.

    python -m studies.position_gates                    everything anew, then the section
    python -m studies.position_gates --resume           only the runs that are missing
    python -m studies.position_gates --only document    nothing anew: the section from the saved numbers
    python -m studies.position_gates --device cuda --size 124m --text FILE      GPT-2 small with and without gates

Each run is kept in .cache/results/gates as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import time

from studies import results
from studies.position_gates import document, experiments, large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep the runs that are saved")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--only", choices=["document"], help="write the section from what is saved")
    parser.add_argument(
        "--size", choices=list(large.SIZES), help="a model of GPT-2's architecture instead of the small one"
    )
    parser.add_argument("--device", default="cpu", help="for --size")
    parser.add_argument("--text", action="append", default=[], help="for --size: a file to train on; repeatable")
    parser.add_argument("--steps", type=int, help="for --size: how many steps")
    options = parser.parse_args()
    place = results.SAVED / "gates.json"
    if options.size:
        experiments.large_runs(options.size, options.device, options.text, options.steps)
        if not place.is_file():
            return
    elif options.only is None:
        start = time.perf_counter()
        found = experiments.section(options.workers, options.resume)
        place.write_text(json.dumps({"seconds": round(time.perf_counter() - start), "found": found}), encoding="utf-8")
    saved = json.loads(place.read_text(encoding="utf-8"))["found"]
    document.splice(results.DOCUMENT, document.text(saved | {"large": experiments.larger()}, results.IMAGES))
    print(f"wrote {results.DOCUMENT.relative_to(results.ROOT)}", flush=True)


if __name__ == "__main__":
    main()
