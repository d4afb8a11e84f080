"""The pages of a job's maps: an index, and scripts beside it with the maps and thumbnails of some rows each."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnx.files import replacing
from attnx.jobs.columns import MapRow
from attnx.jobs.photos import Photos
from attnx.jobs.pool import in_processes
from attnx.jobs.reader import Maps
from attnx.jobs.summary import LEVELS, kind_of, spatial, summarise
from attnx.page.page import CMAPS, assemble, colours, deflated, jpeg

_ROWS = 64  # of a chunk
_VERSION = 1  # of the files
_FOLDER = "chunks"


class Chunk(NamedTuple):
    """Some rows of a shard: `rows` rows from the row at index `first` of the job on. name: of its file."""

    shard: int
    first: int
    rows: int
    name: str


@dataclass
class BrowseReport:
    """Numbers of chunks and thumbnails.

    Attributes:
        made: chunks that were written.
        kept: chunks that were there before.
        errors: (key, reason) of the rows without a thumbnail, of the chunks that were written.
    """

    made: int = 0
    kept: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Browse:
    """The pages to write. The object can be pickled.

    Attributes:
        maps: the maps of the job.
        out: folder of the pages.
        photos: the photos for the thumbnails; None: maps alone.
        thumb: pixels of the longer side of a thumbnail.
        limit: at most this many rows; None: all.
    """

    maps: Maps
    out: Path
    photos: Photos | None = None
    thumb: int = 192
    limit: int | None = None

    @property
    def rows(self) -> int:
        """Number of rows in the pages."""
        return len(self.maps) if self.limit is None else min(len(self.maps), self.limit)

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in the order of the rows."""
        for shard in range(self.maps.shards):
            places = self.maps.places(shard)
            for first in range(places.start, min(places.stop, self.rows), _ROWS):
                count = min(_ROWS, places.stop - first, self.rows - first)
                yield Chunk(shard, first, count, f"{self.maps.path(shard).stem}-{first - places.start:06d}.js")

    def write_chunk(self, chunk: Chunk, stopped: Callable[[], bool] = lambda: False) -> BrowseReport:
        """Write the file of a chunk, unless it is there with these settings and all its thumbnails."""
        path, mark = self.out / _FOLDER / chunk.name, f"// {self._mark(chunk)} "
        report = BrowseReport()
        if _first_line(path) == f"{mark}0":
            report.kept = 1
            return report
        rows = []
        for place in range(chunk.first, chunk.first + chunk.rows):
            if stopped():
                return report
            row = self.maps[place]
            rows.append(_values(row) | self._thumbnail(place, row, report))
        text = json.dumps([chunk.name, rows], separators=(",", ":"))
        with replacing(path, sync=False) as unfinished:
            unfinished.write_text(f"{mark}{len(report.errors)}\nattnxChunk(...{text});\n", encoding="ascii")
        report.made = 1
        return report

    def _thumbnail(self, place: int, row: MapRow, report: BrowseReport) -> dict[str, Any]:
        if self.photos is None or row.map is None:
            return {}
        try:
            return {"photo": jpeg(self.photos(place, row), self.thumb, 80)}
        except ValueError as error:
            report.errors.append((row.key, str(error)))
            return {}

    def _mark(self, chunk: Chunk) -> str:
        """The identity of a chunk's content: its rows, their shard, and these settings."""
        status = self.maps.path(chunk.shard).stat()
        # Not the index of the first row: it changes when a running job writes an earlier shard.
        rows = [chunk.name, chunk.rows, status.st_size, status.st_mtime_ns]
        root = None if self.photos is None else str(self.photos.root)
        identity = [_VERSION, rows, root, self.thumb, self.maps.settings]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def write_pages(browse: Browse, workers: int, progress: Callable[[int, int], None] | None = None) -> BrowseReport:
    """Write index.html and the chunks of a job that are not there yet.

    The index comes first, so that the pages can be opened while their chunks are made.

    Args:
        browse: what to write.
        workers: number of processes; 0: in this process.
        progress: called with the chunks done and their number.

    Raises:
        ValueError: the job has no maps over patches; the folder has another index.html.
    """
    check_job(browse.maps)
    out, chunks = browse.out, list(browse.chunks())
    if (out / "index.html").exists() and not (out / _FOLDER).is_dir():
        raise ValueError(f"out: expected a new folder, or one of attnx browse; {out} has another index.html")
    (out / _FOLDER).mkdir(parents=True, exist_ok=True)
    _index(browse, chunks)
    report = BrowseReport()
    # Starting a process takes as long as several chunks.
    for part in in_processes(browse.write_chunk, chunks, min(workers, len(chunks) // 8)):
        report.made += part.made
        report.kept += part.kept
        report.errors += part.errors
        if progress is not None:
            progress(report.made + report.kept, len(chunks))
    # Chunks of shards or of settings that are no more.
    for old in {path.name for path in (out / _FOLDER).glob("part-*.js")} - {chunk.name for chunk in chunks}:
        (out / _FOLDER / old).unlink()
    return report


def check_job(maps: Maps) -> None:
    """Raise ValueError unless the rows have maps over patches."""
    found = "statistics of heads" if "stats" in maps.settings else ""
    found = "whole maps" if maps.settings.get("store") == "full" else found
    if found:
        raise ValueError(f"browse: expected a job with maps over patches; {maps.folder} has {found}")


def _index(browse: Browse, chunks: list[Chunk]) -> None:
    """Write index.html: the keys, the captions and the numbers of all rows."""
    maps, count = browse.maps, browse.rows
    found = summarise(maps)
    numbers = np.full((3, len(maps)), np.nan, "<f4")
    numbers[0, found.places], numbers[1, found.places] = found.entropies, found.peaks
    levels = np.full(len(maps), LEVELS, np.uint8)
    levels[found.places] = found.levels
    texts: dict[str, list[Any]] = {"key": [], "text": [], "error": []}
    scores: list[float | None] = []
    for table in maps.tables(["key", "text", "error", *(["score"] if "vocab" in maps.settings else [])]):
        for name, values in texts.items():
            values += table.column(name).to_pylist()
        scores += table.column("score").to_pylist() if "score" in table.column_names else [None] * len(table)
    numbers[2] = np.array(scores, np.float32)
    kinds = [*dict.fromkeys(kind_of(error) for error in texts["error"] if error is not None)]
    errors = np.array([0 if e is None else 1 + kinds.index(kind_of(e)) for e in texts["error"]], "<u2")
    words = {name: values[:count] for name, values in texts.items()}
    if not any(words["text"]):
        del words["text"]
    parts = (numbers[:, :count], errors[:count], levels[:count], colours())
    content = deflated([*(part.tobytes() for part in parts), json.dumps(words).encode("ascii")])
    settings = maps.settings
    data = {
        "rows": count, "kinds": kinds, "levels": LEVELS, "cmaps": CMAPS,
        "chunks": [[chunk.name, chunk.first, chunk.rows] for chunk in chunks],
        "mean": None if found.mean is None else {"grid": found.mean.shape, "values": found.mean.reshape(-1).tolist()},
        "about": f"{settings.get('model')}, {settings.get('method')}", "of": len(maps),
    }  # fmt: skip
    assemble("browse", f"Maps of {maps.folder.name}", data, content, loads_scripts=True).save(browse.out / "index.html")


def _values(row: MapRow) -> dict[str, Any]:
    """The maps of a row for the script: base64 of uint8 [maps, h, w], and the largest value of each map."""
    amap = spatial(row)
    if amap is None:
        return {}
    words = row.words if row.words and row.map is not None and row.map.ndim == 3 else ()
    maps = np.stack([amap, *(row.word_maps if words else ())]).astype(np.float32)
    maps = np.nan_to_num(maps, nan=0, posinf=0, neginf=0).clip(0)
    largest = maps.max((1, 2))
    shares = maps / np.where(largest > 0, largest, 1)[:, None, None]
    codes = np.rint(shares * 255).astype(np.uint8)
    return {
        "grid": amap.shape, "words": words, "max": [float(f"{value:.6g}") for value in largest],
        "maps": base64.b64encode(codes.tobytes()).decode("ascii"),
    }  # fmt: skip


def _first_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.readline(100).decode("ascii", "replace").rstrip("\n")
    except OSError:
        return ""
