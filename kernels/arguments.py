"""What every kernel is given about its tensors: pointers, strides, and the constants that follow from them."""

from typing import Any

import torch
from torch import Tensor

from attnx.kernels.configs import split_d
from attnx.kernels.primitives import MEAN

_TILE = 512  # rows and columns of a tile together, at most


def shared_args(
    q: Tensor, k: Tensor, bias: Tensor | None, rows: Tensor | None, scale: float, is_causal: bool
) -> dict[str, Any]:
    """What every kernel is given about q [B,H,M,D], k [B,Hk,N,D], bias (expanded to [B,H,M,N]) and rows [R]."""
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
        scale_log2=scale * 1.4426950408889634,
        D=q.shape[3],
        BLOCK_D=block_d,
        REST_D=rest_d,
        HAS_ROWS=rows is not None,
        BIAS=0 if bias is None else 2 if bias.dtype == torch.bool else 1,
        CAUSAL=is_causal,
        # A scale that is 0 in fp32 would make NaN of minus infinity.
        FOLD_SCALE=bias is None and scale >= 2**-126,
        INT64_OFFSETS=_is_far(q) or _is_far(k),
        PRECISION=precision(q.dtype),
    )


def value_args(q: Tensor, v: Tensor | None, out: Tensor | None) -> dict[str, Any]:
    """The values and the output (its last dim contiguous), or q in their place where neither is asked for."""
    if v is None or out is None:
        strides = {f"stride_v{x}": 0 for x in "bhnd"} | {f"stride_o{x}": 0 for x in "bhm"}
        return dict(v_ptr=q, out_ptr=q, **strides, DV=16, BLOCK_DV=16, REST_DV=0, HAS_V=False)
    strides = named_strides(out, "ob oh om _")
    del strides["stride__"]
    return dict(**_of_values(v), out_ptr=out, **strides, HAS_V=True)


def gradient_args(grad: Tensor, v: Tensor) -> dict[str, Any]:
    """Arguments for the output gradient [B,H,M,Dv] and the values. Merge after `shared_args`: may set INT64_OFFSETS."""
    far = {"INT64_OFFSETS": True} if _is_far(grad) else {}
    return {**_of_values(v), "do_ptr": grad, **named_strides(grad, "dob doh dom dod"), **far}


def _of_values(v: Tensor) -> dict[str, Any]:
    block_dv, rest_dv = split_d(v.shape[3])
    far = {"INT64_OFFSETS": True} if _is_far(v) else {}
    strides = named_strides(v, "vb vh vn vd")
    return dict(v_ptr=v, **strides, DV=v.shape[3], BLOCK_DV=block_dv, REST_DV=rest_dv, **far)


def named_strides(tensor: Tensor, letters: str) -> dict[str, int]:
    """{"stride_qb": ..., ...} for letters "qb qh qm qd"."""
    return {f"stride_{name}": stride for name, stride in zip(letters.split(), tensor.stride(), strict=True)}


def precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless the user allowed tf32 for torch's own, by either of its two settings."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer != "none":
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _is_far(tensor: Tensor) -> bool:
    """Whether offsets within a tile of rows may pass 2^31."""
    return max(tensor.stride(2), tensor.stride(3)) * _TILE >= 2**31


def split_args(count: int, splits: int, heads: int) -> dict[str, Any]:
    """How `count` heads are split over programs; a mean over all of them is divided where it is stored."""
    whole = splits == 1 and heads == MEAN.value
    return dict(splits=splits, heads_each=-(-count // splits), map_share=1.0 / count if whole else 1.0)
