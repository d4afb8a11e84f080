"""Attention of one call, and the record of its map, in the form that `keep` chooses."""

from typing import Any

import torch
from torch import Tensor

from attnx.ops.checks import cast_as_sdpa
from attnx.ops.functional import attention, attention_lse, attention_map
from attnx.trace.records import LayerRecord, MapRecord, QKRecord, detached, qk_bytes, versions_of

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
    mean = heads == "mean" and rows is None
    if keep != "map":
        q, k, v = cast_as_sdpa(q, k, v)  # as they are stored
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
    q, k = detached(q), detached(k)
    versions = versions_of(q, k, call["bias"])
    return out if output else None, QKRecord(q, k, lse, heads=heads, rows=rows, versions=versions, **call)


def check_keep(keep: str) -> str:
    """`keep`, unchanged.

    Raises:
        ValueError: `keep` is not one of KEEP.
    """
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}; got {keep!r}")
    return keep
