"""Device functions that the Hopper kernels share: products, masks, head fusion, stores.

Every kernel has three groups of warps. A producer warp loads tiles into a ring of stages of shared memory. Two consumer
warpgroups of four warps compute 64 rows each. Two barriers for each stage keep them apart: the producer waits until the
stage is empty, and the consumers wait until it is loaded.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from attnx.kernels import primitives

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name before Triton 3.7

LOG2E = gl.constexpr(primitives.LOG2E.value)
MASK_THRESHOLD = gl.constexpr(primitives.MASK_THRESHOLD.value)
MAX = gl.constexpr(primitives.MAX.value)
MIN = gl.constexpr(primitives.MIN.value)
NO_BIAS = gl.constexpr(primitives.NO_BIAS.value)
ADDITIVE = gl.constexpr(primitives.ADDITIVE.value)
KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)

ROWS = gl.constexpr(64)  # rows of a consumer warpgroup
CHUNK = gl.constexpr(64)  # keys of a product


@gluon.constexpr_function
def row_layout(width):
    """Layout of a result [ROWS, width] of a product."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.jit
def ring(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """STAGES barriers that complete after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def boxes(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT boxes of a descriptor [1, 1, rows, columns]."""
    rows: gl.constexpr = desc.block_type.shape[2]
    columns: gl.constexpr = desc.block_type.shape[3]
    return gl.allocate_shared_memory(desc.dtype, [COUNT, 1, 1, rows, columns], desc.layout)


@gluon.jit
def box(buffer, index):
    """The box `index` of `boxes` as [rows, columns]."""
    return buffer.index(index).reshape([buffer.shape[3], buffer.shape[4]])


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """(stage, phase) of the next turn: stages 0..STAGES - 1 in a circle, and a phase that changes with every round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def multiply_keys(q, k, q_rest, k_rest, scores, REST_D: gl.constexpr):
    """Start scores = q k^T, [ROWS, keys], without waiting for it.

    q: [ROWS, D]. k: [keys, D]. q_rest, k_rest: the same rows of the remaining REST_D columns of the head.
    """
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if REST_D > 0:
        scores = warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def products(
    q_buf, k_buf, q_rest, k_rest, q_stage, k_stage, wg: gl.constexpr, chunk: gl.constexpr, scores, REST_D: gl.constexpr
):  # fmt: skip
    """Start the scores of a warpgroup's rows of a box of queries, and of a chunk of a box of keys."""
    return multiply_keys(
        box(q_buf, q_stage).slice(wg * ROWS, ROWS), box(k_buf, k_stage).slice(chunk * CHUNK, CHUNK),
        box(q_rest, q_stage).slice(wg * ROWS, ROWS), box(k_rest, k_stage).slice(chunk * CHUNK, CHUNK), scores, REST_D,
    )  # fmt: skip


@gluon.jit
def log2_mask(mask_ptr, first, N, stride, MASK: gl.constexpr, layout: gl.constexpr):
    """[CHUNK] values to add to scores times log2(e), from key `first` on: -inf hides a key."""
    keys = first + gl.arange(0, CHUNK, layout=layout)
    bias = gl.load(mask_ptr + keys.to(gl.int64) * stride, mask=keys < N, other=0)
    if MASK == ADDITIVE:
        bias = bias.to(gl.float32)
        added = gl.where(bias < MASK_THRESHOLD, float("-inf"), bias * LOG2E)
    else:
        added = gl.where(bias != 0, 0.0, float("-inf"))
    return gl.where(keys < N, added, float("-inf"))


@gluon.jit
def lse_to_log2(lse, INF_IS_NAN: gl.constexpr = False):
    """Log-sum-exps times log2(e); +inf for rows without keys, whose weights are then 0. See kernels/primitives.py."""
    if INF_IS_NAN:
        lse = gl.where(lse == float("inf"), float("nan"), lse)
    return gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@gluon.jit
def finite_max(m):
    """The row maxima, with 0 in place of -inf, so that exp2(s - m) is 0 and not NaN for fully masked rows."""
    return gl.where(m == float("-inf"), 0.0, m)


@gluon.jit
def fused_start(WIDTH: gl.constexpr, layout: gl.constexpr, HEADS: gl.constexpr):
    """Initial tile [ROWS, WIDTH] for `fuse_into`. Weights are not negative, so 0 is a valid start for MAX."""
    return gl.full([ROWS, WIDTH], float("inf") if HEADS == MIN else 0.0, gl.float32, layout)


@gluon.jit
def fuse_into(fused, p, HEADS: gl.constexpr):
    """The fused tile with the weights of one more head (a sum for MEAN). NaN propagates, as in torch."""
    if HEADS == MAX:
        fused = gl.maximum(fused, p, propagate_nan=KEEP_NAN)
    elif HEADS == MIN:
        fused = gl.minimum(fused, p, propagate_nan=KEEP_NAN)
    else:
        fused = fused + p
    return fused


@gluon.jit
def store_rows(map_ptr, tile, first_m, first_n, M, N):
    """Store a tile [ROWS, width] of a map [M, N] at row first_m and column first_n.

    Each row is stored by consecutive lanes. From the layout of the products every sector would be written twice.
    """
    width: gl.constexpr = tile.shape[1]
    lanes: gl.constexpr = 32 if width > 32 else width
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // lanes, lanes], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = first_n + gl.arange(0, width, layout=gl.SliceLayout(0, layout))
    ptrs = map_ptr + gl.to_tensor(first_m).to(gl.int64) * N + gl.expand_dims(rows, 1) * N + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(rows < M - first_m, 1) & gl.expand_dims(columns < N, 0)
    gl.store(ptrs, gl.convert_layout(tile, layout), mask=mask)
