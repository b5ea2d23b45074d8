"""Running statistics: against NumPy on everything at once, merging, and two real processes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from uncollapse.measures import running
from uncollapse.measures.running import WIDEST, Running, RunningCloud

values = st.lists(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=3, max_size=3), min_size=1, max_size=12
)


@given(values, st.integers(0, 12))
def test_any_split_of_the_corpus_gives_the_statistics_of_the_whole(rows: list[list[float]], cut: int) -> None:
    table = np.array(rows)
    first, second = torch.tensor(rows[:cut]).reshape(-1, 3).double(), torch.tensor(rows[cut:]).reshape(-1, 3).double()
    halves = [Running.empty(3).add(part) if len(part) else Running.empty(3) for part in (first, second)]
    merged = halves[0].merge(halves[1])
    for column in range(3):
        seen = table[:, column][~np.isnan(table[:, column])].astype(np.float32).astype(np.float64)
        mean, low, high, n = merged.summary(column)
        assert n == len(seen)
        if n:
            assert (low, high) == (seen.min(), seen.max())
            assert mean == pytest.approx(seen.mean(), rel=1e-12, abs=1e-9)
        else:
            assert math.isnan(mean)


def clouds() -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Points with their keys, and how many of them the first process has: few, more than are kept, none."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"few": (43, 3), "many": (WIDEST + 209, WIDEST + 200), "none": (12, 0)}
    return {
        name: (torch.randn(n, 6, generator=generator) + 5, torch.rand(n, generator=generator, dtype=torch.float64), cut)
        for name, (n, cut) in sizes.items()
    }


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = torch.arange(5.0)[:, None] if rank == 0 else torch.tensor([[10.0], [math.nan]])
    reduced = Running.empty(1).add(own).reduced()
    torch.save(torch.tensor(reduced.summary(0), dtype=torch.float64), f"{folder}/{rank}.pt")
    for name, (points, keys, cut) in clouds().items():
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        torch.save(vars(RunningCloud.of(points[own], keys[own]).reduced()), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_on_the_statistics_of_both(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == pytest.approx([20 / 6, 0.0, 10.0, 6])
        for name, (points, keys, _) in clouds().items():
            found, whole = RunningCloud(**torch.load(tmp_path / f"{name}-{rank}.pt")), RunningCloud.of(points, keys)
            assert (found.count, found.pointing) == (whole.count, whole.pointing)
            assert torch.equal(found.points, whole.points)
            assert torch.equal(found.keys, whole.keys)
            for one, other in ((found.mean, whole.mean), (found.unit, whole.unit), (found.scatter, whole.scatter)):
                assert (one is None) == (other is None)
                assert one is None or other is None or torch.allclose(one, other, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ("cuda:nccl", "cuda:1"),
        ("cuda:nccl,xpu:xccl", "cuda:1"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cpu:mpi", "cpu"),
    ],
)
def test_processes_exchange_tensors_where_their_backend_takes_them(
    backends: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, placed = object(), []

    def all_reduce(tensor: torch.Tensor, _: object, given: object) -> None:
        assert given is group
        placed.append(str(tensor.device))

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda given: backends if given is group else "")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 5)
    with FakeTensorMode():  # tensors that know a device without having one
        reduced = Running.empty(3).reduced(group)
    assert placed == [expected] * 4
    parts = (reduced.total, reduced.low, reduced.high, reduced.count)
    assert [part.device.type for part in parts] == ["cpu"] * 4
    assert [part.dtype for part in parts] == [torch.float64] * 3 + [torch.int64]


def test_what_is_reduced_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda _: "cpu:gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, *_: tensor.mul_(2))
    own = Running.empty(1).add(torch.tensor([[3.0]]))
    assert own.reduced().summary(0) == (3.0, 6.0, 6.0, 2)
    assert own.summary(0) == (3.0, 3.0, 3.0, 1)


def test_what_was_found_cannot_be_changed() -> None:
    own = [each for each in vars(running).values() if getattr(each, "__module__", "") == running.__name__]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert kept
    assert all(each.__dataclass_params__.frozen for each in kept)  # type: ignore[attr-defined]
