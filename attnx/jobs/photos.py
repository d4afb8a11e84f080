"""The photos that the maps of a job belong to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import Image

from attnx.images import large_images, read_scaled
from attnx.jobs.columns import MapRow
from attnx.jobs.job import Job
from attnx.jobs.runfile import RUN

if TYPE_CHECKING:
    from attnx.jobs.reader import Maps
    from attnx.jobs.sources import Reader

__all__ = ["Photos", "path_of_key", "photo_below"]


class Photos:
    """The photos of a job's rows: `photos(3)` is the photo of the row at index 3, cropped as its map is.

    The object can be pickled. Each process opens the source at its first photo.

    Args:
        maps: the maps of the job.
        root: folder of the photos; the photo of a row is root/key. None: the source that the job has read.
    """

    def __init__(self, maps: Maps, root: str | Path | None = None) -> None:
        self.maps = maps
        self.root = None if root is None else Path(root)
        self._opened: tuple[int, Job, Reader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def check(self) -> None:
        """Check that there is a folder or a source of photos.

        Raises:
            ValueError: the root is not a folder; the job has no recipe; its source can't be opened.
        """
        if self.root is None:
            self._source()
        elif not self.root.is_dir():
            raise ValueError(f"images: expected a folder of photos; {self.root} is not a folder")

    def __call__(self, place: int, row: MapRow | None = None) -> Image.Image:
        """The photo of the row at index `place`, upright, RGB, cut to the row's crop in whole pixels.

        A JPEG with more pixels than the job's max_pixels is read at a smaller scale, and so is its crop.

        Args:
            place: the index of the row.
            row: the row at that index, if it is at hand.

        Raises:
            ValueError: the row has no crop; the photo can't be read, or has another size than the row says. The
                message has the key.
        """
        row = self.maps[place] if row is None else row
        most = self.maps.settings.get("max_pixels")
        try:
            with large_images(most):
                picture, size = read_scaled(*self._find(place, row), max_pixels=most)
        except (OSError, ValueError) as error:
            raise ValueError(f"{row.key[:200]}: no photo: {error}") from error
        if row.crop is None:
            raise ValueError(f"{row.key[:200]}: expected a row with a crop; got none")
        if size != (row.width, row.height):
            expected = f"{row.width} x {row.height} pixels, as the job has read it"
            raise ValueError(f"{row.key[:200]}: expected a photo of {expected}; got {size[0]} x {size[1]}")
        across, down = picture.width / size[0], picture.height / size[1]
        left, top, right, bottom = (
            round(side * scale) for side, scale in zip(row.crop, (across, down) * 2, strict=True)
        )
        return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def _find(self, place: int, row: MapRow) -> tuple[Path, IO[bytes] | None]:
        """The path of a row's photo, and its content if it is not the file at that path."""
        if self.root is not None:
            return photo_below(self.root, row.key), None
        job, read = self._source()
        return read(job.entry(self.maps.manifest_row(place)))

    def _source(self) -> tuple[Job, Reader]:
        """The job, and the function that reads its source, opened once in a process."""
        from attnx.jobs.recipe import recipe_of

        # A forked process opens its own files.
        if self._opened is None or self._opened[0] != os.getpid():
            if not (self.maps.folder / RUN).is_file():
                raise ValueError(f"images: expected a folder of photos, because {self.maps.folder} has no {RUN}")
            job = Job(self.maps.folder)
            try:
                reader = recipe_of(job.run.get("recipe")).open_source().reader()
            except (OSError, ValueError) as error:
                raise ValueError(f"images: the source of {self.maps.folder} can't be opened: {error}") from error
            self._opened = os.getpid(), job, reader
        return self._opened[1:]


def path_of_key(key: str) -> Path | None:
    """A key as a path below some folder; None if it is absolute, has `..`, or names no file."""
    path = Path(key)
    return None if not path.name or path.is_absolute() or ".." in path.parts or "\0" in key else path


def photo_below(root: Path, key: str) -> Path:
    """The path of a key's photo below the root. Raises ValueError if the key leaves the root."""
    path = path_of_key(key)
    if path is None:
        raise ValueError(f"expected a key that is a path below {root}")
    return root / path
