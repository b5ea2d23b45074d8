"""Drawn numbers in the place of weights that are kept elsewhere, so that a proof need not read them.

What is proved of a model is a fact about its code: which updates add up to a block's output, which token reaches which, which
operation hides padding, whether rows sum to one. Each is an identity between functions of the weights. One that holds at numbers
drawn from a continuous distribution holds, but for a set of weights of measure zero, at all of them. So it may be proved without
the model's own weights, and these are read once, for the batches. There the pass bears out what was proved, or the proof is made
anew with the weights themselves (`ChangedPath`).

A weight is drawn whenever it is read, and is the same each time. Numbers are drawn at the size that keeps a stream at its size.

When not to use it: for anything that is measured. And where weights are no plain floating numbers, or would not be read anyway:
`can_be_drawn` says so.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

from uncollapse.anatomy.offloaded_weights import kept_parameters, put_in_place
from uncollapse.anatomy.probing import probing
from uncollapse.measures.admission import FLOATS

SPREAD: Final = 0.5  # of what has one axis: gains, biases, logarithms


def can_be_drawn(model: nn.Module) -> bool:
    """Whether weights of the model are kept elsewhere, and all of them are plain floating numbers."""
    kept = list(kept_parameters(model))
    return bool(kept) and all(type(one) is nn.Parameter and one.dtype in FLOATS for one in kept)


@contextlib.contextmanager
def drawn_weights(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the model is read from where accelerate keeps it: numbers are drawn instead. Passes of
    other threads wait."""
    with probing(model), put_in_place(model, _drawn):
        yield


def _drawn(name: str, like: Tensor) -> Tensor:
    """The numbers of the weight with this name, as long and in the format of `like`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    # A stream keeps its size through a matrix, whichever of its axes is contracted.
    spread = max(like.shape[-2:]) ** -0.5 if like.ndim > 1 else SPREAD
    bound = 3**0.5 * spread  # of a uniform distribution
    return torch.empty(like.shape, dtype=like.dtype).uniform_(-bound, bound, generator=generator)
