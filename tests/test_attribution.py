"""Head records: from the weights of whatever projection the model has, and honest where they cannot be had."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, inputs_for
from tiny_models import FAMILIES as SMALL
from tiny_models import text_batch

import uncollapse as uc


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt", "t5", "deepseek_v3"])
def test_projection_figures_are_those_of_the_weights(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    found = uc.diagnose(model, batches=[inputs_for(family)])
    mixed = family.heads * family.head_width
    assert found.record.heads
    for record in found.record.heads:
        assert (record.heads, record.head_width, record.width) == (family.heads, family.head_width, 32)
        assert record.kernel_dimension == max(0, mixed - 32)  # random weights have the rank their shape allows
        assert record.output_projection_rank == min(mixed, 32)
        bias = name in {"gpt2", "opt"}
        groups = family.key_value_heads
        assert record.gauge_dimension == groups * family.head_width**2 + (groups * family.head_width if bias else 0)


def test_nan_in_an_output_projection_is_said_and_the_other_blocks_are_read() -> None:
    model = SMALL["gpt2"].build().eval()
    with torch.no_grad():
        model.h[1].attn.c_proj.weight[0, 0] = math.nan
    found = uc.diagnose(model, batches=[text_batch()])
    bad = found.record.heads[1]
    assert bad.kernel_dimension is None
    assert bad.unavailable["kernel_dimension"] == "NaN or infinity in the output projection"
    assert found.record.heads[0].kernel_dimension == 0
    assert [f.code for f in found.findings if f.severity == "critical"] == ["NUMERICS-NOT-FINITE"]
