"""The screenshots of pages in docs/gallery, and README.md's animation: python docs/make_pages.py. Needs Chromium."""

import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

import attnx
from attnx.demo.albef import demo_albef, prepare
from attnx.demo.captioned import draw_pair
from attnx.demo.run import run_demo
from attnx.demo.scenes import draw_scene
from attnx.extract.caption_layers import caption_layers
from attnx.page.words import words_page

OUT = Path(__file__).with_name("gallery")
SCENE = 20
PAIR = 5
FRAMES = 32
SIDE = 384  # pixels of the pictures in the pages


def enlarged(pixels: Any) -> Image.Image:
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def opened(browser: Any, path: Path, state: str = "", width: int = 1180, height: int = 760) -> Any:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    page.goto(f"file://{path}#{state}")
    page.wait_for_selector("html[data-ready]")
    return page


def shot(page: Any, **options: Any) -> Image.Image:
    page.wait_for_timeout(300)
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


def hover(browser: Any, path: Path) -> Iterator[Image.Image]:
    """The picture and its map while the pointer goes around it."""
    page = opened(browser, path, "stop=3&alpha=65", width=1000, height=900)
    box = page.locator("#panel0 .picture").bounding_box()
    for i in range(FRAMES):
        angle = 2 * math.pi * i / FRAMES
        # The path crosses the shape that the model names.
        x, y = 0.5 + 0.36 * math.cos(angle), 0.55 + 0.36 * math.sin(2 * angle)
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        frame = shot(page, clip={**box, "height": box["height"] + 62})
        yield frame.resize((360, round(360 * frame.height / frame.width)), Image.Resampling.LANCZOS)
    page.close()


def main() -> None:
    """Writes the screenshots and the animation."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "no Chromium: apt-get install chromium"
    pair = draw_pair(PAIR)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        attnx.explore("demo", enlarged(draw_scene(SCENE).image), heads="each").save(folder / "explore.html")
        found = caption_layers(demo_albef(), prepare([pair.image]), pair.caption)
        words_page(found, enlarged(pair.image)).save(folder / "words.html")
        run_demo(folder / "demo")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        state = "stop=3&alpha=65&links=1&pick0=q76&pick1=q31"
        pages = {
            "explore": opened(browser, folder / "explore.html", state),
            "words": opened(browser, folder / "words.html", "stop=2&alpha=65&pick0=q11.12"),
            "browse": opened(browser, folder / "demo" / "browse" / "index.html"),
        }
        for kind, page in pages.items():
            shot(page).save(OUT / f"page-{kind}.jpg", quality=85, optimize=True)
        first, *others = hover(browser, folder / "explore.html")
        first.save(OUT / "hover.webp", save_all=True, append_images=others, duration=180, loop=0, quality=70, method=6)
        browser.close()


if __name__ == "__main__":
    main()
