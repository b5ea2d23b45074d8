"""Whether a model computes another function with a key-value cache than without, on batches that are measured without one.

A probe keeps no cache, and in most models that changes nothing. transformers takes position numbers that start again for sequences
packed into one row, and keeps them apart, but only where no cache is kept: with `config.use_cache` the same call lets them see each
other. What is measured has to be the function that is meant.

When not to use it: for batches whose numbers do not start again. It runs the model twice more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.deviations import largest_difference
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import configurations, output_of, probing
from uncollapse.errors import InputError
from uncollapse.probe.passes import on_device
from uncollapse.wrappers import takes

FAR = 1e-3  # of the largest element; rounding is less in single precision, and what another mask brings is more in any


def require_same_without_cache(caller: str, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Raise `InputError` where the model's own setting keeps a cache, and it gives something else on a batch without one."""
    if not any(getattr(each, "use_cache", False) is True for each in configurations(model)) or not takes(
        model, "use_cache"
    ):
        return
    for batch in batches:
        if batch.get("use_cache") is None and _starts_again(batch):
            given = on_device(batch, device_of(model))
            with probing(model):
                found = [output_of(model, {**given, "use_cache": keeps})[0] for keeps in (False, True)]
            size = float(found[0].abs().nan_to_num(0.0, 0.0, 0.0).max())
            if found[0].shape != found[1].shape or largest_difference([found[0]], [found[1]]) > FAR * size:
                raise InputError(
                    f"{caller}: expected a batch on which a key-value cache changes nothing, got one on which "
                    f"{type(model).__name__} gives something else without: numbers in it start again, as those of packed sequences "
                    "do. It keeps one by itself (config.use_cache), and is measured without. Pass batch | {'use_cache': False} if "
                    "that is what is meant."
                )


def _starts_again(batch: Mapping[str, Any]) -> bool:
    """Whether whole numbers count up along a row and start again somewhere, as positions of packed sequences do."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim >= 2 and value.dtype in {torch.int64, torch.int32}:
            steps = value.diff(dim=-1)
            if bool((steps < 0).any()) and bool(((steps == 1) | (steps < 0)).all()):
                return True
    return False
