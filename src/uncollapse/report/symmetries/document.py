"""The page of `uncollapse symmetries`: four phenomena at a glance, then the tests, the context length, the findings."""

from __future__ import annotations

from uncollapse.records.symmetries import SymmetriesRecord
from uncollapse.report import wording
from uncollapse.report.healthy import references
from uncollapse.report.page import sheet
from uncollapse.report.page.panels import Panel, bundle
from uncollapse.report.symmetries import charts, tables
from uncollapse.report.symmetries import wording as say
from uncollapse.report.symmetries.rows import symmetry_rows, width


def document(record: SymmetriesRecord) -> str:
    """The page of one model's symmetries."""
    levels = [
        (test.defect.mean if test.defect else None, test.rounding.mean if test.rounding else None)
        for test in record.tests
    ]
    scales, low, high = charts.scales(levels)
    healthy = references(record)
    rows = symmetry_rows(record.symmetries, record.findings, healthy, record.tests)
    scaling = width(record.symmetries)
    return sheet.render(
        "symmetries/page.html.j2",
        styles=["page/page.css", "symmetries/page.css"],
        scripts=[bundle(), sheet.source("page/page.js")],
        title=record.model.name,
        record=record,
        symmetry_words=say,
        rows=rows,
        healthy=healthy,
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
