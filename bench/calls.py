"""Whole public calls against the plain forward passes over the same length-sorted batches, in one run.

    make bench                      the packaged MiniLM, 64 real texts of up to 128 tokens
    python -m bench.calls --help    other models and sizes

Every call is timed between two plain passes, and its ratio is to their mean, so that a machine whose speed drifts slows both;
the median of the ratios is reported. *Cold* is the first call for a model object: its anatomy is proved, and what its weights
say is computed. *Warm* is any later one. The models other than MiniLM have random weights in the published shape.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers

import uncollapse as uc
from bench.diagnose import plain, seconds
from uncollapse import sources

Batches = list[dict[str, torch.Tensor]]

CALLS: dict[str, Callable[..., Any]] = {
    "diagnose": uc.diagnose,
    "diagnose_full": functools.partial(uc.diagnose, level="full"),
    "identify": uc.identify,
    "ablate_grid": functools.partial(uc.ablate, grid=True),
}


def minilm(sequences: int, tokens: int, blocks: int | None) -> tuple[Any, Batches]:
    loaded = sources.load_model("demo")
    texts = sources.default_texts(64, 0)
    texts = (texts * (sequences // len(texts) + 1))[:sequences]
    return loaded.model, sources.tokenize(texts, loaded.tokenizer, max_tokens=tokens)


def gpt2(sequences: int, tokens: int, blocks: int | None) -> tuple[Any, Batches]:
    config = transformers.GPT2Config(n_layer=blocks or 12, n_positions=max(1024, tokens))
    return _random(config, sequences, tokens)


def llama(sequences: int, tokens: int, blocks: int | None) -> tuple[Any, Batches]:
    """The shape of TinyLlama 1.1B."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks or 22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    return _random(config, sequences, tokens)


def _random(config: Any, sequences: int, tokens: int) -> tuple[Any, Batches]:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    return model, [{"input_ids": torch.randint(5, 30000, (sequences, tokens))}]


MODELS = {"minilm": (minilm, 64, 128), "gpt2": (gpt2, 4, 1024), "llama": (llama, 2, 512)}


def measured(model: Any, batches: Batches, calls: list[str], rounds: int) -> dict[str, Any]:
    plain(model, batches)
    forward = [seconds(lambda: plain(model, batches))]
    cold: dict[str, float] = {}
    ratios: dict[str, list[float]] = {call: [] for call in calls}
    for number in range(rounds + 1):
        for call in calls:
            if not number:
                uc.forget(model)
            took = seconds(functools.partial(CALLS[call], model, batches=batches))
            forward.append(seconds(lambda: plain(model, batches)))
            ratio = 2 * took / (forward[-2] + forward[-1])
            if number:
                ratios[call].append(ratio)
            else:
                cold[call] = ratio
    found: dict[str, Any] = {"forward_seconds": round(statistics.median(forward), 3)}
    for call in calls:
        found[f"{call}_cold"] = round(cold[call], 2)
        if ratios[call]:
            found[call] = round(statistics.median(ratios[call]), 3)
            found[f"{call}_range"] = [round(min(ratios[call]), 3), round(max(ratios[call]), 3)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the published shape has")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=["diagnose", "identify", "ablate_grid"])
    options = parser.parse_args()
    build, sequences, tokens = MODELS[options.model]
    sequences, tokens = options.sequences or sequences, options.tokens or tokens
    model, batches = build(sequences, tokens, options.blocks)
    said = {
        "model": options.model,
        "blocks": len(model.encoder.layer) if options.model == "minilm" else model.config.num_hidden_layers,
        "sequences": sequences,
        "tokens": tokens,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {batches[0]['input_ids'].device}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(said | measured(model, batches, options.calls, options.rounds), indent=1))


if __name__ == "__main__":
    main()
