"""What a sweep takes, counted beforehand and then measured: processor time, memory and bytes written.

    python -m bench.scale                 three checkpoints of a random Llama of width 384
    python -m bench.scale --width 1024    a larger one

The constants of the machine (a pass, a proof, a megabyte hashed) are measured in one process, for one checkpoint. The count that
docs/scale.md explains is made of them. Then the sweep runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import uncollapse as uc
from bench.diagnose import highest_resident, plain
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.sources import load_model

PASSES = 1.6  # a warm diagnosis in passes: docs/performance.md
KEPT = 20  # MiB: what a process keeps of what it has freed, and the anatomy
CHECKPOINTS, SEQUENCES, TOKENS, BATCH = 3, 16, 256, 4


def config(width: int, blocks: int) -> Any:
    return transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=8192,
        max_position_embeddings=TOKENS,
    )


def probe() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(3, 8192, (SEQUENCES, TOKENS), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in whole.split(BATCH)]


def processor(action: Callable[[], object]) -> float:
    """Seconds of this process's processor time: other work on the machine does not count."""
    start = time.process_time()
    action()
    return time.process_time() - start


def swept(folder: Path) -> None:
    """The measured run, in a process of its own, once everything is imported."""
    uc.sweep(folder / "warm", out=folder / "warm-out", batches=probe())
    before = highest_resident()

    def run() -> object:
        return uc.sweep(folder / "run", out=folder / "out", batches=probe())

    taken, again = processor(run), processor(run)
    print(json.dumps({"before": before, "highest": highest_resident(), "seconds": taken, "again": again}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=384)
    options.add_argument("--blocks", type=int, default=8)
    options.add_argument("--swept", help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.swept:
        swept(Path(given.swept))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given.width, given.blocks)


def measure(folder: Path, width: int, blocks: int) -> None:
    torch.manual_seed(0)
    transformers.LlamaModel(config(64, 1)).save_pretrained(folder / "warm")
    model = transformers.LlamaModel(config(width, blocks)).eval()
    with torch.no_grad():
        for block in model.layers:  # attention that chooses something: else it looks as at the start of training
            block.self_attn.q_proj.weight *= 20
            block.self_attn.k_proj.weight *= 20
            block.self_attn.v_proj.weight *= 5
            block.self_attn.o_proj.weight *= 5
    for step in range(CHECKPOINTS):
        with torch.no_grad():
            model.norm.weight.add_(0.01)
        model.save_pretrained(folder / "run" / f"checkpoint-{step}")
    file = folder / "run" / "checkpoint-0" / "model.safetensors"
    batches = probe()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    plain(model, batches[:1])
    hashing = processor(lambda: hashlib.sha256(file.read_bytes()).digest())
    load_model(str(file.parent))
    loading = processor(lambda: load_model(str(file.parent)))
    proof = processor(lambda: proved_anatomy(model, batches[0]))
    cold = processor(lambda: uc.diagnose(model, batches=batches))
    passes = [processor(lambda: plain(model, batches))]
    warm = processor(lambda: uc.diagnose(model, batches=batches))
    passes.append(processor(lambda: plain(model, batches)))
    one_pass = statistics.mean(passes)
    each = {"hash": hashing, "load": loading, "proof": proof, "weights once": cold - warm, "passes": PASSES * one_pass}
    run = subprocess.run(
        [sys.executable, "-m", "bench.scale", "--swept", str(folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    places = BATCH * TOKENS
    # A block in single precision, what is measured of it in double precision, and spectra.
    activations = 4 * places * (12 * width + 3 * 4 * width) + 8 * places * (4 * width + 3 * 4 * width)
    activations += 3 * 8 * BATCH * min(TOKENS, width) ** 2
    records = [path.stat().st_size for path in (folder / "out").glob("*.json.gz")]
    mib = 2**20
    parameters = sum(p.numel() for p in model.parameters())
    tokens = f"{SEQUENCES} x {TOKENS} tokens"
    counted, spent = CHECKPOINTS * sum(each.values()), found["seconds"]
    held, most = (weights + activations) / mib + KEPT, found["highest"] - found["before"]
    print(f"{parameters:,} parameters, {weights / mib:.0f} MiB; one pass of {tokens} {one_pass:.2f} s")
    print(f"a warm diagnosis: {warm / one_pass:.2f} passes, taken for {PASSES}")
    print("counted for a checkpoint: " + ", ".join(f"{name} {value:.2f} s" for name, value in each.items()))
    print(f"processor seconds for {CHECKPOINTS} checkpoints: counted {counted:.1f}, measured {spent:.1f}")
    print(f"processor seconds when all are there: measured {found['again']:.2f}")
    print(f"MiB beyond the start: counted {held:.0f} (weights {weights / mib:.0f}), measured {most:.0f}")
    print(f"KiB a record, gzipped: measured {max(records) / 1024:.0f}, for {blocks} blocks of {width // 64} heads")


if __name__ == "__main__":
    main()
