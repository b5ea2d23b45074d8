"""Tiny random models of many families, built from their configs: no downloads, milliseconds each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64


@dataclass(frozen=True)
class Tiny:
    """How to build one family, and what its anatomy must look like (written from the architecture's paper or code)."""

    build: Callable[[], nn.Module]
    placement: str
    heads: int = 4
    key_value_heads: int = 4
    head_width: int = 8
    blocks: int = 3
    vision: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def _auto(config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return hf.AutoModel.from_config(copy.deepcopy(config))  # a model changes the settings it is given

    return build


_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY}
_SHORT = {**_TEXT, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Tiny] = {
    "bert": Tiny(_auto(hf.BertConfig(**_TEXT)), "post"),
    "albert": Tiny(_auto(hf.AlbertConfig(**_TEXT, embedding_size=16)), "post"),
    "gpt2": Tiny(
        _auto(
            hf.GPT2Config(
                n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
            )
        ),
        "pre",
    ),
    "llama": Tiny(_auto(hf.LlamaConfig(**_SHORT, num_key_value_heads=2)), "pre", key_value_heads=2),
    "gemma3": Tiny(
        _auto(hf.Gemma3TextConfig(**_SHORT, num_key_value_heads=2, head_dim=16, sliding_window=4)),
        "sandwich",
        key_value_heads=2,
        head_width=16,
    ),
    "gpt_neox": Tiny(_auto(hf.GPTNeoXConfig(**_SHORT)), "pre, parallel"),
    "vit": Tiny(_auto(hf.ViTConfig(**_SMALL, image_size=32, patch_size=8)), "pre", vision=True),
    "t5_encoder": Tiny(
        lambda: (
            torch.manual_seed(0),
            hf.T5EncoderModel(
                hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=VOCABULARY)
            ),
        )[1],
        "pre",
    ),
}


def text_batch(sequences: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (sequences, tokens), generator=generator),
        "attention_mask": torch.ones(sequences, tokens, dtype=torch.long),
    }


def batch_for(tiny: Tiny, sequences: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, Tensor]:
    if tiny.vision:
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(sequences, 3, 32, 32, generator=generator)}
    return text_batch(sequences, tokens, seed)
