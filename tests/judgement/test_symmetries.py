"""What the tests of a symmetry say together, on records made by hand."""

from dataclasses import replace

import pytest

from uncollapse.judgement.symmetries import EXACT, at_rounding, breakers, completed, is_broken_otherwise
from uncollapse.records.common import Phenomenon, Statistic
from uncollapse.records.symmetries import SymmetryRecord, SymmetryTest


def acted(without: list[str], defect: float | None, holds: bool | None = None, **changes: object) -> SymmetryTest:
    value = None if defect is None else Statistic(defect, defect, defect, 1)
    level = Statistic(1e-7, 1e-7, 1e-7, 1)
    reasons = {} if value else {"defect": "it could not act"}
    test = SymmetryTest(
        "rank-collapse-depth", "token permutation", False, "", None, without, value, level, holds, reasons
    )
    return replace(test, **changes)


def suggested(phenomenon: Phenomenon = "rank-collapse-depth") -> SymmetryRecord:
    reasons = {"equivariance_defect": "not acted", "slope": "no lengths"}
    held = ["2 residual additions"]
    return SymmetryRecord(phenomenon, "", None, "", [], [], 0.0, None, ["mask", "position gates"], held, [], reasons)


FREE = acted(["a", "b"], 1e-7, holds=True)


def test_a_component_breaks_what_is_broken_with_all_others_away() -> None:
    assert breakers([acted([], 1.0), acted(["a"], 1e-7), acted(["b"], 1.0), FREE]) == ["a"]
    assert breakers([acted([], 1.0), acted(["a"], 1.0), acted(["b"], 1.0), FREE]) == ["a", "b"]
    assert breakers([acted([], 1e-7), acted(["a"], 1e-7), acted(["b"], 1e-7), FREE]) == []


def test_nobody_is_named_where_that_was_not_found_out() -> None:
    assert breakers([acted([], 1.0), acted(["a"], 1.0), acted(["b"], 1.0), replace(FREE, holds=False)]) is None
    assert breakers([acted([], 1.0), acted(["a"], 1.0), FREE]) is None
    assert breakers([acted([], 1.0), acted(["a"], 1.0), acted(["b"], None), FREE]) is None
    assert breakers([acted([], 1.0)]) is None
    assert breakers([]) is None


def test_a_symmetry_is_broken_otherwise_only_with_everything_away() -> None:
    assert is_broken_otherwise([acted([], 1.0, holds=False), replace(FREE, holds=False)])
    assert not is_broken_otherwise([acted([], 1.0, holds=False), FREE])
    assert not is_broken_otherwise([acted([], 1.0, holds=False)])  # nothing was taken away
    assert not is_broken_otherwise([replace(FREE, holds=None)])
    assert not is_broken_otherwise([])


@pytest.mark.parametrize(("levels", "expected"), [(0.0, True), (EXACT, True), (EXACT * 1.01, False), (100.0, False)])
def test_rounding_is_judged_by_the_largest_defect(levels: float, expected: bool) -> None:
    worst = Statistic(0.0, 0.0, levels, 3)
    test = replace(acted([], 1.0), defect=worst, rounding=Statistic(0.5, 0.0, 1.0, 3))
    assert at_rounding(test) is expected


def test_a_record_takes_over_what_acting_showed() -> None:
    tests = [acted([], 1.0), acted(["a"], 1e-7), acted(["b"], 1.0), FREE]
    held = {"rank-collapse-depth": ["sink columns", "2 residual additions"], "entropy-collapse": ["logit soft cap"]}
    record = completed(suggested(), tests, held)
    assert record.equivariance_defect == tests[0].defect
    assert record.breakers == ["a", "position gates"]  # found by acting; gates were not taken away
    assert record.stabilisers == ["2 residual additions", "sink columns"]
    assert record.unavailable == {"slope": "no lengths"}


def test_a_record_keeps_what_was_suggested_where_acting_could_not_tell() -> None:
    loose = completed(suggested(), [acted([], 1.0), replace(FREE, holds=False)], {})
    assert loose.breakers == ["mask", "position gates", "order told in another way"]
    width = completed(
        suggested("rank-collapse-width"),
        [replace(t, phenomenon="rank-collapse-width") for t in (acted([], 1.0), replace(FREE, holds=False))],
        {},
    )
    assert width.breakers == ["mask", "position gates"]  # only an order can be told
    none = completed(suggested(), [acted([], 1.0, phenomenon="entropy-collapse")], {})
    assert none.unavailable["equivariance_defect"] == "no group of this symmetry could act"
    failed = completed(suggested(), [acted([], None), acted(["a"], 1.0)], {})
    assert failed.unavailable["equivariance_defect"] == "it could not act"
    assert failed.breakers == ["mask", "position gates"]


@pytest.mark.parametrize(("holds", "named"), [(False, True), (True, False), (None, False)])
def test_a_shift_of_logits_that_shows_means_sinks(holds: bool | None, named: bool) -> None:
    tests = [acted([], 1.0, holds, action="logit shift")]
    assert ("sink columns" in completed(suggested(), tests, {}).breakers) is named
