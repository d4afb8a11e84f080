"""Output and head-reduced map of short rows in one launch. Each weight is computed once."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.arguments import split_args
from attnx.kernels.configs import Launch, ShortRows
from attnx.kernels.primitives import (
    EACH,
    MAX,
    MIN,
    bias_item,
    dot,
    finite_max,
    fuse_into,
    fused_start,
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
def weigh_values(
    p, v_head, out_tile, share, offs_m, mask_m, N, stride_vn, stride_vd, stride_om,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store share * (p @ V) of one head.

    p: PARTS tiles [BLOCK_M, BLOCK_N] and, if TAIL > 0, a tile [BLOCK_M, TAIL]. share: [BLOCK_M].
    """
    # [BLOCK_M, BLOCK_DV]
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in tl.static_range(PARTS + (TAIL > 0)):
        offs_n = tl.arange(0, BLOCK_N if part < PARTS else TAIL)
        v_tile = v_head + to_int64(part * BLOCK_N) * stride_vn
        offs_v = row_offsets(offs_n, stride_vn, INT64_OFFSETS)
        # [BLOCK_N or TAIL, BLOCK_DV]
        if part == PARTS + (TAIL > 0) - 1:
            v = load_masked(v_tile, offs_v, offs_n < N - part * BLOCK_N, stride_vd, 0, BLOCK_DV, DV)
        else:
            v = load_tile(v_tile, offs_v, stride_vd, 0, BLOCK_DV, DV)
        if PARTS == 1 and part == 1:
            # A separate accumulator, because a product that feeds a product makes Triton assign whole rows to warps.
            tail = dot(p[part], v, tl.zeros([BLOCK_M, BLOCK_DV], tl.float32), PRECISION)
        else:
            out = dot(p[part], v, out, PRECISION)
    out = out * share[:, None]
    if PARTS == 1 and TAIL > 0:
        out += tail * share[:, None]
    offs_d = tl.arange(0, BLOCK_DV)
    store_tile(out_tile, out, offs_m, offs_d, mask_m, offs_d < DV, stride_om)


@triton.jit
def one_pass_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, rows_ptr, out_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ob, stride_oh, stride_om,
    H, GROUP, M, N, bias_period, scale_log2, splits, heads_each, map_share,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_V: tl.constexpr, HEADS: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, TAIL: tl.constexpr, DELAY_PV: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows, one head after another. Whole rows of keys are on chip: PARTS tiles of BLOCK_N and a TAIL.

    With DELAY_PV, P V of a head is computed in the next iteration. If both products are in the same iteration, the
    first feeds the second, and Triton assigns whole rows to warps, so that half of the warps duplicate work.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_m = (pid % blocks_m) * BLOCK_M
    plane = pid // blocks_m
    b = to_int64(plane // splits)
    bias_b = bias_item(plane // splits, bias_period, BIAS_REPEATS)
    first_head = (plane % splits) * heads_each
    last_head = tl.minimum(first_head + heads_each, H) - 1

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - first_m
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    bias_rows = pos_m.to(tl.int64) * stride_bm
    out_batch = out_ptr + b * stride_ob + to_int64(first_m) * stride_om

    # Tiles [BLOCK_M, BLOCK_N or TAIL] of the map and of the weights
    fused = ()
    p = ()
    for part in tl.static_range(PARTS + (TAIL > 0)):
        fused = fused + (fused_start(BLOCK_M, BLOCK_N if part < PARTS else TAIL, HEADS),)
        p = p + (tl.zeros([BLOCK_M, BLOCK_N if part < PARTS else TAIL], v_ptr.dtype.element_ty),)
    # [BLOCK_M]
    share = tl.zeros([BLOCK_M], tl.float32)

    for step in tl.range(first_head, last_head + 1 + DELAY_PV, disable_licm=True):
        if DELAY_PV:
            h_prev = to_int64(tl.maximum(step - 1, first_head))
            weigh_values(
                p, v_ptr + b * stride_vb + h_prev // GROUP * stride_vh, out_batch + h_prev * stride_oh, share,
                offs_m, offs_m < tl.where(step > first_head, M - first_m, 0), N, stride_vn, stride_vd, stride_om,
                DV, BLOCK_DV, INT64_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, PARTS, TAIL,
            )  # fmt: skip
        # The extra iteration of DELAY_PV repeats the last head. MAX and MIN do not change, and sums get a share of 0.
        h = to_int64(tl.minimum(step, last_head))
        q_head = q_ptr + b * stride_qb + h * stride_qh + q_tile
        # ([BLOCK_M, BLOCK_D],)
        q = head_tiles(q_head, offs_q, stride_qd, D, BLOCK_D, REST_D)
        k_head = k_ptr + b * stride_kb + h // GROUP * stride_kh
        s = ()
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for part in tl.static_range(PARTS + (TAIL > 0)):
            offs_n = tl.arange(0, BLOCK_N if part < PARTS else TAIL)
            mask_n = offs_n < N - part * BLOCK_N
            rows = offs_n
            if part == PARTS + (TAIL > 0) - 1:
                rows = tl.minimum(offs_n, N - 1 - part * BLOCK_N)
            offs_k = row_offsets(rows, stride_kn, INT64_OFFSETS)
            k_tile = k_head + to_int64(part * BLOCK_N) * stride_kn
            # ([BLOCK_N or TAIL, BLOCK_D],)
            k = head_tiles(k_tile, offs_k, stride_kd, D, BLOCK_D, REST_D)
            # [BLOCK_M, BLOCK_N or TAIL]
            tile = masked_scores(
                products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N if part < PARTS else TAIL, PRECISION),
                bias_ptr + bias_b * stride_bb + h * stride_bh, bias_rows, mask_m, pos_m,
                part * BLOCK_N + offs_n, mask_n, stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE,
                part == PARTS + (TAIL > 0) - 1,
            )  # fmt: skip
            m = tl.maximum(m, tl.max(tile, 1))
            s = s + (tile,)

        m = finite_max(m) * score_unit(scale_log2, FOLD_SCALE)
        # [BLOCK_M]
        l = tl.zeros([BLOCK_M], tl.float32)
        weights = ()
        for part in tl.static_range(PARTS + (TAIL > 0)):
            weight = tl.exp2(s[part] * score_unit(scale_log2, FOLD_SCALE) - m[:, None])
            l += tl.sum(weight, 1)
            weights = weights + (weight,)
        # For a row without keys, l and all weights are 0.
        share = 1.0 / tl.where(l == 0.0, 1.0, l)
        if DELAY_PV and HEADS != MAX and HEADS != MIN:
            share = tl.where(step > last_head, 0.0, share)
        previous = fused
        fused = ()
        p = ()
        for part in tl.static_range(PARTS + (TAIL > 0)):
            fused = fused + (fuse_into(previous[part], weights[part] * share[:, None], HEADS),)
            p = p + (weights[part].to(v_ptr.dtype.element_ty),)
        if HAS_V and not DELAY_PV:
            weigh_values(
                p, v_ptr + b * stride_vb + h // GROUP * stride_vh, out_batch + h * stride_oh, share,
                offs_m, mask_m, N, stride_vn, stride_vd, stride_om,
                DV, BLOCK_DV, INT64_OFFSETS, PRECISION, BLOCK_M, BLOCK_N, PARTS, TAIL,
            )  # fmt: skip

    map_tile = map_ptr + to_int64(plane) * M * N + to_int64(first_m) * N
    for part in tl.static_range(PARTS + (TAIL > 0)):
        offs_n = part * BLOCK_N + tl.arange(0, BLOCK_N if part < PARTS else TAIL)
        store_tile(map_tile, fused[part] * map_share, offs_m, offs_n, mask_m, offs_n < N, N)


def one_pass_launch(
    shared: dict[str, Any],
    values: dict[str, Any],
    maps: Tensor,
    heads: int,
    splits: int,
    short: ShortRows,
) -> Launch:
    """Launch that writes out [B, H, M, Dv] (if values are given) and maps [B * splits, M, N] fp32.

    Each map is fused over its share of the heads.
    """
    q = shared["q_ptr"]
    # With four warps each has its own rows anyway, and with heads="each" the extra iteration would double the work.
    delay_pv = short.delay_pv and values["HAS_V"] and not (heads == EACH.value and short.config.num_warps == 4)
    inputs = {name: value for name, value in {**shared, **values}.items() if name != "REST_DV"}
    args = {
        **inputs,
        **dict(map_ptr=maps, HEADS=heads, **split_args(q.shape[1], splits, heads)),
        **dict(BLOCK_D=short.padded, REST_D=0, BLOCK_DV=short.padded),
        **dict(PARTS=short.parts, TAIL=short.tail, DELAY_PV=delay_pv),
    }
    grid = (triton.cdiv(shared["M"], short.config.block_m) * q.shape[0] * splits,)
    return Launch(one_pass_kernel, grid, args, short.config)
