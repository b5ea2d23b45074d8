"""Figures from elsewhere, to stand beside ours."""

from __future__ import annotations

# Consensus distances at the embedding and after each block, noted before this package existed, by another script on one other
# text a model, in float64. None: not noted. Keys read norm·residual·MLP, 1 kept and 0 removed.
NOTED: dict[str, dict[str, list[float | None]]] = {
    "minilm": {
        "1·1·1": [0.97, 0.92, 0.92, 0.91, 0.89, 0.88, 0.88],
        "1·1·0": [0.97, 0.89, 0.87, 0.80, 0.79, 0.84, 0.79],
        "1·0·1": [0.97, 0.68, 0.23, 1.6e-2, 5.5e-6, 1e-15, None],
        "1·0·0": [0.97, 0.70, 4.2e-2, 2.4e-4, 2.4e-11, 4e-16, None],
        "0·0·0": [0.97, 0.72, 3.7e-2, 2.5e-6, 6e-16, None, None],
    },
    "bert-base": {
        "1·1·0": [0.81, *[None] * 11, 0.65],
        "1·0·1": [0.81, 3.3e-2, 1.8e-6, 8e-16, *[None] * 9],
    },
    "albert": {
        "1·1·1": [0.89, 0.81, 0.79, *[None] * 9, 0.74],
        "1·1·0": [0.89, 0.81, 0.72, 0.61, 0.45, 0.35, 0.27, 0.20, 0.15, 0.11, 0.075, 0.053, 0.035],
        "0·1·0": [0.89, 0.84, 0.78, *[None] * 8, 0.90, 0.77],
        "1·0·1": [0.89, 0.72, 0.51, 0.15, 2.9e-3, 1.9e-8, 5e-16, *[None] * 6],
    },
}

NOTED_ABOUT = {"minilm": "one text of 100 tokens", "bert-base": "other text, another draw", "albert": "60 tokens"}
DIFFERS = {
    "minilm": "The text explains most of the difference: on passages of 100 tokens, like theirs, most of it is gone. The rest "
    "comes from the mean: where distances fall doubly exponentially, the few slowest sequences dominate it.",
    "bert-base": "The weights are another random draw and the text is different. The curves have the same shape.",
    "albert": "The weights are the same. The molecules and their lengths differ: the noted run had 60 tokens per sequence, these "
    "are shorter. The rates and the order of the runs agree.",
}

# Dong, Cordonnier, Loukas 2021, arXiv 2103.03404: the ratio after the last block, attention only / with MLP / with skip / whole;
# 32 texts of 128 tokens.
DONG: dict[str, tuple[float, float, float, float]] = {
    "BERT, trained": (0.000, 0.000, 0.074, 0.310),
    "BERT, initialisation": (0.000, 0.000, 0.449, 0.345),
    "ALBERT, trained": (0.000, 0.000, 0.000, 0.556),
    "ALBERT, initialisation": (0.000, 0.000, 0.255, 0.260),
    "XLNet, trained": (0.009, 0.000, 0.103, 0.513),
    "XLNet, initialisation": (0.000, 0.000, 0.927, 0.738),
}
