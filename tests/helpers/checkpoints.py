"""Tiny checkpoints of one training run, as a trainer leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf

from tests.helpers.tokenizers import word_tokenizer

TEXTS = ["a quick brown fox jumps over the lazy dog", "the dog rests for it", "fox and dog and fox then rests"] * 2
BROKEN_FROM = 40


def run_of(steps: list[int], folder: Path) -> Path:
    """A tiny GPT-2 at these steps. From `BROKEN_FROM` on the attention of block 1 is uniform: its queries are zero."""
    tokenizer = word_tokenizer(pad_token="<pad>")
    for step in steps:
        torch.manual_seed(step)
        model = hf.GPT2Model(
            hf.GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=32,
                vocab_size=24,
                bos_token_id=1,
                eos_token_id=1,
                initializer_range=0.4,
            )
        )
        if step >= BROKEN_FROM:
            with torch.no_grad():
                model.h[1].attn.c_attn.weight[:, :16] = 0
                model.h[1].attn.c_attn.bias[:16] = 0
        place = folder / f"checkpoint-{step}"
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return folder
