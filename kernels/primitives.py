"""What every kernel is made of: tile loads, the one place where scores are computed, and head fusion."""

import os

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
HIDDEN: tl.constexpr = tl.constexpr(-1.0e30)  # attnx.reducers.HIDDEN

# Triton's interpreter multiplies the bit patterns of bfloat16; widened to fp32 first, the products are the same.
WIDEN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# How heads are fused: the values of attnx.reducers.Heads.
MEAN: tl.constexpr = tl.constexpr(0)
MAX: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
EACH: tl.constexpr = tl.constexpr(3)

# What is added to the scores.
NO_BIAS: tl.constexpr = tl.constexpr(0)
ADDITIVE: tl.constexpr = tl.constexpr(1)
BOOLEAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def wide(index):
    """int64 of a loop's index: it is multiplied by strides, and the product may pass 2^31."""
    return tl.cast(index, tl.int64)


@triton.jit
def row_positions(rows_ptr, offs_m, mask_m, HAS_ROWS: tl.constexpr):
    """Which query each row of the tile is: the chosen rows, or the rows themselves. int64: strides multiply it."""
    if HAS_ROWS:
        return tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    return offs_m.to(tl.int64)


@triton.jit
def load_tile(ptr, offs_r, mask_r, stride_r, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[R, BLOCK_D] rows of one head; rows outside the mask and columns from D on are zero."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_r[:, None] * stride_r + offs_d[None, :] * stride_d
    if D == BLOCK_D:
        return tl.load(ptrs, mask=mask_r[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_r[:, None] & (offs_d[None, :] < D), other=0.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def scores(
    q,
    k,
    bias_ptr,
    offs_m,
    offs_n,
    mask_m,
    mask_n,
    stride_bm,
    stride_bn,
    scale_log2,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32 scores times log2(e), minus infinity where a key may not be attended."""
    s = dot(q, tl.trans(k), PRECISION) * scale_log2
    if BIAS != NO_BIAS:
        ptrs = bias_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn
        bias = tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0)
        if BIAS == ADDITIVE:
            s += bias.to(tl.float32) * LOG2E
            # The lowest finite number is a usual mask; beside it a log-sum-exp would have no digits left.
            s = tl.where(s < HIDDEN, float("-inf"), s)
        else:
            s = tl.where(bias != 0, s, float("-inf"))
    if CAUSAL:
        s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
    return tl.where(mask_n[None, :], s, float("-inf"))


@triton.jit
def finite_max(m):
    """The row maximum, 0 for a row of minus infinities: exp2(s - m) is then 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def fused_start(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr):
    """The tile that fuse_heads starts from. Weights are never negative, so 0 starts a maximum too."""
    if HEADS == MIN:
        return tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def fuse_heads(fused, p, HEADS: tl.constexpr):
    """One more head into the fused tile (a sum for the mean). A NaN stays, as in torch."""
    if HEADS == MAX:
        return tl.maximum(fused, p, propagate_nan=tl.PropagateNan.ALL)
    if HEADS == MIN:
        return tl.minimum(fused, p, propagate_nan=tl.PropagateNan.ALL)
    return fused + p


@triton.jit
def store_tile(ptr, tile, offs_m, offs_n, mask_m, mask_n, stride_m, stride_n):
    ptrs = ptr + offs_m[:, None].to(tl.int64) * stride_m + offs_n[None, :] * stride_n
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
