"""Arguments that the kernels share: pointers, strides, and the constants derived from them."""

from typing import Any

import torch
from torch import Tensor

from attnx.kernels.configs import split_d
from attnx.kernels.primitives import MEAN

_TILE = 2048  # upper bound on rows of a tile plus columns of a head


def shared_args(
    q: Tensor, k: Tensor, bias: Tensor | None, rows: Tensor | None, scale: float, is_causal: bool
) -> dict[str, Any]:
    """Arguments of every kernel for queries, keys, bias and rows.

    Args:
        q: [B, H, M, D].
        k: [B, Hk, N, D].
        bias: [B, H, M, N], additive or boolean (True: attend); or [P, H, M, N]: item b uses bias[b % P].
        rows: [R] int64, indices of the query rows to compute; None: all.
        scale: factor of the scores.
        is_causal: query m attends to keys 0..m.
    """
    block_d, rest_d = split_d(q.shape[3])
    return dict(
        q_ptr=q,
        k_ptr=k,
        bias_ptr=q if bias is None else bias.view(torch.uint8) if bias.dtype == torch.bool else bias,
        rows_ptr=q if rows is None else rows.contiguous(),
        **named_strides(q, "qb qh qm qd"),
        **named_strides(k, "kb kh kn kd"),
        **({f"stride_b{x}": 0 for x in "bhmn"} if bias is None else named_strides(bias, "bb bh bm bn")),
        H=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        M=q.shape[2] if rows is None else len(rows),
        N=k.shape[2],
        bias_period=1 if bias is None else bias.shape[0],
        scale_log2=scale * 1.4426950408889634,
        D=q.shape[3],
        BLOCK_D=block_d,
        REST_D=rest_d,
        HAS_ROWS=rows is not None,
        BIAS=0 if bias is None else 2 if bias.dtype == torch.bool else 1,
        BIAS_REPEATS=bias is not None and bias.shape[0] < q.shape[0],
        CAUSAL=is_causal,
        # A scale that underflows to 0 in fp32 would turn -inf scores into NaN.
        FOLD_SCALE=bias is None and scale >= 2**-126,
        INT64_OFFSETS=_needs_int64_offsets(q) or _needs_int64_offsets(k),
        PRECISION=precision(q.dtype),
    )


def value_args(q: Tensor, v: Tensor | None, out: Tensor | None) -> dict[str, Any]:
    """Arguments for the values v [B, Hk, N, Dv] and the output out [B, H, M, Dv], whose last dim is contiguous.

    If either is None, q is a placeholder for both pointers, and HAS_V is False.
    """
    if v is None or out is None:
        strides = {f"stride_v{x}": 0 for x in "bhnd"} | {f"stride_o{x}": 0 for x in "bhm"}
        return dict(v_ptr=q, out_ptr=q, **strides, DV=16, BLOCK_DV=16, REST_DV=0, HAS_V=False)
    strides = named_strides(out, "ob oh om _")
    del strides["stride__"]
    return dict(**_value_tile_args(v), out_ptr=out, **strides, HAS_V=True)


def gradient_args(grad: Tensor, v: Tensor) -> dict[str, Any]:
    """Arguments for the output gradient [B, H, M, Dv] and the values [B, Hk, N, Dv].

    Merge after `shared_args`, because INT64_OFFSETS may be set.
    """
    int64_offsets = {"INT64_OFFSETS": True} if _needs_int64_offsets(grad) else {}
    return {**_value_tile_args(v), "do_ptr": grad, **named_strides(grad, "dob doh dom dod"), **int64_offsets}


def _value_tile_args(v: Tensor) -> dict[str, Any]:
    block_dv, rest_dv = split_d(v.shape[3])
    int64_offsets = {"INT64_OFFSETS": True} if _needs_int64_offsets(v) else {}
    strides = named_strides(v, "vb vh vn vd")
    return dict(v_ptr=v, **strides, DV=v.shape[3], BLOCK_DV=block_dv, REST_DV=rest_dv, **int64_offsets)


def named_strides(tensor: Tensor, letters: str) -> dict[str, int]:
    """{"stride_qb": ..., ...} for letters "qb qh qm qd"."""
    return {f"stride_{name}": stride for name, stride in zip(letters.split(), tensor.stride(), strict=True)}


def precision(dtype: torch.dtype) -> str:
    """Triton's input_precision for products of this dtype: "ieee" or "tf32".

    fp32 products use tf32 only if the user allowed it for torch's matmul, by either of its two settings.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    fp32_precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if fp32_precision != "none":
        return "tf32" if fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _needs_int64_offsets(tensor: Tensor) -> bool:
    """True if offsets within a tile may reach 2^31."""
    return max(tensor.stride(2), tensor.stride(3)) * _TILE >= 2**31


def split_args(count: int, splits: int, heads: int) -> dict[str, Any]:
    """Arguments for `count` heads split over `splits` programs.

    map_share is the factor of the stored map: 1 / count for a mean over all heads in one program, else 1.
    """
    is_mean = splits == 1 and heads == MEAN.value
    return dict(splits=splits, heads_each=-(-count // splits), map_share=1.0 / count if is_mean else 1.0)
