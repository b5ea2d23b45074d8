"""The ledger's page in a real browser: it fits a phone, follows light and dark, copies a matrix, and asks for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.browser import Browser
from uncollapse.claims import verify
from uncollapse.report import draw

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "ledger.html"
    path.write_text(draw(verify(trials=5)), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [420, 1280])
def test_it_fits_a_phone_and_follows_light_and_dark(browser: Browser, ledger: Path, width: int, dark: bool) -> None:
    browser.open(ledger, width=width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") == width
    outside = "[...document.querySelectorAll('.claim > *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert browser.value(f"{outside}.length") == 0
    ground = browser.value("getComputedStyle(document.querySelector('.claim')).backgroundColor")
    assert ground == ("rgb(25, 31, 35)" if dark else "rgb(255, 255, 255)")
    assert browser.complaints() == []
    assert browser.requests() == [ledger.as_uri()]


def test_every_badge_can_be_read_on_its_ground(browser: Browser, ledger: Path) -> None:
    """WCAG AA: a contrast of 4.5, in both schemes."""
    contrast = """(() => {
      const light = (c) => {
        const [r, g, b] = c.match(/[0-9.]+/g).map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
      };
      return [...document.querySelectorAll('.verdict')].map((e) => {
        const s = getComputedStyle(e), [a, b] = [light(s.color), light(s.backgroundColor)].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
      });
    })()"""
    for dark in (False, True):
        browser.open(ledger, dark=dark)
        seen = browser.value(contrast)
        assert len(seen) > 27
        assert min(seen) > 4.5


def test_a_button_copies_the_matrix(browser: Browser, ledger: Path) -> None:
    browser.open(ledger)
    button = "document.querySelector('#claim-layernorm-affine-rank button.copy')"
    assert browser.value(f"{button}.hidden") is False
    browser("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser("Page.bringToFront")
    left, top = browser.value(
        f"(() => {{ const b = {button}; b.scrollIntoView({{block: 'center', behavior: 'instant'}});"
        "const r = b.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser("Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", clickCount=1)
    assert browser.value(f"new Promise(done => setTimeout(() => done({button}.textContent), 200))") == "Copied"
    assert browser.value("navigator.clipboard.readText()") == "[[0, 1], [1, 2]]"


def test_where_copying_is_forbidden_the_matrix_is_selected(browser: Browser, ledger: Path) -> None:
    browser.open(ledger)
    button = "document.querySelector('#claim-layernorm-affine-rank button.copy')"
    browser.value("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    browser.value(f"{button}.click()")
    assert browser.value(f"new Promise(done => setTimeout(() => done({button}.textContent), 200))") == "Selected"
    assert browser.value("getSelection().toString()").split() == ["0", "1", "1", "2"]


def test_a_link_of_the_contents_leads_to_its_claim(browser: Browser, ledger: Path) -> None:
    browser.open(ledger)
    browser.value("document.querySelector('.contents a[href=\"#claim-entropy-floor\"]').click()")
    top = browser.value(
        "new Promise(done => setTimeout(done, 300))"
        ".then(() => document.querySelector('#claim-entropy-floor').getBoundingClientRect().top)"
    )
    bar = browser.value("document.querySelector('nav').getBoundingClientRect().bottom")
    assert bar <= top < 120


def test_without_javascript_the_matrices_can_still_be_selected(browser: Browser, ledger: Path) -> None:
    browser("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.events.clear()
        browser("Page.navigate", url=ledger.as_uri())
        browser.wait_for("Page.loadEventFired")
        document = browser("DOM.getDocument")["root"]["nodeId"]
        tables = browser("DOM.querySelectorAll", nodeId=document, selector=".matrix table")["nodeIds"]
        assert len(tables) > 40
        assert browser("DOM.getBoxModel", nodeId=tables[0])["model"]["height"] > 10
        shown = browser("DOM.querySelectorAll", nodeId=document, selector="button.copy:not([hidden])")["nodeIds"]
        assert shown == []
    finally:
        browser("Emulation.setScriptExecutionDisabled", value=False)
