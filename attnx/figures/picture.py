"""Pictures of maps over images: heat maps, overlays, mask contours. `sheets` composes them.

A map is a torch tensor (any device, any real dtype) or a numpy array. An image is a `PIL.Image`, the path of a file, or
a uint8 array [H, W, 3], of any size. A file is turned upright; a PIL image is taken as it is. Every picture is an RGB
`PIL.Image`. Invalid arguments (shape, dtype, range, unknown name, empty, NaN or inf) raise `ValueError` with the
argument's name, the expected and the actual value.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from attnx.files import replacing
from attnx.images import read_image, to_rgb
from attnx.methods import resize

if TYPE_CHECKING:
    import torch

    from attnx.jobs.columns import MapRow as Row

    Map: TypeAlias = torch.Tensor | np.ndarray
    Picture: TypeAlias = Image.Image | np.ndarray | str | Path


def heat(
    amap: Map, size: tuple[int, int] | Picture, *, interpolation: str = "bilinear", normalize: str | None = "minmax"
) -> np.ndarray:
    """[H, W] float32 in 0..1: a map at the size of its image.

    Args:
        amap: [h, w] real; NaN or inf raises `ValueError` with their number.
        size: the image itself (recommended), or (height, width) in pixels. PIL's `image.size` is (width, height).
        interpolation: "bilinear" | "nearest", as `F.interpolate` with `align_corners=False`.
        normalize: "minmax" stretches the resized map to 0..1, and a constant map becomes zeros; "max" divides it by
            its maximum and sets negative values to 0; None leaves it unchanged, and it must be in 0..1.

    Warns:
        UserWarning: `size` is a pair of numbers in landscape format and the map in portrait format, or the reverse.
    """
    check(normalize in ("minmax", "max", None), "normalize", "minmax, max or None", repr(normalize))
    array = float_array(amap, "amap", 2)
    _check_interpolation(interpolation)
    resized = resize(array, _target(size, array.shape), normalize=normalize, mode=interpolation)
    if normalize is None:
        low, high = resized.min(), resized.max()
        check(low > -1e-5 and high < 1 + 1e-5, "amap", "0..1 with normalize=None", f"{low:.4g}..{high:.4g}")
        return resized.clip(0, 1)
    return resized


def overlay(
    image: Picture,
    amap: Map | Row,
    *,
    interpolation: str = "bilinear",
    cmap: str = "turbo",
    alpha: float = 0.5,
    limits: tuple[float, float] | None = None,
    colorbar: bool = False,
    patch: tuple[int, int] | None = None,
) -> Image.Image:
    """The image under a coloured map, at the image's own size: `(1 - alpha) * image + alpha * colours`.

    Args:
        amap: [h, w]; or a row of a job (`attnx.open(...)[0]`), whose map covers only its crop of the photo: the rest of
            the photo stays as it is.
        interpolation: see `heat`.
        cmap: a name in `matplotlib.colormaps`.
        alpha: 0 (only the image) to 1 (only the colours).
        limits: the values of the first and the last colour; None: the smallest and the largest of the resized map.
        colorbar: draw the colours and their values beside the image.
        patch: (row, column) of a patch of the map to frame, such as the one whose map it is.

    Example:
        >>> from PIL import Image
        >>> photo = Image.new("RGB", (640, 480))
        >>> attnx.picture.overlay(photo, torch.rand(12, 12)).size
        (640, 480)
        >>> attnx.picture.overlay(photo, torch.rand(12, 12), cmap="viridis", colorbar=True).height
        480
    """
    from attnx.jobs.columns import MapRow

    image = rgb_image(image)
    values, crop = _of_row(amap, image) if isinstance(amap, MapRow) else (amap, None)
    found, limits = coloured(image, values, interpolation, cmap, alpha, limits, crop)
    if patch is not None:
        (row, column), (rows, columns) = patch, values.shape
        check(
            0 <= row < rows and 0 <= column < columns, "patch", f"(row, column) in a grid of {rows} x {columns}", patch
        )
        left, top, right, bottom = (0, 0, *found.size) if crop is None else crop
        wide, high = (right - left) / columns, (bottom - top) / rows
        corners = left + column * wide, top + row * high, left + (column + 1) * wide, top + (row + 1) * high
        found = marked(found, tuple(at / side for at, side in zip(corners, found.size * 2, strict=True)))
    return with_colorbar(found, limits, cmap) if colorbar else found


def coloured(
    image: Image.Image,
    amap: Map,
    interpolation: str,
    cmap: str,
    alpha: float,
    limits: tuple[float, float] | None = None,
    crop: tuple[float, ...] | None = None,
) -> tuple[Image.Image, tuple[float, float]]:
    """The overlay of an RGB image, see `overlay`, and the limits of its colours; `crop`: the part under the map."""
    from matplotlib import colormaps

    check_colours(cmap, alpha, interpolation)
    if limits is not None:
        check(len(limits) == 2 and limits[0] <= limits[1], "limits", "(low, high) with low <= high", limits)
    array = float_array(amap, "amap", 2)
    values = resize(array, (image.height, image.width), crop, mode=interpolation)
    inside = None if crop is None else resize(np.ones_like(array), values.shape, crop, mode="nearest") > 0
    covered = values if inside is None else values[inside]
    check(covered.size > 0, "crop", "a part of the image", crop)
    low, high = limits or (float(covered.min()), float(covered.max()))
    # Resizing a constant map gives rounding noise, which stretching would amplify.
    noise = 8 * float(np.finfo(np.float32).eps) * float(np.abs(values).max())
    shares = ((values - low) / (high - low)).clip(0, 1) if high - low > noise else np.zeros_like(values)
    colours = Image.fromarray(colormaps[cmap](shares, bytes=True)[..., :3])
    blended = Image.blend(image, colours, alpha)
    return (blended if inside is None else Image.composite(blended, image, Image.fromarray(inside))), (low, high)


def marked(image: Image.Image, box: tuple[float, ...]) -> Image.Image:
    """The image with a frame around a part of it, in shares (left, top, right, bottom) of its width and height."""
    result = image.copy()
    left, right = (round(share * (image.width - 1)) for share in (box[0], box[2]))
    top, bottom = (round(share * (image.height - 1)) for share in (box[1], box[3]))
    draw, line = ImageDraw.Draw(result), max(1, min(image.size) // 200)
    for color, out in (("black", line), ("white", 0)):
        draw.rectangle((left - out, top - out, right + out, bottom + out), outline=color, width=line)
    return result


def with_colorbar(image: Image.Image, limits: tuple[float, float], cmap: str) -> Image.Image:
    """The image on white, with a bar of the colours and the values of its ends and middle on its right."""
    from matplotlib import colormaps

    font = ImageFont.load_default(size=min(max(image.height // 18, 11), 18))
    bar, gap = min(max(8, image.height // 20), 24), min(max(4, image.height // 40), 12)
    low, high = limits
    labels = [f"{value:.3g}" for value in ((high, (low + high) / 2, low) if high > low else (low,))]
    # Bars of one width align the pictures of a sheet.
    wide = bar + 3 * gap + math.ceil(max(font.getlength(label) for label in (*labels, "0.000000")))
    result = Image.new("RGB", (image.width + gap + wide, image.height), "white")
    result.paste(image)
    shares = np.linspace(1, 0, image.height)[:, None].repeat(bar, 1) if high > low else np.zeros((image.height, bar))
    left = image.width + 2 * gap
    result.paste(Image.fromarray(colormaps[cmap](shares, bytes=True)[..., :3]), (left, 0))
    draw = ImageDraw.Draw(result)
    for label, (share, anchor) in zip(labels, ((0.0, "lt"), (0.5, "lm"), (1.0, "lb")), strict=False):
        draw.text((left + bar + gap, share * image.height), label, fill="#282828", font=font, anchor=anchor)
    return result


def _of_row(row: Row, image: Image.Image) -> tuple[Map, tuple[float, ...]]:
    """The map of a row, and its crop in the image's pixels. The image may be a resized photo."""
    got = "none" if row.map is None else f"{row.map.dtype} {list(row.map.shape)}"
    check(row.map is not None and row.map.ndim == 2, "row", f"a map [h, w] of {row.key[:80]}", got)
    width, height, crop = row.width or 0, row.height or 0, row.crop or ()
    check(bool(width and height and crop), "row", f"the size and the crop of {row.key[:80]}", f"crop {row.crop}")
    assert row.map is not None
    across, down = image.width / width, image.height / height
    same = abs(across - down) * max(width, height) <= 1.5
    check(same, "image", f"the photo of {row.key[:80]}, {width} x {height}", f"{image.width} x {image.height}")
    left, top, right, bottom = crop
    return row.map, (left * across, top * down, right * across, bottom * down)


def mask_contour(
    image: Picture, mask: Map, *, color: str | tuple[int, int, int] = "#ff2d55", alpha: float = 0.5
) -> Image.Image:
    """The image with a tinted mask and its contour, at the image's own size.

    Args:
        mask: [h, w] bool, upsampled nearest. An empty mask gives the image, and a full one has no contour.
        color: a name or "#rrggbb", or (r, g, b) in 0..255.
        alpha: 0 (only the contour) to 1 (a solid mask).
    """
    _check_alpha(alpha)
    image = rgb_image(image)
    cells = resize(float_array(mask, "mask", 2, kinds="b"), (image.height, image.width), mode="nearest")
    try:
        solid = Image.new("RGB", image.size, color)
    except (TypeError, ValueError) as error:
        raise ValueError(f"color: expected a name, '#rrggbb' or (r, g, b), got {color!r}") from error
    inside = Image.fromarray((255 * cells).astype(np.uint8))
    reach = 2 * max(1, min(image.size) // 240) + 1
    outer, inner = inside.filter(ImageFilter.MaxFilter(reach)), inside.filter(ImageFilter.MinFilter(reach))
    tinted = Image.composite(Image.blend(image, solid, alpha), image, inside)
    return Image.composite(solid, tinted, ImageChops.difference(outer, inner))


def save(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG atomically. An existing file is replaced.

    Raises:
        ValueError: the name does not end in .png.
        OSError: the folder is missing or read-only, or the disk is full; the error has the path.
    """
    path = Path(path)
    check(path.suffix.lower() == ".png", "path", "a name that ends in .png", repr(str(path)))
    write(path, lambda file: image.save(file, format="PNG"))


def write(path: Path, save_to: Callable[[IO[bytes]], None]) -> None:
    """Write a file of a picture atomically. Raises OSError with the path."""
    try:
        with replacing(path, sync=False) as temporary, temporary.open("xb") as file:
            save_to(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check(good: bool | np.bool_, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless `good`."""
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_colours(cmap: str, alpha: float, interpolation: str) -> None:
    """Raise ValueError for an unknown name, or an opacity out of range; see `overlay`."""
    from matplotlib import colormaps

    check(cmap in colormaps, "cmap", "turbo, jet, viridis or another of matplotlib", repr(cmap))
    _check_alpha(alpha)
    _check_interpolation(interpolation)


def _check_alpha(alpha: float) -> None:
    check(0 <= alpha <= 1, "alpha", "0..1", alpha)


def _check_interpolation(name: str) -> None:
    check(name in ("bilinear", "nearest"), "interpolation", "bilinear or nearest", repr(name))


def float_array(value: Map, name: str, ndim: int, kinds: str = "fiub") -> np.ndarray:
    """The value as a float32 array with `ndim` axes. Raises ValueError unless it is finite and not empty."""
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
        # numpy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
    array = np.asarray(value)
    expected = f"{'bool' if kinds == 'b' else 'real'} {'[h, w]' if ndim == 2 else '[maps, h, w]'}, not empty"
    fits = array.ndim == ndim and array.size > 0 and array.dtype.kind in kinds
    one = f"; take {name}[0]" if array.ndim == ndim + 1 and len(array) == 1 else ""
    check(fits, name, expected, f"{array.dtype} {list(array.shape)}{one}")
    # A copy, because torch warns about read-only memory.
    array = np.array(array, dtype=np.float32, order="C")
    bad = array.size - np.isfinite(array).sum()
    check(bad == 0, name, "finite values", f"{bad} of {array.size} NaN or inf")
    return array


def _target(size: tuple[int, int] | Picture, shape: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of `size`, a pair of numbers or an image."""
    if isinstance(size, (Image.Image, Path)) or (isinstance(size, np.ndarray) and size.ndim != 1):
        image = size if isinstance(size, Image.Image) else rgb_image(size)
        return image.height, image.width
    pair = len(size) == 2 if isinstance(size, (tuple, list, np.ndarray)) else False
    check(pair and not isinstance(size, str) and min(size) > 0, "size", "(H, W), both at least 1, or the image", size)
    assert not isinstance(size, str)
    (height, width), (rows, columns) = size, shape
    if (height - width) * (rows - columns) < 0:
        warnings.warn(
            f"size: taken as (height, width) = ({height}, {width}), which turns a map of {rows} x {columns} patches "
            "(height x width); PIL's `size` is (width, height): pass the image itself",
            stacklevel=3,
        )
    return int(height), int(width)


def rgb_image(image: Picture, tile: int | None = None) -> Image.Image:
    """The image in RGB; with `tile`, scaled to that size."""
    if isinstance(image, (str, Path)):
        image = read_image(image)
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        good = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size > 0
        check(good, "image", "a PIL.Image, a path or uint8 [H, W, 3]", f"{array.dtype} {list(array.shape)}")
        image = Image.fromarray(array)
    check(tile is None or tile > 0, "tile", "at least 1", tile)
    image = image.convert("RGB") if image.mode == "RGB" else to_rgb(image.copy())
    return image if tile is None else ImageOps.contain(image, (tile, tile), Image.Resampling.LANCZOS)
