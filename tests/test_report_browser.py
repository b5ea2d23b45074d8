"""The page in a real browser: Debian's chromium, driven over its own DevTools pipe, with every host unknown to it."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import records_samples

from uncollapse.report import draw

pytestmark = pytest.mark.browser
DEADLINE = 60.0
SAMPLES = ("encoder", "quiet", "collapsed", "translation", "single_block", "large")


class Browser:
    """A headless chromium that resolves no host name. `events` keeps everything it reports."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory()
        inward, self._to = os.pipe()
        self._back, outward = os.pipe()
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-component-update", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
        ]
        # Chromium reads commands from descriptor 3 and answers on 4: a process in between puts our pipes there.
        exec_at_3_and_4 = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); " + (
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", exec_at_3_and_4, str(inward), str(outward), executable, *options),
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            pass_fds=(inward, outward),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward)
        os.close(outward)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        try:
            target = self("Target.createTarget", url="about:blank")["targetId"]
            self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._session = None
        try:
            self("Browser.close")
            self._process.wait(10)
        finally:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._back)
        shutil.rmtree(self._profile.name, ignore_errors=True)
        self._profile.cleanup()

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._back, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("chromium does not answer")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what else arrives is kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        text = json.dumps(message).encode() + b"\0"
        while text:
            text = text[os.write(self._to, text) :]
        until = time.monotonic() + DEADLINE
        while True:
            answer = self._message(until)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            if "method" in answer:
                self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Read on until chromium has reported `event`."""
        until = time.monotonic() + DEADLINE
        while event not in [each["method"] for each in self.events]:
            message = self._message(until)
            if "method" in message:
                self.events.append(message)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, a promise awaited."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file and wait until it says that everything is drawn."""
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in wishes.items()])
        self("Page.navigate", url=path.as_uri())
        until = time.monotonic() + DEADLINE
        while not self.value("document.readyState == 'complete' && document.documentElement.dataset.drawn == 'true'"):
            if time.monotonic() > until:
                raise TimeoutError("the page was not drawn")
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Exceptions, console output and violated policies since the page was opened."""
        self.value("0")
        told = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event["method"] in told]

    def requests(self) -> list[str]:
        """Every address asked for since the page was opened."""
        self.value("0")
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sample's page, written to disk as a user would have it."""
    place = tmp_path_factory.mktemp("pages")
    for name in SAMPLES:
        (place / f"{name}.html").write_text(draw(getattr(records_samples, name)()), encoding="utf-8")
    (place / "hostile.html").write_text(draw(records_samples.encoder("<script>alert(1)</script>")), encoding="utf-8")
    return place


def hover(browser: Browser, chart: str, across: float, down: float) -> str:
    """Move the pointer to a place in a chart, given as shares of its size; returns what the tooltip says."""
    left, top, width, height = browser.value(
        f"(() => {{ const e = document.querySelector('#{chart} svg');"
        "e.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
    )
    for step in (-3, 0):
        browser(
            "Input.dispatchMouseEvent", type="mouseMoved", x=left + width * across + step, y=top + height * down + step
        )
    text: str = browser.value("tip.hidden ? '' : tip.innerText || tip.textContent")
    return text


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
