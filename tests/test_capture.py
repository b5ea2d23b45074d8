"""Capture: changes no bit, and every figure equals the one computed independently from the model's own eager weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, Tiny, batch_for, text_batch
from torch import Tensor, nn

import uncollapse as uc
from uncollapse.capture import ATTENTION_MEASURES, PLAIN_MEASURES, Observations, capture
from uncollapse.proof import proved_anatomy

families = pytest.mark.parametrize("family", FAMILIES)
text_families = pytest.mark.parametrize("family", [f for f in FAMILIES if not FAMILIES[f].vision])


def observe(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> Observations:
    return capture(model, batches, proved_anatomy(model, batches[0]), **options)


def site_table(observed: Observations) -> np.ndarray:
    return np.array([[s.plain.summary(i)[0] for i in range(len(PLAIN_MEASURES))] for s in observed.sites])


def attention_table(observed: Observations, measure: str) -> np.ndarray:
    """[attention call, head] means."""
    row = ATTENTION_MEASURES.index(measure)
    return np.array([[a.values.summary(row, h)[0] for h in range(a.call.heads)] for a in observed.attention])


def eager(tiny: Tiny, model: nn.Module) -> nn.Module:
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


def padded(batch: dict[str, Tensor], side: str, by: int = 4) -> dict[str, Tensor]:
    """The batch with `by` more columns and its first sequence three tokens shorter, positions kept true."""
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    gap = torch.full((ids.shape[0], by), 1)
    order = (gap, ids) if side == "left" else (ids, gap)
    zero = torch.zeros_like(gap)
    mask_order = (zero, mask) if side == "left" else (mask, zero)
    mask = torch.cat(mask_order, 1)
    return {
        "input_ids": torch.cat(order, 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


@families
def test_capture_changes_no_bit_of_the_output(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    batches = [batch_for(tiny, seed=s) for s in range(2)]
    with torch.no_grad():
        plain = [model(**b)[0] for b in batches]
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _m, _i, output: seen.append(output[0].clone()))
    anatomy = proved_anatomy(model, batches[0])
    seen.clear()
    capture(model, batches, anatomy, level="full")
    hook.remove()
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@families
def test_attention_figures_equal_those_of_the_models_own_eager_weights(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    batch = batch_for(tiny)
    observed = observe(model, [batch])
    with torch.no_grad():
        weights = eager(tiny, model)(**batch, output_attentions=True).attentions
    assert len(weights) == len(observed.attention) == tiny.blocks
    expected = [entropies(w, None) for w in weights]
    assert attention_table(observed, "entropy") == pytest.approx(np.array([e for e, _ in expected]), abs=2e-6)
    got = attention_table(observed, "normalized_entropy")
    assert got == pytest.approx(np.array([n for _, n in expected]), abs=2e-6)
    floor = attention_table(observed, "entropy_floor")
    assert (floor <= attention_table(observed, "entropy") + 1e-6).all()


@families
def test_the_softmax_route_and_the_fused_route_agree(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    batch = batch_for(tiny)
    fused, own = observe(model, [batch], level="full"), observe(eager(tiny, model), [batch], level="full")
    assert {a.route for a in own.attention} == {"weights"}
    for measure in ATTENTION_MEASURES:
        assert attention_table(fused, measure) == pytest.approx(attention_table(own, measure), rel=1e-4, abs=1e-5), (
            measure
        )
    for a, b in zip(fused.attention, own.attention, strict=True):
        assert [a.energy.summary(h)[0] for h in range(tiny.heads)] == pytest.approx(
            [b.energy.summary(h)[0] for h in range(tiny.heads)], rel=1e-4
        )


@families
def test_the_trajectory_equals_that_of_independently_hooked_blocks(family: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    batch = batch_for(tiny)
    names = {b.module.name for b in proved_anatomy(model, batch).blocks}
    clouds: list[Tensor] = []
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda _m, _i, output: clouds.append(output if isinstance(output, Tensor) else output[0])
        )
        for n in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    observed = observe(model, [batch])
    assert [s.site for s in observed.sites] == ["embedding", *(f"block.{i}" for i in range(tiny.blocks))]
    table = site_table(observed)
    for row, cloud in zip(table[1:], clouds, strict=True):
        consensus = [np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x) for x in cloud.double().numpy()]
        ranks = [np.linalg.matrix_rank(x) for x in cloud.numpy()]
        assert row[PLAIN_MEASURES.index("consensus_distance")] == pytest.approx(np.mean(consensus), rel=1e-9)
        assert row[PLAIN_MEASURES.index("rank")] == pytest.approx(np.mean(ranks))


@text_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    tiny = FAMILIES[family]
    model = tiny.build().eval()
    batch = text_batch()
    wide = padded(batch, side)
    if family == "t5_encoder":
        wide.pop("position_ids")  # relative positions only
    plain, with_pads = observe(model, [batch], level="full"), observe(model, [wide], level="full")
    assert site_table(with_pads) == pytest.approx(site_table(plain), rel=1e-4, abs=1e-6, nan_ok=True)
    for measure in ATTENTION_MEASURES:
        got, expected = attention_table(with_pads, measure), attention_table(plain, measure)
        assert got == pytest.approx(expected, rel=1e-3, abs=2e-5), measure
    assert with_pads.tokens == plain.tokens


@text_families
def test_the_order_and_the_grouping_of_sequences_change_nothing(family: str) -> None:
    model = FAMILIES[family].build().eval()
    batch = text_batch(4)
    single = [{k: v[i : i + 1] for k, v in batch.items()} for i in (2, 0, 3, 1)]
    together, apart = observe(model, [batch]), observe(model, single)
    assert site_table(apart) == pytest.approx(site_table(together), rel=1e-4, nan_ok=True)
    for measure in ("entropy", "max_logit", "value_contraction"):
        assert attention_table(apart, measure) == pytest.approx(attention_table(together, measure), rel=1e-4, abs=1e-6)
    assert (apart.sequences, apart.tokens) == (together.sequences, together.tokens)


def test_single_head_figures_are_those_of_the_definition() -> None:
    tiny = FAMILIES["bert"]
    model = tiny.build().eval()
    batch = text_batch(2)
    observed = observe(model, [batch], level="full")
    with torch.no_grad():
        weights = eager(tiny, model)(**batch, output_attentions=True).attentions
    contraction = np.array(
        [
            [np.mean([np.linalg.norm(w - w.mean(0), 2) for w in layer[:, h].double().numpy()]) for h in range(4)]
            for layer in weights
        ]
    )
    assert attention_table(observed, "contraction") == pytest.approx(contraction, rel=1e-5)
    gaps = []
    for layer in weights:
        spectra = np.linalg.svd(layer.double().numpy(), compute_uv=False)
        gaps.append((1 - spectra[..., 1] / spectra[..., 0]).mean(0))
    assert attention_table(observed, "spectral_gap") == pytest.approx(np.array(gaps), rel=1e-5)
    assert (attention_table(observed, "value_contraction") <= contraction + 1e-6).all()


def test_energy_shares_are_those_of_each_heads_own_contribution() -> None:
    model = FAMILIES["gpt2"].build().eval()
    batch = text_batch(2)
    seen: list[Tensor] = []
    hook = model.h[1].attn.c_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    observed = observe(model, [batch])
    weight = model.h[1].attn.c_proj.weight.detach().double().numpy()
    shares = []
    for mixed in seen[0].double().numpy():
        parts = [mixed[:, 8 * h : 8 * h + 8] @ weight[8 * h : 8 * h + 8] for h in range(4)]
        energy = np.array([((p - p.mean(0)) ** 2).sum() for p in parts])
        shares.append(energy / energy.sum())
    got = [observed.attention[1].energy.summary(h)[0] for h in range(4)]
    assert got == pytest.approx(np.mean(shares, 0), rel=1e-4)


@pytest.fixture
def interrupted() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = FAMILIES["llama"].build().eval()
    return model, [text_batch(seed=s) for s in range(3)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_restored_after_an_interruption(
    interrupted: tuple[nn.Module, list[dict[str, Tensor]]], error: type[BaseException]
) -> None:
    model, batches = interrupted
    anatomy = proved_anatomy(model, batches[0])
    with torch.no_grad():
        before = model(**batches[0])[0]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise error

    with pytest.raises(error):
        capture(model, batches, anatomy, progress=stop)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batches[0])[0], before)


def test_what_is_kept_does_not_grow_with_the_corpus() -> None:
    model = FAMILIES["bert"].build().eval()

    def kept(observed: Observations) -> int:
        tensors = [t for s in observed.sites for t in (s.plain.total, s.massive.total)]
        return sum(t.numel() for t in tensors) + sum(a.values.total.numel() for a in observed.attention)

    assert kept(observe(model, [text_batch()])) == kept(observe(model, [text_batch(seed=s) for s in range(5)]))


def test_a_mask_of_another_length_than_the_tokens_inside_is_refused_when_it_hides_something() -> None:
    model = FAMILIES["bert"].build().eval()

    class Shortens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids[:, 1:], attention_mask[:, 1:])

    outer = Shortens().eval()
    batch = text_batch(2)
    anatomy = proved_anatomy(outer, batch)
    capture(outer, [batch], anatomy)
    batch["attention_mask"][0, -2:] = 0
    with pytest.raises(uc.InputError, match=r"expected 9 tokens .* got 8"):
        capture(outer, [batch], anatomy)


def test_not_finite_sequences_are_counted_and_the_rest_is_measured() -> None:
    model = FAMILIES["gpt2"].build().eval()
    with torch.no_grad():
        model.wte.weight[5] = math.nan
    batch = text_batch()
    batch["input_ids"][batch["input_ids"] == 5] = 6
    batch["input_ids"][1, 3] = 5
    observed = observe(model, [batch])
    assert [s.not_finite for s in observed.sites] == [1] * 4
    assert all(s.plain.summary(PLAIN_MEASURES.index("rank"))[3] == 2 for s in observed.sites)
