"""Sheets of pictures: grids of heads and layers, contact sheets, captions. Arguments and errors as in `picture`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from attnx.figures.picture import check, float_array, overlay, rgb_image

if TYPE_CHECKING:
    from attnx.figures.picture import Map, Picture


def heads_grid(
    image: Picture,
    maps: Map,
    *,
    interpolation: str = "nearest",
    colormap: str = "turbo",
    alpha: float = 0.6,
    columns: int | None = None,
    tile: int | None = 256,
) -> Image.Image:
    """A grid of overlays, one per head, each with its own colour scale. "head 0" is first.

    Args:
        maps: [H, h, w]. With `colormap="viridis", alpha=1` the pictures are those of DINO's script.
        interpolation, colormap, alpha: see `overlay`.
        columns: pictures per row; None: chosen from their number.
        tile: pixels of a picture's longer side; None: the image's size.
    """
    draw = partial(overlay, rgb_image(image, tile), interpolation=interpolation, colormap=colormap, alpha=alpha)
    heads = float_array(maps, "maps", 3)
    chosen = _columns(len(heads)) if columns is None else columns
    return contact_sheet([*map(draw, heads)], [f"head {i}" for i in range(len(heads))], columns=chosen)


def layers_figure(
    image: Picture,
    names: Sequence[str],
    maps: Map,
    rollout: Map | None,
    *,
    interpolation: str = "bilinear",
    colormap: str = "turbo",
    alpha: float = 0.5,
    columns: int | None = None,
    tile: int | None = 256,
) -> Image.Image:
    """Every layer's map over the image, then max, min and mean over the layers, and rollout.

    Args:
        names: L titles.
        maps: [L, h, w], for example the CLS map of each layer; each has its own colour scale.
        rollout: [h, w]; None: no rollout.
        interpolation, colormap, alpha, columns, tile: see `overlay` and `heads_grid`.
    """
    layers = float_array(maps, "maps", 3)
    check(len(names) == len(layers), "names", f"{len(layers)}, one for each of the maps", len(names))
    summary = {"max": layers.max(0), "min": layers.min(0), "mean": layers.mean(0)}
    if rollout is not None:
        summary["rollout"] = float_array(rollout, "rollout", 2)
    draw = partial(overlay, rgb_image(image, tile), interpolation=interpolation, colormap=colormap, alpha=alpha)
    # If the layers fill whole rows, the summary gets a row of its own.
    chosen = _columns(len(layers), len(summary)) if columns is None else columns
    return contact_sheet([*map(draw, [*layers, *summary.values()])], [*names, *summary], columns=chosen)


def contact_sheet(
    images: Sequence[Picture], titles: Sequence[str] | None, *, columns: int, tile: int | None = None
) -> Image.Image:
    """Pictures of any sizes on a white grid, row by row, each under its title.

    Args:
        images: at least one.
        titles: one per image, or None. An ellipsis replaces the middle of a title that is too wide.
        columns: pictures per row.
        tile: pixels of the longer side of each picture; None: their own sizes.
    """
    check(columns > 0, "columns", "at least 1", columns)
    check(len(images) > 0, "images", "at least one", "none")
    texts = [""] * len(images) if titles is None else titles
    check(len(texts) == len(images), "titles", f"{len(images)}, one for each of the images", len(texts))
    tiles = [rgb_image(image, tile) for image in images]
    width = max(64, *(item.width for item in tiles))
    heights = [max(item.height for item in tiles[at : at + columns]) for at in range(0, len(tiles), columns)]
    gap = max(8, width // 20)
    font = ImageFont.load_default(size=min(max(width // 15, 11), 32))
    caption = math.ceil(1.4 * font.getbbox("Ag")[3]) if any(texts) else 0
    across = gap + (width + gap) * min(columns, len(tiles))
    down = gap + sum(caption + height + gap for height in heights)
    sheet = Image.new("RGB", (across, down), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(tiles):
        row, column = divmod(index, columns)
        left = gap + (width + gap) * column
        top = gap + sum(caption + height + gap for height in heights[:row])
        sheet.paste(picture, (left + (width - picture.width) // 2, top + caption))
        title = _shorten(texts[index], lambda text: font.getlength(text) <= width - gap)
        draw.text((left + width / 2, top), title, fill="#282828", font=font, anchor="ma")
    return sheet


def captioned(image: Picture, text: str) -> Image.Image:
    """The image with a text on white below it, wrapped into lines.

    Args:
        text: newlines and other control characters count as spaces.
    """
    image = rgb_image(image)
    margin = min(max(image.width // 60, 14), 28)
    font, step = ImageFont.load_default(size=margin), math.ceil(1.4 * margin)
    lines = _wrapped(text, lambda line: font.getlength(line) <= image.width - 2 * margin)
    result = Image.new("RGB", (image.width, image.height + step * len(lines) + margin), "white")
    result.paste(image)
    draw = ImageDraw.Draw(result)
    for number, line in enumerate(lines):
        draw.text((margin, image.height + step * number), line, fill="#282828", font=font)
    return result


def _columns(count: int, least: int = 1) -> int:
    """The smallest number of columns from max(sqrt(count), least) to twice that that fills all rows; else the first."""
    root = max(math.ceil(math.sqrt(count)), least)
    return next((columns for columns in range(root, 2 * root + 1) if count % columns == 0), root)


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in lines that fit. A word that is too long for a line is broken at any character."""
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if lines[-1] and not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _shorten(title: str, fits: Callable[[str], bool]) -> str:
    title = " ".join(title.split())
    if fits(title):
        return title

    def keep(count: int) -> str:
        # The middle is cut, because the names of neighbouring layers differ near their end.
        return f"{title[: (count + 1) // 2].rstrip()}…{title[len(title) - count // 2 :].lstrip()}"

    too_many = bisect_left(range(len(title)), True, key=lambda count: not fits(keep(count)))
    return keep(max(0, too_many - 1))
