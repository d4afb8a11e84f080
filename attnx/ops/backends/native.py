"""The op on CPUs by the native kernel (`kernels/cpu/`): everything a block of rows needs stays in cache.

Rows of q, k and v must be contiguous: where the last stride is not 1, they are copied. So is a bias that is neither
float32 nor boolean.
"""

import ctypes
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnx.kernels.cpu.build import FALLBACK, CacheError, compiled, instructions
from attnx.ops.backends import map_pool as pages
from attnx.ops.reducers import Reduction

_DTYPES = (torch.float32, torch.bfloat16)
_POINTERS = ("q", "k", "v", "bias", "rows", "lse", "r", "grad", "out", "map", "lse_out", "passed", "scratch")
_SIZES = ("B", "H", "Hk", "M", "N", "D", "Dv", "R")
_STRIDES = (("q_stride", 3), ("k_stride", 3), ("v_stride", 3), ("bias_stride", 4), ("grad_stride", 3))
_KINDS = ("half", "heads", "bias_kind", "causal", "threads", "clamp")


class _Call(ctypes.Structure):
    """The `Call` of call.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64 * length) for name, length in _STRIDES),
        *((name, ctypes.c_int64) for name in _KINDS),
        ("scale", ctypes.c_double),
    )


def limits(q: Tensor, v: Tensor | None) -> list[str]:
    """Why this backend can't take these inputs; empty if it can.

    Raises:
        ImportError: it can take none here, see `kernel`.
    """
    reasons = []
    if q.device.type != "cpu":
        reasons.append(f"tensors are on {q.device.type}; it is for CPUs")
    if q.dtype not in _DTYPES:
        reasons.append(f"dtype {q.dtype} is not float32 or bfloat16")
    if not reasons:
        kernel(instructions())
    return reasons


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype (rows before heads in memory, as blocks want it) and map, see `ops.attention`."""
    out = _output(q, v)
    if rows is None:
        amap = _empty_map(q, k, heads, q.shape[2])
        _run(q, k, v, bias, is_causal, scale, heads=heads, map=amap, out=out)
        return out, amap
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _run(q, k, v, bias, is_causal, scale, out=out, lse_out=lse)
    return out, attention_map(q, k, bias, is_causal, scale, heads, rows, lse)


def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The map alone, see `ops.attention_map`."""
    count = q.shape[2] if rows is None else len(rows)
    amap = _empty_map(q, k, heads, count)
    rows, lse = (None if t is None else t.contiguous() for t in (rows, lse))
    _run(q, k, None, bias, is_causal, scale, heads=heads, map=amap, rows=rows, lse=lse)
    return amap


def gradient_map(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The gradient-weighted map, see `ops.gradient_map`."""
    amap = _empty_map(q, k, heads, q.shape[2] if rows is None else len(rows))
    rows, lse = (None if t is None else t.contiguous() for t in (rows, lse))
    grad = _rows_contiguous(grad)
    _run(q, k, v, bias, is_causal, scale, heads=heads, clamp=clamp, map=amap, rows=rows, lse=lse, grad=grad)
    return amap


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] and lse [B,H,M], see `ops.attention_lse`."""
    out, lse = _output(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    _run(q, k, v, bias, is_causal, scale, out=out, lse_out=lse)
    return out, lse


def vecmat(
    r: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float, lse: Tensor | None
) -> Tensor:
    """[B,N]: r times the mean map, see `ops.vecmat`."""
    if lse is None:
        lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
        used = (r != 0).any(0).nonzero()[:, 0]
        _run(q, k, None, bias, is_causal, scale, rows=used, lse_out=lse)
    passed = q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)
    _run(q, k, None, bias, is_causal, scale, r=r.contiguous(), lse=lse.contiguous(), passed=passed)
    return passed


def _output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _empty_map(q: Tensor, k: Tensor, heads: Reduction, rows: int) -> Tensor:
    planes = q.shape[:2] if heads is Reduction.EACH else q.shape[:1]
    return pages.empty((*planes, rows, k.shape[2]))


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    heads: Reduction = Reduction.MEAN,
    clamp: bool = False,
    rows: Tensor | None = None,
    **tensors: Tensor | None,
) -> None:
    """Fills a Call and runs it; `tensors` are those of its pointers that are not named here."""
    q, k = _rows_contiguous(q), _rows_contiguous(k)
    v = None if v is None else _rows_contiguous(v)
    if bias is not None:
        if bias.dtype not in (torch.float32, torch.bool):
            # Only what is there once: an expanded bias may be as large as all the weights.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in bias.stride())
            bias = bias[once].float()
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    (B, H, M, D), (_, Hk, N, _) = q.shape, k.shape
    call = _Call(B=B, H=H, Hk=Hk, M=M, N=N, D=D, Dv=0 if v is None else v.shape[3])
    call.R = M if rows is None else len(rows)
    call.half, call.heads, call.causal, call.scale = q.dtype == torch.bfloat16, int(heads), is_causal, scale
    call.bias_kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    call.threads, call.clamp = torch.get_num_threads(), clamp
    given = dict(tensors, q=q, k=k, v=v, bias=bias, rows=rows)
    assert given.keys() <= set(_POINTERS), given.keys()
    for name, t in given.items():
        if t is not None:
            setattr(call, name, t.data_ptr())
    for name, length in _STRIDES:
        t = given.get(name.removesuffix("_stride"))
        if t is not None:
            setattr(call, name, (ctypes.c_int64 * length)(*t.stride()[:length]))
    functions = kernel(instructions())
    # Not kept for the next call: in between, a block's MLP wants the room, and malloc has it again at once.
    scratch = torch.empty(functions.attnx_scratch_floats(ctypes.byref(call)), dtype=torch.float32, device="cpu")
    call.scratch = scratch.data_ptr()
    functions.attnx_run(ctypes.byref(call), _openmp())


def _rows_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


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
    """The functions of a compiled kernel."""
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise CacheError(f"the compiled CPU kernel can't be loaded: {error}") from error
    functions.attnx_call_size.restype = ctypes.c_int64
    functions.attnx_scratch_floats.restype = ctypes.c_int64
    functions.attnx_run.restype = None
    functions.attnx_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    if functions.attnx_call_size() != ctypes.sizeof(_Call):
        raise CacheError("the compiled CPU kernel is of another version")
    return functions


@cache
def _openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP runtime that torch has loaded; None where it has another kind."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return None
