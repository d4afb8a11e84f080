"""Head-reduced map, or selected rows of it, from q, k and lse. Each tile is written once, without atomics."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.arguments import split_args
from attnx.kernels.configs import Config, Launch
from attnx.kernels.primitives import (
    MEAN,
    NO_BIAS,
    bias_item,
    fuse_into,
    fused_start,
    head_tiles,
    lse_to_log2,
    masked_scores,
    products,
    query_offsets,
    row_offsets,
    score_unit,
    store_tile,
    to_int64,
)


@triton.jit
def map_kernel(
    q_ptr, k_ptr, bias_ptr, rows_ptr, lse_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, bias_period, scale_log2, splits, heads_each, map_share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr, HEADS: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, INF_IS_NAN: tl.constexpr,
):  # fmt: skip
    """Compute PARTS adjacent tiles [BLOCK_M, BLOCK_N] of a map [M, N]: P = exp(s - lse), fused over the heads.

    Without a bias, rows and columns outside the map are computed unmasked and not stored. The lse of the next head is
    prefetched, because each iteration would otherwise wait for its load.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N * PARTS)
    block_m, block_n = tl.swizzle2d(pid % (blocks_m * blocks_n) // blocks_n, pid % blocks_n, blocks_m, blocks_n, 8)
    plane = pid // (blocks_m * blocks_n)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N * PARTS
    b = to_int64(plane // splits)
    bias_b = bias_item(plane // splits, bias_period, BIAS_REPEATS)
    first_head = (plane % splits) * heads_each
    last_head = tl.minimum(first_head + heads_each, H) - 1

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - first_m
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    q_batch = q_ptr + b * stride_qb + q_tile
    k_batch = k_ptr + b * stride_kb + to_int64(first_n) * stride_kn
    lse_tile = lse_ptr + b * H * M + first_m
    bias_rows = pos_m.to(tl.int64) * stride_bm

    # PARTS tiles [BLOCK_M, BLOCK_N]
    fused = ()
    for _ in tl.static_range(PARTS):
        fused = fused + (fused_start(BLOCK_M, BLOCK_N, HEADS),)
    # [BLOCK_M]
    next_lse = tl.load(lse_tile + to_int64(first_head) * M + offs_m, mask=mask_m, other=0.0)
    # With a bias, hoisting addresses out of the loop would exceed the registers.
    for head in tl.range(first_head, last_head + 1, disable_licm=BIAS != NO_BIAS):
        h = to_int64(head)
        lse = lse_to_log2(next_lse, INF_IS_NAN)
        # [BLOCK_M]
        next_lse = tl.load(lse_tile + to_int64(tl.minimum(head + 1, last_head)) * M + offs_m, mask=mask_m, other=0.0)
        # ([BLOCK_M, BLOCK_D],) or ([BLOCK_M, BLOCK_D], [BLOCK_M, REST_D])
        q = head_tiles(q_batch + h * stride_qh, offs_q, stride_qd, D, BLOCK_D, REST_D)
        previous = fused
        fused = ()
        for part in tl.static_range(PARTS):
            columns = offs_n + part * BLOCK_N
            offs_k = row_offsets(tl.minimum(columns, N - 1 - first_n), stride_kn, INT64_OFFSETS)
            # ([BLOCK_N, BLOCK_D],) or ([BLOCK_N, BLOCK_D], [BLOCK_N, REST_D])
            k = head_tiles(k_batch + h // GROUP * stride_kh, offs_k, stride_kd, D, BLOCK_D, REST_D)
            # [BLOCK_M, BLOCK_N]
            s = masked_scores(
                products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
                bias_ptr + bias_b * stride_bb + h * stride_bh, bias_rows, mask_m, pos_m, first_n + columns,
                columns < N - first_n, stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE, False,
            )  # fmt: skip
            p = tl.exp2(s * score_unit(scale_log2, FOLD_SCALE) - lse[:, None])
            fused = fused + (fuse_into(previous[part], p, HEADS),)
    map_tile = map_ptr + to_int64(plane) * M * N + to_int64(first_m) * N + first_n
    for part in tl.static_range(PARTS):
        columns = offs_n + part * BLOCK_N
        store_tile(map_tile, fused[part] * map_share, offs_m, columns, mask_m, columns < N - first_n, N)


def map_launch(
    shared: dict[str, Any],
    lse: Tensor,
    maps: Tensor,
    heads: int,
    splits: int,
    config: Config,
    inf_is_nan: bool = False,
) -> Launch:
    """Launch that writes maps [B * splits, M, N] fp32, each fused over its share of the heads.

    lse: [B, H, M] fp32 of the same rows. inf_is_nan: plus infinity means that the row has NaN, and not that it has no
    keys.
    """
    q = shared["q_ptr"]
    args = {**shared, "lse_ptr": lse, "map_ptr": maps, "HEADS": heads, **split_args(q.shape[1], splits, heads)}
    args |= {"PARTS": config.parts, "INF_IS_NAN": inf_is_nan}
    tiles = triton.cdiv(shared["M"], config.block_m) * triton.cdiv(shared["N"], config.block_n * config.parts)
    return Launch(map_kernel, (tiles * q.shape[0] * splits,), args, config)


@triton.jit
def fuse_kernel(maps_ptr, map_ptr, size, splits, share, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Fuse every `splits` partial maps [size] into one map, in a fixed order, so that results are deterministic."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = to_int64(tl.program_id(1))
    mask = offs < size
    first = maps_ptr + plane * splits * size + offs
    # [BLOCK]
    fused = tl.load(first, mask=mask, other=0.0)
    for split in range(1, splits):
        fused = fuse_into(fused, tl.load(first + to_int64(split) * size, mask=mask, other=0.0), HEADS)
    tl.store(map_ptr + plane * size + offs, fused * share, mask=mask)


def fuse_launch(maps: Tensor, amap: Tensor, count: int, splits: int, heads: int) -> Launch:
    """Launch that writes the map [B, M, N] fp32 of `count` heads from partial maps [B * splits, M, N]."""
    size = amap.numel() // amap.shape[0]
    args = dict(
        maps_ptr=maps,
        map_ptr=amap,
        size=size,
        splits=splits,
        share=1.0 / count if heads == MEAN.value else 1.0,
        HEADS=heads,
    )
    return Launch(fuse_kernel, (triton.cdiv(size, 1024), amap.shape[0]), {**args, "BLOCK": 1024}, Config(0, 0, 4, 1))
