"""The page in a real browser: Debian's chromium, driven over its own DevTools pipe, with every host unknown to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import records_samples
from tests.helpers.browser import Browser, hover
from uncollapse.report import draw

pytestmark = pytest.mark.browser
SAMPLES = ("encoder", "quiet", "collapsed", "translation", "single_block", "large")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sample's page, written to disk as a user would have it."""
    place = tmp_path_factory.mktemp("pages")
    for name in SAMPLES:
        (place / f"{name}.html").write_text(draw(getattr(records_samples, name)()), encoding="utf-8")
    (place / "hostile.html").write_text(draw(records_samples.encoder("<script>alert(1)</script>")), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", SAMPLES)
def test_every_chart_is_drawn_and_nothing_is_asked_for(browser: Browser, folder: Path, name: str) -> None:
    browser.open(folder / f"{name}.html")
    charts = browser.value("document.querySelectorAll('script[data-chart]').length")
    drawn = browser.value("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg, canvas').length)")
    assert drawn == [1] * charts
    assert charts >= 4
    assert browser.value("document.querySelectorAll('.chart svg path, .chart svg text').length") > 20 * charts
    assert browser.value("document.querySelectorAll('.failed').length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [(folder / f"{name}.html").as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    for name in ("translation", "large"):
        browser.open(folder / f"{name}.html", width=width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") == width
        wide = browser.value(
            "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('svg').getBoundingClientRect().right"
            " > c.getBoundingClientRect().right + 1).map(c => c.id)"
        )
        assert wide == []
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(17, 21, 24)" if dark else "rgb(247, 246, 243)")
        ink = browser.value("getComputedStyle(document.querySelector('.role-axis-label text')).fill")
        assert ink == ("rgb(158, 171, 181)" if dark else "rgb(86, 97, 107)")


def test_a_script_in_a_models_name_stays_text(browser: Browser, folder: Path) -> None:
    browser.open(folder / "hostile.html")
    assert browser.value("document.querySelector('h1').textContent") == "<script>alert(1)</script>"
    assert browser.value("document.title") == "<script>alert(1)</script> · uncollapse"
    assert browser.value("document.querySelector('h1').children.length") == 0
    assert browser.complaints() == []
    assert "Page.javascriptDialogOpening" not in [event["method"] for event in browser.events]


def test_the_policy_blocks_what_is_not_the_pages_own(browser: Browser, folder: Path) -> None:
    """The same page with a script, a style and an image slipped in: none of them works, and the charts still do."""
    text = (folder / "encoder.html").read_text(encoding="utf-8")
    evil = "<script>document.title = 'owned'</script><img src='http://example.org/x.png'><style>h1{color:red}</style>"
    (folder / "evil.html").write_text(text.replace("<main>", f"<main>{evil}"), encoding="utf-8")
    browser.open(folder / "evil.html")
    assert browser.value("document.title") == "all-MiniLM-L6-v2 · uncollapse"
    assert browser.value("getComputedStyle(document.querySelector('h1')).color") == "rgb(29, 35, 40)"
    blocked = " ".join(browser.complaints())
    assert blocked.count("Content Security Policy") >= 3
    assert browser.value("document.querySelectorAll('.chart svg').length") == 6


def test_tooltips_show_the_row_of_the_table(browser: Browser, folder: Path) -> None:
    browser.open(folder / "encoder.html")
    head = hover(browser, "attention-self", 0.63, 0.55).split("\n")
    assert head[:2] == ["block", "3"]
    assert head[2:4] == ["head", "7"]
    value = browser.value("document.querySelector('#head-self-3-7 td:nth-child(3)').firstChild.textContent")
    assert head[4] == "normalized entropy"
    assert head[5].startswith(value)
    site = hover(browser, "depth-consensus-distance", 0.5, 0.5).split("\n")
    assert site[:2] == ["site", "block 2"]
    assert "tokens left out" in site
    overlap = records_samples.encoder().heads[0].write_space_overlap
    assert overlap is not None
    words = hover(browser, "overlap", 0.5, 0.5)
    assert words.startswith("heads ")
    one, two = (int(word.strip(":")) for word in words.split() if word.strip(":").isdigit())
    assert abs(float(words.split()[-1]) - overlap[one][two]) <= 0.0005
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.value("tip.hidden") is True


def test_an_absent_value_says_why_in_its_tooltip(browser: Browser, folder: Path) -> None:
    browser.open(folder / "translation.html")
    assert "–one allowed key in every row" in hover(browser, "attention-decoder-cross", 0.7, 0.6).replace("\n", "")


def test_the_selector_switches_the_matrix_and_the_bars(browser: Browser, folder: Path) -> None:
    browser.open(folder / "encoder.html")
    fills = "[...document.querySelectorAll('#overlap .mark-rect path')].map(p => p.getAttribute('fill')).join()"
    bars = "[...document.querySelectorAll('#energy .layer_0_marks path')].map(p => p.getAttribute('d')).join()"
    before = browser.value(fills), browser.value(bars)
    browser.value(
        "(() => { const s = document.getElementById('block-choice'); s.value = '4';"
        "s.dispatchEvent(new Event('change')); return new Promise(done => setTimeout(done, 300)); })()"
    )
    after = browser.value(fills), browser.value(bars)
    assert len(before[0].split(",")) == len(after[0].split(",")) > 144
    assert len(before[1]) > 100
    assert before[0] != after[0]
    assert before[1] != after[1]
    overlap = records_samples.encoder().heads[4].write_space_overlap
    assert overlap is not None
    words = hover(browser, "overlap", 0.5, 0.5)
    one, two = (int(word.strip(":")) for word in words.split() if word.strip(":").isdigit())
    assert abs(float(words.split()[-1]) - overlap[one][two]) <= 0.0005
    assert browser.complaints() == []


def test_tables_sort_by_value_and_keep_absent_ones_last(browser: Browser, folder: Path) -> None:
    browser.open(folder / "translation.html")
    record = records_samples.translation()

    def column(number: int) -> list[str]:
        found: list[str] = browser.value(
            "[...document.querySelectorAll('#heads-table tbody tr')]"
            f".map(row => row.cells[{number}].firstChild.textContent)"
        )
        return found

    titles = browser.value("[...document.querySelectorAll('#heads-table th button span')].map(s => s.textContent)")
    at = titles.index("condition")
    click = f"document.querySelectorAll('#heads-table th button')[{at}].click()"
    values = sorted(h.condition_number for h in record.heads if h.condition_number is not None)
    wanted = [f"{value:#.3g}".rstrip(".") for value in values]
    browser.value(click)
    assert column(at) == [*wanted, "–"]
    browser.value(click)
    assert column(at) == [*wanted[::-1], "–"]
    assert browser.value("[...document.querySelectorAll('#heads-table th')].map(t => t.ariaSort)")[at] == "descending"
    browser.value("document.querySelectorAll('#heads-table th button')[0].click()")
    assert column(0)[:5] == [
        "encoder block 0",
        "encoder block 1",
        "encoder block 2",
        "encoder block 3",
        "decoder block 4",
    ]


def test_a_finding_leads_into_the_folded_table(browser: Browser, folder: Path) -> None:
    browser.open(folder / "encoder.html")
    row = "document.getElementById('head-self-4-7')"
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is False
    browser.value(
        "(() => { document.querySelector('.finding a').click(); return new Promise(done => setTimeout(done, 300)); })()"
    )
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is True
    assert 0 < browser.value(f"{row}.getBoundingClientRect().top") < 900


def test_a_browser_that_does_not_unfold_by_itself_is_helped(browser: Browser, folder: Path) -> None:
    browser.open(folder / "encoder.html")
    browser.value("history.replaceState(null, '', '#head-self-4-7'), dispatchEvent(new Event('hashchange'))")
    assert browser.value("document.getElementById('head-self-4-7').closest('details').open") is True


def test_without_javascript_the_tables_remain(browser: Browser, folder: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser("Page.navigate", url=(folder / "encoder.html").as_uri())
        browser.wait_for("Page.loadEventFired")
        document = browser("DOM.getDocument")["root"]["nodeId"]
        root = browser("DOM.querySelectorAll", nodeId=document, selector=".chart noscript p")
        assert len(root["nodeIds"]) == 6
        for node in root["nodeIds"]:
            assert browser("DOM.getBoxModel", nodeId=node)["model"]["height"] > 10
        rows = browser("DOM.querySelectorAll", nodeId=document, selector="#heads-table tbody tr")["nodeIds"]
        assert [browser("DOM.getBoxModel", nodeId=row)["model"]["height"] > 10 for row in rows] == [True] * 6
        hidden = browser("DOM.querySelectorAll", nodeId=document, selector=".choose[hidden]")["nodeIds"]
        assert len(hidden) == 1
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
