"""Any model: for each family the anatomy is proved, capture changes no bit, and every figure equals an independent one.

The references are the model's own eager attention weights, block outputs hooked by name, and NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, Family, inputs_for
from tests.helpers.observing import attention_table, eager, entropies, observe, padded, site_table
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.passes import capture
from uncollapse.probe.sites import PLAIN_MEASURES

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
WITH_MASKS = {name: f for name, f in FAMILIES.items() if f.inputs.startswith("text")}  # T5 and BART in both stacks
padded_families = pytest.mark.parametrize("family", WITH_MASKS.values(), ids=WITH_MASKS)


def reference_weights(family: Family, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The model's own eager attention weights in the order of the blocks, self before cross."""
    model = eager(model)
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    if family.decoder_blocks:
        crossing = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        return [*output.encoder_attentions, *(w for pair in crossing for w in pair)]
    return list(output.attentions)


@families
def test_the_anatomy_is_proved_and_is_that_of_the_architecture(family: Family) -> None:
    model = family.build()
    anatomy = proved_anatomy(model, inputs_for(family))
    assert all(identity.deviation == 0 for identity in anatomy.proof)
    assert anatomy.norm_placement == family.placement
    assert [[p.kind for p in b.parts] for b in anatomy.blocks] == family.parts
    stacks = [None] * family.blocks
    if family.decoder_blocks:
        stacks = ["encoder"] * (family.blocks - family.decoder_blocks) + ["decoder"] * family.decoder_blocks
    assert [b.stack for b in anatomy.blocks] == stacks
    for call in (c for b in anatomy.blocks for p in b.parts for c in p.attention):
        sizes = (call.heads, call.key_value_heads, call.head_width)
        assert sizes == (family.heads, family.key_value_heads, family.head_width)
        assert call.projection is not None


@families
@pytest.mark.parametrize("level", ["core", "full"])
def test_capture_changes_no_bit_of_the_output(family: Family, level: Any) -> None:
    model = family.build()
    batches = [inputs_for(family, seed=s) for s in range(2)]
    anatomy = proved_anatomy(model, batches[0])
    model.config.use_cache = False  # a probe keeps no cache, which GPT-J's rounding notices
    with torch.no_grad():
        plain = [list(tensors_in(model(**b))) for b in batches]
    seen: list[list[Tensor]] = []
    hook = model.register_forward_hook(lambda _m, _i, output: seen.append(list(tensors_in(output))))
    capture(model, batches, anatomy, level=level)
    hook.remove()
    for before, during in zip(plain, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))


@families
def test_attention_figures_equal_those_of_the_models_own_eager_weights(family: Family) -> None:
    model = family.build()
    batch = inputs_for(family)
    observed = observe(model, [batch])
    weights = reference_weights(family, model, batch)
    assert len(weights) == len(observed.attention)
    expected = [entropies(w / w.sum(-1, keepdim=True), None) for w in weights]  # a sink leaves a row short of one
    assert attention_table(observed, "entropy") == pytest.approx(np.array([e for e, _ in expected]), abs=5e-6)
    assert attention_table(observed, "normalized_entropy") == pytest.approx(
        np.array([n for _, n in expected]), abs=5e-6
    )
    assert (attention_table(observed, "entropy_floor") <= attention_table(observed, "entropy") + 1e-5).all()


# The others have attention code of their own and no other.
SWITCHABLE = {n: f for n, f in FAMILIES.items() if n not in {"mpnet", "deberta_v2", "gptj", "bloom", "falcon"}}


@pytest.mark.parametrize("family", SWITCHABLE.values(), ids=SWITCHABLE)
def test_the_models_own_softmax_and_its_fused_attention_give_the_same_figures(family: Family) -> None:
    model = family.build()
    batch = inputs_for(family)
    fused, own = observe(model, [batch], level="full"), observe(eager(model), [batch], level="full")
    assert {a.route for a in own.attention} == {"weights"}
    for measure in ATTENTION_MEASURES:
        a, b = attention_table(fused, measure), attention_table(own, measure)
        short = measure in {
            "rest_entropy",
            "keys_within_reach",
        }  # defined from 16 keys on; test_mixing has both routes
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5, nan_ok=short), measure
    for a, b in zip(fused.attention, own.attention, strict=True):
        shares = [[s.energy.summary(h)[0] for h in range(s.call.heads)] for s in (a, b)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-3)


@families
def test_the_trajectory_equals_that_of_independently_hooked_blocks(family: Family) -> None:
    model = family.build()
    batch = inputs_for(family)
    names = dict.fromkeys(b.module.name for b in proved_anatomy(model, batch).blocks)
    clouds: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output: clouds.append((output if isinstance(output, Tensor) else output[0]).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    observed = observe(model, [batch])
    sites = [s for s in observed.sites if s.block is not None]
    assert [s.block for s in sites] == list(range(family.blocks))
    table = site_table(observed)[[s.block is not None for s in observed.sites]]
    for row, cloud in zip(table, clouds, strict=True):
        consensus = [np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x) for x in cloud.double().numpy()]
        ranks = [np.linalg.matrix_rank(x) for x in cloud.numpy()]
        assert row[PLAIN_MEASURES.index("consensus_distance")] == pytest.approx(np.mean(consensus), rel=1e-6)
        assert row[PLAIN_MEASURES.index("rank")] == pytest.approx(np.mean(ranks))


# BART counts positions from the first column and cannot be told better: padded on the left, its own outputs move.
PADDED = {f"{side}-{n}": (f, side) for n, f in WITH_MASKS.items() for side in ("left", "right")}
del PADDED["left-bart"]


@pytest.mark.parametrize(("family", "side"), PADDED.values(), ids=PADDED)
def test_padding_changes_nothing(family: Family, side: str) -> None:
    model = family.build()
    batch = inputs_for(family)
    wide = padded(model, batch, side)
    plain, with_pads = observe(model, [batch], level="full"), observe(model, [wide], level="full")
    # float32, and a padded batch takes another path through the kernels: the clouds differ in the last digits
    assert site_table(with_pads) == pytest.approx(site_table(plain), rel=2e-3, abs=1e-5, nan_ok=True)
    for measure in ATTENTION_MEASURES:
        got, expected = attention_table(with_pads, measure), attention_table(plain, measure)
        assert got == pytest.approx(
            expected, rel=2e-3, abs=1e-4, nan_ok=measure in {"rest_entropy", "keys_within_reach"}
        ), measure
    assert with_pads.tokens == plain.tokens


@families
def test_the_order_and_the_grouping_of_sequences_change_nothing(family: Family) -> None:
    model = family.build()
    batch = inputs_for(family, 4)
    single = [{k: v[i : i + 1] for k, v in batch.items()} for i in (2, 0, 3, 1)]
    together, apart = observe(model, [batch]), observe(model, single)
    assert site_table(apart) == pytest.approx(site_table(together), rel=2e-3, nan_ok=True)
    for measure in ("entropy", "max_logit", "value_contraction"):
        a, b = attention_table(apart, measure), attention_table(together, measure)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert (apart.sequences, apart.tokens) == (together.sequences, together.tokens)


@padded_families
def test_a_batch_with_padding_loses_and_keeps_what_a_batch_without_it_does(family: Family) -> None:
    """Eager attention adds a mask to its scores only when there is something to hide, in ALBERT beside the residual addition."""
    model = eager(family.build())
    batch = inputs_for(family)
    wide = padded(model, batch, "right")
    observe(model, [batch])  # proved without padding
    for components in (("mlp",), ("residual",), ("attention",)):
        with uc.without(model, *components):
            plain, with_pads = observe(model, [batch]), observe(model, [wide])
        distance = PLAIN_MEASURES.index("consensus_distance")  # ranks of what collapsed are decided by the last bit
        got, expected = site_table(with_pads)[:, distance], site_table(plain)[:, distance]
        assert got == pytest.approx(expected, rel=2e-3, abs=1e-4), components
