"""r @ P of each head on Hopper from q, k and lse, without P. The keys of a program stay in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from attnx.kernels.hopper.primitives import (
    CHUNK,
    ROWS,
    boxes,
    load_box,
    lse_to_log2,
    next_stage,
    products,
    ring,
    row_layout,
)


@gluon.jit
def load_row_numbers(ptr, rows, M):
    """[ROWS] numbers of the rows; 0 beyond the last row."""
    return gl.load(ptr + rows, mask=rows < M, other=0.0)


@gluon.jit
def consume(
    wg: gl.constexpr, q_buf, k_buf, q_rest, k_rest, loaded, loaded_k, empty, r_ptr, lse_ptr, out_ptr,
    first_n, M, N, scale_log2, NC: gl.constexpr, STAGES: gl.constexpr, REST_D: gl.constexpr,
):  # fmt: skip
    """Sum r P over this warpgroup's rows: 64 of every 128. The loop is that of the map kernel, over blocks of rows."""
    layout: gl.constexpr = row_layout(CHUNK)
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    s0 = gl.full([ROWS, CHUNK], 0.0, gl.float32, layout)
    s1 = gl.full([ROWS, CHUNK], 0.0, gl.float32, layout)
    total = ()
    for _ in gl.static_range(NC):
        total = total + (gl.full([ROWS, CHUNK], 0.0, gl.float32, layout),)
    rows = wg * ROWS + gl.arange(0, ROWS, layout=by_row)
    next_lse = load_row_numbers(lse_ptr, rows, M)
    next_r = load_row_numbers(r_ptr, rows, M)
    stage = 0
    phase = 0
    mbarrier.wait(loaded_k.index(0), 0)
    mbarrier.wait(loaded.index(stage), phase)
    s0 = products(q_buf, k_buf, q_rest, k_rest, 0, 0, wg, 0, s0, REST_D)
    s0 = warpgroup_mma_wait(0, [s0])
    for first_m in range(0, M, 2 * ROWS):
        lse = lse_to_log2(next_lse)
        r = next_r
        next_lse = load_row_numbers(lse_ptr, first_m + 2 * ROWS + rows, M)
        next_r = load_row_numbers(r_ptr, first_m + 2 * ROWS + rows, M)
        next_one, next_phase = next_stage(stage, phase, STAGES)
        previous = total
        total = ()
        for c in gl.static_range(NC):
            ahead = stage
            if c == NC - 1:
                # All products of this stage are complete.
                mbarrier.arrive(empty.index(stage))
                mbarrier.wait(loaded.index(next_one), next_phase)
                ahead = next_one
            if c % 2 == 0:
                s1 = products(q_buf, k_buf, q_rest, k_rest, ahead, 0, wg, (c + 1) % NC, s1, REST_D)
            else:
                s0 = products(q_buf, k_buf, q_rest, k_rest, ahead, 0, wg, (c + 1) % NC, s0, REST_D)
            summed = previous[c]
            # The branch also keeps ptxas from moving the exponentials behind the wait.
            if c * CHUNK < N - first_n:
                p = gl.exp2((s0 if c % 2 == 0 else s1) * scale_log2 - gl.expand_dims(lse, 1))
                # Where r is 0, P may be NaN and must not contribute.
                summed += gl.where(gl.expand_dims(r == 0.0, 1), 0.0, gl.expand_dims(r, 1) * p)
            total = total + (summed,)
            if c % 2 == 0:
                s1 = warpgroup_mma_wait(0, [s1])
            else:
                s0 = warpgroup_mma_wait(0, [s0])
        stage = next_one
        phase = next_phase
    for c in gl.static_range(NC):
        columns = first_n + c * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
        gl.store(out_ptr + wg * N + columns, gl.sum(total[c], 0), mask=columns < N)


@gluon.jit
def produce(
    q_desc, k_desc, q_rest_desc, k_rest_desc, q_buf, k_buf, q_rest, k_rest, loaded, loaded_k, empty,
    b, head, key_head, first_n, M, STAGES: gl.constexpr, REST_D: gl.constexpr,
):  # fmt: skip
    """Load the keys, then all queries, then once more the first ones: products start one block ahead."""
    BM: gl.constexpr = q_desc.block_type.shape[2]
    rest: gl.constexpr = q_desc.block_type.shape[3]
    nbytes: gl.constexpr = q_desc.block_type.nbytes + (q_rest_desc.block_type.nbytes if REST_D > 0 else 0)
    nbytes_k: gl.constexpr = k_desc.block_type.nbytes + (k_rest_desc.block_type.nbytes if REST_D > 0 else 0)
    mbarrier.expect(loaded_k.index(0), nbytes_k)
    load_box(k_desc, [b, key_head, first_n, 0], loaded_k.index(0), k_buf.index(0))
    if REST_D > 0:
        load_box(k_rest_desc, [b, key_head, first_n, rest], loaded_k.index(0), k_rest.index(0))
    stage = 0
    phase = 0
    for first in range(0, M + BM, BM):
        first_m = gl.where(first < M, first, 0)
        mbarrier.wait(empty.index(stage), phase ^ 1)  # does not wait in the first round
        barrier = loaded.index(stage)
        mbarrier.expect(barrier, nbytes)
        load_box(q_desc, [b, head, first_m, 0], barrier, q_buf.index(stage))
        if REST_D > 0:
            load_box(q_rest_desc, [b, head, first_m, rest], barrier, q_rest.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def vecmat_kernel(
    q_desc, k_desc, q_rest_desc, k_rest_desc, r_ptr, lse_ptr, out_ptr, H, GROUP, M, N, scale_log2,
    NC: gl.constexpr, STAGES: gl.constexpr, REST_D: gl.constexpr,
):  # fmt: skip
    """Compute 64 NC entries of r @ P of one head, as two parts of out [B, H, 2, N]: one of each warpgroup's rows."""
    BN: gl.constexpr = k_desc.block_type.shape[2]
    blocks_n = gl.cdiv(N, BN)
    plane = gl.program_id(0) // blocks_n
    first_n = gl.program_id(0) % blocks_n * BN
    b = plane // H
    head = plane % H
    q_buf = boxes(q_desc, STAGES)
    k_buf = boxes(k_desc, 1)
    q_rest = q_buf
    k_rest = k_buf
    if REST_D > 0:
        q_rest = boxes(q_rest_desc, STAGES)
        k_rest = boxes(k_rest_desc, 1)
    loaded = ring(STAGES, 1)
    loaded_k = ring(1, 1)
    empty = ring(STAGES, 2)
    r_b = r_ptr + b.to(gl.int64) * M
    lse_head = lse_ptr + plane.to(gl.int64) * M
    out_head = out_ptr + plane.to(gl.int64) * 2 * N
    gl.warp_specialize([
        (consume, (0, q_buf, k_buf, q_rest, k_rest, loaded, loaded_k, empty, r_b, lse_head, out_head,
                   first_n, M, N, scale_log2, NC, STAGES, REST_D)),
        (consume, (1, q_buf, k_buf, q_rest, k_rest, loaded, loaded_k, empty, r_b, lse_head, out_head,
                   first_n, M, N, scale_log2, NC, STAGES, REST_D)),
        (produce, (q_desc, k_desc, q_rest_desc, k_rest_desc, q_buf, k_buf, q_rest, k_rest, loaded, loaded_k, empty,
                   b, head, head // GROUP, first_n, M, STAGES, REST_D)),
    ], [4, 1], [240, 24])  # fmt: skip
