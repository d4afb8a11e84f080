"""The op on CPUs by the native kernel (`kernels/cpu/`): everything a block of rows needs stays in cache.

Rows of q, k and v must be contiguous: where the last stride is not 1, they are copied. So is a bias that is neither
float32 nor boolean.
"""

import ctypes
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnx.kernels.cpu.build import FALLBACK, CacheError, compiled, instructions
from attnx.ops.backends import map_pool
from attnx.ops.backends.native_call import Call, filled, rows_contiguous
from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores
from attnx.ops.statistics import Statistics

_DTYPES = (torch.float32, torch.bfloat16)
IMPORTANCE = 16  # as call.h's
REDUCTIONS = (Reduction.MEAN, Reduction.MAX, Reduction.MIN, Reduction.EACH)  # that call.h has


def limits(scores: Scores, v: Tensor | None, reduction: Reduction | None) -> list[str]:
    """Reasons this backend can't take the call; empty if it can.

    Raises:
        ImportError: it can take no call here, see `kernel`.
    """
    q, reasons = scores.q, []
    if q.device.type != "cpu":
        reasons.append(f"tensors are on {q.device.type}; it is for CPUs")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype {q.dtype} is not float32 or bfloat16")
    if scores.softcap:
        reasons.append(f"it has no softcap ({scores.softcap:g}); backend='eager' has")
    if reduction is not None and reduction not in REDUCTIONS:
        reasons.append(f"it has no heads={reduction.name.lower()!r}; backend='eager' has")
    if not reasons:
        kernel(instructions())
    return reasons


def attention(scores: Scores, v: Tensor, reduction: Reduction, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype and map, see `ops.functional.attention`."""
    if rows is None:
        out, amap = scores.new_output(v), _empty_map(scores, reduction, None)
        _run(scores, v, reduction=reduction, map=amap, out=out)
        return out, amap
    out, lse = attention_lse(scores, v)
    return out, attention_map(scores, reduction, rows, lse)


def prepare(
    scores: Scores, v: Tensor, reduction: Reduction
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None:
    """A function that computes `attention` of other tensors q, k, v and bias of the same shapes, strides and dtypes.

    None if this backend can't take such calls, or copies their inputs.
    """
    try:
        limited = limits(scores, v, reduction)
    except ImportError:
        return None
    bias = scores.bias
    copies = any(rows_contiguous(t) is not t for t in (scores.q, scores.k, v))
    if limited or copies or (bias is not None and bias.dtype not in (torch.float32, torch.bool)):
        return None
    run_like, parallel = kernel(instructions()).attnx_run_like, _openmp()
    out_shape, out_strides = scores.q.shape[:3] + v.shape[3:], scores.new_output(v).stride()
    map_shape = _map_shape(scores, reduction, None)
    like = ctypes.byref(filled(scores, v, reduction=reduction)[0])

    def compute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out, amap = q.new_empty_strided(out_shape, out_strides), map_pool.empty(map_shape)
        missing = run_like(
            like, q.data_ptr(), k.data_ptr(), v.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            amap.data_ptr(), torch.get_num_threads(), parallel,
        )  # fmt: skip
        if missing:
            raise MemoryError(f"attnx: no memory for {missing} bytes of scratch space")
        return out, amap

    return compute


def attention_map(scores: Scores, reduction: Reduction, rows: Tensor | None, lse: Tensor | None) -> Tensor:
    """The map alone, see `ops.functional.attention_map`."""
    amap = _empty_map(scores, reduction, rows)
    rows, lse = (None if t is None else t.contiguous() for t in (rows, lse))
    _run(scores, None, reduction=reduction, map=amap, rows=rows, lse=lse)
    return amap


def attention_lse(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] and lse [B,H,M], see `ops.functional.attention_lse`."""
    out, lse = scores.new_output(v), scores.q.new_empty(scores.q.shape[:3], dtype=torch.float32)
    _run(scores, v, out=out, lse_out=lse)
    return out, lse


def vecmat(scores: Scores, r: Tensor, lse: Tensor | None) -> Tensor:
    """[B,N]: r times the mean map, see `ops.functional.vecmat`."""
    q, k = scores.q, scores.k
    if lse is None:
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
        used = (r != 0).any(0).nonzero()[:, 0]
        _run(scores, None, rows=used, lse_out=lse)
    passed = q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)
    _run(scores, None, r=r.contiguous(), lse=lse.contiguous(), passed=passed)
    return passed


def gradient_map(
    scores: Scores,
    grad: Tensor,
    v: Tensor,
    reduction: Reduction,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The gradient-weighted map, see `ops.functional.gradient_map`."""
    amap = _empty_map(scores, reduction, rows)
    rows, lse = (None if t is None else t.contiguous() for t in (rows, lse))
    grad = rows_contiguous(grad)
    _run(scores, v, reduction=reduction, clamp=clamp, map=amap, rows=rows, lse=lse, grad=grad)
    return amap


def attention_stats(
    scores: Scores, v: Tensor | None, reduction: Reduction | None, statistics: Statistics, lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Output, map and statistics, see `ops.attention_stats`; one product of q and k for all of them."""
    out = None if v is None else scores.new_output(v)
    amap = None if reduction is None else _empty_map(scores, reduction, None)
    stats = statistics.new_result(scores.q)
    kind, lse = reduction or Reduction.MEAN, None if lse is None else lse.contiguous()
    _run(scores, v, reduction=kind, statistics=statistics, out=out, map=amap, stats=stats, lse=lse)
    return out, amap, stats


def row_importance(scores: Scores, grad: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
    """[B,H,M]: the importance of each row, see `ops.row_importance`."""
    importance = scores.q.new_empty(scores.q.shape[:3], dtype=torch.float32)
    lse, grad = None if lse is None else lse.contiguous(), rows_contiguous(grad)
    _run(scores, v, statistics=Statistics(IMPORTANCE), stats=importance, lse=lse, grad=grad)
    return importance


def _empty_map(scores: Scores, reduction: Reduction, rows: Tensor | None) -> Tensor:
    return map_pool.empty(_map_shape(scores, reduction, rows))


def _map_shape(scores: Scores, reduction: Reduction, rows: Tensor | None) -> tuple[int, ...]:
    B, H, M, _ = scores.q.shape
    planes = (B, H) if reduction is Reduction.EACH else (B,)
    return *planes, M if rows is None else len(rows), scores.k.shape[2]


def _run(scores: Scores, v: Tensor | None, **arguments: Any) -> None:
    """Fills a Call, as `_filled` does, and runs it."""
    functions = kernel(instructions())
    call, _kept = filled(scores, v, **arguments)
    # Freed after the call: the block's MLP uses the memory next, and malloc returns it at once.
    scratch = torch.empty(functions.attnx_scratch_floats(ctypes.byref(call)), dtype=torch.float32, device="cpu")
    call.scratch = scratch.data_ptr()
    functions.attnx_run(ctypes.byref(call), _openmp())


def kernel(level: str) -> ctypes.CDLL:
    """The compiled kernel for a key of `build.INSTRUCTIONS`.

    Raises:
        ImportError: it can't be compiled or loaded; says what is missing. It is tried once.
    """
    found = _tried(level)
    if isinstance(found, str):
        raise ImportError(found)
    return found


@cache
def _tried(level: str) -> ctypes.CDLL | str:
    try:
        return _cached(level)
    except ImportError as error:
        if level not in FALLBACK:
            return str(error)
        found = _tried(FALLBACK[level])
        if not isinstance(found, str):
            warnings.warn(f"attnx: bf16 is multiplied as floats, more slowly: {error}", stacklevel=2)
        return found


def _cached(level: str) -> ctypes.CDLL:
    """The kernel of the cache; where that can't be used, one that is compiled for this process alone."""
    try:
        return loaded(compiled(level))
    except CacheError as error:
        try:
            with tempfile.TemporaryDirectory(prefix="attnx-", ignore_cleanup_errors=True) as folder:
                functions = loaded(compiled(level, folder=Path(folder)))  # it stays loaded when its file is gone
        except OSError as cause:
            raise ImportError(f"{error}; there is no temporary folder either: {cause}") from cause
        warnings.warn(f"attnx: {error}; it was compiled for this process alone", stacklevel=2)
        return functions


def loaded(path: Path) -> ctypes.CDLL:
    """Load the functions of a compiled kernel."""
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise CacheError(f"the compiled CPU kernel can't be loaded: {error}") from error
    functions.attnx_call_size.restype = ctypes.c_int64
    functions.attnx_scratch_floats.restype = ctypes.c_int64
    functions.attnx_run.restype = None
    functions.attnx_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    functions.attnx_run_like.restype = ctypes.c_int64
    functions.attnx_run_like.argtypes = (*(ctypes.c_void_p,) * 7, ctypes.c_int64, ctypes.c_void_p)
    if functions.attnx_call_size() != ctypes.sizeof(Call):
        raise CacheError("the compiled CPU kernel is of another version")
    return functions


@cache
def _openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded; None where it has another kind."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return None
