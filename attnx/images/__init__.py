"""Image files: find them in folders, read them as RGB pictures, and convert pictures to normalised tensors.

A file that can't be read raises `ImageError` with its path and the cause. Broken files are never repaired or skipped.
"""

from attnx.images.folders import find_images, walk_images
from attnx.images.formats import HEIF_SUFFIXES, IMAGE_SUFFIXES, image_suffixes, is_unreadable_image
from attnx.images.reading import ImageError, large_images, read_image, read_scaled, to_rgb, upright_size
from attnx.images.tensors import to_tensor

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
    "to_rgb",
    "to_tensor",
    "upright_size",
    "walk_images",
]
