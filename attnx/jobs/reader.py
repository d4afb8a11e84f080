"""Reads the rows of a job by index or by key: `attnx.open`."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from attnx.jobs.columns import MapRow
from attnx.jobs.job import Job
from attnx.jobs.rows import rows_of, shards_in
from attnx.jobs.runfile import RUN
from attnx.jobs.shards import Part

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

    from attnx.jobs.training import MapDataset

__all__ = ["Maps", "open"]

_FILES = 16
_SHOWN = 5  # rows in a notebook
_GROUPS = 4


def open(folder: str | Path) -> Maps:
    """The rows that a job has written so far. The job may still be running.

    Args:
        folder: OUT of `attnx extract`, `attnx words` or `attnx probe`.

    Returns:
        A sequence of rows, see `Maps`.

    Raises:
        FileNotFoundError: the folder has no shards.
        DamagedError: a file is damaged; a ValueError that names the file. Maps are checked when they are read.

    Example:
        >>> from attnx.demo.run import run_demo
        >>> verdict = run_demo("attnx-demo", scenes=2)
        >>> maps = attnx.open("attnx-demo/rollout")
        >>> len(maps), maps["00001.png"].map.shape
        (2, (12, 12))
    """
    return Maps(Path(folder))


class Maps:
    """The rows of a folder of shards: `maps[3]`, `maps[3:9]`, `maps["a.jpg"]`, `key in maps`, `len(maps)`, iteration.

    Rows are `attnx.jobs.columns.MapRow`; maps are already multiplied by their scale. Reading a row reads its row group.
    The first look-up by key builds an index of 16 bytes per row. The object can be pickled, and used in the processes
    of a torch DataLoader.

    Attributes:
        folder: path of the folder.
        settings: the settings that the maps were made with.
        planned: number of planned rows; None if the folder has no run.json.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        job = Job(self.folder) if (self.folder / RUN).exists() else None
        self._shards = shards_in(self.folder, None if job is None else job.shards)
        self._numbers = [int(shard.stem.removeprefix("part-")) for shard in self._shards]
        self._files: OrderedDict[int, Part] = OrderedDict()
        self._manifest = None if job is None else job.manifest_sha256
        self.planned: int | None = None if job is None else job.rows
        self._shard_size = 0 if job is None else job.shard_size
        counts = [Part(shard).rows for shard in self._shards] if job is None else list(map(job.rows_of, self._numbers))
        self._firsts = np.array([0, *accumulate(counts)])
        self.settings: dict[str, Any] = self._file(0).settings
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        self._groups: OrderedDict[tuple[int, int], pa.RecordBatch] = OrderedDict()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __repr__(self) -> str:
        return f"<{len(self)} maps of {self.settings.get('model')} in {self.folder}>"

    def _repr_html_(self) -> str:
        """The first rows, for notebooks."""
        shown = "".join(row._repr_html_() for row in self[:_SHOWN])
        more = f"<div>and {len(self) - _SHOWN:,} more rows</div>" if len(self) > _SHOWN else ""
        return f"<div>{escape(repr(self))}</div>{shown}{more}"

    @overload
    def __getitem__(self, at: int | str) -> MapRow: ...
    @overload
    def __getitem__(self, at: slice) -> list[MapRow]: ...
    def __getitem__(self, at: int | str | slice) -> MapRow | list[MapRow]:
        """A row by index or key, or a list of rows by slice. Raises IndexError or KeyError if there is none."""
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        if isinstance(at, str):
            at = self._find(at)
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"index {at}: expected one of {len(self)} rows")
        return self._row(*self._located(place))

    def __iter__(self) -> Iterator[MapRow]:
        return (row for group in self.groups() for row in group)

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self._find(key) >= 0
        except KeyError:
            return False

    def keys(self) -> Iterator[str]:
        """All keys in order."""
        for file in map(self._file, range(len(self._shards))):
            yield from file.table(["key"]).column("key").to_pylist()

    def errors(self) -> Iterator[tuple[str, str]]:
        """(key, error) of the rows with an error."""
        for number in range(self.shards):
            if self._file(number).errors:
                for batch in self._file(number).batches(["key", "error"]):
                    yield from ((row["key"], row["error"]) for row in batch.to_pylist() if row["error"] is not None)

    def groups(self, errors_only: bool = False) -> Iterator[list[MapRow]]:
        """All rows in groups of a few hundred. With `errors_only`, maps are not read."""
        for shard in range(self.shards):
            yield from self.groups_of(shard, errors_only)

    def groups_of(self, shard: int, errors_only: bool = False) -> Iterator[list[MapRow]]:
        """The rows of a shard, in groups as of `groups`."""
        file, left = self._file(shard), ("map", "tensor", "tensor_crc32") if errors_only else ()
        for batch in file.batches([name for name in file.columns if name not in left]):
            yield list(rows_of(batch, self._shards[shard], self.settings))

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Some columns of each shard, as stored."""
        return (self._file(number).table(columns) for number in range(self.shards))

    def written(self) -> list[float]:
        """The modification time of each shard, in seconds since 1970."""
        return [shard.stat().st_mtime for shard in self._shards]

    def manifest_row(self, place: int) -> int:
        """The row number in the job's manifest of the row at index `place`. The folder must have a run.json."""
        shard, row = self._located(place)
        return self._numbers[shard] * self._shard_size + row

    @property
    def shards(self) -> int:
        """The number of shards."""
        return len(self._shards)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self._shards[shard]

    def places(self, shard: int) -> range:
        """The indices of the rows of a shard."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def has_map(self, shard: int) -> np.ndarray:
        """A mask of the rows of a shard that have a map, bool [rows]."""
        if not self._file(shard).errors:
            return np.ones(self._firsts[shard + 1] - self._firsts[shard], bool)
        has: np.ndarray = ~self._file(shard).table(["error"]).column("error").is_valid().to_numpy()
        return has

    def to_torch(
        self,
        images: bool | str | Path | None = None,
        size: tuple[int, int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> MapDataset:
        """A map-style data set of the rows with a map, in order, with their photos on request.

        Items are {"key": str, "map": float32 tensor, "text": caption or "", "crop": float32 tensor [4], "width": int,
        "height": int}, and "image" with `images`. `torch.utils.data.DataLoader(maps.to_torch(), batch_size=64)` stacks
        them, also with worker processes.

        Args:
            images: True: photos of the source that the job has read; a folder: the photo of a row is folder/key.
                "image" is the photo, upright and cropped as its map is, float32 [3, H, W] in 0..1. The crop is rounded
                to whole pixels.
            size: (height, width) to which photos and maps are resized, bilinearly; photos are antialiased.
            transform: makes "image" of the cropped and resized PIL image. It is pickled for worker processes that are
                spawned.

        Raises:
            ValueError: the job is one of `attnx probe`, which has no maps; an argument is wrong. An item raises it if
                its photo can't be read, or has another size than the row says; the message has the key.

        Example:
            >>> from attnx.demo.run import run_demo
            >>> verdict = run_demo("attnx-demo", scenes=4)
            >>> data = attnx.open("attnx-demo/rollout").to_torch(images=True, size=(96, 96))
            >>> batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
            >>> batch["image"].shape, batch["map"].shape
            (torch.Size([4, 3, 96, 96]), torch.Size([4, 96, 96]))
        """
        from attnx.jobs.training import MapDataset

        return MapDataset(self, images, size, transform)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_groups": OrderedDict(), "_index": None}

    def _located(self, place: int) -> tuple[int, int]:
        """The index of the shard among the existing ones, and the row in it."""
        shard = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return shard, place - int(self._firsts[shard])

    def _row(self, shard: int, row: int) -> MapRow:
        file = self._file(shard)
        group, first = 0, 0
        while row >= first + (count := file.rows_of(group)):
            group, first = group + 1, first + count
        if (shard, group) not in self._groups:
            _keep(self._groups, (shard, group), file.read(group), _GROUPS)
        self._groups.move_to_end((shard, group))
        batch = self._groups[shard, group].slice(row - first, 1)
        return next(rows_of(batch, self._shards[shard], self.settings))

    def _file(self, shard: int) -> Part:
        if shard not in self._files:
            part = Part(self._shards[shard])
            if self._manifest is not None:
                rows = int(self._firsts[shard + 1] - self._firsts[shard])
                part.check_place(self._numbers[shard], rows, self._manifest)
            _keep(self._files, shard, part, _FILES)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _find(self, key: str) -> int:
        if self._index is None:
            hashes = np.frombuffer(array("q", map(hash, self.keys())), np.int64)
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order
        hashes, order = self._index
        at = int(np.searchsorted(hashes, hash(key)))
        # Different keys may have the same hash.
        while at < len(hashes) and hashes[at] == hash(key):
            if self[int(order[at])].key == key:
                return int(order[at])
            at += 1
        raise KeyError(f"no row has the key {key[:200]!r}, of {len(self)} in {self.folder}")


def _keep(cache: OrderedDict[Any, Any], name: Any, value: Any, most: int) -> None:
    """Add a value to a cache of at most `most` values; the oldest ones are dropped."""
    while len(cache) >= most:
        cache.popitem(last=False)
    cache[name] = value
