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
import math
import mmap
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from uncollapse.anatomy.offloaded_weights import kept_parameters, put_in_place
from uncollapse.anatomy.probing import probing
from uncollapse.restoring import restoring

LEAST, MOST = 0.25, 0.75  # of what has one axis: gains, biases, logarithms
LARGE = 2**20  # bytes
DRAWN = 1_048_573  # numbers; a larger weight repeats them, and as this is a prime, no row of it repeats another one


def can_be_drawn(model: nn.Module) -> bool:
    """Whether weights of the model are kept elsewhere, and all of them are plain floating numbers, of more than eight bits."""
    kept = list(kept_parameters(model))
    return bool(kept) and all(
        type(one) is nn.Parameter and one.is_floating_point() and one.element_size() > 1 for one in kept
    )


@contextlib.contextmanager
def drawn_weights(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the model is read from where accelerate keeps it: numbers are drawn instead. Passes of
    other threads wait."""
    with probing(model), restoring() as changes:
        changes.undo(_buffers_as_found(model))
        changes.enter(put_in_place(model, _drawn))
        yield


def _buffers_as_found(model: nn.Module) -> Callable[[], None]:
    """Writes into the model's buffers what they hold now: its code may have noted there what it made of drawn numbers."""
    found = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, before in found:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

    return put_back


def _drawn(name: str, like: Tensor) -> Tensor:
    """The numbers of the weight with this name, as long and in the format of `like`."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    # Of a uniform distribution; matrices so that a stream keeps its size.
    low, high = (LEAST, MOST) if like.ndim < 2 else (-math.sqrt(3 / like.shape[-1]), math.sqrt(3 / like.shape[-1]))
    found = _empty(like)
    first, *others = found.view(-1).split(DRAWN)
    first.uniform_(low, high, generator=generator)  # drawing takes longer than reading from a fast disk
    for more in others:
        more.copy_(first[: len(more)])
    return found


def _empty(like: Tensor) -> Tensor:
    """Memory for a tensor of this shape and format, which goes back to the system with it: the C library would keep pieces of up to
    32 MB for itself."""
    size = like.numel() * like.element_size()
    if size < LARGE:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(like.shape)
