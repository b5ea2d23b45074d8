"""The tables of the symmetries: every order parameter at every place, every test, every slope in the context length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from uncollapse.records.common import Finding, Statistic
from uncollapse.records.symmetries import SymmetryRecord, SymmetryTest, WidthScaling
from uncollapse.report import wording
from uncollapse.report.page import cells
from uncollapse.report.page.cells import Cell, Column, Measure, Table, slug
from uncollapse.report.symmetries import wording as say


def symmetry_key(phenomenon: str) -> str:
    """The key of a symmetry's row in the first thing one sees."""
    return slug("symmetry", phenomenon)


def order_key(symmetry: SymmetryRecord, position: int) -> str:
    """The key of the row of one place of an order parameter."""
    return slug("order", symmetry.phenomenon, position)


def test_key(number: int) -> str:
    """The key of a test's row in the table."""
    return slug("test", number)


def scaling_key(scaling: WidthScaling) -> str:
    """The key of one attention's row in the table of slopes."""
    return slug("scaling", scaling.stack, scaling.kind, scaling.block)


@dataclass(frozen=True)
class Along:
    """One place of one order parameter."""

    symmetry: SymmetryRecord
    position: int
    value: Statistic | None

    @property
    def unavailable(self) -> dict[str, str]:
        known = self.symmetry.unavailable
        return {
            "value": known.get("order_parameter", f"not measured at {say.place(self.symmetry.places[self.position])}")
        }

    def distance(self) -> Cell | None:
        if self.value is None:
            return None
        away = say.distance(self.value.mean, self.symmetry)
        return Cell(wording.number(away), f"from {wording.number(self.symmetry.collapsed_value)}", away)


def order_table(symmetries: Sequence[SymmetryRecord], key: str) -> Table:
    """One row a place and phenomenon: the order parameter, and how far it is from its value at collapse."""
    records = [
        Along(symmetry, position, value)
        for symmetry in symmetries
        for position, value in enumerate(symmetry.order_parameter)
    ]
    return cells.table(
        key,
        "Every order parameter at every place",
        [
            (
                Column("phenomenon", numeric=False),
                lambda row: _named(wording.PHENOMENON_NAMES[row.symmetry.phenomenon]),
            ),
            (
                Column("place", numeric=False),
                lambda row: Cell(say.place(row.symmetry.places[row.position]), sort=float(row.position)),
            ),
            (Column("measured as", numeric=False), lambda row: _named(say.measure(row.symmetry))),
        ],
        [
            Measure("value", Column("order parameter"), lambda row: row.value),
            Measure("value", Column("distance", "from collapse"), Along.distance),
        ],
        records,
        lambda row: order_key(row.symmetry, row.position),
    )


def _named(words: str) -> Cell:
    return Cell(words, sort=words)


@dataclass(frozen=True)
class _Numbered:
    """One test, its number in the record, and what came of it."""

    number: int
    test: SymmetryTest
    outcome: str

    @property
    def unavailable(self) -> dict[str, str]:
        defect = say.reason(self.test, "defect")
        dimension = defect if self.test.defect is None else "no dimension was counted"
        return {"dimension": dimension, "rounding": defect, **self.test.unavailable}


def tests_table(tests: Sequence[SymmetryTest], outcomes: Sequence[str], key: str) -> Table:
    """One row a test."""
    return cells.table(
        key,
        "Every test",
        [
            (
                Column("phenomenon", numeric=False),
                lambda row: _named(wording.PHENOMENON_NAMES[row.test.phenomenon]),
            ),
            (Column("what acted", numeric=False), lambda row: _named(row.test.action)),
            (Column("taken away", numeric=False), lambda row: _named(say.components(row.test.without) or "nothing")),
            (Column("outcome", numeric=False), lambda row: _named(say.OUTCOMES[row.outcome])),
        ],
        [
            Measure("defect", Column("defect", "‖f(gx) − g f(x)‖/‖f(x)‖"), lambda row: row.test.defect),
            Measure("rounding", Column("rounding", "of the same"), lambda row: row.test.rounding),
            Measure("surviving", Column("what survives", numeric=False), lambda row: row.test.surviving),
            Measure("dimension", Column("dimension"), lambda row: row.test.dimension),
        ],
        [_Numbered(i, test, outcome) for i, (test, outcome) in enumerate(zip(tests, outcomes, strict=True))],
        lambda row: test_key(row.number),
    )


@dataclass(frozen=True)
class _Scaled:
    """One attention's slope, and why a figure of it is absent."""

    scaling: WidthScaling
    unavailable: dict[str, str] = field(default_factory=dict)


def scaling_table(symmetry: SymmetryRecord, key: str) -> Table | None:
    """One row an attention: the slope of ln σ₂ on ln n, the regime, and σ₂ at every context length; `None` without any."""
    if not symmetry.scaling:
        return None
    lengths = sorted({n for each in symmetry.scaling for n in each.context_lengths})

    def at(length: int) -> Callable[[_Scaled], Statistic | None]:
        def value(row: _Scaled) -> Statistic | None:
            known = dict(zip(row.scaling.context_lengths, row.scaling.second_singular_value, strict=True))
            return known.get(length)

        return value

    def slope(row: _Scaled) -> Cell | None:
        if row.scaling.slope is None:
            return None
        return Cell(say.signed(row.scaling.slope), say.interval(row.scaling) or "no interval", row.scaling.slope)

    order = {id(each): float(index) for index, each in enumerate(symmetry.scaling)}
    absent = symmetry.unavailable.get("second_singular_value", "not measured at this length")
    return cells.table(
        key,
        "Slope and second singular value of every attention",
        [
            (
                Column("attention", numeric=False),
                lambda row: Cell(say.attention(row.scaling), sort=order[id(row.scaling)]),
            )
        ],
        [
            Measure("slope", Column("slope", "95 % interval"), slope),
            *(Measure("value", Column(f"σ₂ at n = {length:,}"), at(length)) for length in lengths),
            Measure("regime", Column("regime", numeric=False), lambda row: row.scaling.regime),
        ],
        [_Scaled(each, {"slope": each.regime, "value": absent}) for each in symmetry.scaling],
        lambda row: scaling_key(row.scaling),
    )


def finding_key(number: int) -> str:
    """The key of a card of findings, the number counting the cards."""
    return slug("finding", number)


def target(finding: Finding, symmetries: Sequence[SymmetryRecord]) -> str:
    """The key of the row of the order parameter where a finding stands; empty where it is about the whole model."""
    for symmetry in symmetries:
        for position, name in enumerate(symmetry.places):
            here = finding.block is not None and say.block_of(name) == finding.block
            if (
                symmetry.phenomenon == finding.phenomenon
                and here
                and name.endswith(".cross") == (finding.kind == "cross")
            ):
                return order_key(symmetry, position)
    return ""
