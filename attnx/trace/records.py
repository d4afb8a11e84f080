"""Records of a layer: its map, or some rows of it. `qk_record` has those of q and k.

A map takes 4 N^2 bytes; the memory of q and k is linear in N. Methods read both through the interface `LayerRecord`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnx.ops.reducers import Reduction, fuse_heads

NO_MAP = "no map was stored: the capture has keep='stats'; read trace.stats"


class LayerRecord(Protocol):
    """Interface of the records of a layer's map: [B, M, N], or [B, H, M, N] for heads="each"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map."""

    @property
    def device(self) -> torch.device:
        """Device of the map."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the record takes."""

    @property
    def rows_sum_to_one(self) -> bool:
        """True if the rows of the map are known to sum to 1, except rows that are NaN in every entry."""

    def map(self) -> Tensor:
        """The map, float32; computed on each call if the record does not hold it."""

    def row(self, i: int) -> Tensor:
        """Row i of the map: [B, N], or [B, H, N] for heads="each". Only that row is computed."""

    def column(self, i: int) -> Tensor:
        """Column i of the map: [B, M], or [B, H, M] for heads="each". Only that column is computed where possible."""

    def fused(self, heads: Reduction) -> "LayerRecord":
        """The record with its heads fused, if heads="each"; else the record itself."""

    def row_sums(self) -> Tensor:
        """Row sums of the map with heads fused: [B, M]. They are below 1 for rows in which some heads have no keys."""

    def vecmat(self, r: Tensor) -> Tensor:
        """R row vectors times the map with heads fused: [B, R, M] -> [B, R, N]."""


@dataclass(frozen=True, eq=False)
class MapRecord:
    """The record of a layer that holds its map."""

    amap: Tensor
    rows_sum_to_one: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map."""
        return tuple(self.amap.shape)

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.amap.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.amap.nbytes

    def map(self) -> Tensor:
        """The stored map."""
        return self.amap

    def row(self, i: int) -> Tensor:
        """Row `i` of the map."""
        return self.amap[..., i, :]

    def column(self, i: int) -> Tensor:
        """Column `i` of the map."""
        return self.amap[..., i]

    def fused(self, heads: Reduction) -> "MapRecord":
        """A record with the heads fused; the record itself if they already are."""
        return MapRecord(fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        """Row sums of the map: [B, M]."""
        return self.amap.sum(-1)

    def vecmat(self, r: Tensor) -> Tensor:
        """Row vectors times the map: [B, R, M] -> [B, R, N]."""
        with no_autocast(r):
            return torch.bmm(r, self.amap)


@dataclass(frozen=True, eq=False)
class RowsRecord:
    """The record of a layer that holds only some rows of its map; reading the whole map raises RuntimeError."""

    amap: Tensor  # [B, R, N], or [B, H, R, N]
    rows: tuple[int, ...]
    queries: int  # number of queries of the layer

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole map."""
        return (*self.amap.shape[:-2], self.queries, self.amap.shape[-1])

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.amap.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.amap.nbytes

    @property
    def rows_sum_to_one(self) -> bool:
        """False: the whole map is not available."""
        return False

    def map(self) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        if not self.rows:
            raise RuntimeError(NO_MAP)
        raise RuntimeError(f"only rows {list(self.rows)} of the map were stored")

    def row(self, i: int) -> Tensor:
        """Row `i` of the map. Raises IndexError unless it is stored."""
        if not self.rows:
            return self.map()
        if i not in self.rows:
            raise IndexError(f"row: expected one of the stored rows {list(self.rows)}; got {i}")
        return self.amap[..., self.rows.index(i), :]

    def column(self, i: int) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        return self.map()[..., i]

    def fused(self, heads: Reduction) -> "RowsRecord":
        """A record of the same rows with the heads fused."""
        return replace(self, amap=fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        return self.map()

    def vecmat(self, r: Tensor) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        return self.map()


def without_rows(shape: Sequence[int], device: torch.device) -> RowsRecord:
    """The record of a layer of which no map is stored; `shape` is that of the whole map."""
    return RowsRecord(torch.empty(*shape[:-2], 0, shape[-1], device=device), (), shape[-2])


def has_no_map(record: LayerRecord) -> bool:
    """True if a capture with keep="stats" stored the record."""
    return isinstance(record, RowsRecord) and not record.rows


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context manager that disables autocast on the device of `t`."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
