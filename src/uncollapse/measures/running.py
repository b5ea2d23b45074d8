"""Running statistics over sequences that fit in constant memory and merge: mean, smallest, largest, count.

A `Running` holds one figure for every element of a fixed shape (say head, or measure × head). Sequences where a figure is
undefined (NaN) do not count for that element. Two `Running`s of the same shape merge exactly as if one had seen both
corpora, up to the order of a float64 sum; across processes `Running.reduced` does the same with three all-reduces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


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

    def reduced(self, group: torch.distributed.ProcessGroup | None = None) -> Running:
        """Merged over the processes of a `torch.distributed` group; every process gets the same, on the CPU."""
        device = reducing_device(group)
        total, low, high, count = (t.to(device, copy=True) for t in (self.total, self.low, self.high, self.count))
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM, group)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.SUM, group)
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX, group)
        return Running(total.cpu(), low.cpu(), high.cpu(), count.cpu())

    def summary(self, *index: int) -> tuple[float, float, float, int]:
        """(mean, min, max, n) of one element; mean is NaN where nothing was observed."""
        n = int(self.count[index])
        mean = float(self.total[index]) / n if n else float("nan")
        return mean, float(self.low[index]), float(self.high[index]), n


def reducing_device(group: torch.distributed.ProcessGroup | None = None) -> torch.device:
    """Where the group's backend takes tensors: the CPU if it can (gloo), else the current device of its kind (NCCL: CUDA)."""
    backends = torch.distributed.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    kinds = [backend.split(":")[0] for backend in backends.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
