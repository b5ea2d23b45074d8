"""The eight runs of norm × residual × MLP, and Dong et al.'s four variants, on whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import uncollapse as uc
from bench import weights
from uncollapse import sources

MOLECULES = Path(__file__).with_name("molecules.txt")


@dataclass(frozen=True)
class Subject:
    """One model of the grid: how to open it, and what the document says of it and of its text."""

    title: str
    about: str
    command: str
    arguments: Callable[[], dict[str, Any]]


def _bert_base() -> dict[str, Any]:
    """`bert-base-uncased` as it starts its training; it shares its vocabulary with the demo, which lends its tokenizer."""
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).double().eval()
    tokenizer = sources.load_model("demo").tokenizer
    return {"model": model, "tokenizer": tokenizer, "sequences": 8, "name": "BERT-base, random initialisation"}


SUBJECTS = {
    "minilm": Subject(
        "all-MiniLM-L6-v2 (trained sentence encoder, post-norm, 6 blocks)",
        "64 paragraphs of English prose.",
        "uncollapse ablate demo --grid --dtype float64",
        lambda: {"model": "demo", "dtype": "float64", "name": "all-MiniLM-L6-v2"},
    ),
    "albert": Subject(
        "RXNMapper's ALBERT (trained on chemical reactions, one shared layer run 12 times)",
        "24 molecules and reactions as SMILES (`bench/molecules.txt`), as it was trained on.",
        "uncollapse ablate .cache/weights/rxnmapper --grid --dtype float64 --text bench/molecules.txt",
        lambda: {
            "model": weights.rxnmapper(),
            "texts": sources.read_texts([MOLECULES]),
            "dtype": "float64",
            "name": "RXNMapper's ALBERT",
        },
    ),
    "smollm2": Subject(
        "SmolLM2-135M-Instruct (trained decoder, pre-norm, causal, 30 blocks)",
        "16 paragraphs of English prose. The weights are expanded from 4 bits and carry that noise.",
        "uncollapse ablate .cache/weights/smollm2 --grid --dtype float64 --sequences 16",
        lambda: {"model": weights.smollm2(), "sequences": 16, "dtype": "float64", "name": "SmolLM2-135M-Instruct"},
    ),
    "bert-base": Subject(
        "BERT-base, random initialisation (seed 0, post-norm, 12 blocks)",
        "8 paragraphs of English prose.",
        "uncollapse ablate bert-base-uncased --grid --dtype float64",
        _bert_base,
    ),
}


def grid(key: str) -> dict[str, Any]:
    """The ablation record of one subject, as plain data."""
    import json

    found: dict[str, Any] = json.loads(uc.ablate(grid=True, **SUBJECTS[key].arguments()).to_json())
    return found
