"""A look of the monitor against a training step, as a ratio taken in one run.

    make bench                                a decoder of MiniLM's size, training batch 64 x 128, probe 8 x 128
    python -m bench.monitor --gpt2            GPT-2 of 124M parameters, training batch 4 x 256, probe 2 x 128
    python -m bench.monitor --growth 10000    memory and time of a look, over so many looks at a tiny model
    python -m bench.monitor --help            other sizes

The time of each look is divided by the mean of the training steps before and after it. The median of these ratios is reported, and
what a look costs on average if it comes every 50 steps; every tenth look decomposes matrices and counts as one of ten. Time is that
of the process, so that other processes on the machine count less. The aim, which nothing enforces: a monitored step takes at most
1.10 steps, and 1.005 on average at every=50.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import uncollapse as uc


def taken(action: Callable[[], object]) -> float:
    """Seconds of this process."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


@dataclass(frozen=True)
class Size:
    """A model, its training batch and the probe."""

    width: int = 384
    blocks: int = 6
    heads: int = 12
    vocabulary: int = 1000  # a larger one makes the step longer and the look no longer
    sequences: int = 64
    tokens: int = 128
    probed: int = 8
    probed_tokens: int = 128


WINDOW = 100  # looks
GPT2 = Size(768, 12, 12, 50257, 4, 256, 2, 128)


def built(size: Size) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=size.width,
        n_layer=size.blocks,
        n_head=size.heads,
        n_positions=max(size.tokens, size.probed_tokens),
        vocab_size=size.vocabulary,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).train()


def measured(size: Size, rounds: int) -> dict[str, Any]:
    model = built(size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(3, size.vocabulary, (size.sequences, size.tokens))

    def step() -> None:
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    probe = torch.randint(3, size.vocabulary, (size.probed, size.probed_tokens))
    monitor = uc.Monitor(model, [{"input_ids": probe}])
    step()
    monitor.look(0)
    steps, looks, ratios = [taken(step)], [], []
    for number in range(1, rounds + 1):
        looks.append(taken(lambda number=number: monitor.look(number)))
        steps.append(taken(step))
        ratios.append(2 * looks[-1] / (steps[-2] + steps[-1]))
    while not monitor._decomposes:
        monitor.look(number := number + 1)
    tenth = taken(lambda: monitor.look(number + 1)) / statistics.median(steps)
    usual = statistics.median(ratios)
    return {
        "step_seconds": round(statistics.median(steps), 3),
        "monitored_step": round(1 + usual, 3),
        "monitored_step_range": [round(1 + min(ratios), 3), round(1 + max(ratios), 3)],
        "monitored_step_of_every_tenth_look": round(1 + tenth, 3),
        "on_average_at_every_50": round(1 + (0.9 * usual + 0.1 * tenth) / 50, 4),
    }


def growth(looks: int) -> dict[str, Any]:
    """What a look takes, and what the process holds, while a tiny model is looked at after every step: at look 100, 1,000, 10,000
    and so on. Times are medians of the last `WINDOW` looks, and of the last that decompose matrices. `training_steps` is that of
    the looks, in training steps of the same time. Then, whether model and monitor are freed."""
    size = Size(32, 2, 4, 64, 4, 16, 2, 16)
    model, found = built(size), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps: deque[float] = deque(maxlen=WINDOW)
    usual: deque[float] = deque(maxlen=WINDOW)
    decomposing: deque[float] = deque(maxlen=WINDOW // 10)

    with tempfile.TemporaryDirectory() as folder:
        probe = [{"input_ids": torch.randint(3, size.vocabulary, (size.probed, size.probed_tokens))}]
        monitor = uc.Monitor(model, probe, every=1, trail=f"{folder}/run.jsonl")
        marks = {10**n for n in range(2, 10)} | {looks}
        for number in range(1, looks + 1):
            steps.append(taken(partial(train, model, optimizer, size)))
            times = decomposing if monitor._decomposes else usual
            times.append(taken(partial(monitor.step, number)))
            if number in marks:
                one, tenth, training = (statistics.median(each) for each in (usual, decomposing, steps))
                found.append(
                    {
                        "look": number,
                        "milliseconds": round(1e3 * one, 2),
                        "every_tenth": round(1e3 * tenth, 2),
                        "training_steps": round(one / training, 2),
                        "resident_mib": resident(),
                        "alarms": len(monitor.alarms),
                        "trail_mib": round(os.path.getsize(f"{folder}/run.jsonl") / 2**20, 1),
                    }
                )
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    gone = weakref.ref(model), weakref.ref(monitor)
    del model, monitor, optimizer
    return {"looks": found, "freed": all(reference() is None for reference in gone)}


def train(model: Any, optimizer: torch.optim.Optimizer, size: Size) -> None:
    """One step on random tokens."""
    ids = torch.randint(3, size.vocabulary, (size.sequences, size.tokens))
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def resident() -> float:
    """MiB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--growth", type=int, default=0)
    for name in ("sequences", "tokens", "probed", "probed_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.growth:
        print(json.dumps(growth(given.growth)))
    else:
        own = {name: vars(given)[name] for name in ("sequences", "tokens", "probed", "probed_tokens")}
        chosen = replace(GPT2 if given.gpt2 else Size(), **{k: v for k, v in own.items() if v is not None})
        print(json.dumps(measured(chosen, given.rounds)))
