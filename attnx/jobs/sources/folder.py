"""A folder of images, read recursively, or one image."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from attnx.images import walk_images
from attnx.jobs.sources import Entry
from attnx.jobs.sources.skipped import UNREAD, Skipped


@dataclass(frozen=True)
class Folder:
    """Keys are the paths in the folder, with `/`; bytes of a name that are not UTF-8 are written as `\\xff`."""

    root: Path
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "folder"

    def entries(self) -> Iterator[Entry]:
        """See `walk_images`; what looks like an image and can't be read is counted in `skipped`."""
        self.skipped.clear()
        for path in walk_images(self.root, lambda path: self.skipped.add(UNREAD, self._relative(path))):
            relative = self._relative(path)
            # Parquet strings are UTF-8; a POSIX file name is any bytes.
            yield Entry(os.fsencode(relative).decode(errors="backslashreplace"), relative)

    def _relative(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def reader(self) -> "Files":
        """Paths below the folder."""
        return Files(self.root.parent if self.root.is_file() else self.root)


@dataclass(frozen=True)
class Files:
    """Reads whole files below a root; a path that is absolute is taken as it is."""

    root: Path

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        assert entry.path is not None
        return self.root / entry.path, None
