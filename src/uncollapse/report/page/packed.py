"""Tables of thousands of rows: kept in the page column by column and compressed, made into rows when somebody looks.

A browser takes seconds to lay out the rows of five thousand heads, and most readers never open that table. So a table of more
than `ROWS` rows is folded, and its rows are data. `packed.js` makes the same elements of them that the template would have made:
when the table is opened, when a link leads to one of its rows, and one row at a time for a tooltip. Nothing is rounded or left
out.

When not to use it: for what the page should say without JavaScript. Smaller tables are written out.
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

from uncollapse.report.page.cells import Cell, Row, Table

ROWS = 1000


def packed_rows(table: Table) -> str | None:
    """The rows of a large table as one word: gzip in base64, of JSON. None where the table is small enough to be written out.

    The JSON is {keys, severities, reasons, columns}; a column is {text, spread, sort, note}, each with one entry a row, or null
    where no row has any. A note is the number of its reason.
    """
    if len(table.rows) <= ROWS:
        return None
    # A tooltip has no code in it: `sheet.typeset` takes the backticks out of those that are written out.
    reasons = {cell.note: cell.reason.replace("`", "") for row in table.rows for cell in row.cells if cell.note}
    data = {
        "keys": [row.key for row in table.rows],
        "severities": _or_none([row.severity for row in table.rows]),
        "reasons": reasons,
        "columns": [_column(table.rows, index) for index in range(len(table.columns))],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _column(rows: list[Row], index: int) -> dict[str, Any]:
    cells = [row.cells[index] for row in rows]
    return {
        "text": [cell.text for cell in cells],
        "spread": _or_none([cell.spread for cell in cells]),
        "sort": _or_none([sort_key(cell) for cell in cells]),
        "note": _or_none([cell.note for cell in cells]),
    }


def _or_none(values: list[Any]) -> list[Any] | None:
    return values if any(value is not None and value != "" and value != 0 for value in values) else None


def sort_key(cell: Cell) -> str | None:
    """What a cell is sorted by, as it stands in the page."""
    return cell.sort if cell.sort is None or isinstance(cell.sort, str) else f"{cell.sort:.6g}"
