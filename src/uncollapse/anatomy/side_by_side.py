"""Several residual streams side by side (hyper-connections): which axis they lie along, and how a block mixes them.

A sublayer reads a mixture of the streams, and writes to each of them. What it reads tells where they are: a place along the axis
of the streams moves all of it, a place along any other axis moves one place. Streams may also share an axis with the sequences, or
with the features.
On its way past the sublayers each token's streams may be mixed with each other, by the same weights for every feature.

When not to use it: where every stream is a tensor of its own, or mixing is anything else than a product with weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uncollapse.anatomy.influence import poked
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.vocabulary import Fold, StreamAxes

MOST_PLACES = 16  # so many along an axis are poked, and the last


def laid_out(read: Callable[[Tensor], Tensor], streams: Tensor) -> tuple[int, Fold | None]:
    """The axis of the streams, and how they are folded into one with the sequences, if they are: then it is the axis that they have
    when the fold is opened. `read`: what a sublayer reads of the streams.

    Raises `UnreadableError` where that cannot be told."""
    plain = read(streams)
    moved = [_moved(read, plain, streams, axis) for axis in range(streams.ndim)]
    if plain.ndim == streams.ndim - 1:
        for axis in range(streams.ndim):
            others = [a for a in range(streams.ndim) if a != axis]
            if streams.shape[axis] > 1 and all(_is_one(moved[a], streams, plain, a, i) for i, a in enumerate(others)):
                return axis, None
    if plain.ndim == streams.ndim:
        larger = [a for a in range(streams.ndim) if streams.shape[a] != plain.shape[a]]
        others = [a for a in range(streams.ndim) if a not in larger]
        if len(larger) == 1 and all(_is_one(moved[a], streams, plain, a, a) for a in others):
            (axis,) = larger
            fold = _fold(moved[axis], streams.shape[axis], plain.shape[axis], axis)
            if fold is not None:
                return axis + fold.is_minor, fold
    raise UnreadableError(
        f"of streams of sizes {tuple(streams.shape)} a sublayer reads {tuple(plain.shape)}, and along which axis they lie was not "
        "told"
    )


def _moved(
    read: Callable[[Tensor], Tensor], plain: Tensor, streams: Tensor, axis: int
) -> list[tuple[int, list[set[int]]]]:
    """For places along an axis of the streams, which places of what is read they move, axis by axis. Those that move nothing, such
    as a stream that is not read yet, are left out."""
    size = streams.shape[axis]
    found = []
    for place in sorted({*range(min(size, MOST_PLACES)), size - 1}):
        different = read(poked(streams, axis, torch.tensor([place]))) != plain
        if bool(different.any()):
            along = [
                set(different.movedim(a, 0).flatten(1).any(-1).nonzero().flatten().tolist()) for a in range(plain.ndim)
            ]
            found.append((place, along))
    return found


def _is_one(moved: list[tuple[int, list[set[int]]]], streams: Tensor, plain: Tensor, axis: int, own: int) -> bool:
    """Whether an axis of the streams is an axis of what is read: each place moves the same place."""
    return streams.shape[axis] == plain.shape[own] and all(along[own] == {place} for place, along in moved)


def _fold(moved: list[tuple[int, list[set[int]]]], together: int, sequences: int, axis: int) -> Fold | None:
    if together % sequences or together == sequences or not moved:
        return None
    count = together // sequences
    is_minor = all(along[axis] == {place // count} for place, along in moved)
    is_major = all(along[axis] == {place % sequences} for place, along in moved)
    if is_minor == is_major and sequences > 1:  # of one sequence alone both are the same
        return None
    return Fold(axis, count, is_minor) if is_minor or is_major else None


def mixing_gap(axes: StreamAxes, runs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far a way of the streams is from a law after = M before + b, with one M [stream, stream] and b for each token, the same M
    for all of its features, as seen in several runs: 0 within rounding, else the part of the change that does not obey it. The
    first run is the one that the others are compared with; in the second and third the streams were shaken at random."""
    if any(before.shape != after.shape or before.ndim != axes.ndim for before, after in runs):
        return float("inf")
    if any(not bool(tensor.isfinite().all()) for run in runs for tensor in run):
        return float("inf")
    precision = max(torch.finfo(tensor.dtype).eps for run in runs for tensor in run)
    laid = [tuple(axes.side_by_side(tensor.double()) for tensor in run) for run in runs]
    shifts = [before - laid[0][0] for before, _ in laid[1:]]
    answers = [after - laid[0][1] for _, after in laid[1:]]
    if shifts[0].shape[-1] < shifts[0].shape[-2]:
        return float("inf")  # fewer features than streams: any change would obey some law
    known, told = (torch.cat(several[:2], -1) for several in (shifts, answers))
    mixture = told @ torch.linalg.pinv(known)
    size = max(float(tensor.abs().max()) for run in laid for tensor in run) or 1.0
    gap = (
        max(float((answer - mixture @ shift).abs().max()) for shift, answer in zip(shifts, answers, strict=True)) / size
    )
    # In units of it, rounding came to 0.7 at most in half precision, 1.2 in single, and 22 in double, as the law is fitted in that.
    return gap if gap > (4 if precision > 1e-4 else 256) * precision else 0.0
