"""The pictures of docs/gallery.md, from the bundled models and drawn pictures: python docs/make_gallery.py."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

import attnx
from attnx.demo.albef import demo_albef, prepare
from attnx.demo.captioned import draw_pair
from attnx.demo.scenes import draw_scene
from attnx.figures.one_image import draw
from attnx.figures.picture import overlay, save
from attnx.figures.sheets import captioned, contact_sheet
from attnx.figures.shown import Request
from attnx.figures.style import Style

OUT = Path(__file__).with_name("gallery")
SCENES = (3, 7, 11, 20)
PAIR = 5


def draw_street(height: int = 144, width: int = 192, seed: int = 0) -> Image.Image:
    """A hillside under a sky, a grey house, grey trees, and a round red sign, with noise and blur as in a photo."""
    scale = 4
    rng = np.random.default_rng(seed)
    rows = np.linspace(0, 1, height * scale)[:, None, None]
    sky = (1 - rows) * np.array([120.0, 140.0, 165.0]) + rows * np.array([205.0, 205.0, 195.0])
    image = Image.fromarray(np.broadcast_to(sky, (height * scale, width * scale, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, ...]:
        return tuple(scale * value for value in (x0, y0, x1, y1))

    x = np.arange(width * scale + 1)
    hill = scale * (88 + 6 * np.sin(x / (42 * scale)) + 3 * np.sin(x / (13 * scale)))
    pen.polygon([(0, height * scale), *zip(x.tolist(), hill.tolist(), strict=True), (width * scale, height * scale)],
                fill=(118, 122, 112))  # fmt: skip
    pen.rectangle(box(18, 54, 66, 104), fill=(150, 148, 145))
    pen.polygon([(scale * a, scale * b) for a, b in ((12, 56), (42, 32), (72, 56))], fill=(96, 94, 96))
    pen.rectangle(box(36, 80, 48, 104), fill=(80, 78, 80))
    for left in (82, 98):
        pen.rectangle(box(left + 5, 88, left + 8, 106), fill=(84, 80, 76))
        pen.ellipse(box(left - 3, 62, left + 16, 92), fill=(104, 110, 102))
    pen.rectangle(box(150, 72, 153, 122), fill=(90, 90, 92))
    pen.ellipse(box(132, 40, 171, 79), fill=(214, 52, 50))
    small = image.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.6))
    noisy = np.asarray(small, np.float64) + rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def as_jpeg(path: Path) -> None:
    """Replaces a PNG by a JPEG, which is smaller."""
    with Image.open(path) as image:
        image.convert("RGB").save(path.with_suffix(".jpg"), quality=88, optimize=True)
    path.unlink()


def methods_sheet() -> Image.Image:
    """Drawn scenes, with rollout, the class token's map, and Chefer et al.'s relevance of the predicted class."""
    loaded = attnx.load("demo")
    pictures, titles = [], []
    for seed in SCENES:
        image = Image.fromarray(draw_scene(seed).image).resize((192, 192), Image.Resampling.LANCZOS)
        batch = loaded.prepare(image)[None]
        with torch.no_grad(), attnx.capture(loaded.model) as trace:
            loaded.model(batch)
        relevance = attnx.class_maps(loaded.model, batch)[0, 0]
        maps = (attnx.rollout(trace)[0], attnx.cls_map(trace)[0], relevance)
        pictures += [image, *(overlay(image, amap) for amap in maps)]
        titles += ["picture", "rollout", "CLS map", "relevance"]
    return contact_sheet(pictures, titles, columns=4)


def words_sheet() -> Image.Image:
    """One captioned scene: for each word cross-attention, and Grad-CAM under it."""
    scene = draw_pair(PAIR)
    image = Image.fromarray(scene.image).resize((144, 144), Image.Resampling.LANCZOS)
    model, batch = demo_albef(), prepare([scene.image])
    found = attnx.word_maps(model, batch, [scene.caption], layer=2)[0]
    cams = attnx.gradcam(model, batch, [scene.caption], layer=2)[0]
    pictures = [image, *(overlay(image, amap) for amap in found.word_maps)]
    pictures += [image, *(overlay(image, amap) for amap in cams.word_maps)]
    titles = ["attention", *found.words, "Grad-CAM", *cams.words]
    return captioned(contact_sheet(pictures, titles, columns=1 + len(found.words)), scene.caption)


def main() -> None:
    """Writes every picture of the page."""
    OUT.mkdir(exist_ok=True)
    save(methods_sheet(), OUT / "methods.png")
    save(words_sheet(), OUT / "words.png")
    street = draw_street()
    shown = street.resize((384, 288), Image.Resampling.LANCZOS)
    loaded = attnx.load("demo", image_size=(96, 128))
    draw(shown, loaded, OUT, Request(), Style(), torch.device("cpu"))
    save(shown, OUT / "street.png")
    for path in sorted(OUT.glob("*.png")):
        as_jpeg(path)


if __name__ == "__main__":
    main()
