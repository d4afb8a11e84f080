"""Statistics of a job's maps in one pass over its shards: `attnx summary`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from attnx.jobs.columns import MapRow
from attnx.jobs.reader import Maps
from attnx.methods import entropy, entropy_levels

__all__ = ["LEVELS", "Summary", "kind_of", "spatial", "summarise"]

LEVELS = 4


@dataclass(frozen=True)
class Summary:
    """The result of `summarise`.

    Attributes:
        rows: number of rows in the shards.
        planned: number of rows in the job, if known.
        errors: number of rows of each kind of error; a kind is the message without file and numbers.
        per_second: rows per second, from the modification times of the files; None if unknown.
        places: indices of the rows with a map over patches and a finite entropy.
        entropies: entropy of each of these maps in nats.
        peaks: share of the largest patch in the sum of each of these maps.
        levels: quarter of each entropy; 0 is the most focused.
        mean: [h, w] mean of the maps of the most common shape, each divided by its sum.
    """

    rows: int
    planned: int | None
    errors: Counter[str]
    per_second: float | None
    places: np.ndarray
    entropies: np.ndarray
    peaks: np.ndarray
    levels: np.ndarray
    mean: np.ndarray | None

    def of_level(self, level: int, count: int) -> np.ndarray:
        """Indices of at most `count` rows of a level, evenly spaced by rank, the most focused first."""
        return _evenly(self._by_entropy(self.levels == level), count)

    def focused(self, count: int, least: bool = False) -> np.ndarray:
        """Indices of the `count` most focused rows, the most focused first; with `least`, of the least focused."""
        order = self._by_entropy(np.ones(len(self.places), bool))
        return order[::-1][:count] if least else order[:count]

    def entropy_at(self, place: int) -> float:
        """The entropy of the row at index `place`, which must be in `places`."""
        return float(self.entropies[np.searchsorted(self.places, place)])

    def _by_entropy(self, chosen: np.ndarray) -> np.ndarray:
        where = np.flatnonzero(chosen)
        ordered: np.ndarray = self.places[where[np.argsort(self.entropies[where], kind="stable")]]
        return ordered


def summarise(maps: Maps) -> Summary:
    """The statistics of a job's maps. Reads all shards once, with a few hundred maps in memory."""
    whole = maps.settings.get("store") == "full"
    errors: Counter[str] = Counter()
    of_shapes: dict[tuple[int, ...], _OfShape] = {}
    rows = 0
    for group in maps.groups(errors_only=whole):
        errors.update(kind_of(row.error) for row in group if row.error is not None)
        spatials = [(rows + i, spatial(row, whole)) for i, row in enumerate(group)]
        rows += len(group)
        alike: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for place, amap in spatials:
            if amap is not None:
                alike.setdefault(amap.shape, []).append((place, amap))
        for shape, pairs in alike.items():
            of_shapes.setdefault(shape, _OfShape(shape)).add(pairs)
    places = np.concatenate([np.zeros(0, np.int64), *(place for each in of_shapes.values() for place in each.places)])
    values = np.concatenate([np.zeros(0, np.float32), *(one for each in of_shapes.values() for one in each.entropies)])
    peaks = np.concatenate([np.zeros(0, np.float32), *(one for each in of_shapes.values() for one in each.peaks)])
    # A map without mass has no entropy.
    order = np.argsort(places, kind="stable")
    order = order[np.isfinite(values[order])]
    most = max(of_shapes.values(), key=lambda each: each.count, default=None)
    levels = entropy_levels(torch.from_numpy(values[order]), LEVELS).numpy()
    mean = None if most is None else most.mean
    return Summary(rows, maps.planned, errors, _rate(maps), places[order], values[order], peaks[order], levels, mean)


def spatial(row: MapRow, whole: bool = False) -> np.ndarray | None:
    """The mean [h, w] over the layers, heads or words of a row's map; None if the map is not over patches.

    whole: True if maps are over all pairs of tokens.
    """
    amap = row.map
    if amap is None or whole or amap.ndim < 2 or amap.size == 0:
        return None
    if row.word_of is not None:
        amap = amap[[word is not None for word in row.word_of]]
    mean: np.ndarray = amap.reshape(-1, *amap.shape[-2:]).mean(0, dtype=np.float32)
    return mean


class _OfShape:
    """Accumulates maps of one shape: indices, entropies, peaks, and the sum of the normalised maps."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.places: list[np.ndarray] = []
        self.entropies: list[np.ndarray] = []
        self.peaks: list[np.ndarray] = []
        self.count = 0
        self._sum = np.zeros(shape)

    def add(self, pairs: list[tuple[int, np.ndarray]]) -> None:
        """Add pairs of an index and a map."""
        maps = np.stack([amap for _, amap in pairs])
        self.places.append(np.array([place for place, _ in pairs]))
        self.entropies.append(entropy(torch.from_numpy(maps)).numpy())
        mass = maps.sum((1, 2), keepdims=True)
        shares = np.divide(maps, mass, out=np.zeros_like(maps), where=mass > 0)
        self.peaks.append(shares.max((1, 2)))
        self._sum += shares.sum(0, dtype=np.float64)
        self.count += len(pairs)

    @property
    def mean(self) -> np.ndarray:
        """The mean of the maps, each divided by its sum."""
        return (self._sum / self.count).astype(np.float32)


def kind_of(error: str) -> str:
    """An error message without its file and its numbers."""
    head, _, rest = error.partition(": ")
    text = rest.removeprefix("can't be read as an image: ") if "/" in head or "." in head else error
    named = re.match(r"(\w+(?:Error|Exception)): ", text)
    if named and named[1] != "ValueError":
        return named[1]
    text = text.removeprefix("ValueError: ")
    return re.sub(r"\d[\d,.]*", "N", re.split("[;,] (?:got|of) ", text)[0])[:80]


def _rate(maps: Maps) -> float | None:
    """Rows per second, from the modification times. Gaps of more than ten times the median are ignored."""
    start = maps.folder / "manifest.parquet"
    times = sorted(([start.stat().st_mtime] if start.is_file() else []) + maps.written())
    gaps = np.diff(times)
    gaps = gaps[gaps > 0]
    seconds = float(gaps[gaps <= 10 * np.median(gaps)].sum()) if len(gaps) else 0.0
    return len(maps) / seconds if seconds > 0 else None


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    chosen: np.ndarray = values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))]
    return chosen
