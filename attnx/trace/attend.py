"""Attention of one call, and the record of its map, in the form that `keep` chooses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.checks import cast_as_sdpa
from attnx.ops.functional import attention, attention_lse, attention_map
from attnx.trace.qk_record import QKRecord, detached, qk_bytes, versions_of
from attnx.trace.records import LayerRecord, MapRecord, RowsRecord
from attnx.trace.row_stats import RowStats, Wanted

KEEP = ("map", "qk", "auto")
SMALL_MAP = 64 << 20  # bytes; "auto" stores smaller maps in any case: reading them is faster than vecmat


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
    """Output of attention, and the record of the call.

    Args:
        q, k, v, heads, rows: as in `attnx.attention`; `call` holds bias, is_causal, scale and backend.
        keep: one of KEEP. "auto" stores q and k if the map is larger than SMALL_MAP and than q and k, and if `vecmat`
            can replace it (whole maps, mean over heads); else it stores the map.
        output: if False, the output is not computed and None is returned in its place.
    """
    if keep != "map" and torch.is_autocast_enabled(q.device.type):
        q, k, v = cast_as_sdpa(q, k, v)  # as they are stored
    if _stores_map(q, k, keep, heads, rows, call["bias"]):
        options = dict(heads=heads, rows=rows, **call)
        if not output:
            out, amap = None, attention_map(q, k, **options)
        else:
            out, amap = attention(q, k, v, **options)
        whole = call["bias"] is None and call.get("sinks") is None and k.shape[2] > 0
        return out, MapRecord(amap, rows_sum_to_one=heads == "mean" and rows is None and whole)
    with torch.set_grad_enabled(output and torch.is_grad_enabled()):
        out, lse = attention_lse(q, k, v, **call)
    call = {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}
    q, k = detached(q), detached(k)
    versions = versions_of(q, k, call["bias"])
    return out if output else None, QKRecord(q, k, lse, heads=heads, rows=rows, versions=versions, **call)


def attend_with_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: str,
    wanted: Wanted,
    *,
    heads: str,
    rows: Tensor | None,
    output: bool = True,
    **call: Any,
) -> tuple[Tensor | None, LayerRecord, RowStats]:
    """`attend`, and the statistics of all rows. With keep="stats" no map is stored.

    Output, whole map and statistics are computed together; chosen rows of a map, or statistics beside q and k, by a
    second product of q and k.
    """
    if not wanted.names:
        if keep == "stats":
            return None, without_map(q, k), RowStats({}, wanted.missing)
        return *attend(q, k, v, keep, heads=heads, rows=rows, output=output, **call), RowStats({}, wanted.missing)
    requested: dict[str, Any] = dict(stats=wanted.names, places=wanted.places, prefix=wanted.prefix, **call)
    whole = rows is None and keep != "stats" and _stores_map(q, k, keep, heads, rows, call["bias"])
    if whole or keep == "stats":
        values = v if output else None
        out, amap, found = attention_with_stats(q, k, values, heads=heads if whole else None, **requested)
        return out, without_map(q, k) if amap is None else MapRecord(amap), RowStats(found, wanted.missing)
    out, record = attend(q, k, v, keep, heads=heads, rows=rows, output=output, **call)
    if isinstance(record, QKRecord):
        found = record.stats(wanted.names, wanted.places, wanted.prefix)
    else:
        found = attention_with_stats(q, k, None, heads=None, **requested)[2]
    return out, record, RowStats(found, wanted.missing)


def without_map(q: Tensor, k: Tensor) -> RowsRecord:
    """The record of a layer whose map is not stored."""
    return RowsRecord(q.new_empty((len(q), 0, k.shape[2]), dtype=torch.float32), (), q.shape[2])


def _stores_map(q: Tensor, k: Tensor, keep: str, heads: str, rows: Tensor | None, bias: Tensor | None) -> bool:
    """True if `keep` stores the map of a call; False if it stores q and k."""
    if keep != "auto" or heads != "mean" or rows is not None:
        return keep in ("map", "auto")
    return is_small(q, k) or 4 * q.shape[0] * q.shape[2] * k.shape[2] <= qk_bytes(q, k, bias)


def is_small(q: Tensor, k: Tensor) -> bool:
    """True if the map of q and k has at most SMALL_MAP bytes, so that keep="auto" stores it."""
    return 4 * q.shape[0] * q.shape[2] * k.shape[2] <= SMALL_MAP


def check_keep(keep: str, stats: Sequence[str] = ()) -> str:
    """`keep`, unchanged.

    Raises:
        ValueError: `keep` is not one of KEEP, or "stats" where statistics are captured.
    """
    if keep == "stats" and not stats:
        raise ValueError("keep: expected stats=('entropy', ...) with keep='stats'; got no statistics")
    if keep not in KEEP and keep != "stats":
        stored = f", or stats where statistics are captured; got {keep!r}" if stats else f"; got {keep!r}"
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}{stored}")
    return keep
