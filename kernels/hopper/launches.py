"""Launches of the Hopper kernels: their grids and arguments."""

from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from attnx.kernels.arguments import split_args
from attnx.kernels.configs import Config, Launch, Target
from attnx.kernels.hopper.arguments import Attention, Box
from attnx.kernels.hopper.configs import CHUNK, ROWS, ShortRow, Tile
from attnx.kernels.hopper.map import map_kernel
from attnx.kernels.hopper.short_rows import short_rows_kernel
from attnx.kernels.hopper.vecmat import vecmat_kernel
from attnx.kernels.primitives import ADDITIVE, BOOLEAN, NO_BIAS


def short_rows_launch(
    attention: Attention, v: Tensor | None, out: Tensor | None, maps: Tensor, heads: int, splits: int, row: ShortRow
) -> Launch:
    """Launch that writes out [B, H, M, Dv] (if v [B, Hk, N, Dv] is given) and maps [B * splits, M, N] fp32."""
    q, k = attention.q, attention.k
    strides = (0, 0, 0) if out is None else out.stride()[:3]
    args = dict(
        q_desc=Box(q, ROWS, row.width),
        k_desc=Box(k, CHUNK, row.width),
        v_desc=Box(k if v is None else v, CHUNK, row.width),
        out_ptr=q if out is None else out,
        map_ptr=maps,
        **dict(zip(("stride_ob", "stride_oh", "stride_om"), strides, strict=True)),
        **_shared(attention, heads, splits),
        **dict(NC=row.chunks, TAIL=row.tail, TWICE=row.twice, STAGES=row.stages, DV=0 if v is None else v.shape[3]),
    )
    config = Config(ROWS, CHUNK, 4, row.stages, row.chunks)
    return Launch(short_rows_kernel, (cdiv(q.shape[2], ROWS) * q.shape[0] * splits,), args, config)


def map_launch(
    attention: Attention,
    lse: Tensor,
    maps: Tensor,
    heads: int,
    splits: int,
    tile: Tile,
    target: Target,
    inf_is_nan: bool = False,
) -> Launch:
    """Launch that writes maps [B * splits, M, N] fp32, each fused over its share of the heads.

    lse: [B, H, M] fp32, contiguous. inf_is_nan: plus infinity means that the row has NaN, and not that it has no keys.
    """
    q = attention.q
    planes = q.shape[0] * splits
    args = dict(
        **_boxes(attention, tile),
        lse_ptr=lse,
        map_ptr=maps,
        planes=planes,
        **_shared(attention, heads, splits),
        **dict(NC=tile.chunks, STAGES=tile.stages, REST_D=tile.rest, INF_IS_NAN=inf_is_nan),
    )
    tiles = planes * cdiv(q.shape[2], ROWS) * cdiv(attention.k.shape[2], tile.keys)
    grid = (min(tiles, target.processor_count),)
    return Launch(map_kernel, grid, args, Config(ROWS, CHUNK, 4, tile.stages, tile.chunks))


def vecmat_launch(attention: Attention, r: Tensor, lse: Tensor, out: Tensor, tile: Tile) -> Launch:
    """Launch that writes r @ P of every head, out [B, H, 2, N] fp32, as a sum of two parts.

    r: [B, M] fp32, contiguous. lse: [B, H, M] fp32, contiguous. There is no mask.
    """
    q, k = attention.q, attention.k
    shared = _shared(attention, 0, 1)
    args = dict(
        **_boxes(attention, tile),
        r_ptr=r,
        lse_ptr=lse,
        out_ptr=out,
        **{name: shared[name] for name in ("H", "GROUP", "M", "N", "scale_log2")},
        **dict(NC=tile.chunks, STAGES=tile.stages, REST_D=tile.rest),
    )
    grid = (cdiv(k.shape[2], tile.keys) * q.shape[0] * q.shape[1],)
    return Launch(vecmat_kernel, grid, args, Config(ROWS, CHUNK, 4, tile.stages, tile.chunks))


def _boxes(attention: Attention, tile: Tile) -> dict[str, Box]:
    """Boxes of the first columns of q and k, and of the rest, which are not read if there is none."""
    q, k, keys, rest = attention.q, attention.k, tile.keys, tile.rest or tile.width
    return dict(
        q_desc=Box(q, ROWS, tile.width),
        k_desc=Box(k, keys, tile.width),
        q_rest_desc=Box(q, ROWS, rest),
        k_rest_desc=Box(k, keys, rest),
    )


def _shared(attention: Attention, heads: int, splits: int) -> dict[str, Any]:
    """Arguments of all kernels."""
    q, k, mask = attention.q, attention.k, attention.mask
    kind = NO_BIAS if mask is None else BOOLEAN if mask.dtype == torch.bool else ADDITIVE
    return dict(
        mask_ptr=q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        H=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        M=q.shape[2],
        N=k.shape[2],
        mask_period=1 if mask is None else len(mask),
        stride_mb=0 if mask is None else mask.stride(0),
        stride_mn=0 if mask is None else mask.stride(1),
        scale_log2=attention.scale * 1.4426950408889634,
        HEADS=heads,
        CAUSAL=attention.is_causal,
        MASK=kind.value,
        **split_args(q.shape[1], splits, heads),
    )
