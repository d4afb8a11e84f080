"""r @ P of each head from q, k and lse, without P. Rollout uses it if the map is too large to store."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.configs import Launch, Target, vecmat_config
from attnx.kernels.primitives import (
    NO_BIAS,
    bias_item,
    head_tiles,
    lse_to_log2,
    masked_scores,
    products,
    query_offsets,
    row_offsets,
    score_unit,
    to_int64,
)


@triton.jit
def vecmat_kernel(
    r_ptr, q_ptr, k_ptr, bias_ptr, rows_ptr, lse_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, bias_period, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N entries of r @ P of one head. The keys stay on chip while the loop runs over the queries."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first_n = (pid % blocks_n) * BLOCK_N
    h = to_int64((pid // blocks_n) % H)
    b = to_int64(pid // blocks_n // H)
    bias_b = bias_item(pid // blocks_n // H, bias_period, BIAS_REPEATS)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_n = offs_n < N - first_n
    offs_k = row_offsets(tl.minimum(offs_n, N - 1 - first_n), stride_kn, INT64_OFFSETS)
    k_tile = k_ptr + b * stride_kb + h // GROUP * stride_kh + to_int64(first_n) * stride_kn
    # ([BLOCK_N, BLOCK_D],) or ([BLOCK_N, BLOCK_D], [BLOCK_N, REST_D])
    k = head_tiles(k_tile, offs_k, stride_kd, D, BLOCK_D, REST_D)
    q_head = q_ptr + b * stride_qb + h * stride_qh
    bias_head = bias_ptr + bias_b * stride_bb + h * stride_bh

    # [BLOCK_M, BLOCK_N]; summed over its rows once, after the loop
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    start = 0
    if CAUSAL and not HAS_ROWS:
        start = first_n // BLOCK_M * BLOCK_M
    lse_head, r_batch = lse_ptr + (b * H + h) * M, r_ptr + b * M
    # [BLOCK_M], [BLOCK_M]
    next_lse = tl.load(lse_head + start + offs_m, mask=offs_m < M - start, other=0.0)
    next_r = tl.load(r_batch + start + offs_m, mask=offs_m < M - start, other=0.0)
    # With a bias, hoisting addresses out of the loop would exceed the registers.
    for first_m in tl.range(start, M, BLOCK_M, disable_licm=BIAS != NO_BIAS):
        mask_m = offs_m < M - first_m
        lse, r = lse_to_log2(next_lse), next_r
        # Prefetch lse and r of the next rows: [BLOCK_M], [BLOCK_M].
        rest = M - first_m - BLOCK_M
        next_lse = tl.load(lse_head + first_m + BLOCK_M + offs_m, mask=offs_m < rest, other=0.0)
        next_r = tl.load(r_batch + first_m + BLOCK_M + offs_m, mask=offs_m < rest, other=0.0)
        pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
        # ([BLOCK_M, BLOCK_D],) or ([BLOCK_M, BLOCK_D], [BLOCK_M, REST_D])
        q = head_tiles(q_head + q_tile, offs_q, stride_qd, D, BLOCK_D, REST_D)
        # [BLOCK_M, BLOCK_N]
        s = masked_scores(
            products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
            bias_head, pos_m.to(tl.int64) * stride_bm, mask_m, pos_m, first_n + offs_n, mask_n,
            stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE, False,
        )  # fmt: skip
        p = tl.exp2(s * score_unit(scale_log2, FOLD_SCALE) - lse[:, None])
        # Where r is 0, P may be NaN and must not contribute.
        total += tl.where((r == 0.0)[:, None], 0.0, r[:, None] * p)
    # [BLOCK_N]
    tl.store(out_ptr + (b * H + h) * N + first_n + offs_n, tl.sum(total, 0), mask=mask_n)


def vecmat_launch(shared: dict[str, Any], r: Tensor, lse: Tensor, out: Tensor, target: Target) -> Launch:
    """Launch that writes r @ P of every head, out [B, H, N] fp32.

    r: [B, M] fp32, contiguous. lse: [B, H, M] fp32, contiguous.
    """
    q = shared["q_ptr"]
    config = vecmat_config(shared["D"], q.element_size(), shared["M"], target, shared["BIAS"] != 0)
    grid = (triton.cdiv(shared["N"], config.block_n) * q.shape[0] * q.shape[1],)
    return Launch(vecmat_kernel, grid, {**shared, "r_ptr": r, "lse_ptr": lse, "out_ptr": out}, config)
