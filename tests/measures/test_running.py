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
from uncollapse.measures.running import Running, reducing_device

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
