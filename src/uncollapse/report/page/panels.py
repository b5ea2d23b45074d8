"""The parts of a page's sections: panels of charts and tables, tiles of key figures, and the script that draws."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import altair
import vl_convert

from uncollapse.report.page import cells, figures


@dataclass(frozen=True)
class Panel:
    """One part of a section: its heading (empty if the model has only one stack), its charts and its tables."""

    heading: str
    charts: list[figures.Chart]
    tables: list[cells.Table]


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page, and what to compare it with."""

    label: str
    value: str
    detail: str
    reference: str = ""


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, of the version whose specifications Altair writes."""
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
