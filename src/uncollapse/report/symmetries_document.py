"""The page of `uncollapse symmetries`: four phenomena at a glance, then the tests, the width of the context, the findings."""

from __future__ import annotations

from uncollapse.errors import InputError
from uncollapse.records import SYMMETRIES_SCHEMA, SymmetriesRecord
from uncollapse.report import sheet, wording
from uncollapse.report import symmetries_charts as charts
from uncollapse.report import symmetries_tables as tables
from uncollapse.report import symmetries_wording as say
from uncollapse.report.document import Panel, bundle
from uncollapse.report.symmetries_rows import symmetry_rows, width


def symmetries_page(record: SymmetriesRecord) -> str:
    """The page of one model's symmetries. Raises `InputError` where it is not of the schema this version draws."""
    if record.schema != SYMMETRIES_SCHEMA:
        raise InputError(
            f"page: expected a symmetries record of the schema {SYMMETRIES_SCHEMA}, got {record.schema}. "
            "It may come from another version. Measure again, or read the file with from_json(text, SymmetriesRecord)."
        )
    levels = [
        (test.defect.mean if test.defect else None, test.rounding.mean if test.rounding else None)
        for test in record.tests
    ]
    scales, low, high = charts.scales(levels)
    rows, scaling = symmetry_rows(record.symmetries, record.findings, record.tests), width(record.symmetries)
    return sheet.render(
        "symmetries.html.j2",
        styles=["page.css", "symmetries.css"],
        scripts=[bundle(), sheet.source("page.js")],
        title=record.model.name,
        record=record,
        symmetry_words=say,
        rows=rows,
        order=tables.order_table(record.symmetries, "order-table"),
        tests=tables.tests_table(record.tests, say.outcomes(record.tests, record.symmetries), "tests-table"),
        scales={tables.test_key(number): scale for number, scale in enumerate(scales)},
        ends=(low, high),
        acted_on=max((test.defect.n for test in record.tests if test.defect), default=0),
        width=scaling,
        drawn=Panel("", [row.chart for row in rows if row.chart] + (scaling.charts if scaling else []), []),
        findings=[
            [(each, tables.target(each, record.symmetries)) for each in group]
            for group in wording.alike(record.findings)
        ],
    )
