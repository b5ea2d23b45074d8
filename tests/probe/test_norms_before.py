"""What is said of a norm that hides nothing, or of which nothing can be said."""

import torch
from torch import nn

from uncollapse.probe.norms_before import _law, _Run


class Picky(nn.LayerNorm):
    """A layer norm that runs on the model's own batches alone."""

    def forward(self, x):
        if x.shape[:2] != (2, 5):
            raise ValueError("another batch")
        return super().forward(x)


def said(norm):
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    return _law(norm, _Run("norm", x, norm(x).detach()))


def test_a_norm_that_cannot_be_run_is_not_said_to_subtract_no_mean():
    assert said(nn.RMSNorm(6)) == "the output of a norm that subtracts no mean, which hides nothing"
    assert "cannot be run by itself" in said(Picky(6))
    assert said(nn.LayerNorm(6)).kind == "layer"
