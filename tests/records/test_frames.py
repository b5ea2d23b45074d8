"""Records as data frames: one row per record, one column per figure, whoever makes the frame."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

import uncollapse as uc
from uncollapse.records import frames
from uncollapse.records.common import Statistic


@dataclass(frozen=True)
class Made:
    block: int
    value: Statistic | None
    others: list[int] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


ROWS = [Made(0, Statistic(1.0, 0.5, 1.5, 4), [2, 7]), Made(1, None, [], {"value": "a reason"})]
EXPECTED = {
    "block": [0, 1],
    "value": [1.0, None],
    "value_min": [0.5, None],
    "value_max": [1.5, None],
    "value_n": [4, None],
    "others": ["2, 7", ""],
}


def test_a_figure_has_its_mean_under_its_own_name() -> None:
    assert frames.columns(ROWS, Made) == EXPECTED
    assert frames.columns([], Made) == {"block": [], "value": [], "others": []}


def test_whoever_is_installed_makes_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    narwhals = types.ModuleType("narwhals")

    def from_dict(table: dict[str, list[Any]], *, backend: str) -> Any:
        asked.append((table, backend))
        return types.SimpleNamespace(to_native=lambda: "native")

    narwhals.from_dict = from_dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "narwhals", narwhals)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "polars" else None)
    assert frames.frame(ROWS, Made) == "native"
    assert asked == [(EXPECTED, "polars")]


def test_without_any_of_them_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(uc.InputError, match="pandas or polars or pyarrow to be installed"):
        frames.frame(ROWS, Made)
    with pytest.raises(uc.InputError, match="a backend among"):
        frames.frame(ROWS, Made, backend="excel")
