"""`UnsupportedModel` as a new user meets it: what was found, which identity failed and by how much, and where to start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.own_models import OwnBlock, OwnGPT, tokens


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


def test_a_model_without_block_modules() -> None:
    error = refusal(NoBlocks().eval(), {"idx": tokens()})
    assert "3 attention calls" in error.found
    assert "6 residual additions (in the model itself)" in error.found


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


class State:
    def __init__(self, stream: Tensor) -> None:
        self.stream = stream


class StatefulBlock(OwnBlock):
    def forward(self, state: State) -> Tensor:  # type: ignore[override]
        state.stream = super().forward(state.stream)
        return state.stream


class PassesAnObject(OwnGPT):
    """The stream travels in an object of the user's own: no argument of a block is it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(StatefulBlock(32, 4, True) for _ in range(3))

    def forward(self, idx: Tensor) -> Tensor:
        state = State(self.token(idx))
        for block in self.blocks:
            block(state)
        return self.head(self.norm(state.stream))


def test_a_stream_that_is_no_argument_of_the_block() -> None:
    error = refusal(PassesAnObject().eval(), {"idx": tokens()})
    assert "blocks.0 is none of its arguments" in str(error)
    assert "embedding" in error.identity
    assert eval(error.layout, {"uc": uc}).blocks == ("blocks.0", "blocks.1", "blocks.2")


class Scaled(OwnBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def test_a_layout_does_not_silence_the_proof() -> None:
    """The proposed Layout is a start, not a way round: the same identity fails again."""
    model = own_gpt(Scaled)
    error = refusal(model, {"idx": tokens()})
    with pytest.raises(uc.UnsupportedModel) as again:
        uc.diagnose(model, batches=[{"idx": tokens()}], layout=eval(error.layout, {"uc": uc}))
    assert again.value.identity == error.identity


def test_a_layout_with_a_misspelt_block_says_so() -> None:
    model = OwnGPT().eval()
    with pytest.raises(uc.UnsupportedModel, match=r"no run of 'block\.0'.*named_modules") as caught:
        uc.diagnose(model, batches=[{"idx": tokens()}], layout=uc.Layout(blocks=("block.0",)))
    assert "blocks.0" in caught.value.layout
