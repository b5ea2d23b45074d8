"""Running statistics: against NumPy on everything at once, and where processes exchange them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.measures import running
from uncollapse.measures.running import Running, RunningCloud, reducing_device

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
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.xpu, "current_device", lambda: 5)
    assert str(reducing_device()) == expected


def test_what_was_found_cannot_be_changed() -> None:
    own = [each for each in vars(running).values() if getattr(each, "__module__", "") == running.__name__]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert kept
    assert all(each.__dataclass_params__.frozen for each in kept)  # type: ignore[attr-defined]


def test_a_cloud_without_points_leaves_the_other_as_it_is() -> None:
    empty = RunningCloud.of(torch.zeros(0, 3), torch.zeros(0))
    full = RunningCloud.of(torch.eye(3), torch.arange(3) / 3)
    assert empty.merge(full) is full
    assert full.merge(empty) is full
    assert empty.merge(empty).count == 0


def test_a_cloud_on_the_cpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "WIDEST", 4)
    cloud = RunningCloud.of(torch.arange(15.0).view(5, 3), torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7]))
    copy = cloud.on_cpu()
    assert (copy.count, copy.pointing) == (5, 5)
    for name in ("mean", "unit", "points", "keys", "scatter"):
        assert torch.equal(getattr(copy, name), getattr(cloud, name))
    few = RunningCloud.of(torch.eye(3), torch.arange(3) / 3)
    assert few.on_cpu().scatter is None


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("width", [4, 5])
def test_beyond_so_many_points_those_with_the_smallest_keys_are_kept(
    count: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With WIDEST 4: four points are kept whole, of five the four smallest keys; the moment up to width 4."""
    monkeypatch.setattr(running, "WIDEST", 4)
    x = torch.arange(float(count * width)).view(count, width) ** 2
    keys = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])[:count]
    for cloud in (
        RunningCloud.of(x, keys),
        RunningCloud.of(x[:2], keys[:2]).add(x[2:], keys[2:]),
    ):
        kept = [row for row, key in zip(x.tolist(), keys.tolist(), strict=True) if count <= 4 or key < 0.8]
        assert cloud.points.tolist() == kept
        assert (cloud.scatter is not None) == (count > 4 and width <= 4)
        if cloud.scatter is not None:
            centred = x.double() - x.double().mean(0)
            assert torch.allclose(cloud.scatter, centred.mT @ centred)
        assert torch.allclose(cloud.mean, x.double().mean(0))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e18, 1e30])
def test_directions_of_points_of_any_size_are_counted(size: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-4.0, 3.0]]) * size
    cloud = RunningCloud.of(x, torch.rand(3))
    assert (cloud.count, cloud.pointing) == (3, 2)
    assert cloud.unit.tolist() == pytest.approx([0.6 - 0.8, 0.8 + 0.6])


@pytest.mark.parametrize("width", [3, 4, 5])
def test_merged_clouds_of_any_number_keep_the_moment_of_the_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, three and seven points, in any order of merging, with a common mean that is large."""
    monkeypatch.setattr(running, "WIDEST", 5)
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(12, width, generator=generator, dtype=torch.float64) + 1e6
    keys = torch.rand(12, generator=generator, dtype=torch.float64)
    parts = [RunningCloud.of(x[a:b], keys[a:b]) for a, b in ((0, 2), (2, 5), (5, 12))]
    centred = x - x.mean(0)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        cloud = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        assert cloud.count == cloud.pointing == 12
        torch.testing.assert_close(cloud.mean, x.mean(0))
        torch.testing.assert_close(cloud.unit, torch.nn.functional.normalize(x, dim=-1).sum(0))
        assert cloud.scatter is not None
        torch.testing.assert_close(cloud.scatter, centred.mT @ centred, rtol=1e-9, atol=1e-8)
        assert sorted(cloud.keys.tolist()) == sorted(keys.tolist())[:5]


@pytest.mark.parametrize("place", [0, 2])
def test_a_point_that_is_not_finite_is_left_out_with_its_key(place: int) -> None:
    x, keys = torch.eye(3), torch.tensor([0.2, 0.4, 0.6])
    x[place, 1] = math.inf
    cloud = RunningCloud.of(x, keys)
    left = [i for i in range(3) if i != place]
    assert (cloud.count, cloud.pointing) == (2, 2)
    assert torch.equal(cloud.points, x[left])
    assert torch.equal(cloud.keys, keys[left].double())
