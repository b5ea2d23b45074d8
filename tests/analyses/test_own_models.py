"""A user's own PyTorch modules: no configuration, no Hugging Face, no names to go by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.observing import attention_table, entropies, observe
from tests.helpers.own_models import OwnAttention, OwnGPT, tokens
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.passes import capture


class LayerScaleBlock(nn.Module):
    """As in vision transformers: scaled updates and stochastic depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = OwnAttention(width, 4, fused=True)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, width))
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.full((width,), 0.3)), nn.Parameter(torch.full((width,), 0.2))
        self.drop_path = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class OwnVision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.Sequential(*(LayerScaleBlock(32) for _ in range(2)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1))[:, 0]


class WithMultiheadAttention(nn.Module):
    """nn.MultiheadAttention inside a block of one's own."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(self.Block(batch_first) for _ in range(2))
        self.batch_first = batch_first

    class Block(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.norm2(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x if self.batch_first else x.transpose(0, 1)


class WithTransformerEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embed(ids))


MODELS: dict[str, tuple[nn.Module, dict[str, Tensor], str]] = {
    "one-file GPT, fused": (OwnGPT(fused=True), {"idx": tokens()}, "pre"),
    "one-file GPT, softmax": (OwnGPT(fused=False), {"idx": tokens()}, "pre"),
    "vision with LayerScale": (OwnVision(), {"images": torch.randn(3, 3, 32, 32)}, "pre"),
    "MultiheadAttention, batch first": (WithMultiheadAttention(True), {"ids": tokens()}, "pre"),
    "MultiheadAttention, token first": (WithMultiheadAttention(False), {"ids": tokens()}, "pre"),
    "TransformerEncoder, post-norm": (WithTransformerEncoder(False), {"ids": tokens()}, "post"),
    "TransformerEncoder, pre-norm": (WithTransformerEncoder(True), {"ids": tokens()}, "pre"),
}
models = pytest.mark.parametrize(("model", "batch", "placement"), MODELS.values(), ids=MODELS)


@models
def test_an_own_model_is_proved_and_observed(model: nn.Module, batch: dict[str, Tensor], placement: str) -> None:
    model.eval()
    anatomy = proved_anatomy(model, batch)
    assert anatomy.norm_placement == placement
    assert all([p.kind for p in b.parts] == ["attention", "mlp"] for b in anatomy.blocks)
    with torch.no_grad():
        before = model(**batch)
    found = uc.diagnose(model, batches=[batch], level="full")
    with torch.no_grad():
        assert torch.equal(model(**batch), before)
    assert found.record.model.heads == 4
    assert all(a.entropy is not None and a.value_contraction is not None for a in found.record.attention)
    assert all(h.energy_share is not None for h in found.record.heads)
    with uc.without(model, "attention", "mlp"), torch.no_grad():
        assert not torch.equal(model(**batch), before)
    with torch.no_grad():
        assert torch.equal(model(**batch), before)


def test_both_ways_to_write_attention_give_the_same_figures() -> None:
    fused, own = MODELS["one-file GPT, fused"], MODELS["one-file GPT, softmax"]
    a, b = (observe(m.eval(), [batch]) for m, batch, _ in (fused, own))
    for measure in ("entropy", "normalized_entropy", "max_logit", "value_contraction"):
        assert attention_table(a, measure) == pytest.approx(attention_table(b, measure), rel=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_measured_by_its_own_weights(batch_first: bool) -> None:
    model, batch, _ = MODELS[f"MultiheadAttention, {'batch' if batch_first else 'token'} first"]
    model.eval()
    weights: list[Tensor] = []

    def ask(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs) | {"need_weights": True, "average_attn_weights": False}
        return args, kwargs

    hooks = []
    for layer in model.layers:  # type: ignore[union-attr]
        hooks.append(layer.attention.register_forward_pre_hook(ask, with_kwargs=True))
        hooks.append(layer.attention.register_forward_hook(lambda _m, _a, output: weights.append(output[1])))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    expected = np.array([entropies(w, None)[0] for w in weights])
    assert attention_table(observe(model, [batch]), "entropy") == pytest.approx(expected, abs=2e-6)


def test_a_model_that_returns_other_things_than_it_did_when_traced_is_an_error() -> None:
    class Fickle(OwnGPT):
        def forward(self, idx: Tensor) -> Tensor:
            for block in self.blocks:
                block.attention.fused = idx.shape[0] == 1
            return super().forward(idx)

    model = Fickle().eval()
    batch = {"idx": tokens()}
    with pytest.raises(uc.UncollapseError, match="took another path"):
        capture(model, [batch], proved_anatomy(model, batch))
