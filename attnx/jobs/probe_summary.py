"""Statistics over the data set of a job of `attnx probe`: for each statistic, layer and head."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnx.files import replacing
from attnx.jobs.reader import Maps

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["QUANTILES", "HeadTable", "compared", "head_table", "write_table"]

QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
UNITS = {"entropy": "nats", "distance": "pixels", "max": "share", "mass": "share", "importance": "of the score"}
_MOST_BYTES = 2**28  # of the values in memory at a time


@dataclass(frozen=True)
class HeadTable:
    """The result of `head_table`.

    Attributes:
        model: name of the model; folder: of the job; size: (height, width) of its input.
        layers: {layer: what is known of it}, see `attnx.jobs.probes.HeadProbes`.
        images, planned: numbers of images with values, and of the job.
        stats: {statistic: {"mean" | "std" | a name of QUANTILES: [T] float64}}, for the heads of all layers one after
            another. std is the root of the mean squared deviation.
        uniform: {statistic: its value in each layer for heads that attend to all keys alike}.
    """

    model: str
    folder: str
    size: tuple[int, int]
    layers: dict[str, dict[str, Any]]
    images: int
    planned: int
    stats: dict[str, dict[str, np.ndarray]]
    uniform: dict[str, list[float]]

    def by_layer(self, stat: str, column: str = "mean") -> list[np.ndarray]:
        """The values of the heads of each layer."""
        return np.split(self.stats[stat][column], np.cumsum(self.heads)[:-1])

    @property
    def heads(self) -> list[int]:
        """The number of heads of each layer."""
        return [about["heads"] for about in self.layers.values()]

    @property
    def of_images(self) -> str:
        """The number of images, in words."""
        count = f"{self.images:,}" if self.images == self.planned else f"{self.images:,} of {self.planned:,}"
        return f"{count} image" if self.planned == 1 else f"{count} images"

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each statistic, layer and head."""
        for stat, columns in self.stats.items():
            place = 0
            for depth, (layer, heads) in enumerate(zip(self.layers, self.heads, strict=True)):
                for head in range(heads):
                    named: dict[str, Any] = {"stat": stat, "unit": UNITS[stat], "layer": layer, "depth": depth}
                    named |= {"head": head, "images": self.images}
                    yield named | {name: float(values[place]) for name, values in columns.items()}
                    place += 1


def head_table(maps: Maps) -> HeadTable:
    """Mean, deviation and quantiles over the images of a job, in float64.

    Raises:
        ValueError: the job is not one of `attnx probe`, or no image has values.
    """
    if "stats" not in maps.settings:
        raise ValueError(f"folder: expected the output of attnx probe; {maps.folder} has maps: see attnx summary")
    settings = maps.settings
    images = sum(int(maps.has_map(shard).sum()) for shard in range(maps.shards))
    if not images:
        raise ValueError(f"folder: expected at least one image without an error in {maps.folder}; got none")
    layers = settings["layers"]
    heads = sum(about["heads"] for about in layers.values())
    stats = {name: _over_images(maps, name, images, heads) for name in settings["stats"]}
    height, width = settings["input_size"]
    return HeadTable(
        settings["model"], maps.folder.name, (height, width), layers, images, maps.planned or len(maps), stats,
        settings["uniform"],
    )  # fmt: skip


def _over_images(maps: Maps, name: str, images: int, heads: int) -> dict[str, np.ndarray]:
    """Mean, deviation and quantiles of one statistic. Reads the shards once for each block of heads that fits."""
    columns = {each: np.empty(heads) for each in ("mean", "std", *QUANTILES)}
    step = max(1, _MOST_BYTES // (8 * images))
    for first in range(0, heads, step):
        block = slice(first, first + step)
        values = np.concatenate([part[:, block] for part in _values(maps, name, heads)]).astype(np.float64)
        columns["mean"][block] = values.mean(0)
        columns["std"][block] = values.std(0)
        for quantile, found in zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis=0), strict=True):
            columns[quantile][block] = found
    return columns


def _keys(maps: Maps) -> Iterator[dict[str, str | None]]:
    """{"key": key, "error": None} of the images with values."""
    for table in maps.tables(["key", "error"]):
        yield from (row for row in table.to_pylist() if row["error"] is None)


def _values(maps: Maps, name: str, heads: int) -> Iterator[np.ndarray]:
    """The values of the images of each shard, [K, T]; images with an error are left out."""
    for table in maps.tables([name]):
        column: pa.ListArray = table.column(name).combine_chunks()
        yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, heads)


def compared(jobs: Sequence[Maps]) -> tuple[list[HeadTable], list[str]]:
    """The tables of several jobs, and notices of what else differs between them than the model.

    Raises:
        ValueError: as `head_table`; a folder is given twice; or no statistic is in all of the jobs.
    """
    tables = [head_table(job) for job in jobs]
    if not set.intersection(*(set(table.stats) for table in tables)):
        each = "; ".join(f"{job.folder}: {', '.join(table.stats)}" for job, table in zip(jobs, tables, strict=True))
        raise ValueError(f"folders: expected jobs with a statistic in common; got {each}")
    if len({job.folder.resolve() for job in jobs}) < len(jobs):
        raise ValueError(f"folders: expected different folders; got {', '.join(str(job.folder) for job in jobs)}")
    notices = []
    if len({frozenset(row["key"] for row in _keys(job)) for job in jobs}) > 1:
        notices.append("the jobs have different images, so part of the differences may be theirs")
    sizes = list(dict.fromkeys(f"{height} x {width}" for height, width in (table.size for table in tables)))
    if len(sizes) > 1:
        notices.append(
            f"the models see images of {' and '.join(sizes)} pixels, so distances and entropies differ for that alone; "
            "the dotted lines are those of uniform attention"
        )
    return tables, notices


def write_table(tables: Sequence[HeadTable], folder: Path, name: str) -> list[Path]:
    """Write NAME.csv and NAME.parquet; with several tables, the first columns are the model and the job's folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        ({"model": table.model, "folder": table.folder} if len(tables) > 1 else {}) | row
        for table in tables
        for row in table.rows()
    ]
    paths = [folder / f"{name}.csv", folder / f"{name}.parquet"]
    with replacing(paths[0]) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(paths[1]) as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return paths
