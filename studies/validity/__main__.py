"""docs/validity.md, from planted damage and what the rules say of it.

    make validity                                everything; models already measured by the same code are not run again
    python -m studies.validity --only minilm gpt2  these models anew, then the document from all that is saved

What is saved in .cache/validity are records, so that a change of a rule costs seconds and only a change of a measure costs the
runs again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing

from studies.validity import document
from studies.validity.models import SUBJECTS
from studies.validity.saved import fingerprint, measure, saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=[])
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of places in each model; 0: healthy runs alone"
    )
    parser.add_argument("--jobs", type=int, default=2, help="models at a time")
    options = parser.parse_args()
    current = fingerprint()
    wanted = options.only or [n for n in SUBJECTS if (found := saved(n)) is None or found.fingerprint != current]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        # The slowest first, so that none is left alone at the end.
        slow_first = sorted(wanted, key=lambda name: (SUBJECTS[name].is_real, name), reverse=True)
        waiting = [pool.submit(measure, name, options.scale) for name in slow_first]
        for number, done in enumerate(concurrent.futures.as_completed(waiting), 1):
            print(f"[{number}/{len(waiting)}] {done.result()}", flush=True)
    document.write({n: found for n in SUBJECTS if (found := saved(n)) is not None})


if __name__ == "__main__":
    main()
