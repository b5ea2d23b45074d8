"""What a number made of a model's output loses when a component is taken away, and later layers may answer: one pass for each.

Heads are taken out before the output projection, MLPs where they are added (`interventions`). What comes in their place is zero,
the mean over the batch, or what another sequence of the batch has there.

When not to use this: to add the effects up. They do not sum to anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import known_example
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.errors import UnsupportedModel
from uncollapse.interventions import single_heads
from uncollapse.interventions.single_heads import HeadsAs
from uncollapse.interventions.without import filling_of_heads, filling_of_parts, removed
from uncollapse.probe.effects import Effect, Metric, metric_of


def add_total_effects(
    model: nn.Module,
    batch: Mapping[str, Any],
    metric: Metric,
    anatomy: Anatomy,
    effects: list[Effect],
    ablated_as: HeadsAs,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Fill in `total` of the effects of heads and MLPs, and of attentions whose heads cannot be told: the metric of the whole model
    less that without the component. Where it cannot be taken away by itself, the reason."""
    device = device_of(model)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def measured() -> Tensor:
        with probing(model):
            torch.manual_seed(0)
            return metric_of(metric, model(**given), given).detach().double()

    whole = measured()
    heads: dict[int, set[int]] = {}
    for effect in effects:
        if effect.kind != "head" or effect.block is None or effect.head is None:
            continue
        if effect.part == single_heads.attention_of(anatomy.blocks[effect.block]):
            heads.setdefault(effect.block, set()).add(effect.head)
    example = known_example(model) or given
    reasons = single_heads.not_apart(model, anatomy, heads, example, ablated_as, one_by_one=True)
    apart = {number: own for number, own in heads.items() if number not in reasons}
    try:
        filling = filling_of_heads(model, anatomy, apart, ablated_as, given, seed) if apart else None
    except UnsupportedModel as error:
        reasons |= dict.fromkeys(apart, str(error))
        filling = None
    for done, effect in enumerate(effects):
        if progress is not None:
            progress("total effects", done, len(effects))
        if effect.block is None or effect.kind not in {"head", "attention", "mlp", "mixer"}:
            effect.reasons["total"] = "only heads, attentions and MLPs are taken away"
            continue
        number = effect.block
        if effect.kind == "head":
            head = effect.head or 0
            if effect.part != single_heads.attention_of(anatomy.blocks[number]):
                effect.reasons["total"] = (
                    "of a block with self- and cross-attention only heads of the former are taken away"
                )
                continue
            if number in reasons or filling is None:
                effect.reasons["total"] = reasons.get(number, "it cannot be taken away by itself")
                continue
            with removed(model, "attention", heads={number: [head]}, filling=filling, batch=given):
                effect.total = whole - measured()
            continue
        component = "attention" if effect.kind == "attention" else "mlp"
        kinds = {"attention", "cross"} if component == "attention" else {"mlp", "mixer"}
        parts = {i for i, part in enumerate(anatomy.blocks[number].parts) if part.kind in kinds}
        if len(parts) > 1:
            effect.reasons["total"] = "several of its kind in one block can be taken away together only"
            continue
        try:
            own_filling = filling_of_parts(model, anatomy, {number: parts}, ablated_as, given, seed)
            with removed(model, component, blocks=[number], filling=own_filling, batch=given):
                effect.total = whole - measured()
        except UnsupportedModel as error:
            effect.reasons["total"] = str(error)
    if progress is not None:
        progress("total effects", len(effects), len(effects))
