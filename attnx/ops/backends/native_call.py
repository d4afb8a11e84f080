"""The arguments of the native kernel: the structure `Call` of call.h, filled from tensors."""

import ctypes

import torch
from torch import Tensor

from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores
from attnx.ops.statistics import Statistics

_POINTERS = (
    *("q", "k", "v", "bias", "rows", "lse", "r", "grad", "queries_at", "keys_at"),
    *("out", "map", "lse_out", "passed", "stats", "scratch"),
)
_SIZES = ("B", "H", "Hk", "M", "N", "D", "Dv", "R", "bias_items", "places", "prefix")
_STRIDES = (("q_stride", 3), ("k_stride", 3), ("v_stride", 3), ("bias_stride", 4), ("grad_stride", 3))
_KINDS = ("half", "heads", "bias_kind", "causal", "threads", "clamp", "statistics")


class Call(ctypes.Structure):
    """The `Call` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64 * length) for name, length in _STRIDES),
        *((name, ctypes.c_int64) for name in _KINDS),
        ("scale", ctypes.c_double),
    )


def filled(
    scores: Scores,
    v: Tensor | None,
    *,
    reduction: Reduction = Reduction.MEAN,
    clamp: bool = False,
    rows: Tensor | None = None,
    statistics: Statistics | None = None,
    **tensors: Tensor | None,
) -> tuple[Call, dict[str, Tensor | None]]:
    """A Call, and the tensors that it points to; `tensors` are its other pointers by name."""
    q, k = rows_contiguous(scores.q), rows_contiguous(scores.k)
    v = None if v is None else rows_contiguous(v)
    bias = scores.bias
    if bias is not None:
        if bias.dtype not in (torch.float32, torch.bool):
            # Convert the stored part only: an expanded bias may be as large as all the weights.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in bias.stride())
            bias = bias[once].float()
        bias = bias.expand(-1, q.shape[1], q.shape[2], k.shape[2])
    (B, H, M, D), (_, Hk, N, _) = q.shape, k.shape
    call = Call(B=B, H=H, Hk=Hk, M=M, N=N, D=D, Dv=0 if v is None else v.shape[3])
    call.R = M if rows is None else len(rows)
    call.half, call.heads, call.causal = q.dtype == torch.bfloat16, int(reduction), scores.is_causal
    call.scale, call.threads, call.clamp = scores.scale, torch.get_num_threads(), clamp
    call.bias_items = 1 if bias is None else bias.shape[0]
    call.bias_kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    call.places = 1
    if statistics is not None:
        call.statistics, call.prefix, call.places = statistics.which, statistics.prefix, statistics.places
        tensors |= {"queries_at": statistics.queries_at, "keys_at": statistics.keys_at}
    pointers = dict(tensors, q=q, k=k, v=v, bias=bias, rows=rows)
    assert pointers.keys() <= set(_POINTERS), pointers.keys()
    for name, t in pointers.items():
        if t is not None:
            setattr(call, name, t.data_ptr())
    for name, length in _STRIDES:
        t = pointers.get(name.removesuffix("_stride"))
        if t is not None:
            setattr(call, name, (ctypes.c_int64 * length)(*t.stride()[:length]))
    return call, pointers


def rows_contiguous(t: Tensor) -> Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()
