"""Two processes on loopback, and whether two records say the same."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as d
import transformers as hf
from torch import Tensor

Checks = Callable[[int, dict[str, Any]], None]
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def in_two(checks: Checks, folder: Path) -> list[dict[str, Any]]:
    """What `checks` noted in each of two processes. It is called with the rank and the dict to note in."""
    torch.multiprocessing.spawn(_worker, (checks, str(folder)), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    return [pickle.loads((folder / f"{rank}").read_bytes()) for rank in range(2)]


def _worker(rank: int, checks: Checks, folder: str) -> None:
    torch.set_num_threads(1)
    d.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    noted: dict[str, Any] = {}
    try:
        checks(rank, noted)
    except Exception:  # whatever it is: the test shows it
        noted["failed"] = traceback.format_exc()
    Path(folder, f"{rank}").write_bytes(pickle.dumps(noted))
    d.destroy_process_group()
    end_at_once(0)


def end_at_once(status: int) -> NoReturn:
    """End this process at once, without taking Python apart. What DDP holds keeps gloo's threads beyond their group, and one that
    lets go of a tensor while the interpreter ends aborts the process (pytorch/pytorch#190489)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval().to(dtype)


def experts(dtype: torch.dtype = torch.float64) -> Any:
    """A model with two routers."""
    torch.manual_seed(0)
    # The fused experts know no float64.
    config = hf.MixtralConfig(**SIZES, num_local_experts=4, experts_implementation="eager")
    return hf.MixtralForCausalLM(config).eval().to(dtype)


def hardly_trained() -> Any:
    """A model with norms on its queries and keys, whose gains have left their start a little and whose output layer has learnt."""
    torch.manual_seed(0)
    model: Any = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)).eval().double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[0] *= 1.1
            layer.self_attn.q_norm.weight *= 0.05  # logits so small that attention is as at the start
        model.lm_head.weight += torch.outer(torch.linspace(-1, 1, 100), torch.linspace(1, 2, 32))
    return model


def padded_batches(count: int, sequences: int = 4) -> list[dict[str, Tensor]]:
    """Batches of 12 tokens, each sequence padded another way, the first of them not at all."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = torch.randint(0, 100, (sequences, 12), generator=generator)
        lengths = torch.tensor([12 - (row + number) % 4 for row in range(sequences)])
        found.append({"input_ids": ids, "attention_mask": (torch.arange(12) < lengths[:, None]).long()})
    return found


def differences(one: Any, other: Any, tolerance: float, path: str = "") -> list[str]:
    """Where two records differ by more than `tolerance`, how many processes took part and the names of wrappers aside."""
    one, other = (asdict(each) if hasattr(each, "__dataclass_fields__") else each for each in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - {"processes"}
        return [
            line
            for key in sorted(keys, key=str)
            for line in differences(one.get(key), other.get(key), tolerance, f"{path}/{key}")
        ]
    if isinstance(one, list | tuple):
        if not isinstance(other, list | tuple) or len(one) != len(other):
            return [f"{path}: {one} {other}"]
        return [
            line
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for line in differences(a, b, tolerance, f"{path}/{i}")
        ]
    if isinstance(one, float) and isinstance(other, float):
        is_same = one == other or abs(one - other) <= tolerance * max(1.0, abs(one))
        return [] if is_same else [f"{path}: {one} {other}"]
    if isinstance(one, str) and isinstance(other, str):
        return [] if one.replace("module.", "") == other.replace("module.", "") else [f"{path}: {one} {other}"]
    return [] if one == other else [f"{path}: {one} {other}"]
