"""The four rows: the symmetry, how far this model is from the collapse, what keeps it there. Two pages draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.common import Finding
from uncollapse.records.symmetries import SymmetryRecord, SymmetryTest, WidthScaling
from uncollapse.report import wording
from uncollapse.report.healthy import References, sentence_of_symmetry
from uncollapse.report.page.cells import Table
from uncollapse.report.page.figures import Chart
from uncollapse.report.symmetries import charts, tables
from uncollapse.report.symmetries import wording as say


@dataclass(frozen=True)
class Row:
    """One phenomenon. `findings` are the cards about it: the key of each, and its findings, worst first. `tests` are the tests
    of its symmetry, in the order of the record: key, test and outcome. `reference` is what the order parameter is in healthy
    models.
    """

    key: str
    symmetry: SymmetryRecord
    course: str
    chart: Chart | None
    findings: list[tuple[str, list[Finding]]]
    tests: list[tuple[str, SymmetryTest, str]]
    reference: str = ""

    @property
    def one_line(self) -> list[tuple[str, str, int]]:
        """The tests, one line per action."""
        return say.in_one_line([(test, outcome) for _, test, outcome in self.tests])


def symmetry_rows(
    symmetries: Sequence[SymmetryRecord],
    findings: Sequence[Finding],
    healthy: References,
    tests: Sequence[SymmetryTest] = (),
) -> list[Row]:
    """One row per symmetry of the record."""
    decoder_from = say.first_decoder_block(symmetries)
    outcomes = say.outcomes(tests, symmetries)
    cards = [(tables.finding_key(number), group) for number, group in enumerate(wording.alike(findings))]
    return [
        Row(
            tables.symmetry_key(symmetry.phenomenon),
            symmetry,
            say.course(symmetry, decoder_from),
            charts.order_chart(symmetry, decoder_from),
            [
                (key, about)
                for key, group in cards
                if (about := [f for f in group if f.phenomenon == symmetry.phenomenon])
            ],
            [
                (tables.test_key(i), test, outcomes[i])
                for i, test in enumerate(tests)
                if test.phenomenon == symmetry.phenomenon
            ],
            sentence_of_symmetry(healthy, symmetry.phenomenon),
        )
        for symmetry in symmetries
    ]


@dataclass(frozen=True)
class Width:
    """How attention changes with the context length: the slopes along depth, one small chart per attention, the figures."""

    symmetry: SymmetryRecord
    slopes: Chart | None
    multiples: list[tuple[WidthScaling, Chart]]
    table: Table

    @property
    def charts(self) -> list[Chart]:
        return ([self.slopes] if self.slopes else []) + [chart for _, chart in self.multiples]


def width(symmetries: Sequence[SymmetryRecord]) -> Width | None:
    """What was measured with context lengths; `None` if nothing was."""
    for symmetry in symmetries:
        table = tables.scaling_table(symmetry, "scaling-table")
        if table is not None:
            multiples = charts.scaling_charts(symmetry.scaling)
            return Width(symmetry, charts.slopes_chart(symmetry.scaling, "slopes"), multiples, table)
    return None
