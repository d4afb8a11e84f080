"""The maps of a page: stops of a slider, each with the maps of one or several heads over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_UNPACKED = 128e6  # bytes in the browser
_BYTES_PER_VALUE = 1.11  # 132 values take at most 7.05 bits, and five characters hold four bytes


@dataclass(frozen=True)
class Side:
    """The tokens on one side of a map: those before the patches, the patches row by row, those after them.

    Attributes:
        before, after: names of the other tokens.
        grid: (rows, columns) of patches; None: no token has a place in the picture.
    """

    before: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    after: tuple[str, ...] = ()

    def to_json(self, pool: int = 1) -> dict[str, Any]:
        """The side for the script. `extent` is the size of the picture in pools of patches, which may not be whole."""
        grid = None if self.grid is None else [math.ceil(n / pool) for n in self.grid]
        extent = None if self.grid is None else [n / pool for n in self.grid]
        return {"before": self.before, "grid": grid, "extent": extent, "after": self.after, "pool": pool}

    def count(self, pool: int = 1) -> int:
        """Number of tokens, with pools of `pool` x `pool` patches."""
        patches = 0 if self.grid is None else math.prod(math.ceil(n / pool) for n in self.grid)
        return len(self.before) + patches + len(self.after)

    def pooled(self, maps: Tensor, pool: int) -> Tensor:
        """Maps [..., N] with the mean of each pool of keys; smaller pools at the right and bottom edge."""
        if pool == 1 or self.grid is None:
            return maps
        start, patches = len(self.before), math.prod(self.grid)
        grids = maps[..., start : start + patches].reshape(-1, 1, *self.grid)
        means = F.avg_pool2d(grids, pool, ceil_mode=True).reshape(*maps.shape[:-1], -1)
        return torch.cat([maps[..., :start], means, maps[..., start + patches :]], -1)


@dataclass(frozen=True)
class Stop:
    """A stop of the slider.

    Attributes:
        name: the layer, or a fusion of the layers such as "rollout".
        queries, keys: the tokens of the rows and of the columns.
        heads: names of the maps, the first of which is shown first.
        read: returns the maps, float32 [heads, M, N].
        nonzero: the most keys of a query with a value other than 0, for windows; None: all of them.
    """

    name: str
    queries: Side
    keys: Side
    heads: tuple[str, ...]
    read: Callable[[], Tensor]
    nonzero: int | None = None

    def values(self, pool: int) -> int:
        """Number of values with pools of keys."""
        return len(self.heads) * self.queries.count() * self.keys.count(pool)

    def size(self, pool: int) -> float:
        """An upper bound of the bytes that the maps take in a page."""
        keys = self.keys.count(pool)
        # A query sees a pool if it sees one of its keys. Zeros compress to nearly nothing.
        seen = keys if self.nonzero is None else min(keys, self.nonzero)
        return self.values(pool) * (seen / max(keys, 1) * _BYTES_PER_VALUE + 0.01)


def pool_for(stops: Sequence[Stop], limit: float) -> int:
    """The smallest pool of keys with which the maps take at most `limit` bytes of a page, and can be unpacked."""
    pool = 1
    while sum(stop.size(pool) for stop in stops) > limit or sum(stop.values(pool) for stop in stops) > _UNPACKED:
        if all(stop.keys.grid is None or max(stop.keys.grid) <= pool for stop in stops):
            break
        pool += 1
    return pool


def maps_of(stops: Sequence[Stop], pool: int) -> Iterator[np.ndarray]:
    """The maps of all stops, one stop after the other, with pooled keys."""
    for stop in stops:
        maps = stop.read()
        expected = [len(stop.heads), stop.queries.count(), stop.keys.count()]
        assert list(maps.shape) == expected, f"{stop.name}: expected {expected}; got {list(maps.shape)}"
        yield from stop.keys.pooled(maps.float(), pool).cpu().numpy()


def to_json(stops: Sequence[Stop], pool: int) -> dict[str, Any]:
    """The stops and their sides for the script, in the order of `maps_of`. Equal sides are one."""
    sides: list[dict[str, Any]] = []

    def number(side: dict[str, Any]) -> int:
        if side not in sides:
            sides.append(side)
        return sides.index(side)

    named = [
        {
            "name": stop.name,
            "heads": stop.heads,
            "queries": number(stop.queries.to_json()),
            "keys": number(stop.keys.to_json(pool)),
        }
        for stop in stops
    ]
    return {"stops": named, "sides": sides}
