"""A share of `make fuzz`, with seeds that Hypothesis draws: some seconds by default, two minutes among the slow tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzzing.checkpoints import checkpoint
from tests.fuzzing.command_line import command_line
from tests.fuzzing.functions import pure_function
from tests.fuzzing.models import borrowed_model
from tests.fuzzing.readers import text_file
from tests.fuzzing.records import stored_record

seeds = st.integers(0, 2**32)
Target = Callable[[int], str]
TARGETS: dict[Target, tuple[int, int]] = {
    pure_function: (1000, 30_000),
    stored_record: (15, 400),
    text_file: (40, 600),
    command_line: (10, 150),
    checkpoint: (15, 150),
    borrowed_model: (25, 300),
}
"""Each with how many cases it gets by default, and among the slow tests."""


def tried(target: Target, cases: int) -> None:
    @given(seeds)
    @settings(max_examples=cases, deadline=None, database=None)
    def case(seed: int) -> None:
        assert target(seed) in {"computed", "refused"}

    case()


@pytest.mark.parametrize("target", TARGETS)
def test_a_case_is_computed_or_refused_in_one_line(target: Target) -> None:
    tried(target, TARGETS[target][0])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_cases_are_computed_or_refused_in_one_line(target: Target) -> None:
    tried(target, TARGETS[target][1])
