"""Reads image files as RGB pictures, and converts pictures to normalised tensors.

A file that can't be read raises `ImageError` with its path and the cause. Broken files are never repaired or skipped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from attnx.files import open_regular

if TYPE_CHECKING:
    import torch

__all__ = [
    "HEIF_SUFFIXES",
    "IMAGE_SUFFIXES",
    "ImageError",
    "find_images",
    "image_suffixes",
    "is_unreadable_image",
    "large_images",
    "read_image",
    "read_scaled",
    "to_tensor",
    "walk_images",
]

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip

# Read where pillow-heif is installed.
HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")

# Suffixes of pictures that can't be read. They are skipped with a message.
_OTHER_SUFFIXES = (
    ".3fr", ".ai", ".apng", ".arw", ".avifs", ".bpg", ".cr2", ".cr3", ".crw", ".cur", ".dcm", ".dcr", ".dds", ".dib",
    ".djvu", ".dng", ".emf", ".eps", ".erf", ".exr", ".fff", ".flif", ".hdp", ".hdr", ".icns", ".ico", ".iiq", ".j2c",
    ".j2k", ".jng", ".jpc", ".jpf", ".jpm", ".jpx", ".jxl", ".jxr", ".k25", ".kdc", ".mef", ".mos", ".mpo", ".mrw",
    ".nef", ".nrw", ".orf", ".ori", ".pam", ".pbm", ".pcx", ".pef", ".pfm", ".pjp", ".pjpeg", ".psb", ".psd", ".qoi",
    ".raf", ".ras", ".raw", ".rw2", ".rwl", ".sgi", ".sr2", ".srf", ".srw", ".svg", ".svgz", ".tga", ".wdp", ".wmf",
    ".x3f", ".xbm", ".xcf", ".xpm",
)  # fmt: skip

# Only these decoders are used: Pillow detects formats by content, and would pass an EPS file named .jpg to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_OF_A_JOB = {"manifest.parquet", "run.json"}
_STRIP = 2**20  # pixels of a 16-bit picture that are scaled at once
_HEADER = 2**16  # bytes
_LONGEST = 200  # characters of a decoder's own message
_INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that can't be used as an image. The message has its path and the cause."""


def find_images(source: str | Path) -> list[Path]:
    """The image files of `source`, sorted by their POSIX path relative to it.

    Args:
        source: a file, taken whatever its suffix, or a folder, read recursively. In a folder, a file counts
            when its suffix (any case) is in `image_suffixes()`; files and folders whose name begins with a dot
            are skipped, and so are folders that jobs have written. Links to folders are followed, except one that
            leads back to a folder it stands in.

    Returns:
        At least one path, each beginning with `source`.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: `source` is a folder without images, or neither a file nor a folder.
        OSError: a folder can't be listed.
    """
    return list(walk_images(source))


def walk_images(source: str | Path, left_out: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """`find_images` as an iterator. Only the names of one folder are in memory.

    left_out: called with each file that looks like an image but can't be read.
    """
    source = Path(source)
    looked_for = f"an image or a folder with images ({' '.join(image_suffixes())})"
    if source.is_file():
        yield source
        return
    if not source.exists():
        raise FileNotFoundError(f"source: expected {looked_for}, got {source}, which does not exist")
    if not source.is_dir():
        raise ValueError(f"source: expected {looked_for}, got {source}, which is neither a file nor a folder")
    found, readable, others, example = False, image_suffixes(), 0, ""
    for path in _walk(source):
        if path.name.lower().endswith(readable):
            found = True
            yield path
            continue
        others += 1
        example = example or path.name
        if left_out is not None:
            left_out(path)
    if not found:
        such = f" but {others} that can't be read, such as {example[:200]!r}" if others else ""
        raise ValueError(f"source: expected {looked_for}, got {source}, a folder without any{such}")


def image_suffixes() -> tuple[str, ...]:
    """The readable suffixes: `IMAGE_SUFFIXES`, and `HEIF_SUFFIXES` where pillow-heif is installed."""
    return IMAGE_SUFFIXES + (HEIF_SUFFIXES if "HEIF" in _formats() else ())


def is_unreadable_image(name: str) -> bool:
    """True if a file with this name looks like a picture but can't be read."""
    suffixes = (*HEIF_SUFFIXES, *_OTHER_SUFFIXES)
    return name.lower().endswith(suffixes) and not name.lower().endswith(image_suffixes())


def _walk(folder: Path) -> Iterator[Path]:
    """Files that look like images, in order of their paths."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    if {name for name, _ in seen} >= _OF_A_JOB:
        return
    # Folders sort with a trailing slash, so that all files come in the order of their paths.
    for name, is_folder in sorted(seen, key=lambda item: f"{item[0]}/" if item[1] else item[0]):
        if not is_folder:
            if name.lower().endswith(image_suffixes()) or is_unreadable_image(name):
                yield folder / name
        elif not _leads_back(folder, name):
            yield from _walk(folder / name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    # A link to itself raises OSError.
    except OSError:
        return False


def _leads_back(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_symlink() and folder.resolve().is_relative_to(path.resolve())


def read_image(path: str | Path, content: IO[bytes] | None = None, max_pixels: int | None = None) -> Image.Image:
    """The picture in a file, fully decoded, upright, as 8-bit RGB.

    The EXIF orientation is applied; an EXIF block that can't be parsed counts as upright. Alpha is dropped,
    not blended: what lies under transparent pixels shows, as in timm and Hugging Face. 16-bit grey is scaled
    by 1 / 257 and rounded. CMYK, palettes and grey are converted as Pillow does, without a colour profile. Of
    an animation or a multi-page file, the first frame.

    Args:
        path: JPEG, PNG, WebP, GIF, BMP, TIFF, PNM, JPEG 2000 or AVIF (what the installed Pillow has of them), or
            HEIF where pillow-heif is installed, recognised by content.
        content: what to read in place of the file, which then only names it in an error.
        max_pixels: the most pixels that are decoded; what remains is Pillow's own limit.

    Returns:
        A `PIL.Image` of mode RGB with empty `info`: no orientation is left for anyone to apply a second time.

    Raises:
        ImageError: the file is missing, not a regular file, not an image, truncated, of zero size, above Pillow's
            decompression bomb limit (twice `PIL.Image.MAX_IMAGE_PIXELS`), of float pixels, or of integers outside
            0..65535.
    """
    return _read(path, content, max_pixels, scaled=False)[0]


def read_scaled(
    path: str | Path, content: IO[bytes] | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """`read_image`, but a JPEG of more than max_pixels is decoded at 1/2, 1/4 or 1/8 of its width and height.

    The largest of these that has at most max_pixels is taken. A progressive JPEG may have at most 2 * max_pixels: all
    its coefficients are in memory at once, whatever the scale.

    Returns:
        The picture, and the (width, height) of the upright picture at full size.
    """
    return _read(path, content, max_pixels, scaled=True)


def _read(
    path: str | Path, content: IO[bytes] | None, max_pixels: int | None, scaled: bool
) -> tuple[Image.Image, tuple[int, int]]:
    source = content
    try:
        with contextlib.ExitStack() as opened:
            if source is None:
                source = opened.enter_context(open_regular(path))
            picture, orientation, size = _decode(source, max_pixels, scaled)
        turn = _UPRIGHT.get(orientation)
        if turn is not None:
            picture = picture.transpose(turn)
    # Decoders raise nearly any exception for broken data: SyntaxError, EOFError, struct.error, KeyError.
    except Exception as error:
        # Pillow's messages have the address of the file object, which differs between runs.
        message = str(error).replace(f" {source!r}", "").removeprefix(f"{path}: ")
        message = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 1]}…"
        raise ImageError(f"{path}: can't be read as an image: {type(error).__name__}: {message}") from error
    picture.info = {}
    # Orientations 5 to 8 swap width and height.
    return picture, size[::-1] if turn is not None and orientation >= 5 else size


def _decode(source: IO[bytes], max_pixels: int | None, scaled: bool) -> tuple[Image.Image, int, tuple[int, int]]:
    """The picture as stored, its orientation, and its full (width, height)."""
    _check_header(source)
    with Image.open(source, formats=_formats()) as image:
        size = image.size
        if 0 in size:
            raise ValueError(f"expected at least one pixel, got {image.width} x {image.height}")
        if max_pixels is not None and scaled:
            _reduce(image, max_pixels)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"expected at most {max_pixels:,} pixels, got {size[0]} x {size[1]}")
        image.load()
        return _to_rgb(image), _orientation(image), size


def _check_header(source: IO[bytes]) -> None:
    """Raise ValueError for a PNM file with a long header, because Pillow reads comments byte by byte."""
    head = source.read(_HEADER)
    source.seek(0)
    if len(head) == _HEADER and re.match(rb"P[1-7fFy]\s", head):
        words = re.sub(rb"#[^\n]*", b" ", head).split()
        if len(words) < (3 if words[0] in (b"P1", b"P4") else 4):
            raise ValueError(f"expected a header of at most {_HEADER:,} bytes")


def _reduce(image: Image.Image, max_pixels: int) -> None:
    """Set the scale at which a JPEG of more than max_pixels is decoded, if a suitable one exists."""
    width, height = image.size
    most = 2 * max_pixels if "progressive" in image.info else 64 * max_pixels
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not max_pixels < width * height <= most:
        return
    for scale in (2, 4, 8):
        if -(-width // scale) * -(-height // scale) <= max_pixels and min(width, height) >= scale:
            image.draft(None, (width // scale, height // scale))
            return


@contextlib.contextmanager
def large_images(max_pixels: int | None) -> Iterator[None]:
    """Disable Pillow's own limit of pixels inside the `with`, unless `max_pixels` is None. See `read_image`."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = before if max_pixels is None else None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@functools.cache
def _formats() -> tuple[str, ...]:
    # `Image.open` raises KeyError for formats that this build of Pillow lacks.
    Image.init()
    # `Image.init` does not find pillow-heif; every decoder process must register it.
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # A broken EXIF block must not make the pixels unusable.
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("expected 8 or 16 bits a channel, got float pixels, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    # Pillow would use this key for a single colour, and warn if a palette has several.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey / 257, rounded, in strips of rows. Pillow's own conversion clips to 255."""
    if image.mode == "I":
        low, high = cast("tuple[int, int]", image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError(f"expected 16-bit grey in 0..65535, got values in {low}..{high}")
    grey = Image.new("L", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.int32)
        grey.paste(Image.fromarray(((strip + 128) // 257).astype(np.uint8)), (0, top))
    return grey


def to_tensor(
    image: Image.Image,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """The whole image at the size of a model's input, `(pixels / 255 - mean) / std`.

    It is resized with antialiasing to exactly `size`, and not cropped, so that maps cover the whole picture. The aspect
    ratio changes if `size` has another one.

    Args:
        image: mode RGB, any size.
        size: (h, w) in pixels.
        mean, std: 3 values each, for pixels in 0..1; std positive.
        interpolation: "nearest" | "box" | "bilinear" | "hamming" | "bicubic" | "lanczos", as Pillow's.

    Returns:
        [3, h, w] float32, contiguous, on the CPU.

    Raises:
        ValueError: a wrong argument.
    """
    import torch

    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}; read_image gives RGB")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (h, w), each at least 1, got {size}")
    if len(mean) != 3:
        raise ValueError(f"mean: expected 3 values, got {mean}")
    if len(std) != 3 or min(std) <= 0:
        raise ValueError(f"std: expected 3 positive values, got {std}")
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {_INTERPOLATIONS}, got {interpolation!r}")
    height, width = size
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    # [h, w, 3] -> [3, h, w]; numpy keeps to one thread: torch would start its pool in every decoding thread.
    pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
    pixels -= np.asarray(mean, dtype=np.float32)[:, None, None]
    pixels /= np.asarray(std, dtype=np.float32)[:, None, None]
    return torch.from_numpy(pixels)
