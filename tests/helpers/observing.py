"""What the capture tests share: observing a model, tables of what was observed, and slow obvious references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uncollapse.analyses.preparation import with_true_positions
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.passes import Observations, capture
from uncollapse.probe.sites import PLAIN_MEASURES


def observe(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> Observations:
    return capture(model, batches, proved_anatomy(model, batches[0]), **options)


def site_table(observed: Observations) -> np.ndarray:
    return np.array([[s.plain.summary(i)[0] for i in range(len(PLAIN_MEASURES))] for s in observed.sites])


def attention_table(observed: Observations, measure: str) -> np.ndarray:
    """[attention call, head] means."""
    row = ATTENTION_MEASURES.index(measure)
    return np.array([[a.values.summary(row, h)[0] for h in range(a.call.heads)] for a in observed.attention])


def eager(model: nn.Module) -> nn.Module:
    """The same weights, run by the model's own eager attention, which returns its weights."""
    copy = type(model)._from_config(model.config, attn_implementation="eager").eval()
    copy.load_state_dict(model.state_dict())
    return copy


def entropies(weights: Tensor, mask: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean entropy and normalised entropy [head] by loops over sequences and rows, from weights [batch, head, query, key]."""
    plain, normalised = [], []
    for b in range(weights.shape[0]):
        real = range(weights.shape[2]) if mask is None else mask[b].nonzero().flatten().tolist()
        rows, shares = [], []
        for i in real:
            p = weights[b, :, i].double().numpy()
            allowed = (p > 0).any(0).sum()  # a forbidden key has weight exactly zero in every head
            h = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
            rows.append(h)
            if allowed > 1:
                shares.append(h / math.log(allowed))
        plain.append(np.mean(rows, 0))
        normalised.append(np.mean(shares, 0))
    return np.mean(plain, 0), np.mean(normalised, 0)


def padded(model: nn.Module, batch: dict[str, Tensor], side: str, by: int = 4) -> dict[str, Tensor]:
    """The batch with `by` more columns of padding in each stack; positions kept true where the model takes them."""
    wide: dict[str, Tensor] = {}
    for stack in ("", "decoder_"):
        if f"{stack}input_ids" not in batch:
            continue
        ids, mask = batch[f"{stack}input_ids"], batch[f"{stack}attention_mask"]
        gap = torch.zeros(ids.shape[0], by, dtype=torch.long)
        # MPNet numbers positions by where this token is not, whatever its configuration calls padding
        filler = gap + getattr(getattr(model, "embeddings", None), "padding_idx", 0)
        wide[f"{stack}input_ids"] = torch.cat((filler, ids) if side == "left" else (ids, filler), 1)
        wide[f"{stack}attention_mask"] = torch.cat((gap, mask) if side == "left" else (mask, gap), 1)
    return with_true_positions(model, [wide])[0]
