"""Output and head-reduced map of short rows on Hopper in one launch. Q, K and V of each head are loaded once.

A row of keys is NC chunks of 64 keys and a tail. The map of a row stays in registers over all heads. Up to about 200
keys the weights of a head fit beside it, so that each is computed once (`weigh_once`). Longer rows compute each weight
twice: first for the output and the log-sum-exp, then for the map (`weigh_twice`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from attnx.kernels.hopper.parts import (
    add_values,
    as_operand,
    layout_of,
    masked,
    no_products,
    output_layout,
    output_pointers,
    rows_of,
    scores,
    width_of,
)
from attnx.kernels.hopper.primitives import (
    CHUNK,
    NO_BIAS,
    ROWS,
    box,
    boxes,
    finite_max,
    fuse_into,
    fused_start,
    load_box,
    log2_mask,
    next_stage,
    ring,
    row_layout,
    store_rows,
)


@gluon.jit
def weigh_once(
    wg: gl.constexpr, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_ptr, map_ptr,
    stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
    NC: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Compute ROWS rows, one head after another: all scores, their softmax, the output, and the fused weights.

    DV: columns of the values; 0: no output.
    """
    PARTS: gl.constexpr = NC + (TAIL > 0)
    WIDTH: gl.constexpr = q_buf.shape[4]
    by_row: gl.constexpr = gl.SliceLayout(1, row_layout(CHUNK))
    unit = scale_log2 if MASK == NO_BIAS else 1.0
    first_row = first_m + wg * ROWS
    rows = first_row + gl.arange(0, ROWS, layout=by_row)
    fused = ()
    no_scores = ()
    for part in gl.static_range(PARTS):
        fused = fused + (fused_start(width_of(part, NC, TAIL), layout_of(part, NC, TAIL), HEADS),)
        no_scores = no_scores + (no_products(part, NC, TAIL),)
    out_rows: gl.constexpr = gl.SliceLayout(1, output_layout(WIDTH))
    no_output = gl.full([ROWS, WIDTH], 0.0, gl.float32, output_layout(WIDTH))
    out, out_mask = output_pointers(out_ptr, first_row, M, stride_om, WIDTH, DV)
    stage = 0
    phase = 0
    for head in range(first_head, last_head + 1):
        mbarrier.wait(loaded_k.index(stage), phase)
        q = box(q_buf, stage).slice(wg * ROWS, ROWS)
        s = ()
        for part in gl.static_range(PARTS):
            s = s + (scores(q, k_buf, stage * PARTS, part, no_scores[part], NC, TAIL),)
        s = warpgroup_mma_wait(0, s)
        mbarrier.arrive(empty_k.index(stage))
        raw = (s,) if PARTS == 1 else s
        s = ()
        m = gl.full([ROWS], float("-inf"), gl.float32, by_row)
        for part in gl.static_range(PARTS):
            tile = masked(raw[part], added_buf, part, rows, N, scale_log2, NC, TAIL, CAUSAL, MASK)
            m = gl.maximum(m, gl.convert_layout(gl.max(tile, 1), by_row))
            s = s + (tile,)
        m = finite_max(m) * unit
        l = gl.full([ROWS], 0.0, gl.float32, by_row)
        p = ()
        for part in gl.static_range(PARTS):
            weight = gl.exp2(s[part] * unit - gl.expand_dims(gl.convert_layout(m, rows_of(part, NC, TAIL)), 1))
            l = l + gl.convert_layout(gl.sum(weight, 1), by_row)
            p = p + (weight,)
        # For a row without keys, l and all weights are 0.
        share = 1.0 / gl.where(l == 0.0, 1.0, l)
        previous = fused
        fused = ()
        operands = ()
        for part in gl.static_range(PARTS):
            weight = p[part] * gl.expand_dims(gl.convert_layout(share, rows_of(part, NC, TAIL)), 1)
            fused = fused + (fuse_into(previous[part], weight, HEADS),)
            operands = operands + (as_operand(p[part], v_buf),)
        if DV > 0:
            mbarrier.wait(loaded_v.index(stage), phase)
            o = no_output
            for part in gl.static_range(PARTS):
                o = add_values(operands[part], v_buf, stage * PARTS, part, o, NC, TAIL)
            o = warpgroup_mma_wait(0, [o])
            mbarrier.arrive(empty_v.index(stage))
            o = o * gl.expand_dims(gl.convert_layout(share, out_rows), 1)
            gl.store(out + head * stride_oh, o.to(out_ptr.dtype.element_ty), mask=out_mask)
        stage, phase = next_stage(stage, phase, STAGES)
    for part in gl.static_range(PARTS):
        store_rows(map_ptr, fused[part] * map_share, first_row, part * CHUNK, M, N)


@gluon.jit
def weigh_twice(
    wg: gl.constexpr, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_ptr, map_ptr,
    stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
    NC: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The same for longer rows: flash attention over the parts of a row, then its weights from the log-sum-exp."""
    PARTS: gl.constexpr = NC + (TAIL > 0)
    WIDTH: gl.constexpr = q_buf.shape[4]
    by_row: gl.constexpr = gl.SliceLayout(1, row_layout(CHUNK))
    out_rows: gl.constexpr = gl.SliceLayout(1, output_layout(WIDTH))
    unit = scale_log2 if MASK == NO_BIAS else 1.0
    first_row = first_m + wg * ROWS
    rows = first_row + gl.arange(0, ROWS, layout=by_row)
    fused = ()
    for part in gl.static_range(PARTS):
        fused = fused + (fused_start(width_of(part, NC, TAIL), layout_of(part, NC, TAIL), HEADS),)
    # The products of a part go where those of the part before it were.
    KEPT: gl.constexpr = 1 if TAIL > 0 else 0  # parts whose scores are kept for their weights
    raw = no_products(0, NC, TAIL)
    last_raw = no_products(PARTS - 1, NC, TAIL)
    o = gl.full([ROWS, WIDTH], 0.0, gl.float32, output_layout(WIDTH))
    out, out_mask = output_pointers(out_ptr, first_row, M, stride_om, WIDTH, DV)
    stage = 0
    phase = 0
    for head in range(first_head, last_head + 1):
        mbarrier.wait(loaded_k.index(stage), phase)
        if DV > 0:
            mbarrier.wait(loaded_v.index(stage), phase)
        q = box(q_buf, stage).slice(wg * ROWS, ROWS)
        m = gl.full([ROWS], float("-inf"), gl.float32, by_row)
        l = gl.full([ROWS], 0.0, gl.float32, by_row)
        for part in gl.static_range(PARTS):
            if part < PARTS - KEPT:
                raw = warpgroup_mma_wait(0, [scores(q, k_buf, stage * PARTS, part, raw, NC, TAIL)])
                s = raw
            else:
                last_raw = warpgroup_mma_wait(0, [scores(q, k_buf, stage * PARTS, part, last_raw, NC, TAIL)])
                s = last_raw
            s = masked(s, added_buf, part, rows, N, scale_log2, NC, TAIL, CAUSAL, MASK)
            larger = gl.maximum(m, gl.convert_layout(gl.max(s, 1), by_row) * unit)
            shift = finite_max(larger)
            p = gl.exp2(s * unit - gl.expand_dims(gl.convert_layout(shift, rows_of(part, NC, TAIL)), 1))
            fade = gl.exp2(m - shift)
            l = l * fade + gl.convert_layout(gl.sum(p, 1), by_row)
            m = larger
            if DV > 0:
                if part > 0:
                    o = o * gl.expand_dims(gl.convert_layout(fade, out_rows), 1)
                o = warpgroup_mma_wait(0, [add_values(as_operand(p, v_buf), v_buf, stage * PARTS, part, o, NC, TAIL)])
        # For a row without keys, l and all weights are 0.
        if DV > 0:
            mbarrier.arrive(empty_v.index(stage))
            share = gl.convert_layout(1.0 / gl.where(l == 0.0, 1.0, l), out_rows)
            result = (o * gl.expand_dims(share, 1)).to(out_ptr.dtype.element_ty)
            gl.store(out + head * stride_oh, result, mask=out_mask)
        lse = gl.where(l == 0.0, float("inf"), finite_max(m) + gl.log2(l))
        last_fused = fused[PARTS - 1]
        if KEPT:
            s = masked(last_raw, added_buf, PARTS - 1, rows, N, scale_log2, NC, TAIL, CAUSAL, MASK)
            p = gl.exp2(s * unit - gl.expand_dims(gl.convert_layout(lse, rows_of(PARTS - 1, NC, TAIL)), 1))
            last_fused = fuse_into(last_fused, p, HEADS)
        previous = fused
        fused = ()
        for part in gl.static_range(PARTS - KEPT):
            raw = warpgroup_mma_wait(0, [scores(q, k_buf, stage * PARTS, part, raw, NC, TAIL)])
            s = masked(raw, added_buf, part, rows, N, scale_log2, NC, TAIL, CAUSAL, MASK)
            p = gl.exp2(s * unit - gl.expand_dims(gl.convert_layout(lse, rows_of(part, NC, TAIL)), 1))
            fused = fused + (fuse_into(previous[part], p, HEADS),)
        if KEPT:
            fused = fused + (last_fused,)
        mbarrier.arrive(empty_k.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    for part in gl.static_range(PARTS):
        store_rows(map_ptr, fused[part] * map_share, first_row, part * CHUNK, M, N)


@gluon.jit
def consume(
    wg: gl.constexpr, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_ptr, map_ptr,
    stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
    NC: gl.constexpr, TAIL: gl.constexpr, TWICE: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Compute ROWS rows by `weigh_twice` or `weigh_once`."""
    if TWICE:
        weigh_twice(
            wg, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_ptr, map_ptr,
            stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
            NC, TAIL, STAGES, DV, HEADS, CAUSAL, MASK,
        )  # fmt: skip
    else:
        weigh_once(
            wg, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_ptr, map_ptr,
            stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
            NC, TAIL, STAGES, DV, HEADS, CAUSAL, MASK,
        )  # fmt: skip


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, b, first_m,
    first_head, last_head, GROUP, PARTS: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """Load q and k, then v, of every head."""
    stage = 0
    phase = 0
    for head in range(first_head, last_head + 1):
        key_head = head // GROUP
        mbarrier.wait(empty_k.index(stage), phase ^ 1)  # does not wait in the first round
        barrier = loaded_k.index(stage)
        mbarrier.expect(barrier, q_desc.block_type.nbytes + PARTS * k_desc.block_type.nbytes)
        load_box(q_desc, [b, head, first_m, 0], barrier, q_buf.index(stage))
        for part in gl.static_range(PARTS):
            load_box(k_desc, [b, key_head, part * CHUNK, 0], barrier, k_buf.index(stage * PARTS + part))
        if DV > 0:
            mbarrier.wait(empty_v.index(stage), phase ^ 1)
            barrier_v = loaded_v.index(stage)
            mbarrier.expect(barrier_v, PARTS * v_desc.block_type.nbytes)
            for part in gl.static_range(PARTS):
                load_box(v_desc, [b, key_head, part * CHUNK, 0], barrier_v, v_buf.index(stage * PARTS + part))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def short_rows_kernel(
    q_desc, k_desc, v_desc, mask_ptr, out_ptr, map_ptr, stride_ob, stride_oh, stride_om,
    H, GROUP, M, N, splits, heads_each, mask_period, stride_mb, stride_mn, scale_log2, map_share,
    NC: gl.constexpr, TAIL: gl.constexpr, TWICE: gl.constexpr, STAGES: gl.constexpr, DV: gl.constexpr,
    HEADS: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Compute 128 rows of out [B, H, M, Dv] and of maps [B * splits, M, N], each fused over its share of the heads."""
    PARTS: gl.constexpr = NC + (TAIL > 0)
    BM: gl.constexpr = q_desc.block_type.shape[2]
    blocks_m = gl.cdiv(M, BM)
    plane = gl.program_id(0) // blocks_m
    first_m = gl.program_id(0) % blocks_m * BM
    b = plane // splits
    first_head = plane % splits * heads_each
    last_head = gl.minimum(first_head + heads_each, H) - 1
    q_buf = boxes(q_desc, STAGES)
    k_buf = boxes(k_desc, STAGES * PARTS)
    v_buf = k_buf
    if DV > 0:
        v_buf = boxes(v_desc, STAGES * PARTS)
    loaded_k = ring(STAGES, 1)
    loaded_v = ring(STAGES, 1)
    empty_k = ring(STAGES, 2)
    empty_v = ring(STAGES, 2)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    added_buf = gl.allocate_shared_memory(gl.float32, [PARTS if MASK != NO_BIAS else 1, CHUNK], shared)
    if MASK != NO_BIAS:
        across: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0]))
        mask_b = mask_ptr + (b % mask_period).to(gl.int64) * stride_mb
        for part in gl.static_range(PARTS):
            added_buf.index(part).store(log2_mask(mask_b, part * CHUNK, N, stride_mn, MASK, across))
    out_b = out_ptr + b.to(gl.int64) * stride_ob
    map_plane = map_ptr + plane.to(gl.int64) * M * N
    gl.warp_specialize([
        (consume, (0, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_b, map_plane,
                   stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
                   NC, TAIL, TWICE, STAGES, DV, HEADS, CAUSAL, MASK)),
        (consume, (1, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, added_buf, out_b, map_plane,
                   stride_oh, stride_om, first_m, first_head, last_head, M, N, scale_log2, map_share,
                   NC, TAIL, TWICE, STAGES, DV, HEADS, CAUSAL, MASK)),
        (produce, (q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, loaded_k, loaded_v, empty_k, empty_v, b, first_m,
                   first_head, last_head, GROUP, PARTS, STAGES, DV)),
    ], [4, 1], [240, 24])  # fmt: skip
