"""A look of the monitor against a training step, as a ratio taken in one run.

    make bench                     a decoder of MiniLM's size, training batch 64 x 128, probe 8 x 128
    python -m bench.monitor --help other sizes

The time of each look is divided by the mean of the training steps before and after it. The median of these ratios is reported, and
what a look costs on average if it comes every 50 steps. Time is that of the process, so that other processes on the machine count
less. The aim, which nothing enforces: a monitored step takes at most 1.10 steps, and 1.005 on average at every=50.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import uncollapse as uc

VOCABULARY = 1000  # a larger one makes the step longer and the look no longer


def taken(action: Callable[[], object]) -> float:
    """Seconds of this process."""
    begun = time.process_time()
    action()
    return time.process_time() - begun


def measured(sequences: int, tokens: int, probed: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=384, n_layer=6, n_head=12, n_positions=tokens, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ids = torch.randint(3, VOCABULARY, (sequences, tokens))

    def step() -> None:
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    monitor = uc.Monitor(model, [{"input_ids": torch.randint(3, VOCABULARY, (probed, tokens))}])
    step()
    monitor.look(0)
    steps, looks, ratios = [taken(step)], [], []
    for number in range(1, rounds + 1):
        looks.append(taken(lambda number=number: monitor.look(number)))
        steps.append(taken(step))
        ratios.append(2 * looks[-1] / (steps[-2] + steps[-1]))
    return {
        "step_seconds": round(statistics.median(steps), 3),
        "monitored_step": round(1 + statistics.median(ratios), 3),
        "monitored_step_range": [round(1 + min(ratios), 3), round(1 + max(ratios), 3)],
        "on_average_at_every_50": round(1 + statistics.fmean(ratios) / 50, 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--probed", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measured(given.sequences, given.tokens, given.probed, given.rounds)))
