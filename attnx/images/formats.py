"""Image formats: suffixes of readable and unreadable pictures, and the decoders in use."""

import contextlib
import functools
import importlib

from PIL import Image

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


def image_suffixes() -> tuple[str, ...]:
    """The readable suffixes: `IMAGE_SUFFIXES`, and `HEIF_SUFFIXES` where pillow-heif is installed."""
    return IMAGE_SUFFIXES + (HEIF_SUFFIXES if "HEIF" in installed_formats() else ())


def is_unreadable_image(name: str) -> bool:
    """True if a file with this name looks like a picture but can't be read."""
    suffixes = (*HEIF_SUFFIXES, *_OTHER_SUFFIXES)
    return name.lower().endswith(suffixes) and not name.lower().endswith(image_suffixes())


@functools.cache
def installed_formats() -> tuple[str, ...]:
    """Names of the decoders in use that this build of Pillow has, and of pillow-heif where it is installed."""
    # `Image.open` raises KeyError for formats that this build of Pillow lacks.
    Image.init()
    # `Image.init` does not find pillow-heif; every decoder process must register it.
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
