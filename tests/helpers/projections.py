"""Output projections of real models, found and hooked without the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Where each family keeps its output projections, from its source code; a decoder's self-attention before its cross-attention.
PROJECTIONS = {
    "bert": "attention.output.dense",
    "roberta": "attention.output.dense",
    "electra": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "albert": "attention.dense",
    "mpnet": "attention.attn.o",
    "deberta_v2": "attention.output.dense",
    "modernbert": "attn.Wo",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "gptj": "attn.out_proj",
    "opt": "self_attn.out_proj",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "phi": "self_attn.dense",
    "llama": "self_attn.o_proj",
    "mistral": "self_attn.o_proj",
    "mixtral": "self_attn.o_proj",
    "qwen2": "self_attn.o_proj",
    "qwen3": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj",
    "gemma3": "self_attn.o_proj",
    "olmo2": "self_attn.o_proj",
    "cohere": "self_attn.o_proj",
    "granite": "self_attn.o_proj",
    "deepseek_v3": "self_attn.o_proj",
    "gpt_oss": "self_attn.o_proj",
    "t5": "Attention.o",
    "bart": "attn.out_proj",
    "vit": "attention.o_proj",
    "dinov2": "attention.o_proj",
    "clip_vision": "self_attn.out_proj",
    "clip_text": "self_attn.out_proj",
    "whisper_encoder": "self_attn.out_proj",
    "wav2vec2": "attention.out_proj",
}


def projections(model: nn.Module, suffix: str) -> list[nn.Module]:
    found = [m for name, m in model.named_modules() if name.endswith(suffix)]
    assert found, f"no module ends in {suffix}: {[n for n, _ in model.named_modules()][:40]}"
    return found


def hooked(model: nn.Module, modules: list[nn.Module], batch: dict[str, Any]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Input and output of every run of the modules in one plain pass, in the order they ran."""
    runs: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [m.register_forward_hook(lambda m, args, out: runs.append((m, args[0], out))) for m in modules]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return runs


def weight_of(module: nn.Module) -> np.ndarray:
    """[mixed, width] in float64."""
    weight = module.weight.detach().double().numpy()
    return weight if type(module).__name__ == "Conv1D" else weight.T
