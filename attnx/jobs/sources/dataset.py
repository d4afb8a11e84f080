"""A Hugging Face data set written by `save_to_disk`. Requires the package `datasets`."""

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from attnx.jobs.sources import Entry, text_of, wrong_caption
from attnx.jobs.sources.skipped import Skipped
from attnx.jobs.sources.table import CAPTION


@dataclass(frozen=True)
class DataSet:
    """A data set on disk. Keys are from the column `key` or `id`, else the row number from 0."""

    path: Path
    split: str | None
    skipped: Skipped = field(default_factory=Skipped, compare=False, repr=False)
    kind = "dataset"

    def entries(self) -> Iterator[Entry]:
        """All rows in order. Pictures are not read."""
        data, image, _ = _load(self.path, self.split)
        names = data.column_names
        key, text = (next((name for name in wanted if name in names), None) for wanted in (("key", "id"), CAPTION))
        if not len(data):
            raise ValueError(f"source: expected at least one row; {self.path} has none")
        columns = [name for name in (key, text) if name is not None]
        rows = data.select_columns(columns) if columns else [{}] * len(data)
        for number, row in enumerate(rows):
            own = str(number) if key is None or row[key] is None else text_of(row[key])
            caption = None if text is None else row[text]
            wrong = wrong_caption(caption)
            error = None if wrong is None else f"row {number}: {wrong}"
            yield Entry(own, image, number, text=None if wrong else caption, error=error)

    def reader(self) -> "Rows":
        """A reader of single pictures by row number."""
        return Rows(self.path, self.split)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of `datasets`. It changes if other rows are saved at the same path."""
        return _load(self.path, self.split).fingerprint


@dataclass(frozen=True)
class Rows:
    """Reads the picture of one row."""

    path: Path
    split: str | None

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        """The image's path, and its content if that is not the file at the path."""
        data, image, _ = _load(self.path, self.split)
        value = data[entry.offset][image]
        if value is None:
            raise ValueError(f"expected a picture in row {entry.offset}; got none")
        content = value["bytes"]
        return (Path(value["path"]), None) if content is None else (self.path / entry.key, io.BytesIO(content))


class _Loaded(NamedTuple):
    """A data set with undecoded pictures, the name of their column, and the fingerprint."""

    rows: Any
    image: str
    fingerprint: str


@functools.lru_cache(maxsize=1)
def _load(path: Path, split: str | None) -> _Loaded:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("source: data sets require the package datasets: pip install 'attnx[datasets]'") from error
    if any(not file.is_file() for file in path.rglob("*.arrow")):
        raise ValueError(
            f"source: expected a data set of regular files; {path} has an .arrow that is not a regular file"
        )
    try:
        data = datasets.load_from_disk(str(path))
    # It raises IndexError if there are no rows, and nearly any exception for a broken file.
    except Exception as error:
        expected = "source: expected a data set with rows, as save_to_disk writes it"
        raise ValueError(f"{expected}; {path} can't be loaded: {type(error).__name__}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"split: expected one of {', '.join(data)}; got {split!r}")
        data = data[split]
    elif split is not None:
        raise ValueError(f"split: {path} has none; got {split!r}")
    images = [name for name, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise ValueError(f"source: expected one column of images; {path} has {', '.join(images) or 'none'}")
    return _Loaded(data.cast_column(images[0], datasets.Image(decode=False)), images[0], str(data._fingerprint))
