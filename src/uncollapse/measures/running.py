"""Running statistics over sequences that fit in constant memory and merge: mean, smallest, largest, count; and a cloud of points.

A `Running` holds one figure for every element of a fixed shape (say head, or measure × head). Sequences where a figure is
undefined (NaN) do not count for that element. Two `Running`s of the same shape merge exactly as if one had seen both
corpora, up to the order of a float64 sum.

A `RunningCloud` holds points of one width: the points themselves while there are few, their mean and second moment beyond. It
merges in the same way. Above a width of `WIDEST` it keeps a uniform sample of the points in place of the second moment.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.distributed
from torch import Tensor

WIDEST: Final = 1024  # of a cloud whose second moment is kept; and how many points are kept as they are


@dataclass(frozen=True)
class Running:
    """Sum, minimum, maximum (float64) and count (int64) of what was seen so far, elementwise over a fixed shape."""

    total: Tensor
    low: Tensor
    high: Tensor
    count: Tensor

    @staticmethod
    def empty(*shape: int) -> Running:
        zeros = torch.zeros(shape, dtype=torch.float64)
        return Running(zeros, zeros + torch.inf, zeros - torch.inf, torch.zeros(shape, dtype=torch.int64))

    def add(self, values: Tensor) -> Running:
        """With `values` of shape [sequence, *shape] added; NaN counts as not observed."""
        values = values.detach().to("cpu", torch.float64)
        missing = values.isnan()
        return Running(
            self.total + values.masked_fill(missing, 0.0).sum(0),
            torch.minimum(self.low, values.masked_fill(missing, torch.inf).amin(0)),
            torch.maximum(self.high, values.masked_fill(missing, -torch.inf).amax(0)),
            self.count + (~missing).sum(0),
        )

    def merge(self, other: Running) -> Running:
        """What one `Running` would hold had it seen both."""
        return Running(
            self.total + other.total,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.count + other.count,
        )

    def summary(self, *index: int) -> tuple[float, float, float, int]:
        """(mean, min, max, n) of one element; mean is NaN where nothing was observed."""
        total, low, high, n = (_at(numbers, index) for numbers in self._numbers)
        return total / n if n else float("nan"), low, high, int(n)

    @functools.cached_property
    def _numbers(self) -> tuple[Any, ...]:
        """As nested lists: a tensor hands out its elements one by one at ten times the price."""
        return tuple(tensor.tolist() for tensor in (self.total, self.low, self.high, self.count))


def _at(numbers: Any, index: tuple[int, ...]) -> Any:
    return functools.reduce(operator.getitem, index, numbers)


@dataclass(frozen=True)
class RunningCloud:
    """A cloud of points x_1 … x_n of one width d, streamed.

    `count` n; `mean` [d], the mean of the points; `unit` [d], the sum of x/||x|| over the `pointing` points that are not zero;
    all in float64. `points` [k, d] with their `keys` [k]: all points while n <= WIDEST; beyond that a uniform sample of WIDEST of
    them, those with the smallest keys. `scatter` [d, d], the sum of (x - mean)(x - mean)^T in float64: from the moment when not
    all points are kept, where d <= WIDEST; otherwise None. Two clouds whose points came with the same keys keep the same ones.

    Memory: at most WIDEST d numbers and d d more, whatever the corpus. Points with NaN or infinity are left out.

    The scatter is that about the mean, and is merged by the formula of Chan, Golub and LeVeque ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979, eq. 2.1), so that a large common mean takes no digits away.
    """

    count: int
    pointing: int
    mean: Tensor
    unit: Tensor
    points: Tensor
    keys: Tensor
    scatter: Tensor | None = None

    @staticmethod
    def of(points: Tensor, keys: Tensor) -> RunningCloud:
        """The cloud of `points` [n, width], each with its key: a number drawn uniformly from 0 to 1, in float64 [n]."""
        points = points.detach()
        double = points.double()
        sizes = torch.linalg.vector_norm(double, dim=-1)
        known = sizes.isfinite()
        if not bool(known.all()):
            points, double, keys, sizes = points[known], double[known], keys.to(points.device)[known], sizes[known]
        pointing = sizes > 0
        mean = double.sum(0) / max(len(double), 1)
        unit = torch.where(pointing, 1 / sizes, 0) @ double
        found = RunningCloud(
            len(double), int(pointing.sum()), mean, unit, points, keys.to(points.device, torch.float64)
        )
        return found._within_bounds(double)

    def add(self, points: Tensor, keys: Tensor) -> RunningCloud:
        """With further points; see `of`."""
        return self.merge(RunningCloud.of(points, keys))

    def merge(self, other: RunningCloud) -> RunningCloud:
        """What one `RunningCloud` would hold had it seen both."""
        if not other.count or not self.count:
            return self if self.count else other
        count = self.count + other.count
        apart = other.mean - self.mean
        merged = RunningCloud(
            count,
            self.pointing + other.pointing,
            self.mean + apart * (other.count / count),
            self.unit + other.unit,
            torch.cat([self.points, other.points]),
            torch.cat([self.keys, other.keys]),
        )
        if len(merged.points) == count and self.scatter is None and other.scatter is None:
            return merged._within_bounds()
        if len(self.mean) <= WIDEST:
            between = torch.outer(apart, apart * (self.count * other.count / count))
            merged = replace(merged, scatter=self._scattered() + other._scattered() + between)
        return merged._sampled()

    def on_cpu(self) -> RunningCloud:
        """The same, its tensors on the CPU."""
        return replace(
            self,
            mean=self.mean.cpu(),
            unit=self.unit.cpu(),
            points=self.points.cpu(),
            keys=self.keys.cpu(),
            scatter=None if self.scatter is None else self.scatter.cpu(),
        )

    def _within_bounds(self, double: Tensor | None = None) -> RunningCloud:
        """With no more points than are kept; what is lost of them is in the scatter, where that is kept. `double`: all points in
        float64, if somebody has them."""
        if self.count <= WIDEST:
            return self
        if len(self.mean) > WIDEST:
            return self._sampled()
        return replace(self, scatter=self._scattered(double))._sampled()

    def _scattered(self, double: Tensor | None = None) -> Tensor:
        if self.scatter is not None:
            return self.scatter
        centred = (self.points.double() if double is None else double) - self.mean
        half = centred.shape[1] // 2  # both triangles are equal: three quarters of the products say all
        left, right = centred[:, :half], centred[:, half:]
        scatter = centred.new_empty(centred.shape[1], centred.shape[1])
        torch.mm(left.mT, left, out=scatter[:half, :half])
        torch.mm(right.mT, right, out=scatter[half:, half:])
        scatter[:half, half:] = left.mT @ right
        scatter[half:, :half] = scatter[:half, half:].mT
        return scatter

    def _sampled(self) -> RunningCloud:
        if len(self.points) <= WIDEST:
            return self
        kept = self.keys.topk(WIDEST, largest=False, sorted=False).indices.sort().values
        return replace(self, points=self.points[kept].clone(), keys=self.keys[kept])


def reducing_device() -> torch.device:
    """Where processes exchange tensors: the CPU if their backend takes them there (gloo), else the current device of its kind
    (NCCL: CUDA)."""
    backends = torch.distributed.get_backend_config()  # such as "cpu:gloo,cuda:nccl"
    kinds = [backend.split(":")[0] for backend in backends.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
