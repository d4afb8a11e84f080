"""Record of a layer that holds q, k and the log-sum-exp of its rows, from which its map can be computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.functional import attention_map, vecmat
from attnx.ops.reducers import Reduction
from attnx.trace.records import MapRecord, no_autocast


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

    def column(self, i: int) -> Tensor:
        """Column `i` of the map, computed without the other columns, unless the mask is causal."""
        count = self.shape[-1]
        if not -count <= i < count:
            raise IndexError(f"column: expected -{count}..{count - 1}; got {i}")
        if self.is_causal:
            return self.map()[..., i]
        key, call = slice(i % count, i % count + 1), self._call()
        if self.bias is not None and self.bias.shape[-1] > 1:
            call["bias"] = self.bias[..., key]
        # The weights are exp(score - lse), where lse is over all keys.
        call |= dict(heads=self.heads, rows=self.rows, lse=self.lse)
        with no_autocast(self.q):
            return attention_map(self.q, self.k[:, :, key], **call)[..., 0]

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

    def check_unchanged(self) -> None:
        """Raise RuntimeError if q, k or the mask was modified in place after the layer ran."""
        if self.versions and versions_of(self.q, self.k, self.bias) != self.versions:
            raise RuntimeError(
                "q, k or the mask of a layer was modified in place after the layer ran; capture with keep='map'"
            )

    def _call(self) -> dict[str, Any]:
        self.check_unchanged()
        beyond = dict(softcap=self.softcap, sinks=self.sinks)
        given = {name: value for name, value in beyond.items() if value is not None}
        return dict(bias=self.bias, is_causal=self.is_causal, scale=self.scale, backend=self.backend, **given)


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
