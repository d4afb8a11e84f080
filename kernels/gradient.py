"""Head-reduced map weighted by its own gradient, or selected rows of it.

Each tile is written once, without atomics, and P and dP are not stored.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.arguments import gradient_args, split_args
from attnx.kernels.configs import Config, Launch
from attnx.kernels.primitives import (
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
def gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, bias_ptr, rows_ptr, lse_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, bias_period, scale_log2, splits, heads_each, map_share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr,
    HEADS: tl.constexpr, CLAMP: tl.constexpr, HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BIAS_REPEATS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute one tile [BLOCK_M, BLOCK_N] of a map [M, N]: P = exp(s - lse) times dP = do v^T, fused over the heads.

    Without a bias, rows and columns outside the map are computed unmasked and not stored.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = tl.swizzle2d(pid % (blocks_m * blocks_n) // blocks_n, pid % blocks_n, blocks_m, blocks_n, 8)
    plane = pid // (blocks_m * blocks_n)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    b = to_int64(plane // splits)
    bias_b = bias_item(plane // splits, bias_period, BIAS_REPEATS)
    first_head = (plane % splits) * heads_each
    last_head = tl.minimum(first_head + heads_each, H) - 1

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - first_m, offs_n < N - first_n
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    _, do_tile, offs_do = query_offsets(rows_ptr, first_m, offs_m, M, stride_dom, HAS_ROWS, INT64_OFFSETS)
    keys = tl.minimum(offs_n, N - 1 - first_n)
    offs_k, offs_v = row_offsets(keys, stride_kn, INT64_OFFSETS), row_offsets(keys, stride_vn, INT64_OFFSETS)
    q_batch = q_ptr + b * stride_qb + q_tile
    k_batch = k_ptr + b * stride_kb + to_int64(first_n) * stride_kn
    v_batch = v_ptr + b * stride_vb + to_int64(first_n) * stride_vn
    do_batch = do_ptr + b * stride_dob + do_tile
    lse_tile = lse_ptr + b * H * M + first_m
    bias_rows = pos_m.to(tl.int64) * stride_bm

    # [BLOCK_M, BLOCK_N]
    fused = fused_start(BLOCK_M, BLOCK_N, HEADS, not CLAMP)
    # With two products, hoisting addresses out of the loop would exceed the registers.
    for head in tl.range(first_head, last_head + 1, disable_licm=True):
        h = to_int64(head)
        # [BLOCK_M, BLOCK_D], [BLOCK_N, BLOCK_D]; and a second tile of REST_D columns each
        q = head_tiles(q_batch + h * stride_qh, offs_q, stride_qd, D, BLOCK_D, REST_D)
        k = head_tiles(k_batch + h // GROUP * stride_kh, offs_k, stride_kd, D, BLOCK_D, REST_D)
        # [BLOCK_M, BLOCK_N]
        s = masked_scores(
            products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
            bias_ptr + bias_b * stride_bb + h * stride_bh, bias_rows, mask_m, pos_m, first_n + offs_n, mask_n,
            stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE, False,
        )  # fmt: skip
        # [BLOCK_M]
        lse = lse_to_log2(tl.load(lse_tile + h * M + offs_m, mask=mask_m, other=0.0))
        # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * score_unit(scale_log2, FOLD_SCALE) - lse[:, None])
        # [BLOCK_M, BLOCK_DV], [BLOCK_N, BLOCK_DV]; and a second tile of REST_DV columns each
        do = head_tiles(do_batch + h * stride_doh, offs_do, stride_dod, DV, BLOCK_DV, REST_DV)
        v = head_tiles(v_batch + h // GROUP * stride_vh, offs_v, stride_vd, DV, BLOCK_DV, REST_DV)
        # [BLOCK_M, BLOCK_N]
        dp = products(do, v, DV, BLOCK_DV, REST_DV, BLOCK_M, BLOCK_N, PRECISION)
        if CLAMP:
            dp = tl.maximum(dp, 0.0, propagate_nan=tl.PropagateNan.ALL)
        fused = fuse_into(fused, p * dp, HEADS)
    map_tile = map_ptr + to_int64(plane) * M * N + to_int64(first_m) * N + first_n
    store_tile(map_tile, fused * map_share, offs_m, offs_n, mask_m, mask_n, N)


def gradient_launch(
    shared: dict[str, Any],
    grad: Tensor,
    v: Tensor,
    lse: Tensor,
    maps: Tensor,
    heads: int,
    clamp: bool,
    splits: int,
    config: Config,
) -> Launch:
    """Launch that writes maps [B * splits, M, N] fp32, each fused over its share of the heads.

    grad: [B, H, M, Dv], for all queries; rows are selected as for q. lse: [B, H, R] fp32, of the selected rows.
    """
    q = shared["q_ptr"]
    args = {
        **shared,
        **gradient_args(grad, v),
        "lse_ptr": lse,
        "map_ptr": maps,
        "HEADS": heads,
        "CLAMP": clamp,
        **split_args(q.shape[1], splits, heads),
    }
    tiles = triton.cdiv(shared["M"], config.block_m) * triton.cdiv(shared["N"], config.block_n)
    return Launch(gradient_kernel, (tiles * q.shape[0] * splits,), args, config)
