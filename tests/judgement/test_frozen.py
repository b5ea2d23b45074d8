"""What a judgement holds is as frozen as the records that it was made of."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import pytest

from uncollapse import judgement

MODULES = [name for _, name, _ in pkgutil.walk_packages(judgement.__path__, f"{judgement.__name__}.")]


@pytest.mark.parametrize("name", MODULES)
def test_what_was_found_cannot_be_changed(name: str) -> None:
    own = [each for each in vars(importlib.import_module(name)).values() if getattr(each, "__module__", "") == name]
    kept = [each for each in own if isinstance(each, type) and dataclasses.is_dataclass(each)]
    assert all(each.__dataclass_params__.frozen for each in kept)  # type: ignore[attr-defined]  # not in typeshed


def test_there_is_something_to_change() -> None:
    assert dataclasses.is_dataclass(importlib.import_module("uncollapse.judgement.findings").Reading)
