"""Images at URLs: a listing of a remote folder, and whole files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

from attnx.images import image_suffixes, is_unreadable_image
from attnx.images.folders import JOB_FILES
from attnx.jobs.sources.skipped import UNREAD, Skipped
from attnx.limits import PICTURE_BYTES
from attnx.remote import RemotePath

__all__ = ["images_below", "whole_file"]


def images_below(folder: Path, skipped: Skipped) -> Iterator[str]:
    """The names of the images below a remote folder, relative to it, as `attnx.images.walk_images` lists local ones.

    Raises:
        ValueError: there are no images.
    """
    names = cast("RemotePath", folder).walk()
    own = set(names)
    folders = {PurePosixPath(name).parent for name in names}
    jobs = {str(folder) for folder in folders if all(str(folder / name) in own for name in JOB_FILES)}
    listed = 0
    for name in names:
        parts = PurePosixPath(name).parts
        parents = {str(parent) for parent in PurePosixPath(name).parents}
        if any(part.startswith(".") for part in parts) or parents & jobs:
            continue
        if name.lower().endswith(image_suffixes()):
            listed += 1
            yield name
        elif is_unreadable_image(name):
            skipped.add(UNREAD, name)
    if not listed:
        suffixes = " ".join(image_suffixes())
        raise ValueError(f"source: expected an image or a folder with images ({suffixes}), got {folder}, without any")


def whole_file(path: Path) -> tuple[Path, IO[bytes] | None]:
    """The path, and the content of a remote file; None for a local one, which the decoder opens itself."""
    if not isinstance(path, RemotePath):
        return path, None
    content = path.read(0, PICTURE_BYTES + 1)
    if len(content) > PICTURE_BYTES:
        raise ValueError(f"expected a picture of at most {PICTURE_BYTES:,} bytes; got a larger one")
    return path, io.BytesIO(content)
