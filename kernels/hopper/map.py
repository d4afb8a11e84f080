"""Head-reduced map on Hopper from q, k and lse. Programs are persistent, and products and exponentials overlap."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from attnx.kernels.hopper.primitives import (
    ADDITIVE,
    CHUNK,
    NO_BIAS,
    ROWS,
    boxes,
    fuse_into,
    fused_start,
    load_box,
    log2_mask,
    lse_to_log2,
    next_stage,
    products,
    ring,
    row_layout,
    store_rows,
)


@gluon.jit
def tile_of(tile, planes, M, N, BM: gl.constexpr, BN: gl.constexpr):
    """(plane, first row, first key) of a tile.

    First the tiles that lie inside the maps, in groups of eight row blocks for the same keys, so that K stays in L2.
    Then the tiles at the right and lower edges, which take less time.
    """
    inside_m = M // BM
    inside_n = N // BN
    inside = inside_m * inside_n
    plane = tile * 0
    first_m = tile * 0
    first_n = tile * 0
    if tile < planes * inside:
        plane = tile // inside
        place = tile % inside
        group = place // (8 * inside_n)
        height = gl.minimum(inside_m - group * 8, 8)
        place = place % (8 * inside_n)
        first_m = (group * 8 + place % height) * BM
        first_n = place // height * BN
    else:
        edges = gl.cdiv(M, BM) * gl.cdiv(N, BN) - inside
        plane = (tile - planes * inside) // edges
        place = (tile - planes * inside) % edges
        right = gl.where(N % BN > 0, inside_m, 0)  # tiles at the right edge
        first_m = gl.where(place < right, place, inside_m) * BM
        first_n = gl.where(place < right, inside_n, place - right) * BN
    return plane, first_m, first_n


@gluon.jit
def load_lse(lse_rows, head, last, M):
    """[ROWS] log-sum-exps of a head, or of the last head beyond it."""
    return gl.load(lse_rows + gl.minimum(head, last) * M)


@gluon.jit
def consume(
    wg: gl.constexpr, q_buf, k_buf, q_rest, k_rest, loaded, empty, added_buf, mask_ptr, lse_ptr, map_ptr,
    planes, tiles, H, M, N, splits, heads_each, mask_period, stride_mb, stride_mn, scale_log2, map_share,
    NC: gl.constexpr, STAGES: gl.constexpr, REST_D: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr, INF_IS_NAN: gl.constexpr,
):  # fmt: skip
    """Compute ROWS rows of each tile, NC chunks of keys.

    Two sets of scores alternate: the tensor cores compute one while the other is exponentiated. Nothing is in flight
    at the end of an iteration, because ptxas would serialise all products of the loop. Each tile starts with scores
    that the last iteration of the tile before it computed.
    """
    layout: gl.constexpr = row_layout(CHUNK)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    by_key: gl.constexpr = gl.SliceLayout(0, layout)
    s0 = gl.full([ROWS, CHUNK], 0.0, gl.float32, layout)
    s1 = gl.full([ROWS, CHUNK], 0.0, gl.float32, layout)
    stage = 0
    phase = 0
    mbarrier.wait(loaded.index(stage), phase)
    s0 = products(q_buf, k_buf, q_rest, k_rest, 0, 0, wg, 0, s0, REST_D)
    s0 = warpgroup_mma_wait(0, [s0])
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        plane, first_m, first_n = tile_of(tile, planes, M, N, 2 * ROWS, NC * CHUNK)
        b = plane // splits
        first_head = plane % splits * heads_each
        last_head = gl.minimum(first_head + heads_each, H) - 1
        first_row = first_m + wg * ROWS
        rows = first_row + gl.arange(0, ROWS, layout=by_row)
        # Keys from first_n on that this warpgroup's rows attend, and keys that it stores.
        stored = gl.where(first_row < M, N - first_n, 0)
        keys = stored
        if CAUSAL:
            keys = gl.minimum(stored, first_row + ROWS - first_n)
        mask_b = mask_ptr
        if MASK != NO_BIAS:
            mask_b = mask_ptr + (b % mask_period).to(gl.int64) * stride_mb
        if MASK == ADDITIVE:
            for c in gl.static_range(NC):
                added_buf.index(wg * NC + c).store(log2_mask(mask_b, first_n + c * CHUNK, N, stride_mn, MASK, by_key))
        lse_rows = lse_ptr + b.to(gl.int64) * H * M + gl.minimum(rows, M - 1)
        next_lse = load_lse(lse_rows, first_head, last_head, M)
        poison = gl.full([ROWS], 0.0, gl.float32, by_row)
        fused = ()
        for _ in gl.static_range(NC):
            fused = fused + (fused_start(CHUNK, layout, HEADS),)
        for head in range(first_head, last_head + 1):
            lse = lse_to_log2(next_lse, INF_IS_NAN)
            next_lse = load_lse(lse_rows, head + 1, last_head, M)
            if CAUSAL or MASK != NO_BIAS:
                poison += gl.where(lse != lse, lse, 0.0)
            next_one, next_phase = next_stage(stage, phase, STAGES)
            previous = fused
            fused = ()
            for c in gl.static_range(NC):
                ahead = stage
                if c == NC - 1:
                    # All products of this stage are complete.
                    mbarrier.arrive(empty.index(stage))
                    mbarrier.wait(loaded.index(next_one), next_phase)
                    ahead = next_one
                if c % 2 == 0:
                    s1 = products(q_buf, k_buf, q_rest, k_rest, ahead, ahead, wg, (c + 1) % NC, s1, REST_D)
                else:
                    s0 = products(q_buf, k_buf, q_rest, k_rest, ahead, ahead, wg, (c + 1) % NC, s0, REST_D)
                tile_fused = previous[c]
                # The branch also keeps ptxas from moving the exponentials behind the wait.
                if c * CHUNK < keys:
                    s = (s0 if c % 2 == 0 else s1) * scale_log2
                    if MASK == ADDITIVE:
                        s = s + gl.expand_dims(added_buf.index(wg * NC + c).load(by_key), 0)
                    p = gl.exp2(s - gl.expand_dims(lse, 1))
                    tile_fused = fuse_into(tile_fused, p, HEADS)
                fused = fused + (tile_fused,)
                if c % 2 == 0:
                    s1 = warpgroup_mma_wait(0, [s1])
                else:
                    s0 = warpgroup_mma_wait(0, [s0])
            stage = next_one
            phase = next_phase
        map_plane = map_ptr + plane.to(gl.int64) * M * N
        for c in gl.static_range(NC):
            if c * CHUNK < stored:
                result = fused[c] * map_share
                # A hidden key has weight 0 in every head, or NaN in a row with NaN.
                if CAUSAL:
                    at = first_n + c * CHUNK + gl.arange(0, CHUNK, layout=by_key)
                    hidden = gl.expand_dims(rows, 1) < gl.expand_dims(at, 0)
                    result = gl.where(hidden, gl.expand_dims(poison, 1), result)
                if MASK != NO_BIAS:
                    added = log2_mask(mask_b, first_n + c * CHUNK, N, stride_mn, MASK, by_key)
                    hidden = gl.expand_dims(added == float("-inf"), 0)
                    result = gl.where(hidden, gl.expand_dims(poison, 1), result)
                store_rows(map_plane, result, first_row, first_n + c * CHUNK, M, N)


@gluon.jit
def produce(
    q_desc, k_desc, q_rest_desc, k_rest_desc, q_buf, k_buf, q_rest, k_rest, loaded, empty,
    planes, tiles, H, GROUP, M, N, splits, heads_each,
    STAGES: gl.constexpr, REST_D: gl.constexpr,
):  # fmt: skip
    """Load q and k of every head of each tile, in the order of `consume`; then once more those of the last one.

    The consumers start the products of a next head after the last one, too. These are not used.
    """
    BM: gl.constexpr = q_desc.block_type.shape[2]
    BN: gl.constexpr = k_desc.block_type.shape[2]
    stage = 0
    phase = 0
    for step in range(gl.program_id(0), tiles + gl.num_programs(0), gl.num_programs(0)):
        tile = gl.where(step < tiles, step, gl.program_id(0))
        plane, first_m, first_n = tile_of(tile, planes, M, N, BM, BN)
        b = plane // splits
        first_head = plane % splits * heads_each
        stop = gl.where(step < tiles, gl.minimum(first_head + heads_each, H), first_head + 1)
        for head in range(first_head, stop):
            mbarrier.wait(empty.index(stage), phase ^ 1)  # does not wait in the first round
            barrier = loaded.index(stage)
            nbytes: gl.constexpr = q_desc.block_type.nbytes + k_desc.block_type.nbytes
            rest_nbytes: gl.constexpr = q_rest_desc.block_type.nbytes + k_rest_desc.block_type.nbytes
            mbarrier.expect(barrier, nbytes + (rest_nbytes if REST_D > 0 else 0))
            load_box(q_desc, [b, head, first_m, 0], barrier, q_buf.index(stage))
            load_box(k_desc, [b, head // GROUP, first_n, 0], barrier, k_buf.index(stage))
            if REST_D > 0:
                rest: gl.constexpr = q_desc.block_type.shape[3]
                load_box(q_rest_desc, [b, head, first_m, rest], barrier, q_rest.index(stage))
                load_box(k_rest_desc, [b, head // GROUP, first_n, rest], barrier, k_rest.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def map_kernel(
    q_desc, k_desc, q_rest_desc, k_rest_desc, mask_ptr, lse_ptr, map_ptr,
    planes, H, GROUP, M, N, splits, heads_each, mask_period, stride_mb, stride_mn, scale_log2, map_share,
    NC: gl.constexpr, STAGES: gl.constexpr, REST_D: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr, INF_IS_NAN: gl.constexpr,
):  # fmt: skip
    """Compute maps [planes, M, N]: P = exp(s - lse), fused over the heads of each plane, in tiles of 128 x 64 NC.

    What lies outside the map is not exponentiated, in units of 64 rows and 64 keys.
    """
    BM: gl.constexpr = q_desc.block_type.shape[2]
    BN: gl.constexpr = k_desc.block_type.shape[2]
    tiles = planes * gl.cdiv(M, BM) * gl.cdiv(N, BN)
    q_buf = boxes(q_desc, STAGES)
    k_buf = boxes(k_desc, STAGES)
    q_rest = q_buf
    k_rest = k_buf
    if REST_D > 0:
        q_rest = boxes(q_rest_desc, STAGES)
        k_rest = boxes(k_rest_desc, STAGES)
    loaded = ring(STAGES, 1)
    empty = ring(STAGES, 2)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    added_buf = gl.allocate_shared_memory(gl.float32, [2 * NC if MASK == ADDITIVE else 1, CHUNK], shared)
    gl.warp_specialize([
        (consume, (0, q_buf, k_buf, q_rest, k_rest, loaded, empty, added_buf, mask_ptr, lse_ptr, map_ptr,
                   planes, tiles, H, M, N, splits, heads_each, mask_period, stride_mb, stride_mn, scale_log2, map_share,
                   NC, STAGES, REST_D, HEADS, CAUSAL, MASK, INF_IS_NAN)),
        (consume, (1, q_buf, k_buf, q_rest, k_rest, loaded, empty, added_buf, mask_ptr, lse_ptr, map_ptr,
                   planes, tiles, H, M, N, splits, heads_each, mask_period, stride_mb, stride_mn, scale_log2, map_share,
                   NC, STAGES, REST_D, HEADS, CAUSAL, MASK, INF_IS_NAN)),
        (produce, (q_desc, k_desc, q_rest_desc, k_rest_desc, q_buf, k_buf, q_rest, k_rest, loaded, empty,
                   planes, tiles, H, GROUP, M, N, splits, heads_each, STAGES, REST_D)),
    ], [4, 1], [240, 24])  # fmt: skip
