"""Tensor in, figure out: token clouds, attention matrices, output projections, norms and fits. Nothing here knows a model."""
