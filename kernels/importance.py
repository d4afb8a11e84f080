"""Magnitude of each row's weights times their gradients, of each head: from q, k, v, lse and the output's gradient.

P and dP are not stored, and there are no atomics.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.arguments import gradient_args
from attnx.kernels.configs import Launch, Target, importance_config
from attnx.kernels.primitives import (
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
def importance_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, bias_ptr, rows_ptr, lse_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_dom, stride_dod,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, bias_period, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute sum_j P |dP| of BLOCK_M rows of one head: P = exp(s - lse), dP = do v^T."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_m = (pid % blocks_m) * BLOCK_M
    h = to_int64((pid // blocks_m) % H)
    b = to_int64(pid // blocks_m // H)
    bias_b = bias_item(pid // blocks_m // H, bias_period, BIAS_REPEATS)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - first_m
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    _, do_tile, offs_do = query_offsets(rows_ptr, first_m, offs_m, M, stride_dom, HAS_ROWS, INT64_OFFSETS)
    # [BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_DV]; and a second tile of REST_D or REST_DV columns each
    q = head_tiles(q_ptr + b * stride_qb + h * stride_qh + q_tile, offs_q, stride_qd, D, BLOCK_D, REST_D)
    do = head_tiles(do_ptr + b * stride_dob + h * stride_doh + do_tile, offs_do, stride_dod, DV, BLOCK_DV, REST_DV)
    k_head = k_ptr + b * stride_kb + h // GROUP * stride_kh
    v_head = v_ptr + b * stride_vb + h // GROUP * stride_vh
    bias_head = bias_ptr + bias_b * stride_bb + h * stride_bh
    # [BLOCK_M]
    lse = lse_to_log2(tl.load(lse_ptr + (b * H + h) * M + first_m + offs_m, mask=mask_m, other=0.0))

    # [BLOCK_M]
    total = tl.zeros([BLOCK_M], tl.float32)
    stop = N
    if CAUSAL:
        stop = tl.minimum(N, first_m + BLOCK_M)
    # With two products, hoisting addresses out of the loop would exceed the registers.
    for first_n in tl.range(0, stop, BLOCK_N, disable_licm=True):
        mask_n = offs_n < N - first_n
        keys = tl.minimum(offs_n, N - 1 - first_n)
        offs_k, offs_v = row_offsets(keys, stride_kn, INT64_OFFSETS), row_offsets(keys, stride_vn, INT64_OFFSETS)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_DV]; and a second tile of REST_D or REST_DV columns each
        k = head_tiles(k_head + to_int64(first_n) * stride_kn, offs_k, stride_kd, D, BLOCK_D, REST_D)
        v = head_tiles(v_head + to_int64(first_n) * stride_vn, offs_v, stride_vd, DV, BLOCK_DV, REST_DV)
        # [BLOCK_M, BLOCK_N]
        s = masked_scores(
            products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
            bias_head, pos_m.to(tl.int64) * stride_bm, mask_m, pos_m, first_n + offs_n, mask_n,
            stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE, True,
        )  # fmt: skip
        p = tl.exp2(s * score_unit(scale_log2, FOLD_SCALE) - lse[:, None])
        dp = products(do, v, DV, BLOCK_DV, REST_DV, BLOCK_M, BLOCK_N, PRECISION)
        total += tl.sum(p * tl.abs(dp), 1)
    tl.store(out_ptr + (b * H + h) * M + first_m + offs_m, total, mask=mask_m)


def importance_launch(
    shared: dict[str, Any], grad: Tensor, v: Tensor, lse: Tensor, out: Tensor, target: Target
) -> Launch:
    """Launch that writes the importance of every row, out [B, H, M] fp32.

    grad: [B, H, M, Dv]. lse: [B, H, M] fp32, contiguous.
    """
    q = shared["q_ptr"]
    widest = max(shared["D"], v.shape[3])
    config = importance_config(widest, q.element_size(), shared["M"], target, shared["BIAS"] != 0)
    grid = (triton.cdiv(shared["M"], config.block_m) * q.shape[0] * q.shape[1],)
    args = {**shared, **gradient_args(grad, v), "lse_ptr": lse, "out_ptr": out}
    return Launch(importance_kernel, grid, args, config)
