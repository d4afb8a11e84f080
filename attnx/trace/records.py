"""What a capture keeps of a layer: its map, or what the map is made of (q, k and the log-sum-exp of its rows).

A map takes 4 N^2 bytes, q and k a number that is linear in N. Methods read both in the same way, see `LayerRecord`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnx.ops.functional import attention, attention_lse, attention_map, cast_as_sdpa, vecmat
from attnx.ops.reducers import Reduction, fuse_heads

KEEP = ("map", "qk", "auto")
SMALL_MAP = 64 << 20  # bytes of a layer's maps that "auto" keeps in any case: reading them is faster than vecmat


class LayerRecord(Protocol):
    """A layer's map, in whatever form it was kept: [B, M, N], or [B, H, M, N] for heads="each"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The map's."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""

    @property
    def nbytes(self) -> int:
        """What is held in memory."""

    @property
    def rows_sum_to_one(self) -> bool:
        """Whether the map's rows are known to sum to 1; one that is NaN is so as a whole."""

    def map(self) -> Tensor:
        """The map itself, float32; made on demand and not cached if it was not kept."""

    def row(self, i: int) -> Tensor:
        """[B, N] (each: [B, H, N]): one row of the map, at the price of one row."""

    def fused(self, heads: Reduction) -> "LayerRecord":
        """The same with its heads fused, if it is of heads="each"; else itself."""

    def row_sums(self) -> Tensor:
        """[B, M]: the map's row sums, heads fused. Less than 1 where heads have no keys there."""

    def vecmat(self, r: Tensor) -> Tensor:
        """[B, R, M] -> [B, R, N]: R row vectors times the map, heads fused."""


@dataclass(frozen=True, eq=False)
class MapRecord:
    """A layer whose map was kept."""

    amap: Tensor
    rows_sum_to_one: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.amap.shape)

    @property
    def device(self) -> torch.device:
        return self.amap.device

    @property
    def nbytes(self) -> int:
        return self.amap.nbytes

    def map(self) -> Tensor:
        return self.amap

    def row(self, i: int) -> Tensor:
        return self.amap[..., i, :]

    def fused(self, heads: Reduction) -> "MapRecord":
        return MapRecord(fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        return self.amap.sum(-1)

    def vecmat(self, r: Tensor) -> Tensor:
        with no_autocast(r):
            if r.device.type == "cpu" and r.shape[1] == 1 and len(r):
                # bmm takes twice as long for a single row.
                return torch.stack([row @ amap for row, amap in zip(r, self.amap, strict=True)])
            return torch.bmm(r, self.amap)


@dataclass(frozen=True, eq=False)
class RowsRecord:
    """A layer of which some rows were kept, since the method reads no others; what needs the whole map raises."""

    amap: Tensor  # [B, R, N], or [B, H, R, N]
    rows: tuple[int, ...]
    queries: int  # that the layer has

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.amap.shape[:-2], self.queries, self.amap.shape[-1])

    @property
    def device(self) -> torch.device:
        return self.amap.device

    @property
    def nbytes(self) -> int:
        return self.amap.nbytes

    @property
    def rows_sum_to_one(self) -> bool:
        return False

    def map(self) -> Tensor:
        raise RuntimeError(f"only rows {list(self.rows)} of the map were kept")

    def row(self, i: int) -> Tensor:
        if i not in self.rows:
            raise IndexError(f"row: expected one of {list(self.rows)}, which were kept; got {i}")
        return self.amap[..., self.rows.index(i), :]

    def fused(self, heads: Reduction) -> "RowsRecord":
        return replace(self, amap=fuse_heads(self.amap, heads)) if self.amap.dim() == 4 else self

    def row_sums(self) -> Tensor:
        return self.map()

    def vecmat(self, r: Tensor) -> Tensor:
        return self.map()


@dataclass(frozen=True, eq=False)
class QKRecord:
    """A layer of which q, k and lse were kept: arguments as in `attnx.attention_map`, rows a tensor on q's device.

    What is kept is not copied where it is a tensor of its own. A model that writes to it afterwards spoils it: that
    raises RuntimeError when it is read, except under inference_mode, whose tensors do not count their changes.
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
        B, H, M, _ = self.q.shape
        M = M if self.rows is None else len(self.rows)
        return (B, H, M, self.k.shape[2]) if self.heads == "each" else (B, M, self.k.shape[2])

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.k.nbytes + self.lse.nbytes + _held(self.bias)

    @property
    def rows_sum_to_one(self) -> bool:
        return False  # of a row whose scores are infinite nothing is passed on, where its map would be NaN

    def map(self) -> Tensor:
        return self._rows(self.rows)

    def row(self, i: int) -> Tensor:
        count = self.shape[-2]
        if not -count <= i < count:
            raise IndexError(f"row: expected -{count}..{count - 1}; got {i}")
        i %= count
        chosen = torch.arange(i, i + 1, device=self.q.device) if self.rows is None else self.rows[i : i + 1]
        return self._rows(chosen)[..., 0, :]

    def fused(self, heads: Reduction) -> "QKRecord":
        return replace(self, heads=heads.name.lower()) if self.heads == "each" else self

    def row_sums(self) -> Tensor:
        if not self._whole_mean():
            return self.map().sum(-1)
        # A row of softmax sums to 1, and to 0 in a head where it has no keys.
        return (~self.lse.isinf()).float().mean(1)

    def vecmat(self, r: Tensor) -> Tensor:
        if not self._whole_mean():
            return MapRecord(self.map()).vecmat(r)
        with no_autocast(r):
            return torch.stack([vecmat(row, self.q, self.k, **self._call(), lse=self.lse) for row in r.unbind(1)], 1)

    def _whole_mean(self) -> bool:
        return self.heads == "mean" and self.rows is None and self.sinks is None

    def _rows(self, rows: Tensor | None) -> Tensor:
        # q and k are what autocast made of them already, and lse is theirs.
        with no_autocast(self.q):
            return attention_map(self.q, self.k, **self._call(), heads=self.heads, rows=rows, lse=self.lse)

    def _call(self) -> dict[str, Any]:
        if self.versions and _versions(self.q, self.k, self.bias) != self.versions:
            raise RuntimeError("q, k or the mask of a layer was changed in place after it ran; capture with keep='map'")
        beyond = dict(softcap=self.softcap, sinks=self.sinks)
        given = {name: value for name, value in beyond.items() if value is not None}
        return dict(bias=self.bias, is_causal=self.is_causal, scale=self.scale, backend=self.backend, **given)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: str,
    *,
    heads: str,
    rows: Tensor | None,
    output: bool = True,
    **call: Any,
) -> tuple[Tensor | None, LayerRecord]:
    """Attention's output, and what is to be kept of the call.

    Args:
        q, k, v, heads, rows: as in `attnx.attention`; so is `call`: bias, is_causal, scale, backend.
        keep: one of KEEP. "auto": q and k if the map is not small, they are smaller, and `vecmat` can stand for it,
            which is to say whole mean maps.
        output: False: nobody wants the output, and None takes its place.
    """
    q, k, v = cast_as_sdpa(q, k, v)
    mean = heads == "mean" and rows is None
    fits = max(SMALL_MAP, qk_bytes(q, k, call["bias"])) < 4 * q.shape[0] * q.shape[2] * k.shape[2]
    if keep == "map" or (keep == "auto" and not (mean and fits)):
        options = dict(heads=heads, rows=rows, **call)
        if not output:
            out, amap = None, attention_map(q, k, **options)
        else:
            out, amap = attention(q, k, v, **options)
        whole = call["bias"] is None and call.get("sinks") is None and k.shape[2] > 0
        return out, MapRecord(amap, rows_sum_to_one=mean and whole)
    with torch.set_grad_enabled(output and torch.is_grad_enabled()):
        out, lse = attention_lse(q, k, v, **call)
    call = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}
    q, k = _own(q), _own(k)
    versions = _versions(q, k, call["bias"])
    return out if output else None, QKRecord(q, k, lse, heads=heads, rows=rows, versions=versions, **call)


def check_keep(keep: str) -> str:
    """`keep` itself.

    Raises:
        ValueError: it is not one of KEEP.
    """
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}; got {keep!r}")
    return keep


def qk_bytes(q: Tensor, k: Tensor, bias: Tensor | None) -> int:
    """What q, k, the log-sum-exp and the bias take in memory."""
    return q.nbytes + k.nbytes + 4 * q.shape[:3].numel() + _held(bias)


def _held(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.untyped_storage().nbytes()


def _versions(*tensors: Tensor | None) -> tuple[int | None, ...]:
    """How often each was changed in place."""
    return tuple(None if t is None or t.is_inference() else t._version for t in tensors)


def _own(t: Tensor) -> Tensor:
    """Without its graph, and without the rest of the storage that it may be a view of: v, in a packed qkv."""
    t = t.detach()
    return t.clone(memory_format=torch.contiguous_format) if t.untyped_storage().nbytes() > t.nbytes else t


def no_autocast(t: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(t.device.type, enabled=False)
