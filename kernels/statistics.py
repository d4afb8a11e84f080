"""Statistics of each row of the weights of each head from q, k and lse, without the weights and without atomics."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.configs import Launch, Target, statistics_config
from attnx.kernels.primitives import (
    LN2,
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

STATISTICS = {"ENTROPY": 1, "DISTANCE": 2, "LARGEST_WEIGHT": 4, "MASS": 8}  # values of attnx.ops.statistics.Statistic


@triton.jit
def statistics_kernel(
    q_ptr, k_ptr, bias_ptr, rows_ptr, lse_ptr, queries_at_ptr, keys_at_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    H, GROUP, M, N, bias_period, scale_log2, places, prefix, stride_out,
    ENTROPY: tl.constexpr, DISTANCE: tl.constexpr, LARGEST_WEIGHT: tl.constexpr, MASS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr,
    HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, BIAS_REPEATS: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr, INT64_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of BLOCK_M rows of one head. The queries stay on chip while the loop runs over keys."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    first_m = (pid % blocks_m) * BLOCK_M
    h = to_int64((pid // blocks_m) % H)
    b = to_int64(pid // blocks_m // H)
    bias_b = bias_item(pid // blocks_m // H, bias_period, BIAS_REPEATS)

    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - first_m
    pos_m, q_tile, offs_q = query_offsets(rows_ptr, first_m, offs_m, M, stride_qm, HAS_ROWS, INT64_OFFSETS)
    # ([BLOCK_M, BLOCK_D],) or ([BLOCK_M, BLOCK_D], [BLOCK_M, REST_D])
    q = head_tiles(q_ptr + b * stride_qb + h * stride_qh + q_tile, offs_q, stride_qd, D, BLOCK_D, REST_D)
    k_head = k_ptr + b * stride_kb + h // GROUP * stride_kh
    bias_head = bias_ptr + bias_b * stride_bb + h * stride_bh
    # [BLOCK_M]
    lse = lse_to_log2(tl.load(lse_ptr + (b * H + h) * M + first_m + offs_m, mask=mask_m, other=0.0))
    if DISTANCE:
        place = to_int64(pid // blocks_m // H % places)
        queries_at = queries_at_ptr + (place * M + first_m + offs_m) * 2
        keys_at = keys_at_ptr + place * N * 2
        # [BLOCK_M], [BLOCK_M]; NaN for a query without a place
        y_m = tl.load(queries_at, mask=mask_m, other=0.0)
        x_m = tl.load(queries_at + 1, mask=mask_m, other=0.0)

    # [BLOCK_M] each
    logs = tl.zeros([BLOCK_M], tl.float32)
    distances = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    stop = N
    if CAUSAL:
        stop = tl.minimum(N, first_m + BLOCK_M)
    # With a bias, hoisting addresses out of the loop would exceed the registers.
    for first_n in tl.range(0, stop, BLOCK_N, disable_licm=BIAS != NO_BIAS):
        mask_n = offs_n < N - first_n
        offs_k = row_offsets(tl.minimum(offs_n, N - 1 - first_n), stride_kn, INT64_OFFSETS)
        # ([BLOCK_N, BLOCK_D],) or ([BLOCK_N, BLOCK_D], [BLOCK_N, REST_D])
        k = head_tiles(k_head + to_int64(first_n) * stride_kn, offs_k, stride_kd, D, BLOCK_D, REST_D)
        # [BLOCK_M, BLOCK_N]
        s = masked_scores(
            products(q, k, D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, PRECISION),
            bias_head, pos_m.to(tl.int64) * stride_bm, mask_m, pos_m, first_n + offs_n, mask_n,
            stride_bn, scale_log2, BIAS, CAUSAL, FOLD_SCALE, True,
        )  # fmt: skip
        log2_p = s * score_unit(scale_log2, FOLD_SCALE) - lse[:, None]
        p = tl.exp2(log2_p)
        if ENTROPY:
            # Where the weight is 0, its logarithm may be minus infinity.
            logs += tl.sum(p * tl.where(p == 0.0, 0.0, log2_p), 1)
        if DISTANCE:
            # [BLOCK_N], [BLOCK_N]; NaN for a key without a place
            y_n = tl.load(keys_at + (first_n + offs_n) * 2, mask=mask_n, other=0.0)
            x_n = tl.load(keys_at + (first_n + offs_n) * 2 + 1, mask=mask_n, other=0.0)
            dy, dx = y_m[:, None] - y_n[None, :], x_m[:, None] - x_n[None, :]
            distances += tl.sum(tl.where((y_n == y_n)[None, :], p * tl.sqrt(dy * dy + dx * dx), 0.0), 1)
        if LARGEST_WEIGHT:
            largest = tl.maximum(largest, tl.max(log2_p, 1))
        if MASS and first_n < prefix:
            mass += tl.sum(tl.where((offs_n < prefix - first_n)[None, :], p, 0.0), 1)

    # [BLOCK_M]
    out = out_ptr + (b * H + h) * M + first_m + offs_m
    if ENTROPY:
        entropy = tl.maximum(0.0 - logs * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out, entropy, mask=mask_m)
        out += stride_out
    if DISTANCE:
        # A query without a place has NaN even if no key has one.
        tl.store(out, distances + y_m * 0.0, mask=mask_m)
        out += stride_out
    if LARGEST_WEIGHT:
        # The maximum skips NaN.
        tl.store(out, tl.where(lse != lse, lse, tl.exp2(largest)), mask=mask_m)
        out += stride_out
    if MASS:
        tl.store(out, mass, mask=mask_m)


def statistics_launch(
    shared: dict[str, Any],
    lse: Tensor,
    queries_at: Tensor | None,
    keys_at: Tensor | None,
    which: int,
    prefix: int,
    out: Tensor,
    target: Target,
) -> Launch:
    """Launch that writes the statistics `which` of every row, out [S, B, H, M] fp32.

    lse: [B, H, M] fp32, contiguous. queries_at: [P, M, 2] fp32, contiguous; keys_at: [P, N, 2]; None without DISTANCE.
    """
    q = shared["q_ptr"]
    config = statistics_config(shared["D"], q.element_size(), shared["M"], target, shared["BIAS"] != 0)
    grid = (triton.cdiv(shared["M"], config.block_m) * q.shape[0] * q.shape[1],)
    args = dict(
        lse_ptr=lse,
        queries_at_ptr=lse if queries_at is None else queries_at,
        keys_at_ptr=lse if keys_at is None else keys_at,
        out_ptr=out,
        places=1 if queries_at is None else len(queries_at),
        prefix=prefix,
        stride_out=out.stride(0),
        **{name: bool(which & value) for name, value in STATISTICS.items()},
    )
    return Launch(statistics_kernel, grid, {**shared, **args}, config)
