"""Whole public calls against the plain forward passes over the same length-sorted batches, in one run.

    python -m bench.calls                    the packaged MiniLM, 64 real texts of up to 128 tokens
    python -m bench.calls --model llama --device cuda --dtype bfloat16 --tokens 2048
    python -m bench.table                    several models, as one table

Every call is timed between two plain passes, and its ratio is to their mean, so that a machine whose speed drifts slows both;
the median of the ratios is reported, of wall time and, with one thread, of processor time (`_cpu`), which other processes on the
machine disturb less. *Cold* is the first call for a model object: its anatomy is proved, and what its weights
say is computed. *Warm* is any later one. The models other than MiniLM have random weights in the published shape.

Memory is the peak of a call over that of the plain passes. On the CPU it is the resident size of a process of its own for each, so
that the cold call before the warm one counts too; on CUDA what torch allocated there in the warm one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import uncollapse as uc
from bench.diagnose import highest_resident, plain
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
        max_position_embeddings=max(2048, tokens),
    )
    return _random(config, sequences, tokens)


def _random(config: Any, sequences: int, tokens: int) -> tuple[Any, Batches]:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    return model, [{"input_ids": torch.randint(5, 30000, (sequences, tokens))}]


MODELS = {"minilm": (minilm, 64, 128), "gpt2": (gpt2, 4, 1024), "llama": (llama, 2, 512)}


def placed(model: Any, batches: Batches, device: str, dtype: str | None) -> tuple[Any, Batches]:
    """Both on a device; the model's weights in a number format, or in their own."""
    model = model.to(device, None if dtype is None else getattr(torch, dtype))
    return model, [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def peak(model: Any, batches: Batches, what: str) -> float:
    """MiB at the highest, of this process or on its CUDA device."""
    run = plain if what == "plain" else CALLS[what]
    on_cuda = next(model.parameters()).is_cuda
    for _ in range(2):
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        run(model, batches) if what == "plain" else run(model, batches=batches)
    if on_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return highest_resident()


def _peak_apart(what: str) -> float:
    """`peak` in a process of its own, with the same options."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.calls", *sys.argv[1:], "--peak-of", what],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def measured(model: Any, batches: Batches, calls: list[str], rounds: int) -> dict[str, Any]:
    clocks = {"": time.perf_counter, "_cpu": time.process_time}
    CALLS[calls[0]](model, batches=batches)  # its anatomy and its weights are known from here on
    forward = [_took(functools.partial(plain, model, batches), clocks)]
    found: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for call in calls:
            subject = model if number else copy.deepcopy(model)  # of which nothing is known yet
            took = _took(functools.partial(CALLS[call], subject, batches=batches), clocks)
            forward.append(_took(functools.partial(plain, model, batches), clocks))
            for clock in clocks:
                ratio = 2 * took[clock] / (forward[-2][clock] + forward[-1][clock])
                found.setdefault(f"{call}{clock}" if number else f"{call}_cold{clock}", []).append(ratio)
    said: dict[str, Any] = {"forward_seconds": round(statistics.median(f[""] for f in forward), 3)}
    for name, ratios in found.items():
        said[name] = round(statistics.median(ratios), 3)
        if len(ratios) > 1:
            said[f"{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return said


def _took(action: Callable[[], Any], clocks: dict[str, Callable[[], float]]) -> dict[str, float]:
    def now() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    now()
    start = {name: clock() for name, clock in clocks.items()}
    action()
    now()
    return {name: clock() - start[name] for name, clock in clocks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="minilm")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the published shape has")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=["diagnose", "identify", "ablate_grid"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--peaks", action="store_true", help="also the peak memory of the first of --calls")
    parser.add_argument("--peak-of", choices=["plain", *CALLS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    build, sequences, tokens = MODELS[options.model]
    sequences, tokens = options.sequences or sequences, options.tokens or tokens
    model, batches = placed(*build(sequences, tokens, options.blocks), options.device, options.dtype)
    if options.peak_of:
        print(peak(model, batches, options.peak_of))
        return
    said = {
        "model": options.model,
        "blocks": len(model.encoder.layer) if options.model == "minilm" else model.config.num_hidden_layers,
        "sequences": sequences,
        "tokens": tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {_device_name(options.device)}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    said |= measured(model, batches, options.calls, options.rounds)
    if options.peaks:
        said["peak_ratio"] = round(_peak_apart(options.calls[0]) / _peak_apart("plain"), 3)
    print(json.dumps(said, indent=1))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
