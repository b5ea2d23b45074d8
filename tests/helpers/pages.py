"""A page, parsed, and what has to be true of every page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import pytest

from uncollapse.records.common import Statistic

VOID = {"meta", "path", "rect", "circle", "link", "br", "hr", "img", "input"}


@dataclass
class Page(HTMLParser):
    """A page read back: its elements in order, the text of scripts and styles, and the cells of its tables."""

    text: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    scripts: list[tuple[dict[str, str], str]] = field(default_factory=list)
    style: str = ""
    words: str = ""
    cells: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    titles: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._table = self._row = ""
        self._column = -1
        self.feed(self.text)
        self.close()
        assert not self._open, f"left open: {self._open}"
        for attributes, text in self.scripts:
            if "data-rows" in attributes:
                self._unpack(attributes["data-rows"], json.loads(gzip.decompress(base64.b64decode(text))))

    def _unpack(self, table: str, data: dict[str, Any]) -> None:
        """The rows of a large table, which lie in the page as columns."""
        self._table = table
        for number, key in enumerate(data["keys"]):
            severity = data["severities"][number] if data["severities"] else ""
            self.elements.append(("tr", {"id": key} | ({"class": severity} if severity else {})))
            self._row = key
            for self._column, column in enumerate(data["columns"]):
                part = {name: (values[number] if values else None) for name, values in column.items()}
                note = part["note"] or ""
                self._cell().update(
                    v=part["sort"] or "",
                    text=str(part["text"]),
                    small="" if note else part["spread"] or "",
                    sup=str(note),
                    title=data["reasons"][str(note)] if note else "",
                )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = attributes.get("id", "")
            self.titles[self._table] = []
        elif tag == "th" and "scope" in attributes and attributes["scope"] == "col":
            self.titles[self._table].append("")
        elif tag == "tr":
            self._row, self._column = attributes.get("id", ""), -1
        elif tag == "td":
            self._column += 1
            self._cell().update(v=attributes.get("data-v", ""), text="", small="", sup="", title="")
        elif tag == "abbr" and "td" in self._open:
            self._cell()["title"] = attributes["title"]
        elif tag == "script":
            self.scripts.append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif inside == "style":
            self.style += data
        else:
            self.words += data
            if inside == "span" and "th" in self._open and self.titles.get(self._table):
                self.titles[self._table][-1] += data
            elif "td" in self._open and self._row:
                key = {"td": "text", "abbr": "text", "small": "small", "sup": "sup"}[inside]
                self._cell()[key] += data

    def _cell(self) -> dict[str, str]:
        titles = self.titles.get(self._table, [])
        title = titles[self._column] if self._column < len(titles) else str(self._column)
        same = titles[: self._column].count(title)
        return self.cells.setdefault((self._row, f"{title}#{same}" if same else title), {})

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def spec(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = next(json.loads(t) for a, t in self.scripts if a.get("data-chart") == key)
        return found

    def charts(self) -> list[str]:
        return [a["data-chart"] for a, _ in self.scripts if "data-chart" in a]

    def rows_of(self, key: str, *fields: str) -> list[dict[str, Any]]:
        """The data of a chart that have all of `fields`."""
        return [r for rows in self.spec(key)["datasets"].values() for r in rows if all(f in r for f in fields)]


def printed(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def holds(cell: dict[str, str], statistic: Statistic) -> None:
    """A cell shows the statistic to three digits, sorts by six, and gives its range where it has one."""
    assert printed(cell["text"]) == pytest.approx(statistic.mean, rel=5.1e-3)
    assert float(cell["v"]) == pytest.approx(statistic.mean, rel=1e-5)
    if cell["small"]:
        low, high = cell["small"].split(" … ")
        assert printed(low) == pytest.approx(statistic.min, rel=5.1e-3)
        assert printed(high) == pytest.approx(statistic.max, rel=5.1e-3)
    else:
        assert statistic.min == pytest.approx(statistic.max, rel=5.1e-3)


SITE_TITLES = {
    "rank": "rank",
    "attainable_rank": "attainable rank",
    "affine_rank": "affine rank",
    "attainable_affine_rank": "attainable affine rank",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "participation_ratio": "participation ratio",
    "consensus_distance": "consensus distance",
    "token_similarity": "token similarity",
    "rank_gap": "gap at the cut",
    "consensus_after_norm": "consensus distance after normalisation",
    "stream_carried": "stream carried on",
}


def well_formed_and_accessible(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    ids = shown.ids()
    assert len(ids) == len(set(ids))
    for tag, attributes in shown.elements:
        assert not {"style"} & set(attributes), f"{tag} has a style attribute, which the policy blocks"
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("aria-labelledby", "for"):
            assert key not in attributes or attributes[key] in ids
    for anchor in shown.attributes("a"):
        assert anchor["href"].startswith("#")
        assert anchor["href"][1:] in ids
    assert not shown.attributes("link") + shown.attributes("img") + shown.attributes("iframe")
    assert not [a for _, a in shown.elements if "src" in a]
    levels = [int(tag[1]) for tag, _ in shown.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    drawn = [a for a in shown.attributes("div") if a.get("role") == "img"]
    assert [a["id"] for a in drawn] == shown.charts()
    assert all(a["aria-label"].endswith(".") for a in drawn)
    assert len(shown.attributes("figcaption")) == len(drawn) > 0
    tips = [row.get("row", "").split() for key in shown.charts() for row in rows_anywhere(shown.spec(key))]
    assert {key for keys in tips for key in keys} <= set(ids)
    assert any(tips)


def rows_anywhere(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in spec.get("datasets", {}).values() for row in rows]


def policy_allows_own_scripts_only(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    policy = next(a["content"] for a in shown.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert "unsafe" not in policy

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    run = [text for attributes, text in shown.scripts if "type" not in attributes]
    assert rules["script-src"] == [digest(text) for text in run]
    assert rules["style-src"] == [digest(shown.style)]
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}


def enough_contrast(pages: dict[str, Page]) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, two: str) -> float:
        high, low = sorted((luminance(one), luminance(two)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    themes = re.findall(r":root \{(.*?)\}", pages["encoder"].style, re.S)[:2]
    for theme in themes:
        colour = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", theme))
        for ground in ("page", "sheet"):
            for ink in ("ink", "soft", "link", "good"):
                assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)
            for line in colours_of_marks():
                assert contrast(line, colour[ground]) >= 3.0, (line, ground)
        for severity in ("critical", "warning", "info"):
            assert contrast(colour[severity], colour[f"{severity}-sheet"]) >= 4.5, severity


def colours_of_marks() -> list[str]:
    from uncollapse.report.page import figures

    return [figures.BLUE, figures.TEAL, figures.ORANGE, figures.PURPLE, figures.RED]


def references_of(page: Page, table: str) -> dict[str, str]:
    """The reference under each title of a table."""
    head = page.text.split(f'<table id="{table}"')[1].split("</thead>")[0]
    found = {}
    for cell in head.split("<th ")[1:]:
        title = cell.split("<span>")[1].split("</span>")[0]
        found[title] = cell.split('class="reference">')[1].split("</small>")[0] if "reference" in cell else ""
    return found
