"""A tokenizer of whole words, made on the spot."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "it", "rests", "for"]


def word_tokenizer(**options: Any) -> transformers.PreTrainedTokenizerFast:
    """One token a word, as plain as a tokenizer can be. Without options it has no padding token, like GPT-2's."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", "<pad>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", **{"pad_token": None} | options
    )
