"""A share of `make fuzz`: seeds that Hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing import borrowed_model, pure_function, stored_record

seeds = st.integers(0, 2**32)


@given(seeds)
@settings(max_examples=1500, deadline=None)
def test_pure_functions(seed: int) -> None:
    assert pure_function(seed) in {"computed", "refused"}


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_stored_records(seed: int) -> None:
    assert stored_record(seed) in {"computed", "refused"}


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_borrowed_models(seed: int) -> None:
    assert borrowed_model(seed) in {"computed", "refused"}


@pytest.mark.slow
@given(seeds)
@settings(max_examples=20_000, deadline=None)
def test_many_pure_functions(seed: int) -> None:
    assert pure_function(seed) in {"computed", "refused"}
