"""A real browser, driven through its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

DEADLINE = 60.0
A4, MARGIN = (210, 297), 12  # millimetres; the margin at the sides is that of page.css
HIGHEST = 15_000  # pixels of a picture
ARTEFACTS = Path(__file__).resolve().parents[2] / "artefacts" / "pages"  # where tests leave pictures to be looked at


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

    def wait_until(self, expression: str, seconds: float = 10.0) -> None:
        """Wait until a JavaScript expression in the page is true."""
        until = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > until:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file and wait until it says that everything is drawn."""
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", media="")
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self("Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in wishes.items()])
        self("Page.navigate", url=path.as_uri())
        until = time.monotonic() + DEADLINE
        while not self.value("document.readyState == 'complete' && document.documentElement.dataset.drawn == 'true'"):
            if time.monotonic() > until:
                raise TimeoutError("the page was not drawn")
            time.sleep(0.05)

    def picture(self, path: Path, height: int = HIGHEST) -> None:
        """Write what is open as it looks from top to bottom, down to `height`."""
        width, whole = self.value("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height), "scale": 1}
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> int:
        """Print what is open on A4, as a reader would; returns how many sheets it takes."""
        size = {"paperWidth": A4[0] / 25.4, "paperHeight": A4[1] / 25.4}
        printed = self("Page.printToPDF", preferCSSPageSize=True, printBackground=True, **size)
        path.write_bytes(base64.b64decode(printed["data"]))
        return len(re.findall(rb"/Type\s*/Page\b", path.read_bytes()))

    @staticmethod
    def scale(path: Path) -> float:
        """The scale of a printed page: 1, or less where chromium shrank it because something is wider than the sheet. It does so
        down to 2/3, and cuts off the rest."""
        printed = path.read_bytes()
        for stream in re.finditer(rb"stream\r?\n", printed):
            with contextlib.suppress(zlib.error):
                drawn = zlib.decompressobj().decompress(printed[stream.end() :])
                if found := re.match(rb"\.2399\d* 0 0 -\.2399\d* 0 [\d.]+ cm\nq\n([\d.]+) 0 0 ", drawn):
                    return float(found[1]) / (300 / 96)
        raise ValueError(f"{path}: no page in it")

    def as_paper(self) -> None:
        """Lay out what is open as on a sheet, without printing it."""
        across = round((A4[0] - 2 * MARGIN) / 25.4 * 96)
        self("Emulation.setDeviceMetricsOverride", width=across, height=1000, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", media="print")
        self.value("dispatchEvent(new Event('beforeprint'))")

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
