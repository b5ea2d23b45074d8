"""The page of the symmetries, and their section on the page of a diagnosis, in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import records_samples
from tests.helpers.browser import Browser, hover
from uncollapse.report import draw

pytestmark = pytest.mark.browser
SAMPLES = ("symmetries", "deep", "two_stacks", "lengths")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages")
    for name in SAMPLES:
        (place / f"{name}.html").write_text(draw(getattr(records_samples, name)()), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", SAMPLES)
def test_every_chart_is_drawn_and_nothing_is_asked_for(browser: Browser, folder: Path, name: str) -> None:
    browser.open(folder / f"{name}.html")
    charts = browser.value("document.querySelectorAll('script[data-chart]').length")
    drawn = browser.value("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg').length)")
    assert drawn == [1] * charts
    assert charts >= 4
    assert browser.value("document.querySelectorAll('.failed').length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [(folder / f"{name}.html").as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    for name in SAMPLES:
        browser.open(folder / f"{name}.html", width=width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") == width
        wide = browser.value(
            "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('svg').getBoundingClientRect().right"
            " > c.getBoundingClientRect().right + 1).map(c => c.id)"
        )
        assert wide == []
        spilt = browser.value(
            "[...document.querySelectorAll('.phenomenon *, .tests *')].filter(e => !e.closest('svg') &&"
            " e.getBoundingClientRect().right > e.closest('.phenomena, .tests').getBoundingClientRect().right + 1).length"
        )
        assert spilt == 0
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(17, 21, 24)" if dark else "rgb(247, 246, 243)")
    ink = browser.value("getComputedStyle(document.querySelector('#symmetries .mark-text.role-mark text')).fill")
    assert ink == ("rgb(158, 171, 181)" if dark else "rgb(86, 97, 107)")


def test_the_four_rows_come_first_and_side_by_side_where_there_is_room(browser: Browser, folder: Path) -> None:
    cells = (
        "[...document.querySelectorAll('.phenomenon')].map(p => [...p.children].map(c => {"
        "const r = c.getBoundingClientRect(); return [Math.round(r.left), Math.round(r.top), r.bottom]; }))"
    )
    browser.open(folder / "symmetries.html", width=1200)
    rows = browser.value(cells)
    assert len(rows) == 4
    assert rows[0][0][1] < 300  # within the first screen, right behind the name and one line
    for row in rows:
        assert len({top for _, top, _ in row}) == 1
        assert [left for left, _, _ in row] == [left for left, _, _ in rows[0]]
        assert row[0][0] < row[1][0] < row[2][0]
    browser.open(folder / "symmetries.html", width=400)
    for row in browser.value(cells):
        assert row[0][2] <= row[1][1] + 1
        assert row[1][2] <= row[2][1] + 1


def test_the_line_of_collapse_lies_at_its_value(browser: Browser, folder: Path) -> None:
    browser.open(folder / "symmetries.html")
    for chart in ("curve-rank-collapse-depth", "curve-entropy-collapse"):
        line, zero, one = browser.value(
            f"(() => {{ const c = document.getElementById('{chart}'), mid = e => {{ const r = e.getBoundingClientRect();"
            "return (r.top + r.bottom) / 2; };"
            "const ticks = [...c.querySelectorAll('.role-axis-label text')];"
            "const tick = words => mid(ticks.find(t => t.textContent === words));"
            "const line = [...c.querySelectorAll('.mark-rule.role-mark line')].find(l => l.getAttribute('stroke') === '#d1403f');"
            "return [mid(line), tick('0.0'), tick('1.0')]; })()"
        )
        assert abs(line - zero) < 3
        assert one < zero
        label = browser.value(f"document.querySelector('#{chart} .mark-text.role-mark text').textContent")
        assert label == "collapse"


def click(browser: Browser, selector: str) -> None:
    """Follow a link and wait until the page has settled."""
    browser.value(
        f"(() => {{ document.querySelector({selector!r}).click(); return new Promise(done => setTimeout(done, 300)); }})()"
    )


def top_of(browser: Browser, key: str) -> Any:
    return browser.value(f"document.getElementById('{key}').getBoundingClientRect().top")


@pytest.mark.parametrize("name", ["symmetries", "lengths"])
def test_a_finding_leads_to_its_symmetry_and_back(browser: Browser, folder: Path, name: str) -> None:
    browser.open(folder / f"{name}.html")
    everywhere = browser.value(
        "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length"
    )
    assert everywhere == 0
    click(browser, '.finding a[href="#symmetry-entropy-collapse"]')
    assert 0 <= top_of(browser, "symmetry-entropy-collapse") < 900
    back = browser.value("document.querySelector('#symmetry-entropy-collapse a.badge').hash.slice(1)")
    click(browser, "#symmetry-entropy-collapse a.badge")
    assert 0 <= top_of(browser, back) < 900
    assert browser.value(f"document.querySelector('#{back} code').textContent") in ("ENTROPY-FROZEN", "sharp-head")


def test_a_test_leads_into_the_folded_table(browser: Browser, folder: Path) -> None:
    browser.open(folder / "symmetries.html")
    row = "document.getElementById('test-5')"
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is False
    click(browser, '#test-5-words a[href="#test-5"]')
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is True
    click(browser, "#symmetry-rank-collapse-depth .tested a")
    assert 0 <= top_of(browser, "test-0-words") < 900


def test_tooltips_show_the_row_of_the_table(browser: Browser, folder: Path) -> None:
    browser.open(folder / "two_stacks.html")
    words = hover(browser, "curve-rank-collapse-depth", 0.97, 0.4).split("\n")
    assert words[words.index("place") + 1] == "block 7"
    assert words[words.index("order parameter") + 1].startswith("0.332")
    both = hover(browser, "curve-entropy-collapse", 0.97, 0.4)  # self- and cross-attention of the last block
    assert both.count("order parameter") == 2
    browser.open(folder / "lengths.html")
    words = hover(browser, "slopes", 0.97, 0.5).split("\n")
    assert words[:2] == ["attention", "block 5"]
    assert words[words.index("slope") + 1].startswith("−0.55")


def test_outcomes_are_told_apart_without_colour(browser: Browser, folder: Path) -> None:
    browser.open(folder / "symmetries.html")
    signs = browser.value(
        "[...document.querySelectorAll('.outcome')].map(a => getComputedStyle(a, '::before').content + a.textContent)"
    )
    assert signs == [
        *('"≠"broken', '"="exact', '"≠"broken', '"~"not a symmetry', '"="exact', '"="exact'),
        *('"–"cannot be tested', '"="exact', '"~"not a symmetry'),
    ]


@pytest.mark.parametrize("dark", [False, True])
def test_outcomes_have_enough_contrast(browser: Browser, folder: Path, dark: bool) -> None:
    browser.open(folder / "symmetries.html", dark=dark)
    pairs = browser.value(
        "[...document.querySelectorAll('.outcome')].map(a => {"
        "const s = getComputedStyle(a); return [s.color, s.backgroundColor]; })"
    )

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair


def test_without_javascript_rows_tests_and_tables_remain(browser: Browser, folder: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser("Page.navigate", url=(folder / "symmetries.html").as_uri())
        browser.wait_for("Page.loadEventFired")
        document = browser("DOM.getDocument")["root"]["nodeId"]
        for selector, amount in ((".phenomenon", 4), (".tests li", 9), (".tests svg", 8), (".chart noscript p", 4)):
            nodes = browser("DOM.querySelectorAll", nodeId=document, selector=selector)["nodeIds"]
            assert len(nodes) == amount
            for node in nodes:
                assert browser("DOM.getBoxModel", nodeId=node)["model"]["height"] > 10
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
