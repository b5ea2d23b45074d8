"""Which parameter a projection's weight and bias are, and along which of its axes the output lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parameters:
    """A learned product's parameters by their qualified names. Feature `j` of its output is number `offset + j` along `out`."""

    weight: str
    bias: str | None
    out: int
    offset: int = 0


def is_part_of(operand: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter, a cut of it, or its transpose."""
    if parameter.device.type == "meta" or operand.dtype != parameter.dtype:
        return False
    same = operand.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    inside = operand.ndim == parameter.ndim and set(operand.stride()) == set(parameter.stride())
    return same and inside and operand.numel() <= parameter.numel()


def output_axis(module: nn.Module, weight: Tensor, bias: Tensor | None) -> int | None:
    """Along which axis of its weight a linear map keeps its outputs, told by what it does; None if it does something else."""
    generator = torch.Generator().manual_seed(0)
    for axis in (0, 1):
        given = torch.randn(1, 3, weight.shape[1 - axis], generator=generator).to(weight)
        if bias is not None and len(bias) != weight.shape[axis]:
            continue
        expected = given.double() @ weight.double().movedim(axis, 1) + (0 if bias is None else bias.double())
        try:
            got = module.forward(given)  # `forward`: no hook on this module should meet these numbers
        except Exception:  # the other shape
            continue
        eps = torch.finfo(weight.dtype).eps * weight.shape[1 - axis] ** 0.5
        if got.shape == expected.shape and bool((got - expected).abs().max() <= 16 * eps * expected.abs().max()):
            return axis
    return None
