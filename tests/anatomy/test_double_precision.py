"""Blocks in double precision against the same written in NumPy, and what they may not do there."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uncollapse as uc
from tests.helpers.families import FAMILIES, inputs_for
from uncollapse.anatomy.double_precision import in_double_precision
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.proof import proved_anatomy
from uncollapse.anatomy.reached_rows import reached_by_later
from uncollapse.anatomy.vocabulary import Anatomy, StreamAxes

AXES = StreamAxes(0, (1,), 2)


class MaskedBehindTheSoftmax(nn.Module):
    """One head; forbidden weights are set to 0 behind the softmax, and the rest are scaled up to one again."""

    def __init__(self, dtype: torch.dtype, steepness: float = 6.0, leak: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steepness, self.leak = steepness, leak
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.steepness * self.q(x) @ self.k(x).transpose(-1, -2)
        weights = torch.softmax(logits.float(), -1).to(x.dtype)
        allowed = torch.ones_like(weights, dtype=torch.float16).tril().to(x.dtype)
        allowed = allowed.masked_fill(allowed == 0, self.leak)
        weights = weights * allowed
        return (weights / weights.sum(-1, keepdim=True)) @ self.v(x)


def in_numpy(model: MaskedBehindTheSoftmax, x: Tensor) -> np.ndarray:
    q, k, v = (layer.weight.detach().double().numpy() for layer in (model.q, model.k, model.v))
    given = x.double().numpy()
    logits = model.steepness * (given @ q.T) @ (given @ k.T).swapaxes(-1, -2)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * np.tril(np.ones(logits.shape[-2:]))
    return np.asarray((weights / weights.sum(-1, keepdims=True)) @ (given @ v.T))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_block_gives_what_numpy_gives_in_double_precision(dtype: torch.dtype) -> None:
    """Casts, formats asked for by name and by attribute, and weights of another format are all in double precision."""
    model, x = MaskedBehindTheSoftmax(dtype), torch.randn(2, 7, 8).to(dtype)
    with torch.no_grad(), in_double_precision(model):
        found = model(x)
        assert model.q.weight.dtype == torch.float64
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), in_numpy(model, x), rtol=1e-9, atol=1e-12)
    assert model.q.weight.dtype == dtype


def test_what_is_written_into_a_tensor_of_another_format_would_be_lost() -> None:
    kept = torch.zeros(3, dtype=torch.float16)
    with in_double_precision(nn.Module()):
        made = torch.zeros(3, dtype=torch.float16)
        made += 1.0
        with pytest.raises(UnreadableError, match="written to"):
            kept += 1.0
    assert made.dtype == torch.float64
    assert not bool(kept.any())


@pytest.mark.parametrize("leak", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_key_hidden_behind_the_softmax_is_not_heard_and_one_that_leaks_is(dtype: torch.dtype, leak: float) -> None:
    """The weights that a hidden key leaves have underflowed in half precision: their digits move by as much as a real token's."""
    model = MaskedBehindTheSoftmax(dtype, steepness=12.0, leak=leak)
    torch.manual_seed(5)
    x = torch.randn(3, 8, 8).to(dtype)
    reached = reached_by_later(model, lambda stream, _: model(stream), x, AXES)
    assert bool(reached.any()) == bool(leak)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_weights_that_are_brought_for_a_run_in_double_precision_stay_in_their_format(dtype: torch.dtype) -> None:
    """accelerate converts a weight to the format of the parameter, and makes that parameter anew behind the run."""
    model, x = MaskedBehindTheSoftmax(dtype), torch.randn(2, 7, 8).to(dtype)
    expected, plain = in_numpy(model, x), model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(x), plain)
    before = hooks(model)  # what accelerate notes at its first run is there
    with in_double_precision(model):
        found = model(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert [(p.dtype, p.is_meta) for p in model.parameters()] == [(dtype, True)] * 3
    assert hooks(model) == before
    assert torch.equal(model(x), plain)


def hooks(model: nn.Module) -> list[tuple[str, set[str]]]:
    """What stands on the hooks that bring each module its weights."""
    return [(name, set(vars(module._hf_hook))) for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bert", "t5", "opt"])
def test_a_half_precision_model_that_writes_out_its_weights_is_read_where_it_is_kept_elsewhere(name: str) -> None:
    model, given = FAMILIES[name].build().to(torch.bfloat16), inputs_for(FAMILIES[name])
    model.set_attn_implementation("eager")
    inside = proved_anatomy(model, given)
    uc.forget(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    outside = proved_anatomy(model, given)
    assert outside == inside
    assert sums(outside) == sums(inside)
    assert set(sums(inside)) & {True, False}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def sums(anatomy: Anatomy) -> list[bool | None]:
    return [call.sums_to_one for block in anatomy.blocks for part in block.parts for call in part.attention]
