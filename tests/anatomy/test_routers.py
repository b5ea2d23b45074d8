"""Routers by what they do: against the models' own router logits, on hand-written mixtures, and where a choice is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.mixtures import Mixture, batch
from tests.helpers.several_processes import SIZES
from uncollapse.records.diagnosis import RouterRecord


def routers_of(model: nn.Module, batches: list[dict[str, Tensor]] | None = None) -> list[RouterRecord]:
    return uc.diagnose(model.eval(), batches=batches or [batch(0), batch(1)]).record.routers


def test_the_load_is_that_of_the_models_own_router_logits() -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
    model = transformers.MixtralForCausalLM(config).eval()
    given = [batch(0), batch(1)]
    counts, tokens, generator = np.zeros((2, 5)), 0, np.random.default_rng(0)
    for each in given:
        with torch.no_grad():
            logits = model(**each, output_router_logits=True).router_logits
        real = each["attention_mask"].bool().numpy().ravel()
        tokens += int(real.sum())
        for number, rows in enumerate(logits):
            for row in rows.numpy()[real]:
                counts[number, np.argsort(-row)[:2]] += 1
    found = routers_of(model, given)
    assert [(r.block, r.experts, r.chosen, r.tokens) for r in found] == [(0, 5, 2, tokens), (1, 5, 2, tokens)]
    for number, router in enumerate(found):
        shares = counts[number] / counts[number].sum()
        entropy = -sum(p * np.log(p) for p in shares if p)
        assert router.load == pytest.approx(shares.tolist(), abs=1e-12)
        assert router.entropy == pytest.approx(entropy / np.log(5))
        assert router.effective_experts == pytest.approx(np.exp(entropy))
        assert router.dead == [i for i in range(5) if counts[number, i] == 0]
        assert router.random_dead == pytest.approx(5 * (1 - 2 / 5) ** tokens)
        drawn = [by_chance(tokens, generator) for _ in range(400)]
        assert router.random_entropy == pytest.approx(np.mean([entropy for entropy, _ in drawn]), abs=0.003)
        assert router.random_load is not None
        low, high = router.random_load
        inside = np.mean([low <= min(loads) and max(loads) <= high for _, loads in drawn])
        assert 0.92 < inside < 1  # 0.95 or more, from 400 draws


def by_chance(tokens: int, generator: np.random.Generator) -> tuple[float, np.ndarray[Any, Any]]:
    """Entropy and loads of tokens that each choose 2 of 5 experts at random."""
    choices = generator.random((tokens, 5)).argsort(1)[:, :2]
    loads = np.bincount(choices.ravel(), minlength=5) / choices.size
    return float(-sum(p * np.log(p) for p in loads if p) / np.log(5)), loads


def test_of_several_choices_the_one_among_experts_counts() -> None:
    """DeepSeek chooses groups first; its sigmoid scores are no distribution."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    assert [(r.block, r.experts, r.chosen) for r in routers_of(transformers.DeepseekV3Model(config))] == [(1, 8, 2)]


@pytest.mark.parametrize(("kind", "chosen"), [("one expert a token", 1), ("the other experts are zero", 2)])
def test_a_mixture_written_by_hand_is_found_by_what_its_choice_does(kind: str, chosen: int) -> None:
    model: Any = Mixture(kind)
    with torch.no_grad():
        model.layers[1].score.bias[2] = -1e4
    ids = [{"input_ids": batch(seed)["input_ids"]} for seed in range(2)]
    first, second = routers_of(model, ids)
    assert (first.experts, first.chosen, first.tokens, first.dead) == (4, chosen, 110, [])
    assert second.dead == [2]
    assert second.load is not None
    assert second.load[2] == 0
    assert sum(second.load) == pytest.approx(1.0)


# Of the last three a count would be wrong: of second experts only, of tokens as experts, of padding in place of tokens.
@pytest.mark.parametrize(
    "kind",
    ["all experts", "a choice without effect", "first and second", "the experts first", "another order of tokens"],
)
def test_no_router_where_no_choice_decides(kind: str) -> None:
    assert routers_of(Mixture(kind), [{"input_ids": batch()["input_ids"]}]) == []
