"""Image files of a folder, in the order of their paths."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from attnx.images.formats import image_suffixes, is_unreadable_image

JOB_FILES = {"manifest.parquet", "run.json"}  # a folder with both was written by a job


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


def _walk(folder: Path) -> Iterator[Path]:
    """Files that look like images, in order of their paths."""
    with os.scandir(folder) as entries:
        seen = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
    if {name for name, _ in seen} >= JOB_FILES:
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
