"""What all pages share, seen in a real browser: legible maps, long tables, paper. Leaves pictures in `artefacts/pages`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import heads_samples, records_samples
from tests.helpers.browser import ARTEFACTS, Browser
from uncollapse.report import draw

pytestmark = pytest.mark.browser
PAGES: dict[str, Callable[[], Any]] = {
    "6-blocks": records_samples.encoder,
    "30-blocks": lambda: records_samples.sized(30, 9),
    "48-blocks": lambda: records_samples.sized(48, 64),
    "translation": records_samples.translation,
    "corpus": records_samples.with_corpus,
    "heads": heads_samples.mixed,
    "symmetries": records_samples.symmetries,
    "ablation": records_samples.ablation,
}
# The contrast of every number in a map with the cell behind it, as (contrast, number), lowest first.
CONTRASTS = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const cells = [...document.querySelectorAll(".chart .mark-rect path")].filter((cell) => {
    const style = getComputedStyle(cell);
    return style.fill.startsWith("rgb(") && style.opacity > 0.9 && style.fillOpacity > 0.9;
  }).map((cell) => [cell.getBoundingClientRect(), getComputedStyle(cell).fill]);
  const found = [];
  for (const text of document.querySelectorAll("[id^=attention] .mark-text text")) {
    const box = text.getBoundingClientRect();
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    const behind = cells.find(([cell]) => cell.left < x && x < cell.right && cell.top < y && y < cell.bottom);
    if (!behind) continue;
    const [one, other] = [light(getComputedStyle(text).fill), light(behind[1])];
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), text.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pages")
    for name, record in PAGES.items():
        (place / f"{name}.html").write_text(draw(record()), encoding="utf-8")
    return place


@pytest.mark.parametrize("name", PAGES)
def test_pictures_to_look_at(browser: Browser, folder: Path, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    for width in (1280, 400):
        for dark in (False, True):
            browser.open(folder / f"{name}.html", width=width, dark=dark)
            browser.picture(ARTEFACTS / f"{name}-{width}-{'dark' if dark else 'light'}.png")
            assert browser.value("document.documentElement.scrollWidth") == width
    assert 1 < browser.print(ARTEFACTS / f"{name}.pdf") < 30
    assert Browser.scale(ARTEFACTS / f"{name}.pdf") == pytest.approx(1.0, abs=0.02), "something is wider than the sheet"
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_every_number_of_a_map_is_legible_on_its_cell(browser: Browser, folder: Path, dark: bool) -> None:
    for name, least in (("6-blocks", 72), ("translation", 80)):
        browser.open(folder / f"{name}.html", dark=dark)
        found = browser.value(CONTRASTS)
        assert len(found) >= least
        assert found[0][0] >= 4.5, found[0]


def table(key: str) -> str:
    return f"document.getElementById('{key}')"


def test_a_long_table_says_where_it_goes_on(browser: Browser, folder: Path) -> None:
    browser.open(folder / "6-blocks.html", width=400)
    scroll = f"{table('attention-self-table')}.closest('.scroll')"
    more = f"{scroll}.parentElement.nextElementSibling"
    browser.value(f"{scroll}.closest('details').open = true")
    browser.wait_until(f"{more}.textContent.startsWith('Rows 1 to ')")
    said = browser.value(f"{more}.textContent")
    assert "of 72: scroll for the others. To the right: " in said
    assert "value contraction" in said
    edges = f"[...{scroll}.parentElement.querySelectorAll('.edge')].map(e => e.checkVisibility())"
    assert browser.value(edges) == [True, True]
    browser.value(f"{scroll}.scrollTo({scroll}.scrollWidth, {scroll}.scrollHeight)")
    browser.wait_until(f"{more}.textContent.includes(' to 72 of 72')")
    assert "To the right" not in browser.value(f"{more}.textContent")
    assert browser.value(edges) == [False, False]
    # What names a row is still in sight.
    left = browser.value(f"[...{table('attention-self-table')}.rows[60].cells].slice(0, 2).map(c => c.offsetLeft)")
    at = browser.value(f"{scroll}.scrollLeft")
    assert at > 200
    assert left[0] == pytest.approx(at, abs=2)
    assert left[0] < left[1] < at + 100


def test_a_short_table_says_nothing_of_scrolling(browser: Browser, folder: Path) -> None:
    browser.open(folder / "6-blocks.html")
    browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    more = f"{table('shares-table')}.closest('.frame').nextElementSibling"
    browser.wait_until(f"{more}.textContent.startsWith('Rows')")
    short = f"{table('depth-table')}.closest('.frame').nextElementSibling"
    assert "Rows" not in browser.value(f"{short}.textContent")


@pytest.mark.parametrize("name", PAGES)
def test_on_paper_tables_unfold_and_none_is_cut(browser: Browser, folder: Path, name: str) -> None:
    browser.open(folder / f"{name}.html")
    browser.as_paper()
    across = browser.value("document.documentElement.clientWidth")
    cut = browser.value(
        f"[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > {across} + 1"
        " || t.scrollWidth > t.parentElement.clientWidth + 1).map(t => t.id)"
    )
    assert cut == []
    folded = browser.value(
        "[...document.querySelectorAll('details table')].filter(t => !t.checkVisibility({contentVisibilityAuto: true}))"
        ".map(t => [t.id, t.closest('details').matches('.long')])"
    )
    assert all(long for _, long in folded), folded
    browser.value("dispatchEvent(new Event('afterprint'))")
    assert browser.value("document.querySelectorAll('details[open]').length") == 0


def test_on_paper_nothing_that_leads_is_left_behind(browser: Browser, folder: Path) -> None:
    """A heading, and the line that says how to read a part, ask to stand on the sheet of what follows; rows are not torn, and a
    table has its head on every sheet, which a button in it would prevent."""
    browser.open(folder / "6-blocks.html")
    browser.as_paper()
    for leading in ("h1", "h2", "section h3", ".good", "figcaption", "summary"):
        values = f"[...document.querySelectorAll('{leading}')].map(e => getComputedStyle(e).breakAfter)"
        assert set(browser.value(values)) == {"avoid"}, leading
    for whole in ("figure", "tr", ".scroll thead", ".good"):
        values = f"[...document.querySelectorAll('{whole}')].map(e => getComputedStyle(e).breakInside)"
        assert set(browser.value(values)) == {"avoid"}, whole
    assert set(browser.value("[...document.querySelectorAll('th button')].map(b => getComputedStyle(b).display)")) == {
        "contents"
    }


def test_a_table_of_thousands_of_rows_stays_folded_on_paper_and_says_so(browser: Browser, folder: Path) -> None:
    browser.open(folder / "48-blocks.html")
    browser.as_paper()
    details = f"{table('attention-self-table')}.closest('details')"
    assert browser.value(f"{details}.open") is False
    said = f"getComputedStyle({details}.querySelector('summary span'), '::after').content"
    assert "not printed" in browser.value(said)


@pytest.mark.parametrize(("name", "blocks", "heads"), [("6-blocks", 6, 12), ("48-blocks", 48, 64)])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_map_gives_its_cell_and_a_click_leads_to_its_row(
    browser: Browser, folder: Path, name: str, blocks: int, heads: int, width: int
) -> None:
    browser.open(folder / f"{name}.html", width=width)
    x, y, across, down = browser.value(
        "(() => { document.getElementById('attention-self').scrollIntoView({block: 'center', behavior: 'instant'});"
        "const cells = [...document.querySelectorAll('#attention-self .mark-rect.role-mark path')]"
        ".map(p => p.getBoundingClientRect());"
        "const cell = cells.filter(c => c.width > 1); const left = Math.min(...cell.map(c => c.left));"
        "const top = Math.min(...cell.map(c => c.top)); return [left, top,"
        "Math.max(...cell.map(c => c.right)) - left, Math.max(...cell.map(c => c.bottom)) - top]; })()"
    )
    block, head = blocks - 3, heads - 2
    at = {"x": x + across * (head + 0.5) / heads, "y": y + down * (block + 0.5) / blocks}
    for shift in (-2, 0):
        browser("Input.dispatchMouseEvent", type="mouseMoved", x=at["x"] + shift, y=at["y"])
    browser.wait_until("!tip.hidden")
    assert browser.value("tip.innerText").split("\n")[:4] == ["block", str(block), "head", str(head)]
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    row = f"document.getElementById('head-self-{block}-{head}')"
    browser.wait_until(f"!!{row}?.closest('details').open")
    browser.wait_until(
        f"(() => {{ const r = {row}.getBoundingClientRect(); return r.top > 0 && r.bottom < innerHeight; }})()"
    )
    browser.wait_until(f"{row}.matches('.aimed')")  # the browser itself unfolds and scrolls before it says so
    assert browser.complaints() == []
