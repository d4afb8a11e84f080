"""The head-reduced map, or chosen rows of it, from q, k and lse: tile by tile, without atomics."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.configs import Launch, Target, map_config
from attnx.kernels.primitives import (
    EACH,
    LOG2E,
    MEAN,
    fuse_heads,
    fused_start,
    load_tile,
    row_positions,
    scores,
    store_tile,
    wide,
)


@triton.jit
def map_kernel(
    q_ptr, k_ptr, bias_ptr, rows_ptr, lse_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of the map [B, M, N]: P = exp(s - lse), head after head, stored once."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_m = pid % blocks_m
    block_n = (pid // blocks_m) % blocks_n
    plane = (pid // blocks_m // blocks_n).to(tl.int64)
    first, last = 0, H
    b = plane
    if HEADS == EACH:
        b = plane // H
        first = (plane % H).to(tl.int32)
        last = first + 1

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pos_m = row_positions(rows_ptr, offs_m, mask_m, HAS_ROWS)
    offs_n = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N

    fused = fused_start(BLOCK_M, BLOCK_N, HEADS)
    for head in range(first, last):
        h = wide(head)
        hk = h // GROUP
        q = load_tile(q_ptr + b * stride_qb + h * stride_qh, pos_m, mask_m, stride_qm, stride_qd, D, BLOCK_D)
        k = load_tile(k_ptr + b * stride_kb + hk * stride_kh, offs_n, mask_n, stride_kn, stride_kd, D, BLOCK_D)
        bias_head = bias_ptr + b * stride_bb + h * stride_bh
        s = scores(
            q, k, bias_head, pos_m, offs_n, mask_m, mask_n, stride_bm, stride_bn, scale_log2, BIAS, CAUSAL, PRECISION
        )
        lse = tl.load(lse_ptr + (b * H + h) * M + offs_m, mask=mask_m, other=0.0) * LOG2E
        # A row without keys has lse = -inf and scores of -inf: weights of zero, not exp(nan).
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        fused = fuse_heads(fused, tl.exp2(s - lse[:, None]), HEADS)
    if HEADS == MEAN:
        fused = fused / H
    store_tile(map_ptr + plane * M * N, fused, offs_m, offs_n, mask_m, mask_n, N, 1)


def map_launch(shared: dict[str, Any], lse: Tensor, amap: Tensor, heads: int, target: Target) -> Launch:
    """Writes the map ([B,M,N], or [B,H,M,N] for each) fp32; lse: [B,H,M] fp32 of the same (chosen) rows."""
    q = shared["q_ptr"]
    config = map_config(shared["D"], q.element_size(), shared["M"], target, shared["BIAS"] != 0)
    planes = amap.numel() // (amap.shape[-2] * amap.shape[-1])
    grid = (triton.cdiv(shared["M"], config.block_m) * triton.cdiv(shared["N"], config.block_n) * planes,)
    return Launch(map_kernel, grid, {**shared, "lse_ptr": lse, "map_ptr": amap, "HEADS": heads}, config)
