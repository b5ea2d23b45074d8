"""How much faster two processes with one thread each are than one, and what memory each takes.

    torchrun --nproc-per-node 2 -m bench.processes [BATCHES]

One process measures the whole corpus, then both share it out, in turn. Reported are the fastest wall time of each, and the median
CPU time of the busiest process; on a machine that does other things as well, only the second says something. Then the memory that a
process has gained over a corpus twice as long.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time

import torch
import torch.distributed as d

import uncollapse as uc
from uncollapse import sources

ROUNDS = 5


def _timed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], *, alone: bool) -> tuple[float, float]:
    """Wall and CPU seconds; of several processes, those of the slowest."""
    d.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    if not alone or d.get_rank() == 0:
        uc.diagnose(model, batches=batches, alone=alone)
    spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])
    d.all_reduce(spent, d.ReduceOp.MAX)
    return float(spent[0]), float(spent[1])


def main() -> None:
    torch.set_num_threads(1)
    d.init_process_group("gloo")
    loaded = sources.load_model("demo", device="cpu")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    few = sources.tokenize(sources.default_texts(64, 0), loaded.tokenizer)
    batches = [few[number * len(few) // count] for number in range(count)]  # the longest first
    uc.diagnose(loaded.model, batches=batches[:2], alone=True)  # the parts are proved once for a model
    one, two = [], []
    for _ in range(ROUNDS):
        one.append(_timed(loaded.model, batches, alone=True))
        two.append(_timed(loaded.model, batches, alone=False))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _timed(loaded.model, batches * 2, alone=False)
    gained = torch.tensor([float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)])
    d.all_reduce(gained, d.ReduceOp.MAX)
    if d.get_rank() == 0:
        figures = ("wall, the fastest", min), ("CPU of the busiest process, median", statistics.median)
        for place, (name, of) in enumerate(figures):
            first, second = (of(each[place] for each in spent) for spent in (one, two))
            print(
                f"{name} of {ROUNDS}: {first:.2f} s in one process, {second:.2f} s in two: {first / second:.2f} times as fast"
            )
        print(f"a corpus twice as long: {gained.item() / 1024:.1f} MiB more in a process")
    d.destroy_process_group()


if __name__ == "__main__":
    main()
