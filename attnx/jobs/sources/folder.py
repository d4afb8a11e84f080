"""A folder of images that is read recursively, or one image."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from attnx.images import walk_images
from attnx.jobs.sources import Entry
from attnx.jobs.sources.remote import images_below, whole_file
from attnx.jobs.sources.skipped import UNREAD, Skipped
from attnx.remote import is_remote


@dataclass(frozen=True)
class Folder:
    r"""A folder of images. Keys are the relative paths with `/`; bytes that are not UTF-8 become escapes: `\xff`."""

    root: Path
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "folder"

    def entries(self) -> Iterator[Entry]:
        """See `walk_images`. Files that look like images but can't be read are counted in `skipped`."""
        self.skipped.clear()
        for relative in self._names():
            # Parquet strings are UTF-8, but POSIX file names may have any bytes.
            yield Entry(os.fsencode(relative).decode(errors="backslashreplace"), relative)

    @property
    def fingerprint(self) -> None:
        """A folder has none."""

    def _names(self) -> Iterator[str]:
        """The images' paths relative to the root, in order."""
        if is_remote(self.root):
            yield from images_below(self.root, self.skipped) if self.root.is_dir() else [self.root.name]
            return
        for path in walk_images(self.root, lambda path: self.skipped.add(UNREAD, self._relative(path))):
            yield self._relative(path)

    def _relative(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def reader(self) -> "Files":
        """A reader of files below the folder."""
        return Files(self.root.parent if self.root.is_file() else self.root)


@dataclass(frozen=True)
class Files:
    """Reads whole files below a root. Absolute paths are used as they are."""

    root: Path

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        """The image's path, and its content if that is not the file at the path."""
        assert entry.path is not None
        return whole_file(self.root / entry.path)
