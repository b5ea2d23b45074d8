"""What a sweep takes, counted beforehand and then measured: time, memory, bytes read and bytes written.

    python -m bench.scale                 three checkpoints of a random Llama with 60 million parameters
    python -m bench.scale --width 1024    a larger one

The constants of the machine (products a second, bytes hashed a second) are measured in the same process, just before. The count is
that of docs/scale.md. The sweep runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.diagnose import highest_resident, plain, seconds
from uncollapse.anatomy.probing import probing

CHECKPOINTS, SEQUENCES, TOKENS, BATCH = 3, 16, 256, 4
PASSES = 1.6  # a warm diagnosis in passes; docs/performance.md
READS = 25  # how often the weights are read while the anatomy is proved, by passes of a few tokens


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


def swept(folder: str) -> None:
    """The measured run, in a process of its own: what it held before, and when it was done."""
    import uncollapse as uc

    before = highest_resident()
    batches = probe()
    taken = seconds(lambda: uc.sweep(Path(folder) / "run", out=Path(folder) / "out", batches=batches))
    again = seconds(lambda: uc.sweep(Path(folder) / "run", out=Path(folder) / "out", batches=batches))
    print(json.dumps({"before": before, "highest": highest_resident(), "seconds": taken, "again": again}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--blocks", type=int, default=12)
    options.add_argument("--swept", help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.swept:
        swept(given.swept)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given.width, given.blocks)


def measure(folder: Path, width: int, blocks: int) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaModel(config(width, blocks)).eval()
    for step in range(CHECKPOINTS):
        with torch.no_grad():
            model.norm.weight.add_(0.01)
        model.save_pretrained(folder / "run" / f"checkpoint-{step}")
    batches = probe()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    few = {"input_ids": batches[0]["input_ids"][:3, :7]}
    plain(model, batches[:1])
    one_pass = min(seconds(lambda: plain(model, batches)) for _ in range(2))
    with probing(model):
        short = min(seconds(lambda: model(**few)) for _ in range(3))
    file = folder / "run" / "checkpoint-0" / "model.safetensors"
    start = time.perf_counter()
    hashlib.sha256(file.read_bytes()).digest()
    hashing = time.perf_counter() - start
    from uncollapse.sources import load_model

    loading = seconds(lambda: load_model(str(file.parent)))
    each = {"hash": hashing, "load": loading, "proof": READS * short, "passes": PASSES * one_pass}
    run = subprocess.run(
        [sys.executable, "-m", "bench.scale", "--swept", str(folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    gram = 8 * min(TOKENS, width) ** 2
    activations = BATCH * TOKENS * 4 * (4 * 4 * width + 12 * width) + 3 * BATCH * gram
    records = [path.stat().st_size for path in (folder / "out").glob("*.json.gz")]
    mib = 2**20
    print(f"weights {weights / mib:.0f} MiB, one pass of {SEQUENCES} x {TOKENS} tokens {one_pass:.2f} s")
    print("counted for a checkpoint: " + ", ".join(f"{name} {value:.2f} s" for name, value in each.items()))
    print(
        f"seconds for {CHECKPOINTS} checkpoints: counted {CHECKPOINTS * sum(each.values()):.1f}, measured {found['seconds']:.1f}"
    )
    print(f"seconds when all are there: measured {found['again']:.2f}")
    print(
        f"MiB beyond the start: counted {(weights + activations) / mib:.0f}, measured {found['highest'] - found['before']:.0f}"
    )
    print(f"KiB a record, gzipped: measured {max(records) / 1024:.0f}, for {blocks} blocks of {width // 64} heads")


if __name__ == "__main__":
    main()
