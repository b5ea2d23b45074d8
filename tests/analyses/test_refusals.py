"""`UnsupportedModel` as a new user meets it: what was found, which identity failed and by how much, and where to start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.observing import observe
from tests.helpers.own_models import OwnBlock, OwnGPT, tokens
from tests.reference.geometry import consensus_distance
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.probe.sites import PLAIN_MEASURES


def refusal(model: nn.Module, batch: dict[str, Tensor]) -> uc.UnsupportedModel:
    """The error, after checking what each must have."""
    with torch.no_grad():
        before = model(**batch)
    with pytest.raises(uc.UnsupportedModel) as caught:
        uc.diagnose(model, batches=[batch])
    error = caught.value
    with torch.no_grad():
        assert torch.equal(model(**batch), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert type(model).__name__ in str(error)
    assert "\n" not in str(error)
    assert error.found
    assert error.identity
    if error.layout:
        assert error.layout in str(error)
        layout = eval(error.layout, {"uc": uc})
        assert isinstance(layout, uc.Layout)
        assert set(layout.blocks) <= {name for name, _ in model.named_modules()}
    return error


@torch.library.custom_op("uncollapse_tests::fused_add", mutates_args=())
def fused_add(x: Tensor, update: Tensor) -> Tensor:
    """A kernel of one's own that adds: nobody sees inside."""
    return x + update


class FusedBlock(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = fused_add(x, self.attention(self.first(x)))
        return fused_add(x, self.mlp(self.second(x)))


class HalfFusedBlock(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return fused_add(x, self.mlp(self.second(x)))


def own_gpt(block: type[OwnBlock]) -> OwnGPT:
    model = OwnGPT()
    model.blocks = nn.ModuleList(block(32, 4, True) for _ in range(3))
    return model.eval()


def test_residual_additions_fused_into_a_custom_kernel() -> None:
    error = refusal(own_gpt(FusedBlock), {"idx": tokens()})
    assert "3 attention calls (in blocks.0.attention, blocks.1.attention, blocks.2.attention)" in error.found
    assert "0 residual additions" in error.found
    assert eval(error.layout, {"uc": uc}) == uc.Layout(blocks=("blocks.0", "blocks.1", "blocks.2"))


def test_one_addition_seen_and_the_other_fused() -> None:
    error = refusal(own_gpt(HalfFusedBlock), {"idx": tokens()})
    assert "blocks.0" in str(error)
    assert "deviation of" in str(error)
    assert "off by" in error.identity
    assert float(error.identity.split("off by ")[1].rstrip(")")) > 0
    assert "attention (blocks.0.attention)" in error.found


class NoBlocks(nn.Module):
    """Everything in one forward, over lists of parts: no module is a block."""

    def __init__(self) -> None:
        super().__init__()
        model = OwnGPT()
        self.token = model.token
        self.norms = nn.ModuleList(b.first for b in model.blocks)
        self.attentions = nn.ModuleList(b.attention for b in model.blocks)
        self.mlps = nn.ModuleList(b.mlp for b in model.blocks)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token(idx)
        for norm, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return x


def test_a_model_without_block_modules_has_blocks_all_the_same() -> None:
    blocks = proved_anatomy(NoBlocks().eval(), {"idx": tokens()}).blocks
    assert [b.name for b in blocks] == ["attentions.0", "attentions.1", "attentions.2"]


def test_a_layout_names_blocks_that_do_not_run() -> None:
    model, batch = NoBlocks().eval(), {"idx": tokens()}
    blocks = proved_anatomy(model, batch, uc.Layout(blocks=("attentions.0", "attentions.2"))).blocks
    assert [b.name for b in blocks] == ["attentions.0", "attentions.2"]


class OnlyMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token(idx)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_model_of_mlps_alone() -> None:
    error = refusal(OnlyMLP().eval(), {"idx": tokens()})
    assert "0 attention calls" in error.found
    assert "2 residual additions (in the model itself)" in error.found
    assert "self-attention" in error.identity


class Bent(OwnBlock):
    """Its output is no longer the stream plus updates."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


def test_a_layout_does_not_silence_the_proof_and_is_not_advised_again() -> None:
    model = own_gpt(Bent)
    error = refusal(model, {"idx": tokens()})
    with pytest.raises(uc.UnsupportedModel) as again:
        uc.diagnose(model, batches=[{"idx": tokens()}], layout=eval(error.layout, {"uc": uc}))
    assert again.value.identity == error.identity
    assert again.value.layout == ""
    assert "No layout helps" in str(again.value)


def test_a_forward_hook_of_ones_own_is_named() -> None:
    model = OwnGPT().eval()
    model.blocks[1].register_forward_hook(lambda _module, _args, output: torch.tanh(output))
    with pytest.raises(uc.UnsupportedModel, match=r"forward hook of yours changes what passes blocks\.1"):
        uc.diagnose(model, batches=[{"idx": tokens()}])


def test_a_steering_vector_in_a_hook_is_part_of_the_stream() -> None:
    model, batch = OwnGPT().eval(), {"idx": tokens()}
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _module, _args, output: output + shift)
    model.blocks[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    observed = observe(model, [batch])
    got = observed.sites[2].plain.summary(PLAIN_MEASURES.index("consensus_distance"))[0]
    assert got == pytest.approx(np.mean([consensus_distance(x, 2.0**-23) for x in seen[-1].double().numpy()]), rel=1e-5)


def test_a_layout_with_a_misspelt_block_says_so() -> None:
    model = OwnGPT().eval()
    with pytest.raises(uc.UnsupportedModel, match=r"no run of 'block\.0'.*named_modules") as caught:
        uc.diagnose(model, batches=[{"idx": tokens()}], layout=uc.Layout(blocks=("block.0",)))
    assert "blocks.0" in caught.value.layout
