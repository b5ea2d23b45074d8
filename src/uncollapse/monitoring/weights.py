"""What the weights say without a pass: how far each head's matrices moved since the last look, and how large its logits can get.

Where a head keeps its queries, keys, values and its part of the output projection is found by experiment, once
(`symmetry.channels`). A head for which that is not known has no figures here.

* `update_queries`, `update_keys`, `update_values`, `update_projection`: ||W - W'||_F / ||W'||_F, where W' is the matrix at the last
  look.
* `query_key_norm`: ||W_Q W_K^T||_F of the head. Its logits are proportional to it. It has no noise from the probe.
* `query_key_update_entropy`: -sum p ln p / ln n of the n = 2 d_k singular values that the change of W_Q W_K^T can have, with
  p = sigma^2 / sum sigma^2. It falls towards 0 where all the change goes into one direction (arXiv 2606.28116).
* `update_gains`: the same as for the matrices, over all gains of a block's norms.

One copy of these matrices is kept. When not to use it: on sharded parameters, whose rows are elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.vocabulary import Anatomy, ModuleCall
from uncollapse.records.trail import HeadPlace, SitePlace
from uncollapse.symmetry.channels import Channels, channels_of
from uncollapse.symmetry.studied_calls import Rows

ROLES = ("queries", "keys", "values", "projection")
Figures = dict[str, list[float | None]]


@dataclass
class Weights:
    """Where the heads of a model keep their matrices, and what these were at the last look."""

    channels: Sequence[Channels]
    gains: Mapping[int, tuple[str, ...]]  # by block: the names of its norms' parameters
    _before: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _gains_before: dict[int, list[Tensor]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> Weights:
        """Find them, on a few tokens of `batch`."""
        names = dict(model.named_modules())
        gains = {
            number: tuple(
                f"{norm.module.name}.{name}" if norm.module.name else name
                for norm in block.norms
                if norm.piece is None and isinstance(norm.module, ModuleCall)
                for name, _ in names[norm.module.name].named_parameters(recurse=False)
            )
            for number, block in enumerate(anatomy.blocks)
        }
        return Weights(channels_of(model, anatomy, batch), gains)

    @torch.no_grad()
    def look(
        self, model: nn.Module, heads: Sequence[HeadPlace], sites: Sequence[SitePlace], *, spectra: bool
    ) -> tuple[Figures, Figures]:
        """The figures of the heads and of the sites. `spectra`: also the entropy of the updates, which takes a decomposition."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        by_place: dict[tuple[int, str], list[dict[str, float]]] = {}
        for number, one in enumerate(self.channels):
            by_place.setdefault((one.block, one.kind), []).extend(self._heads(number, one, parameters, spectra))
        counts: dict[tuple[int, str], int] = {}
        for head in heads:
            counts[head.block, head.kind] = counts.get((head.block, head.kind), 0) + 1
        # Calls that share their queries are the same heads again.
        known = {place: several for place, several in by_place.items() if len(several) == counts.get(place)}
        measures = sorted({name for several in known.values() for one in several for name in one})
        head_figures: Figures = {
            name: [known[h.block, h.kind][h.head].get(name) if (h.block, h.kind) in known else None for h in heads]
            for name in measures
        }
        moved = {block: self._gains(block, names, parameters) for block, names in self.gains.items() if names}
        site_figures: Figures = {}
        if any(value is not None for value in moved.values()):
            site_figures["update_gains"] = [None if s.block is None else moved.get(s.block) for s in sites]
        return head_figures, site_figures

    def _heads(
        self, number: int, one: Channels, parameters: Mapping[str, Tensor], spectra: bool
    ) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in one.groups]
        now: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        for role in ROLES:
            rows: Rows | None = getattr(one, role)
            if rows is None or rows.place not in parameters:
                continue
            matrix = parameters[rows.place].detach().movedim(rows.axis, 0)
            now[role] = matrix[rows.index().to(matrix.device)]  # [head or group, channel, other side]; a copy
            last = self._before.get((number, role))
            self._before[number, role] = now[role]
            if last is None or last.shape != now[role].shape:
                continue
            before[role] = last
            moved = (now[role].float() - last.float()).flatten(1).norm(dim=1) / last.float().flatten(1).norm(dim=1)
            for head, group in enumerate(one.groups):
                which = group if role in ("keys", "values") else head
                if math.isfinite(value := float(moved[which])):
                    found[head][f"update_{role}"] = value
        if "queries" not in now or "keys" not in now or now["queries"].shape[2] != now["keys"].shape[2]:
            return found
        for head, group in enumerate(one.groups):
            q, k = now["queries"][head].double(), now["keys"][group].double()
            if math.isfinite(size := float(((q @ q.T) * (k @ k.T)).sum().clamp(min=0).sqrt())):
                found[head]["query_key_norm"] = size
            if spectra and "queries" in before and "keys" in before:
                entropy = update_entropy(q, k, before["queries"][head].double(), before["keys"][group].double())
                if math.isfinite(entropy):
                    found[head]["query_key_update_entropy"] = entropy
        return found

    def _gains(self, block: int, names: Sequence[str], parameters: Mapping[str, Tensor]) -> float | None:
        now = [parameters[name].detach().float().clone() for name in names if name in parameters]
        last = self._gains_before.get(block)
        self._gains_before[block] = now
        if last is None or len(last) != len(now):
            return None
        moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(now, last, strict=True)))
        size = math.sqrt(sum(float(b.square().sum()) for b in last))
        return moved / size if size and math.isfinite(moved) else None


def update_entropy(q: Tensor, k: Tensor, q_before: Tensor, k_before: Tensor) -> float:
    """The normalised spectral entropy of W_Q^T W_K - W_Q'^T W_K', for matrices [channel, width]. NaN where nothing changed.

    The difference is the product of two matrices of 2 d_k columns, so nothing of size width x width is made.
    """
    left = torch.linalg.qr(torch.cat([q, q_before]).T).R
    right = torch.linalg.qr(torch.cat([k, -k_before]).T).R
    energy = torch.linalg.svdvals(left @ right.T).square()
    if not float(energy.sum()):
        return math.nan
    p = energy / energy.sum()
    return float(-(p * p.clamp(min=1e-300).log()).sum()) / math.log(len(p))
