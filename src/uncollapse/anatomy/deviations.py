"""By how much tensors miss what is to hold of them: equality in every bit, rounding, and a stream that is carried element by
element. 0 means that it holds."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def largest_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest absolute difference; 0 means equal in every bit, NaNs in the same places included."""
    if len(expected) != len(got):
        return float("inf")
    return max((difference(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)


def difference(expected: Tensor, got: Tensor) -> float:
    """The same for two tensors, which may have their axes in another order."""
    if expected.numel() != got.numel():
        return float("inf")
    if got.shape != expected.shape:  # the same values with their axes in another order are the same stream
        orders = [o for o in itertools.permutations(range(got.ndim)) if got.permute(o).shape == expected.shape]
        equal = [o for o in orders if torch.equal(got.permute(o), expected)]
        got = got.permute(equal[0]) if equal else got.reshape(expected.shape)
    if torch.equal(expected.isnan(), got.isnan()) and torch.equal(
        expected.nan_to_num(), got.to(expected.dtype).nan_to_num()
    ):
        return 0.0
    return float((expected.double() - got.double()).nan_to_num(nan=float("inf")).abs().max())


def is_rounding(gap: float, *values: Tensor) -> bool:
    """Whether a difference is no more than a few of the last digits of the largest value."""
    largest = max(float(v.double().abs().nan_to_num().max()) for v in values)
    return gap <= 4 * torch.finfo(values[0].dtype).eps * largest


def carry_gap(runs: list[tuple[Tensor, Tensor]]) -> float:
    """How far a way of the stream is from a law after = a * before + b with a and b fixed in every element, seen in several
    runs: 0 within rounding, else the part of the change that does not obey it."""
    if all(difference(before, after) == 0.0 for before, after in runs):
        return 0.0
    before, after = [b.double() for b, _ in runs], [a.double() for _, a in runs]
    if any(b.numel() != a.numel() for b, a in runs):
        return max(0.0 if _is_choice(b, a) else float("inf") for b, a in runs)
    if any(not bool(b.isfinite().all() & a.isfinite().all()) for b, a in runs):
        return float("inf")
    precision = max(torch.finfo(t.dtype).eps for run in runs for t in run)
    return min(_law_gap([b.permute(order) for b in before], after, precision) for order in _orders(before[0], after[0]))


def _is_choice(before: Tensor, after: Tensor) -> bool:
    """Whether some of the tokens went on as they were: the smaller tensor's rows are, bit for bit, rows of the larger one."""
    if before.ndim < 2 or after.ndim < 2 or before.shape[-1] != after.shape[-1]:
        return False
    few, many = sorted((before, after), key=Tensor.numel)
    known = set(map(tuple, many.reshape(-1, many.shape[-1]).tolist()))
    return all(tuple(row) in known for row in few.reshape(-1, few.shape[-1]).tolist())


def _orders(before: Tensor, after: Tensor) -> list[tuple[int, ...]]:
    """The orders of its axes in which one tensor may be compared with another; as it lies, where none gives its shape."""
    same = [o for o in itertools.permutations(range(before.ndim)) if before.permute(o).shape == after.shape]
    return same or [tuple(range(before.ndim))]


def _law_gap(before: list[Tensor], after: list[Tensor], precision: float) -> float:
    """The part of the change that obeys no law, relative to the sizes of both tensors. Beyond rounding is more than eight units in
    the last place of the largest element anywhere; or, in half of the features or more, a root mean square of one unit of the
    feature's own largest element: rounding alone comes to a fifth of that, and one feature of a great size hides no others."""
    before = [b.reshape(after[0].shape) for b in before]
    shifts, answers = [b - before[0] for b in before[1:]], [a - after[0] for a in after[1:]]
    sizes = _largest_by_feature(before) * _largest_by_feature(after)
    worst = 0.0
    for shift, answer in zip(shifts[1:], answers[1:], strict=True):
        cross = (answer * shifts[0] - answers[0] * shift).abs()
        anywhere = float(cross.max()) / (_size(before) * _size(after))
        typical = cross.square().flatten(0, -2).mean(0).sqrt() if cross.ndim > 1 else cross
        usual = float(torch.where(sizes > 0, typical / sizes, 0.0).median())
        worst = max(worst, anywhere if anywhere > 8 * precision else 0.0, usual if usual > precision else 0.0)
    return worst


def _size(tensors: list[Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors) or 1.0


def _largest_by_feature(tensors: list[Tensor]) -> Tensor:
    """The largest element of each feature, the last axis, in several tensors."""
    return torch.stack([t.abs().flatten(0, -2).amax(0) if t.ndim > 1 else t.abs() for t in tensors]).amax(0)
