"""Pages in a real browser: Debian's Chromium by Playwright, without a connection."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Opened:
    """A page in a browser, and what it reported.

    Attributes:
        page: of Playwright.
        problems: errors of the console, exceptions, and requests other than for files.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._note(request.url))

    def _note(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "about:")):
            self.problems.append(f"a request to {url}")

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def at(self, x: float, y: float, *, panel: int = 0, click: bool = False) -> None:
        """Point at a place of the picture, in shares of its sides, or click there."""
        box = self.page.locator(f"#panel{panel} .picture").bounding_box()
        assert box is not None
        place = box["x"] + x * box["width"], box["y"] + y * box["height"]
        (self.page.mouse.click if click else self.page.mouse.move)(*place)
        self.settle()

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)
        self.settle()

    def go(self, state: str) -> None:
        """Open a state of the page by its address."""
        self.page.evaluate(
            """state => new Promise(done => {
            if (location.hash.slice(1) === state) done();
            addEventListener('hashchange', () => done(), { once: true });
            location.hash = state; })""",
            state,
        )
        self.settle()

    def until(self, expression: str, seconds: float = 15) -> None:
        """Wait until an expression is true. Playwright's own function needs a page that allows eval."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
            time.sleep(0.05)

    def canvas(self, selector: str) -> np.ndarray:
        """The pixels of a canvas, uint8 [height, width, 4]."""
        url = self.page.evaluate("selector => document.querySelector(selector).toDataURL()", selector)
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
            return np.asarray(image.convert("RGBA"))

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


class Browser:
    """Opens pages: `with browser.open(path) as opened`. It fails at the end if the page reported a problem."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    @contextmanager
    def open(self, path: Path | str, state: str = "", **options: Any) -> Iterator[Opened]:
        """Options: of Playwright's `new_page`, such as `viewport`."""
        page = self._browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        try:
            page.set_default_timeout(15_000)
            opened = Opened(page)
            page.goto(f"file://{Path(path).absolute()}" + (f"#{state}" if state else ""))
            page.wait_for_selector("html[data-ready]", timeout=60_000)
            opened.settle()
            yield opened
            assert opened.problems == []
        finally:
            page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; tests that use it are skipped without one."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Browser(launched)
        launched.close()
