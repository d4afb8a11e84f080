"""Attention output and log-sum-exp for any number of keys, by online softmax."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.configs import Launch, Target, forward_config
from attnx.kernels.primitives import (
    LN2,
    NO_BIAS,
    bias_item,
    dot,
    finite_max,
    head_tiles,
    load_masked,
    load_tile,
    masked_scores,
    products,
    query_offsets,
    row_offsets,
    score_unit,
    store_tile,
    to_int64,
)


@triton.jit
def attend(
    acc, m, l, q, k_head, v_head, bias_head, bias_rows, pos_m, mask_m, start, end, N,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, HAS_V: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, EDGE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Process keys start..end in tiles of BLOCK_N and return the updated (acc, m, l).

    acc: ([BLOCK_M, BLOCK_DV],) or ([BLOCK_M, BLOCK_DV], [BLOCK_M, REST_DV]), the unnormalised output.
    m, l: [BLOCK_M], row maxima and sums of the exponentials.
    EDGE: the last tile may extend beyond key N.
    """
    offs = tl.arange(0, BLOCK_N)
    # The edge loop has one or two tiles. If it is pipelined, ptxas serialises the HGMMAs of both loops (C7515).
    # With a bias, hoisting addresses out of the loop would exceed the registers.
    for first in tl.range(start, end, BLOCK_N, num_stages=1 if EDGE else None, disable_licm=BIAS != NO_BIAS):
        mask_n = offs < N - first
        rows = tl.minimum(offs, N - 1 - first) if EDGE else offs
        k_tile = k_head + to_int64(first) * stride_kn
        # ([BLOCK_N, BLOCK_D],) or ([BLOCK_N, BLOCK_D], [BLOCK_N, REST_D])
        k = head_tiles(k_tile, row_offsets(rows, stride_kn, INT64_OFFSETS), stride_kd, D, BLOCK_D, REST_D)
        # [BLOCK_M, BLOCK_N]
        s = masked_scores(
            products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
            bias_head, bias_rows, mask_m, pos_m, first + offs, mask_n, stride_bn, scale_log2,
            BIAS, CAUSAL, FOLD_SCALE, EDGE,
        )  # fmt: skip
        # [BLOCK_M]
        m_new = tl.maximum(m, tl.max(s, 1) * score_unit(scale_log2, FOLD_SCALE))
        shift = finite_max(m_new)
        # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * score_unit(scale_log2, FOLD_SCALE) - shift[:, None])
        # [BLOCK_M]
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 1)
        if HAS_V:
            v_tile = v_head + to_int64(first) * stride_vn
            offs_v = row_offsets(offs, stride_vn, INT64_OFFSETS)
            p = p.to(v_head.dtype.element_ty)
            # [BLOCK_N, BLOCK_DV]
            if EDGE:
                v = load_masked(v_tile, offs_v, mask_n, stride_vd, 0, BLOCK_DV, DV)
            else:
                v = load_tile(v_tile, offs_v, stride_vd, 0, BLOCK_DV, DV)
            # [BLOCK_M, BLOCK_DV]
            out = dot(p, v, acc[0] * alpha[:, None], PRECISION)
            if REST_DV > 0:
                # [BLOCK_N, REST_DV]
                rest = load_masked(v_tile, offs_v, mask_n, stride_vd, BLOCK_DV, REST_DV, DV)
                acc = (out, dot(p, rest, acc[1] * alpha[:, None], PRECISION))
            else:
                acc = (out,)
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ob, stride_oh, stride_om,
    H, GROUP, M, N, bias_period, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, REST_DV: tl.constexpr, HAS_V: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows of one head: out [B, H, M, DV] and lse [B, H, M].

    Without values (HAS_V is False) only lse is written.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_m = (pid % blocks_m) * BLOCK_M
    h = to_int64((pid // blocks_m) % H)
    b = to_int64(pid // blocks_m // H)
    bias_b = bias_item(pid // blocks_m // H, bias_period, BIAS_REPEATS)
    hk = h // GROUP

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - first_m
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    # ([BLOCK_M, BLOCK_D],) or ([BLOCK_M, BLOCK_D], [BLOCK_M, REST_D])
    q = head_tiles(q_ptr + b * stride_qb + h * stride_qh + q_tile, offs_q, stride_qd, D, BLOCK_D, REST_D)
    k_head = k_ptr + b * stride_kb + hk * stride_kh
    v_head = v_ptr + b * stride_vb + hk * stride_vh
    bias_head = bias_ptr + bias_b * stride_bb + h * stride_bh
    bias_rows = pos_m.to(tl.int64) * stride_bm

    # [BLOCK_M]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    # [BLOCK_M, BLOCK_DV], and [BLOCK_M, REST_DV] for the rest
    acc = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),)
    if REST_DV > 0:
        acc = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), tl.zeros([BLOCK_M, REST_DV], tl.float32))
    # Tiles 0..inner are complete and visible to every row, so they need no mask. The second call masks the rest.
    inner, end = N // BLOCK_N * BLOCK_N, N
    if CAUSAL:
        inner = 0 if HAS_ROWS else tl.minimum(inner, first_m // BLOCK_N * BLOCK_N)
        end = N if HAS_ROWS else tl.minimum(N, first_m + BLOCK_M)
    acc, m, l = attend(
        acc, m, l, q, k_head, v_head, bias_head, bias_rows, pos_m, mask_m, 0, inner, N,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, scale_log2,
        D, BLOCK_D, REST_D, DV, BLOCK_DV, REST_DV, HAS_V, BIAS, False, FOLD_SCALE, INT64_OFFSETS, False, PRECISION,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q, k_head, v_head, bias_head, bias_rows, pos_m, mask_m, inner, end, N,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_bn, scale_log2,
        D, BLOCK_D, REST_D, DV, BLOCK_DV, REST_DV, HAS_V, BIAS, CAUSAL, FOLD_SCALE, INT64_OFFSETS, True, PRECISION,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip

    # For a row without keys, l is 0, so its output is 0 and its lse is -inf.
    tl.store(lse_ptr + (b * H + h) * M + first_m + offs_m, (finite_max(m) + tl.log2(l)) * LN2, mask=mask_m)
    if HAS_V:
        # [BLOCK_M, 1]
        inv_l = (1.0 / tl.where(l == 0.0, 1.0, l))[:, None]
        out_tile = out_ptr + b * stride_ob + h * stride_oh + to_int64(first_m) * stride_om
        offs_d = tl.arange(0, BLOCK_DV)
        store_tile(out_tile, acc[0] * inv_l, offs_m, offs_d, mask_m, offs_d < DV, stride_om)
        if REST_DV > 0:
            offs_d = BLOCK_DV + tl.arange(0, REST_DV)
            store_tile(out_tile, acc[1] * inv_l, offs_m, offs_d, mask_m, offs_d < DV, stride_om)


def forward_launch(shared: dict[str, Any], values: dict[str, Any], lse: Tensor, target: Target) -> Launch:
    """Launch that writes out [B, H, M, Dv] (if values are given) and lse [B, H, M] fp32 (natural logarithm)."""
    q = shared["q_ptr"]
    head_dim = max(shared["D"], values["DV"]) if values["HAS_V"] else shared["D"]
    heads = q.shape[0] * q.shape[1]
    even = not values["HAS_V"] or (shared["D"] == values["DV"] and shared["REST_D"] == 0)
    config = forward_config(head_dim, q.element_size(), shared["M"], heads, target, shared["BIAS"] != 0, even)
    grid = (triton.cdiv(shared["M"], config.block_m) * heads,)
    return Launch(forward_kernel, grid, {**shared, **values, "lse_ptr": lse}, config)
