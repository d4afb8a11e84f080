"""Checks of the op's arguments: an error names the argument, what was expected and what came."""

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from attnx.ops.backends import BACKENDS
from attnx.ops.reducers import Reduction


def check_backend(backend: str) -> str:
    """The name itself. Raise ValueError unless it is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def check_dropout(dropout_p: float) -> None:
    """Raise ValueError unless the share is 0."""
    if dropout_p:
        raise ValueError(f"dropout_p: expected 0, since attnx has no dropout; got {dropout_p!r}; call model.eval()")


def cast_as_sdpa(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k (and v), cast to autocast's dtype where it is on, as for SDPA. Raise ValueError unless they are tensors."""
    for name, t in zip("qkv", tensors, strict=False):
        if not isinstance(t, Tensor):
            raise ValueError(f"{name}: expected a tensor; got {type(t).__name__}")
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def resolve_scale(scale: float | None, q: Tensor) -> float:
    """The scale; D ** -0.5 for None."""
    return max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)


def resolve_softcap(softcap: float | None) -> float:
    """The softcap as the operators take it: 0 for None."""
    if softcap is None:
        return 0.0
    if not isinstance(softcap, int | float) or not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a finite number above 0, or None; got {softcap!r}")
    return float(softcap)


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Raise ValueError unless sinks are [H] floating point on q's device."""
    if isinstance(sinks, Tensor):
        if sinks.shape == q.shape[1:2] and sinks.is_floating_point() and sinks.device == q.device:
            return
        came = f"{sinks.dtype} {list(sinks.shape)} on {sinks.device}"
    else:
        came = type(sinks).__name__
    raise ValueError(f"sinks: expected a floating-point tensor [{q.shape[1]}] on {q.device}; got {came}")


def one_bias(bias: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
    """The bias by either of its names. Raise ValueError for both."""
    if bias is not None and attn_mask is not None:
        raise ValueError("bias, attn_mask: expected one of the two, which are names of one argument; got both")
    return bias if attn_mask is None else attn_mask


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, heads: str, attn_mask: Tensor | None = None
) -> Tensor | None:
    """The bias, or the mask in its place, as a 4-D tensor. Raise ValueError for inputs that don't fit together."""
    Reduction.parse(heads)
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, t in named.items():
        if t.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, heads, tokens, head dim]; got {list(t.shape)}")
        if not t.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype; got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name}: expected q's {q.dtype} on {q.device}; got {t.dtype} on {t.device}")
    B, H, M, D = q.shape
    Hk, N = k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected [{B}, heads, tokens, {D}] to fit q {list(q.shape)}; got {list(k.shape)}")
    if Hk == 0 or H % Hk:
        raise ValueError(f"k: expected a number of heads that divides q's {H}; got {Hk}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected [{B}, {Hk}, {N}, head dim] to fit k {list(k.shape)}; got {list(v.shape)}")
    bias, name = one_bias(bias, attn_mask), "bias" if attn_mask is None else "attn_mask"
    return None if bias is None else _four_dimensions(name, bias, (B, H, M, N), q.device)


def _four_dimensions(name: str, bias: Tensor, sizes: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """The bias with 4 dimensions. Raise ValueError unless it fits scores of these sizes [B, H, M, N]."""
    B, H, M, N = sizes
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(f"{name}: expected a float or bool dtype; got {bias.dtype}")
    if bias.device != device:
        raise ValueError(f"{name}: expected device {device}; got {bias.device}")
    hint = "; for a key-padding mask [B, N] pass mask[:, None, None, :]" if bias.shape == (B, N) else ""
    shape = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape[1:], (H, M, N), strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {[B, H, M, N]}; got {list(bias.shape)}{hint}")
    if shape[0] != B and (shape[0] == 0 or B % shape[0]):
        raise ValueError(f"{name}: expected a first dimension that divides the batch of {B}; got {list(bias.shape)}")
    return bias.reshape(shape)


def check_float32(name: str, t: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """Raise ValueError unless t is float32 of that shape on the device; `lse` may be None."""
    if t is None and name == "lse":
        return
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: expected a tensor; got {type(t).__name__}")
    if t.shape != torch.Size(shape) or t.dtype != torch.float32 or t.device != device:
        came = f"{t.dtype} {list(t.shape)} on {t.device}"
        raise ValueError(f"{name}: expected float32 {list(shape)} on {device}; got {came}")


def check_gradient(grad: Tensor, q: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the gradient has the shape of the output, and q's dtype and device."""
    shape = (*q.shape[:3], v.shape[3])
    if not isinstance(grad, Tensor) or grad.shape != shape or grad.dtype != q.dtype or grad.device != q.device:
        came = f"{grad.dtype} {list(grad.shape)} on {grad.device}" if isinstance(grad, Tensor) else f"{grad!r}"
        raise ValueError(f"grad: expected {q.dtype} {list(shape)} on {q.device}; got {came}")


def integer(value: Any) -> int | None:
    """The value as an int; None for a flag, a fraction or another type."""
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def row_indices(rows: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """The indices of the chosen rows, as given; one integer is one row.

    Raises:
        ValueError: not integers, or none.
    """
    expected = "rows: expected an integer or a sequence of integers"
    try:
        values: Any = rows
        given = (values,) if isinstance(rows, int) or getattr(rows, "ndim", 1) == 0 else tuple(values)
    except TypeError as error:
        raise ValueError(f"{expected}; got {rows!r}") from error
    found = [integer(row) for row in given]
    chosen = tuple(row for row in found if row is not None)
    if len(chosen) < len(given):
        raise ValueError(f"{expected}; got {rows!r}")
    if not chosen:
        raise ValueError("rows: expected at least one row, or None for all; got none")
    return chosen


def in_range(rows: Sequence[int], count: int) -> tuple[int, ...]:
    """Indices of `count` rows, not negative. Raise ValueError unless they are in -count..count - 1."""
    if not all(-count <= row < count for row in rows):
        raise ValueError(f"rows: expected integers in -{count}..{count - 1}; got {list(rows)}")
    return tuple(row % count for row in rows)


def row_index(rows: int | Sequence[int] | Tensor | None, m: int, device: torch.device) -> Tensor | None:
    """Row indices as an int64 tensor on the device. Raise ValueError for other than integers in -m..m-1.

    The operators check the values of a tensor, and count its negative ones from the end.
    """
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or rows.dim() == 0:
        none = isinstance(rows, Sequence) and not len(rows)
        chosen = () if none else in_range(row_indices(rows), m)
        return torch.tensor(chosen, dtype=torch.int64, device=device)
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if rows.dim() != 1 or not whole or rows.device != device:
        raise ValueError(
            f"rows: expected a 1-D integer tensor on {device}; got {rows.dtype} {list(rows.shape)} on {rows.device}"
        )
    return rows.to(torch.int64)
