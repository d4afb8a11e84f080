"""A job's rows, by their place or by their key: `attnx.open`."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from attnx.jobs.job import Job
from attnx.jobs.rows import Row, rows_of, shards_in
from attnx.jobs.runfile import RUN
from attnx.jobs.shards import Part

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Maps", "open"]

_FILES = 16
_GROUPS = 4


def open(folder: str | Path) -> Maps:
    """The rows that a job has written so far; it may still be running.

    Args:
        folder: OUT of `attnx extract` or `attnx words`.

    Raises:
        FileNotFoundError: it holds no shards.
        DamagedError: a file is not as it was written; a ValueError that names the file. Maps are checked when they are
            read.
    """
    return Maps(Path(folder))


class Maps:
    """Rows of a folder of shards: `maps[3]`, `maps[3:9]`, `maps["a.jpg"]`, `key in maps`, `len(maps)`, iteration.

    A row has its map as it was, times its scale: see `attnx.jobs.rows.Row`. Only what is asked for is read, a row with
    some of its neighbours. Keys are found by an index that the first one makes: 16 bytes a row. It can be pickled, and
    used in the processes of a torch DataLoader.

    Attributes:
        settings: what the maps were made with.
        planned: rows of the job, done or not; None without its run.json.
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

    @overload
    def __getitem__(self, at: int | str) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | str | slice) -> Row | list[Row]:
        """Raises IndexError or KeyError where there is none."""
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        if isinstance(at, str):
            at = self._find(at)
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"index {at}: expected one of {len(self)} rows")
        return self._row(*self._located(place))

    def __iter__(self) -> Iterator[Row]:
        return (row for group in self.groups() for row in group)

    def __contains__(self, key: object) -> bool:
        try:
            return isinstance(key, str) and self._find(key) >= 0
        except KeyError:
            return False

    def keys(self) -> Iterator[str]:
        """All keys, in order."""
        for file in map(self._file, range(len(self._shards))):
            yield from file.table(["key"]).column("key").to_pylist()

    def errors(self) -> Iterator[tuple[str, str]]:
        """Of the rows that have no map: their keys, and why."""
        for number in range(self.shards):
            if self._file(number).errors:
                for batch in self._file(number).batches(["key", "error"]):
                    yield from ((row["key"], row["error"]) for row in batch.to_pylist() if row["error"] is not None)

    def groups(self, errors_only: bool = False) -> Iterator[list[Row]]:
        """All rows, a few hundred at a time; with `errors_only` without maps, which are then not read."""
        for number, shard in enumerate(self._shards):
            file = self._file(number)
            columns = [
                name for name in file.columns if not errors_only or name not in ("map", "tensor", "tensor_crc32")
            ]
            for batch in file.batches(columns):
                yield list(rows_of(batch, shard))

    def written(self) -> list[float]:
        """When each shard was written, in seconds since 1970."""
        return [shard.stat().st_mtime for shard in self._shards]

    def manifest_row(self, place: int) -> int:
        """The row of the job's manifest that is at a place, if the folder is a job's."""
        shard, row = self._located(place)
        return self._numbers[shard] * self._shard_size + row

    @property
    def shards(self) -> int:
        """How many there are."""
        return len(self._shards)

    def has_map(self, shard: int) -> np.ndarray:
        """Of each row of a shard, whether it has a map: bool [rows]."""
        if not self._file(shard).errors:
            return np.ones(self._firsts[shard + 1] - self._firsts[shard], bool)
        has: np.ndarray = ~self._file(shard).table(["error"]).column("error").is_valid().to_numpy()
        return has

    def to_torch(self) -> MapDataset:
        """A map-style data set of the rows that have a map: {"key", "map": float32 tensor, "text": "" without caption}.

        Rows come in order; `torch.utils.data.DataLoader(maps.to_torch(), batch_size=64)` stacks them.
        """
        return MapDataset(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_groups": OrderedDict(), "_index": None}

    def _located(self, place: int) -> tuple[int, int]:
        """Which of the shards that are there, and the row in it."""
        shard = int(np.searchsorted(self._firsts, place, side="right")) - 1
        return shard, place - int(self._firsts[shard])

    def _row(self, shard: int, row: int) -> Row:
        file = self._file(shard)
        group, first = 0, 0
        while row >= first + (count := file.rows_of(group)):
            group, first = group + 1, first + count
        if (shard, group) not in self._groups:
            _keep(self._groups, (shard, group), file.read(group), _GROUPS)
        self._groups.move_to_end((shard, group))
        return next(rows_of(self._groups[shard, group].slice(row - first, 1), self._shards[shard]))

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
        # Different keys may have one hash.
        while at < len(hashes) and hashes[at] == hash(key):
            if self[int(order[at])].key == key:
                return int(order[at])
            at += 1
        raise KeyError(f"no row has the key {key[:200]!r}, of {len(self)} in {self.folder}")


def _keep(cache: OrderedDict, name: Any, value: Any, most: int) -> None:
    """The newest of them."""
    while len(cache) >= most:
        cache.popitem(last=False)
    cache[name] = value


class MapDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """See `Maps.to_torch`."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        good = [np.ones(0, bool), *(maps.has_map(shard) for shard in range(maps.shards))]
        self._places = np.flatnonzero(np.concatenate(good))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = self.maps[int(self._places[at])]
        assert row.map is not None
        return {"key": row.key, "map": torch.from_numpy(row.map.astype(np.float32)), "text": row.text or ""}
