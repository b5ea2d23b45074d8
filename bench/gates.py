"""Position gates against none: the projection forward and backward, and the whole model forward, as ratios taken in one run.

    make bench                    projections and models of MiniLM's and GPT-2 small's size
    python -m bench.gates --help  other sizes

Both sides do the same work on the same input and take turns in one process: each gated run is held against the mean of the
plain runs before and after it, and the median of these ratios is reported with their range. Gates are open unevenly; in a
left-padded batch they differ from sequence to sequence. The gates move bytes (input and output of the projection once more
forward, three times backward), the projection multiplies matrices: the wider it is, the smaller their share.
Bounds: 1.05 for a projection forward and backward, so far met at a width of 768, not at 384; 1.02 for
a model forward.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import uncollapse as uc
from bench.diagnose import seconds
from uncollapse import sources

SIZES = {"MiniLM": (384, 12), "GPT-2 small": (768, 12)}  # width and heads


def ratio(gated: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """The median of gated / plain, both run in turns."""
    for run in (gated, plain, gated, plain):
        run()
    before, ratios, plains = seconds(plain), [], []
    for _ in range(rounds):
        with_gates, after = seconds(gated), seconds(plain)
        ratios.append(2 * with_gates / (before + after))
        plains.append(before)
        before = after
    low, *_, high = statistics.quantiles(ratios, n=20)
    return {
        "gated_over_plain": round(statistics.median(ratios), 3),
        "middle_nine_tenths": [round(low, 3), round(high, 3)],
        "plain_milliseconds": round(1000 * statistics.median(plains), 2),
    }


def left_padded(sequences: int, tokens: int) -> Tensor:
    """A mask whose rows begin at different tokens, up to half of them hidden."""
    hidden = torch.linspace(0, tokens // 2, sequences).long()
    return (torch.arange(tokens) >= hidden[:, None]).long()


def projection(width: int, heads: int, sequences: int, tokens: int, rounds: int, padded: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = nn.Linear(width, width)
    gated = uc.PositionGatedProjection(copy.deepcopy(plain), heads, perturbation=0.5)
    x, dy = torch.randn(sequences, tokens, width, requires_grad=True), torch.randn(sequences, tokens, width)
    positions = (left_padded(sequences, tokens).cumsum(-1) - 1).clamp(min=0) if padded else None

    def with_gates() -> None:
        gated(x, positions).backward(dy)

    def without() -> None:
        plain(x).backward(dy)

    return ratio(with_gates, without, rounds)


def model_forward(name: str, sequences: int, tokens: int, rounds: int, padded: bool) -> dict[str, Any]:
    width, heads = SIZES[name]
    torch.manual_seed(0)
    if name == "MiniLM":
        plain = sources.load_model("demo").model
    else:
        plain = transformers.GPT2Model(
            transformers.GPT2Config(n_embd=width, n_head=heads, vocab_size=1000, bos_token_id=1, eos_token_id=2)
        ).eval()
    gated = copy.deepcopy(plain)
    batch = {"input_ids": torch.randint(5, 900, (sequences, tokens)), "attention_mask": torch.ones(sequences, tokens)}
    batch["attention_mask"] = left_padded(sequences, tokens) if padded else batch["attention_mask"].long()
    uc.install_gates(gated, batch=batch, perturbation=0.5)
    with torch.no_grad():
        return ratio(lambda: gated(**batch), lambda: plain(**batch), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    # Freed once, a large tensor keeps the allocator from giving smaller ones back to the system and fetching them anew in every
    # round. In a model its wider activations do that.
    torch.zeros(4 << 20)
    sizes = (options.sequences, options.tokens)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "sequences": sizes[0], "tokens": sizes[1]}
    for name, (width, heads) in SIZES.items():
        for padded in (False, True):
            key = f"{name}, left-padded" if padded else name
            result[f"projection forward and backward: {key}"] = projection(width, heads, *sizes, options.rounds, padded)
            rounds = max(5, options.rounds // 6)
            result[f"model forward: {key}"] = model_forward(name, *sizes, rounds, padded)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
