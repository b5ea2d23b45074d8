"""The page of an ablation in a real browser, driven as the page of a diagnosis is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import records_samples
from tests.helpers.browser import Browser, hover
from uncollapse.report import draw

pytestmark = pytest.mark.browser
SAMPLES = ("ablation", "causal_ablation")


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


def marks(browser: Browser, kind: str) -> list[str]:
    """The fill and stroke of every mark of this kind in the chart of all runs."""
    found: list[str] = browser.value(
        f"[...document.querySelectorAll('#consensus .mark-symbol.role-mark path')].filter(p => {kind})"
        ".map(p => p.getAttribute('fill') + ' ' + p.getAttribute('stroke'))"
    )
    return found


def test_points_at_the_floor_are_hollow_and_grey_in_the_band_that_names_it(browser: Browser, folder: Path) -> None:
    browser.open(folder / "ablation.html")
    hollow = marks(browser, "p.getAttribute('stroke') === '#8a949e'")
    assert len(hollow) == 9  # 1 + 1 + 2 + 5 sites at the floor, in the four runs without the residual
    assert {fill.split()[0] for fill in hollow} <= {"transparent", "none"}
    level = marks(browser, "p.getAttribute('stroke') !== '#8a949e'")
    assert len(level) == 8 * 7 - 9
    assert browser.value("document.querySelector('#consensus .mark-text.role-mark text').textContent") == (
        "rounding floor 3.6e-15: no level below"
    )
    inside = browser.value(
        "(() => { const c = document.getElementById('consensus').getBoundingClientRect();"
        "const t = document.querySelector('#consensus .mark-text.role-mark').getBoundingClientRect();"
        "return t.left >= c.left && t.right <= c.right && t.bottom <= c.bottom; })()"
    )
    assert inside is True


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Browser, folder: Path, width: int, dark: bool) -> None:
    for name in SAMPLES:
        browser.open(folder / f"{name}.html", width=width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") == width
        wide = browser.value(
            "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('svg').getBoundingClientRect().right"
            " > c.getBoundingClientRect().right + 1).map(c => c.id)"
        )
        assert wide == []
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(17, 21, 24)" if dark else "rgb(247, 246, 243)")
    browser.open(folder / "ablation.html", width=width, dark=dark)
    ink = browser.value("getComputedStyle(document.querySelector('#consensus .mark-text.role-mark text')).fill")
    assert ink == ("rgb(158, 171, 181)" if dark else "rgb(86, 97, 107)")


def test_a_tooltip_shows_all_runs_at_the_depth_under_the_pointer(browser: Browser, folder: Path) -> None:
    browser.open(folder / "ablation.html")
    words = hover(browser, "consensus", 0.52, 0.4).split("\n")
    assert words[:2] == ["site", "block 2"]
    assert words[2] == "1·1·1"
    assert words[3].startswith("0.890")
    assert words[-2] == "0·0·0"
    assert words[-1].replace(" ", "") == "4.90e-16rounding"
    words = hover(browser, "share-2", 0.95, 0.4).split("\n")
    assert words[:4] == ["run", "1·0·1", "site", "block 5"]


def test_a_verdict_leads_into_the_folded_table(browser: Browser, folder: Path) -> None:
    browser.open(folder / "ablation.html")
    row = "document.getElementById('run-3-site-5')"
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is False
    browser.value(
        "(() => { document.querySelector('.card a').click(); return new Promise(done => setTimeout(done, 300)); })()"
    )
    assert browser.value(f"{row}.checkVisibility({{contentVisibilityAuto: true}})") is True


def test_the_answers_are_told_apart_without_colour(browser: Browser, folder: Path) -> None:
    browser.open(folder / "ablation.html")
    signs = browser.value(
        "[...document.querySelectorAll('.answer')].map(a => getComputedStyle(a, '::before').content + a.textContent)"
    )
    assert signs == ['"✗"disagrees', '"✓"agrees', '"✓"agrees', '"?"open']
