"""The same comparison on GPT-2's architecture, for a machine with a GPU:

    python -m studies.position_gates --device cuda --size 124m --text FILE

`124m` is GPT-2 small (12 blocks, width 768, 12 heads, 124 million parameters), its gates put in by `install_gates`, trained in
bfloat16 autocast on the bytes of the given files; the last twentieth of them is held out. The vocabulary stays that of
GPT-2, of which bytes use 256 entries, so that the size is the one named. `tiny` goes the same way in seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uncollapse as uc
from studies.language_models import corpus
from studies.position_gates import training

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Size:
    """What differs from GPT-2's own configuration, and how it is trained."""

    context: int
    batch: int
    rate: float
    steps: int
    every: int
    config: dict[str, Any] = field(default_factory=dict)


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # GPT-2's own lies outside a vocabulary of bytes
SIZES = {
    "124m": Size(context=1024, batch=16, rate=6e-4, steps=2000, every=100),
    "tiny": Size(
        32, 8, 2e-3, 4, 2, {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 256, **_ENDS}
    ),
}


def model(size: Size, arm: str, seed: int, device: str) -> Any:
    """GPT-2 without dropout; the weights of a seed are the same in every arm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(seed)
    made = GPT2LMHeadModel(GPT2Config(**size.config, **no_dropout, use_cache=False)).to(device)
    if arm != "plain":
        perturbation = training.PERTURBATION if arm == "perturbed" else 0.0
        uc.install_gates(
            made, batch={"input_ids": torch.arange(8, device=device)[None]}, perturbation=perturbation, seed=seed
        )
    return made.train()


def text(files: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Bytes to train on and to be judged on."""
    if not files:
        return corpus()
    given = torch.frombuffer(bytearray(b"\n".join(Path(name).read_bytes() for name in files)), dtype=torch.uint8).long()
    cut = len(given) - len(given) // 20
    return given[:cut], given[cut:]


def run(
    name: str, arm: str, seed: int, device: str = "cpu", files: Sequence[str] = (), steps: int | None = None
) -> dict[str, Any]:
    """One training, noted as those of the small model are."""
    size = SIZES[name]
    learned, held_out = text(files)
    made = model(size, arm, seed, device)
    judge = training.windows(held_out, size.context, most=64)
    recipe = {"context": size.context, "batch": size.batch, "rate": size.rate}
    found, _ = training.record(made, arm, seed, learned, judge, steps or size.steps, size.every, **recipe)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    return found | {"size": name, "where": where}
