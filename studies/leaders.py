"""Do leaders explain the ALBERT sequences that keep several groups? Its layer without norm, residual and MLP, run on and on.

    python -m studies.leaders

For each sequence: the groups of tokens after 12, 21 and 40 layers, with the softmax and with its hard maximum, and how far the
logits of a row lie apart in the ninth layer. The layer is computed here from its weights, not through the package.
docs/theory.md, section 4, says what it shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from studies import weights
from studies.pretrained import MOLECULES
from uncollapse import sources

AFTER = (12, 21, 40)
ALIKE = 1e-6  # two tokens are in one group below this distance, over the largest norm


def groups(x: Tensor) -> int:
    """How many different tokens there are."""
    near = torch.cdist(x, x) <= ALIKE * x.norm(dim=1).max()
    return len({tuple(row.nonzero().flatten().tolist()) for row in near})


def layer(attention: Any, heads: int, x: Tensor, hard: bool) -> tuple[Tensor, float]:
    """One layer of attention alone, and the mean over rows of how far their logits lie apart."""
    queries, keys, values = (
        (x @ part.weight.T + part.bias).unflatten(-1, (heads, -1)).transpose(0, 1)
        for part in (attention.query, attention.key, attention.value)
    )
    logits = queries @ keys.mT / queries.shape[-1] ** 0.5
    apart = float((logits.amax(-1) - logits.amin(-1)).mean())
    if hard:
        best = (logits >= logits.amax(-1, keepdim=True) - 1e-9 * logits.abs().max()).double()
        pattern = best / best.sum(-1, keepdim=True)
    else:
        pattern = logits.softmax(-1)
    mixed = (pattern @ values).transpose(0, 1).flatten(1)
    return mixed @ attention.dense.weight.T + attention.dense.bias, apart


@torch.no_grad()
def main() -> None:
    """Print one line a sequence."""
    loaded = sources.load_model(str(weights.rxnmapper()), dtype="float64")
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    attention = model.encoder.albert_layer_groups[0].albert_layers[0].attention
    print(
        f"{'sequence':>8} {'tokens':>6}  groups after {AFTER}: softmax, hard maximum; logits apart in the ninth layer"
    )
    for number, text in enumerate(sources.read_texts([MOLECULES])):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        start = model.encoder.embedding_hidden_mapping_in(model.embeddings(ids))[0]
        found = []
        for hard in (False, True):
            x, counts, ninth = start, [], 0.0
            for depth in range(1, AFTER[-1] + 1):
                x, apart = layer(attention, model.config.num_attention_heads, x, hard)
                ninth = apart if depth == 9 else ninth
                counts += [groups(x)] if depth in AFTER else []
            found.append((counts, ninth))
        print(f"{number:>8} {len(start):>6}  {found[0][0]}, {found[1][0]}; {found[0][1]:.2g}", flush=True)


if __name__ == "__main__":
    main()
