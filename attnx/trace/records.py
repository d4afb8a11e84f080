"""Records of a layer: its map, or q, k and the log-sum-exp of its rows, from which the map can be computed.

A map takes 4 N^2 bytes; the memory of q and k is linear in N. Methods read both through the interface `LayerRecord`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.functional import attention_map, vecmat
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

    def fused(self, heads: Reduction) -> "MapRecord":
        """A record with the heads fused; the record itself if they already are."""
        return MapRecord(fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        """Row sums of the map: [B, M]."""
        return self.amap.sum(-1)

    def vecmat(self, r: Tensor) -> Tensor:
        """Row vectors times the map: [B, R, M] -> [B, R, N]."""
        with no_autocast(r):
            if r.device.type == "cpu" and r.shape[1] == 1 and len(r):
                # bmm takes twice as long for a single row.
                return torch.stack([row @ amap for row, amap in zip(r, self.amap, strict=True)])
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

    def fused(self, heads: Reduction) -> "RowsRecord":
        """A record of the same rows with the heads fused."""
        return replace(self, amap=fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        return self.map()

    def vecmat(self, r: Tensor) -> Tensor:
        """Raise RuntimeError: the whole map is not stored."""
        return self.map()


@dataclass(frozen=True, eq=False)
class QKRecord:
    """The record of a layer that holds q, k and lse. Arguments as in `attnx.attention_map`; rows: tensor on q's device.

    Tensors that own their storage are not copied. If the model writes to them afterwards, reading the record raises
    RuntimeError, except under inference_mode, whose tensors have no version counters.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float | None
    heads: str = "mean"
    rows: Tensor | None = None
    backend: str = "auto"
    versions: tuple[int | None, ...] = ()
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map."""
        B, H, M, _ = self.q.shape
        M = M if self.rows is None else len(self.rows)
        return (B, H, M, self.k.shape[2]) if self.heads == "each" else (B, M, self.k.shape[2])

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return self.q.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.q.nbytes + self.k.nbytes + self.lse.nbytes + _held(self.bias)

    @property
    def rows_sum_to_one(self) -> bool:
        """False: the scores may be infinite."""
        return False  # a row with infinite scores passes nothing on here, whereas its map would be NaN

    def map(self) -> Tensor:
        """The map, computed from q, k and lse at each call."""
        return self._rows(self.rows)

    def row(self, i: int) -> Tensor:
        """Row `i` of the map, computed without the other rows."""
        count = self.shape[-2]
        if not -count <= i < count:
            raise IndexError(f"row: expected -{count}..{count - 1}; got {i}")
        i %= count
        chosen = torch.arange(i, i + 1, device=self.q.device) if self.rows is None else self.rows[i : i + 1]
        return self._rows(chosen)[..., 0, :]

    def fused(self, heads: Reduction) -> "QKRecord":
        """A record with the heads fused; the record itself if they already are."""
        return replace(self, heads=heads.name.lower()) if self.heads == "each" else self

    def row_sums(self) -> Tensor:
        """Row sums of the map, from lse where possible."""
        if not self._whole_mean():
            return self.map().sum(-1)
        # A row of softmax sums to 1, or to 0 in a head in which it has no keys.
        return (~self.lse.isinf()).float().mean(1)

    def vecmat(self, r: Tensor) -> Tensor:
        """Row vectors times the map, without computing the map where possible."""
        if not self._whole_mean():
            return MapRecord(self.map()).vecmat(r)
        with no_autocast(r):
            return torch.stack([vecmat(row, self.q, self.k, **self._call(), lse=self.lse) for row in r.unbind(1)], 1)

    def stats(self, names: Sequence[str], places: tuple[Tensor, Tensor] | None, prefix: int) -> dict[str, Tensor]:
        """Statistics of all rows: {name: [B, H, M]}, as of `attnx.ops.attention_stats.attention_with_stats`."""
        with no_autocast(self.q):
            options: dict[str, Any] = dict(heads=None, stats=names, places=places, prefix=prefix, lse=self.lse)
            return attention_with_stats(self.q, self.k, None, **options, **self._call())[2]

    def _whole_mean(self) -> bool:
        return self.heads == "mean" and self.rows is None and self.sinks is None

    def _rows(self, rows: Tensor | None) -> Tensor:
        # q and k were cast by autocast before they were stored, and lse was computed from the cast values.
        with no_autocast(self.q):
            return attention_map(self.q, self.k, **self._call(), heads=self.heads, rows=rows, lse=self.lse)

    def _call(self) -> dict[str, Any]:
        if self.versions and versions_of(self.q, self.k, self.bias) != self.versions:
            raise RuntimeError(
                "q, k or the mask of a layer was modified in place after the layer ran; capture with keep='map'"
            )
        beyond = dict(softcap=self.softcap, sinks=self.sinks)
        given = {name: value for name, value in beyond.items() if value is not None}
        return dict(bias=self.bias, is_causal=self.is_causal, scale=self.scale, backend=self.backend, **given)


def has_no_map(record: LayerRecord) -> bool:
    """True if a capture with keep="stats" stored the record."""
    return isinstance(record, RowsRecord) and not record.rows


def qk_bytes(q: Tensor, k: Tensor, bias: Tensor | None) -> int:
    """Bytes of q, k, the log-sum-exp and the bias."""
    return q.nbytes + k.nbytes + 4 * q.shape[:3].numel() + _held(bias)


def _held(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.untyped_storage().nbytes()


def versions_of(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """Version counters of the tensors: how often each was modified in place; None if unknown."""
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def detached(t: Tensor) -> Tensor:
    """The tensor without its graph; copied if it is a view of a larger storage, such as a packed qkv."""
    t = t.detach()
    return t.clone(memory_format=torch.contiguous_format) if t.untyped_storage().nbytes() > t.nbytes else t


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context manager that disables autocast on the device of `t`."""
    return torch.autocast(t.device.type, enabled=False)
