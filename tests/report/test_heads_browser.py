"""The heads' page in a real browser, driven as the page of a diagnosis is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import heads_samples
from tests.helpers.browser import Browser, hover
from uncollapse.report import draw

pytestmark = pytest.mark.browser
SAMPLES = ("mixed", "forced", "crossed", "single", "deep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages")
    for name in SAMPLES:
        (place / f"{name}.html").write_text(draw(getattr(heads_samples, name)()), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", SAMPLES)
def test_everything_is_drawn_and_nothing_is_asked_for(browser: Browser, folder: Path, name: str) -> None:
    browser.open(folder / f"{name}.html")
    charts = browser.value("document.querySelectorAll('script[data-chart]').length")
    drawn = browser.value("[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('svg').length)")
    assert drawn == [1] * charts
    assert charts == (0 if name == "single" else 2)
    assert browser.value("document.querySelectorAll('.failed').length") == 0
    assert browser.complaints() == []
    assert browser.requests() == [(folder / f"{name}.html").as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    for name in SAMPLES:
        browser.open(folder / f"{name}.html", width=width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") == width
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(17, 21, 24)" if dark else "rgb(247, 246, 243)")


def test_the_answer_is_on_the_first_screen(browser: Browser, folder: Path) -> None:
    for name, height in (("mixed", 900), ("deep", 900)):
        browser.open(folder / f"{name}.html", height=height)
        bottoms = browser.value(
            "[...document.querySelectorAll('.lead, .answer-card')].map(e => e.getBoundingClientRect().bottom)"
        )
        assert len(bottoms) >= 2
        assert max(bottoms) < height


def pixels(browser: Browser, block: int) -> list[list[int]]:
    found: list[list[int]] = browser.value(
        f"(() => {{ const c = document.querySelectorAll('.map canvas')[{block}];"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return Array.from({length: c.width * c.height}, (_, i) => [...d.slice(4 * i, 4 * i + 4)]); })()"
    )
    return found


def test_the_small_maps_paint_the_overlaps(browser: Browser, folder: Path) -> None:
    browser.open(folder / "mixed.html")
    heads = heads_samples.mixed().heads
    for block in range(3):
        overlap = heads[block].write_space_overlap
        assert overlap is not None
        painted = pixels(browser, block)
        assert len(painted) == 64
        flat = [v for row in overlap for v in row]
        order = [i for i in sorted(range(64), key=lambda i: flat[i]) if i // 8 != i % 8]
        brightness = [sum(painted[i][:3]) for i in order]
        assert brightness == sorted(brightness)  # the scale grows brighter with the overlap
        assert all(painted[9 * h] == [0, 0, 0, 0] for h in range(8))  # the diagonal is left out
    assert pixels(browser, 2)[3 * 8 + 7][:3] == [0xFE, 0xE8, 0x38]  # the copies: the top of the scale
    assert pixels(browser, 2)[7 * 8 + 3][:3] == [0xFE, 0xE8, 0x38]


def test_a_map_that_is_chosen_is_shown_large(browser: Browser, folder: Path) -> None:
    browser.open(folder / "deep.html")
    fills = "[...document.querySelectorAll('#overlap .mark-rect path')].map(p => p.getAttribute('fill')).join()"
    pressed = "[...document.querySelectorAll('.map')].findIndex(b => b.ariaPressed === 'true')"
    before = browser.value(fills)
    assert browser.value(pressed) == 0
    browser.value(
        "(() => { document.querySelectorAll('.map')[17].click();return new Promise(done => setTimeout(done, 400)); })()"
    )
    assert browser.value("document.getElementById('block-choice').selectedIndex") == 17
    assert browser.value(pressed) == 17
    assert browser.value(fills) != before
    overlap = heads_samples.deep().heads[17].write_space_overlap
    assert overlap is not None
    words = hover(browser, "overlap", 0.5, 0.5)
    one, two = (int(word.strip(":")) for word in words.split() if word.strip(":").isdigit())
    assert abs(float(words.split()[-1]) - overlap[one][two]) <= 0.0005
    browser.value(
        "(() => { const s = document.getElementById('block-choice'); s.value = '4'; s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.value(pressed) == 4
    assert browser.complaints() == []


def column(browser: Browser, table: str, number: int) -> list[str]:
    found: list[str] = browser.value(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(row => row.cells[{number}].firstChild.textContent)"
    )
    return found


def clicked(browser: Browser, table: str, title: str) -> int:
    titles: list[str] = browser.value(
        f"[...document.querySelectorAll('#{table} th button span')].map(s => s.textContent)"
    )
    at = titles.index(title)
    browser.value(f"document.querySelectorAll('#{table} th button')[{at}].click()")
    return at


def test_heads_sort_by_what_is_clicked_with_infinite_ones_at_the_end(browser: Browser, folder: Path) -> None:
    browser.open(folder / "mixed.html")
    record = heads_samples.mixed()
    gains = [g for h in record.heads for g in h.head_noise_gain or []]
    at = clicked(browser, "heads-table", "noise gain")
    wanted = [f"{g:#.3g}" for g in sorted(g for g in gains if g is not None)]
    assert column(browser, "heads-table", at) == [*wanted, "∞", "∞"]
    clicked(browser, "heads-table", "noise gain")
    assert column(browser, "heads-table", at) == ["∞", "∞", *wanted[::-1]]
    assert browser.value("[...document.querySelectorAll('#heads-table th')].map(t => t.ariaSort)")[at] == "descending"
    at = clicked(browser, "heads-table", "energy share")
    shares = [float(text) for text in column(browser, "heads-table", at)]
    assert shares == sorted(shares)
    clicked(browser, "heads-table", "block")
    assert column(browser, "heads-table", 0) == ["0"] * 8 + ["1"] * 8 + ["2"] * 8


def test_blocks_sort_by_what_is_clicked_and_unread_ones_stay_last(browser: Browser, folder: Path) -> None:
    browser.open(folder / "crossed.html")
    at = clicked(browser, "blocks-table", "relative noise gain")
    once = column(browser, "blocks-table", at)
    clicked(browser, "blocks-table", "relative noise gain")
    twice = column(browser, "blocks-table", at)
    assert once[-1] == twice[-1] == "–"
    assert [float(v) for v in once[:-1]] == sorted(float(v) for v in once[:-1])
    assert twice[:-1] == once[-2::-1]


def test_thirty_blocks_of_heads_stay_in_sight(browser: Browser, folder: Path) -> None:
    """The layer view: all maps within about a screen, the long table in a box of its own."""
    browser.open(folder / "deep.html")
    top, bottom = browser.value(
        "(() => { const r = document.querySelector('.maps').getBoundingClientRect(); return [r.top, r.bottom]; })()"
    )
    assert bottom - top < 900
    assert len(column(browser, "heads-table", 0)) == 960
    assert browser.value("document.querySelector('#heads-table').closest('.scroll').clientHeight") < 600


def test_without_javascript_the_tables_remain(browser: Browser, folder: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser("Page.navigate", url=(folder / "mixed.html").as_uri())
        browser.wait_for("Page.loadEventFired")
        document = browser("DOM.getDocument")["root"]["nodeId"]
        rows = browser("DOM.querySelectorAll", nodeId=document, selector="#heads-table tbody tr")["nodeIds"]
        assert len(rows) == 24
        assert all(browser("DOM.getBoxModel", nodeId=row)["model"]["height"] > 10 for row in rows[:3])
        assert len(browser("DOM.querySelectorAll", nodeId=document, selector=".maps[hidden]")["nodeIds"]) == 1
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
