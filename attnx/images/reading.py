"""Read image files as upright 8-bit RGB pictures."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin

from attnx.files import open_regular
from attnx.images.formats import installed_formats

_STRIP_PIXELS = 2**20  # pixels of a 16-bit picture that are scaled at once
_TURNED = (5, 6, 7, 8)  # orientations in EXIF that exchange width and height
_HEADER_BYTES = 2**16
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts of a PNG in which Pillow finds an orientation
_TEXT_BYTES = max(map(len, _TEXTS))
_MESSAGE_LENGTH = 200  # most characters of a decoder's message in an error

# Transpositions that turn a picture of each EXIF orientation upright.
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


def upright_size(path: str | Path, max_pixels: int | None = None) -> tuple[int, int]:
    """The (width, height) of the upright picture in a file, as `read_scaled` gives it, from its header.

    Pixels are decoded only for a PNG that may have its orientation after them.

    Args:
        path: as in `read_image`.
        max_pixels: the most pixels of a PNG that is decoded.

    Raises:
        ImageError: the file has no header of an image, or a PNG that has to be decoded can't be.
    """
    with _opened(path, None) as source:
        _check_header(source)
        if not _has_late_orientation(source):
            with Image.open(source, formats=installed_formats()) as image:
                return _turned_size(_stored_size(image), _orientation(image))
    return read_scaled(path, max_pixels=max_pixels)[1]


def _read(
    path: str | Path, content: IO[bytes] | None, max_pixels: int | None, scaled: bool
) -> tuple[Image.Image, tuple[int, int]]:
    with _opened(path, content) as source:
        picture, orientation, size = _decode(source, max_pixels, scaled)
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
    picture.info = {}
    return picture, _turned_size(size, orientation)


@contextlib.contextmanager
def _opened(path: str | Path, content: IO[bytes] | None) -> Iterator[IO[bytes]]:
    """The content, or the file at the path. Inside the `with`, every error becomes an ImageError with the path."""
    source = content
    try:
        with contextlib.ExitStack() as opened:
            if source is None:
                source = opened.enter_context(open_regular(path))
            yield source
    # Decoders raise nearly any exception for broken data: SyntaxError, EOFError, struct.error, KeyError.
    except Exception as error:
        # Pillow's messages have the address of the file object, which differs between runs.
        message = str(error).replace(f" {source!r}", "").removeprefix(f"{path}: ")
        message = message if len(message) <= _MESSAGE_LENGTH else f"{message[: _MESSAGE_LENGTH - 1]}…"
        raise ImageError(f"{path}: can't be read as an image: {type(error).__name__}: {message}") from error


def _decode(source: IO[bytes], max_pixels: int | None, scaled: bool) -> tuple[Image.Image, int, tuple[int, int]]:
    """The picture as stored, its orientation, and its full (width, height)."""
    _check_header(source)
    with Image.open(source, formats=installed_formats()) as image:
        size = image.size
        if 0 in size:
            raise ValueError(f"expected at least one pixel, got {image.width} x {image.height}")
        if max_pixels is not None and scaled:
            _reduce(image, max_pixels)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"expected at most {max_pixels:,} pixels, got {size[0]} x {size[1]}")
        image.load()
        return to_rgb(image), _orientation(image), size


def _check_header(source: IO[bytes]) -> None:
    """Raise ValueError for a PNM file with a long header, because Pillow reads comments byte by byte."""
    head = source.read(_HEADER_BYTES)
    source.seek(0)
    if len(head) == _HEADER_BYTES and re.match(rb"P[1-7fFy]\s", head):
        words = re.sub(rb"#[^\n]*", b" ", head).split()
        if len(words) < (3 if words[0] in (b"P1", b"P4") else 4):
            raise ValueError(f"expected a header of at most {_HEADER_BYTES:,} bytes")


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


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image in what was read of it; 1 if it has none that can be parsed."""
    try:
        # PngImageFile.getexif would decode the pixels, to find what comes after them.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    # A broken EXIF block must not make the pixels unusable.
    except Exception:
        return 1


def _turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return size[::-1] if orientation in _TURNED else size


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """The (width, height) of an image before it is turned."""
    # Of a TIFF, recent versions of Pillow give the upright one.
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
    return image.size


def _has_late_orientation(source: IO[bytes]) -> bool:
    """True for a PNG with a chunk after its pixels that may have an orientation. The source is left at its start."""
    place, pixels, found = len(_PNG), False, False
    if source.read(place) == _PNG:
        # A chunk is the length of its data, its kind, the data and a checksum.
        while not found and len(head := source.read(8)) == 8:
            kind = head[4:]
            pixels = pixels or kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                found = kind == b"eXIf" or source.read(_TEXT_BYTES).startswith(_TEXTS)
            place += 12 + int.from_bytes(head[:4], "big")
            source.seek(place)
    source.seek(0)
    return found


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB. 16-bit grey is scaled to 8 bits, where Pillow clips it. Float pixels raise ValueError."""
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
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))).astype(np.int32)
        grey.paste(Image.fromarray(((strip + 128) // 257).astype(np.uint8)), (0, top))
    return grey
