"""Device functions that the kernels share: tile loads, scores with bias and masks, and head fusion."""

import os

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
MASK_THRESHOLD: tl.constexpr = tl.constexpr(-5.0e4)  # attnx.ops.reducers.MASK_THRESHOLD

# Triton's interpreter multiplies the bit patterns of bfloat16. Converting to fp32 first gives the correct products.
WIDEN: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Head reductions, with the values of attnx.ops.reducers.Reduction.
MEAN: tl.constexpr = tl.constexpr(0)
MAX: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)
EACH: tl.constexpr = tl.constexpr(3)

# Kinds of bias.
NO_BIAS: tl.constexpr = tl.constexpr(0)
ADDITIVE: tl.constexpr = tl.constexpr(1)
BOOLEAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def to_int64(index):
    """The index as int64, for products with strides that may reach 2^31."""
    return tl.cast(index, tl.int64)


@triton.jit
def bias_item(b, bias_period, BIAS_REPEATS: tl.constexpr):
    """Index in the bias of batch item b, as int64."""
    if BIAS_REPEATS:
        return to_int64(b % bias_period)
    else:
        return to_int64(b)


@triton.jit
def query_offsets(rows_ptr, first, offs, M, stride, HAS_ROWS: tl.constexpr, INT64_OFFSETS: tl.constexpr):
    """(index of the query of each row [R], offset of the tile, offsets of its rows within the tile [R]).

    Rows beyond the last one are clamped to it. Their results are not stored, so loads need no mask. Offsets within a
    tile are 32-bit unless INT64_OFFSETS, because each 64-bit offset needs two registers.
    """
    if HAS_ROWS:
        pos = tl.load(rows_ptr + first + offs, mask=first + offs < M, other=0).to(tl.int64)
        return pos, to_int64(0), pos * stride
    else:
        rows = tl.minimum(offs, M - 1 - first)
        return first + offs, to_int64(first) * stride, row_offsets(rows, stride, INT64_OFFSETS)


@triton.jit
def row_offsets(rows, stride, INT64_OFFSETS: tl.constexpr):
    """Offsets of the rows of a tile within the tile, [R]."""
    if INT64_OFFSETS:
        return rows.to(tl.int64) * stride
    else:
        return rows * stride


@triton.jit
def load_tile(ptr, offs_r, stride_d, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """[R, WIDTH]: columns START..START + WIDTH of the rows at offsets offs_r; columns from D on are 0."""
    offs_d = START + tl.arange(0, WIDTH)
    ptrs = ptr + offs_r[:, None] + offs_d.to(offs_r.dtype)[None, :] * stride_d
    if START + WIDTH <= D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def load_masked(ptr, offs_r, mask_r, stride_d, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """`load_tile` with 0 for rows outside the mask, because weight 0 times an infinite value would be NaN."""
    offs_d = START + tl.arange(0, WIDTH)
    ptrs = ptr + offs_r[:, None] + offs_d.to(offs_r.dtype)[None, :] * stride_d
    if START + WIDTH <= D:
        return tl.load(ptrs, mask=mask_r[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_r[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def head_tiles(ptr, offs_r, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr):
    """Rows of one head: ([R, BLOCK_D],), or ([R, BLOCK_D], [R, REST_D]) if REST_D > 0.

    Heads wider than these tiles are not loaded: (address, offsets of the rows [R], stride), for `products`.
    """
    if BLOCK_D + REST_D < D:
        return (ptr, offs_r, stride_d)
    elif REST_D > 0:
        first = load_tile(ptr, offs_r, stride_d, 0, BLOCK_D, D)
        return (first, load_tile(ptr, offs_r, stride_d, BLOCK_D, REST_D, D))
    else:
        return (load_tile(ptr, offs_r, stride_d, 0, BLOCK_D, D),)


@triton.jit
def load_chunk(rows, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[R, BLOCK_D]: columns from `first` of the rows of a wide head, from `head_tiles`; columns from D on are 0."""
    ptr, offs_r, stride_d = rows
    offs_d = first + tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_r[:, None] + offs_d.to(offs_r.dtype)[None, :] * stride_d
    return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def products(
    q,
    k,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32: q k^T, for q and k from `head_tiles`. Wide heads are loaded here, chunk by chunk."""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_D + REST_D < D:
        for first in tl.range(0, D, BLOCK_D):
            s = dot(load_chunk(q, first, D, BLOCK_D), tl.trans(load_chunk(k, first, D, BLOCK_D)), s, PRECISION)
    else:
        s = dot(q[0], tl.trans(k[0]), s, PRECISION)
        if REST_D > 0:
            s = dot(q[1], tl.trans(k[1]), s, PRECISION)
    return s


@triton.jit
def masked_scores(
    s,
    bias_ptr,
    rows,
    mask_m,
    pos_m,
    offs_n,
    mask_n,
    stride_bn,
    scale_log2,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores times log2(e), [BLOCK_M, BLOCK_N]; -inf where a key is masked.

    With FOLD_SCALE (no bias, scale > 0) the scores stay unscaled, because exp2(s * scale_log2 - shift) is one FFMA and
    one EX2, and the maximum of the scaled scores is the scaled maximum. `score_unit` returns the remaining factor.

    Args:
        s: [BLOCK_M, BLOCK_N] products from `products`.
        rows: [BLOCK_M] offsets of the bias rows.
        pos_m: [BLOCK_M] index of the query of each row.
        offs_n: [BLOCK_N] index of the key of each column.
        EDGE: columns outside mask_n are masked.
    """
    if not FOLD_SCALE:
        s = s * scale_log2
    if BIAS != NO_BIAS:
        # [BLOCK_M, BLOCK_N]
        ptrs = bias_ptr + rows[:, None] + offs_n[None, :].to(tl.int64) * stride_bn
        bias = tl.load(ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0)
        if BIAS == ADDITIVE:
            bias = bias.to(tl.float32)
            s = tl.where(bias < MASK_THRESHOLD, float("-inf"), s + bias * LOG2E)
        else:
            s = tl.where(bias != 0, s, float("-inf"))
    if CAUSAL:
        s = tl.where(pos_m[:, None] >= offs_n[None, :], s, float("-inf"))
    if EDGE:
        s = tl.where(mask_n[None, :], s, float("-inf"))
    return s


@triton.jit
def score_unit(scale_log2, FOLD_SCALE: tl.constexpr):
    """Factor that turns the result of `masked_scores` into scores times log2(e)."""
    if FOLD_SCALE:
        return scale_log2
    return 1.0


@triton.jit
def finite_max(m):
    """The row maxima, with 0 in place of -inf, so that exp2(s - m) is 0 and not NaN for fully masked rows."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def lse_to_log2(lse, INF_IS_NAN: tl.constexpr = False):
    """Log-sum-exps (natural) times log2(e), to be subtracted from scores in the same units.

    +inf for rows without keys (lse -inf), so that their weights are 0 and not NaN. With INF_IS_NAN, NaN for +inf, which
    flash attention gives for rows with NaN.
    """
    if INF_IS_NAN:
        lse = tl.where(lse == float("inf"), float("nan"), lse)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def fused_start(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, SIGNED: tl.constexpr = False):
    """Initial tile for `fuse_into`. Unless SIGNED, weights are not negative, so 0 is a valid start for MAX."""
    if HEADS == MIN:
        return tl.full([BLOCK_M, BLOCK_N], float("inf"), tl.float32)
    if SIGNED and HEADS == MAX:
        return tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def fuse_into(fused, p, HEADS: tl.constexpr):
    """The fused tile with one more head (a sum for MEAN). NaN propagates, as in torch."""
    if HEADS == MAX:
        return tl.maximum(fused, p, propagate_nan=tl.PropagateNan.ALL)
    if HEADS == MIN:
        return tl.minimum(fused, p, propagate_nan=tl.PropagateNan.ALL)
    return fused + p


@triton.jit
def store_tile(ptr, tile, offs_m, offs_n, mask_m, mask_n, stride_m):
    """Store a tile at ptr, the address of its origin. Offsets are relative to it, and the last dim is contiguous."""
    ptrs = ptr + offs_m[:, None] * stride_m + offs_n[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
