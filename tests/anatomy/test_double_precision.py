"""Blocks in double precision against the same written in NumPy, and what they may not do there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from uncollapse.anatomy.double_precision import in_double_precision
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.reached_rows import reached_by_later
from uncollapse.anatomy.vocabulary import StreamAxes

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
    with torch.no_grad(), in_double_precision():
        found = model(x)
        assert model.q.weight.dtype == torch.float64
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), in_numpy(model, x), rtol=1e-9, atol=1e-12)
    assert model.q.weight.dtype == dtype


def test_what_is_written_into_a_tensor_of_another_format_would_be_lost() -> None:
    kept = torch.zeros(3, dtype=torch.float16)
    with in_double_precision():
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
    reached = reached_by_later(lambda stream, _: model(stream), x, AXES)
    assert bool(reached.any()) == bool(leak)
