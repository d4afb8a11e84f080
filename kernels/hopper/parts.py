"""Parts of short rows on Hopper: NC chunks of 64 keys and a tail, their scores, and the output of a head."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from attnx.kernels.hopper.primitives import CHUNK, NO_BIAS, ROWS, box, multiply_keys, row_layout


@gluon.constexpr_function
def width_of(part, NC, TAIL):
    """Keys of a part of a row."""
    return TAIL if part == NC else CHUNK.value


@gluon.constexpr_function
def layout_of(part, NC, TAIL):
    """Layout of the scores of a part of a row."""
    return row_layout(width_of(part, NC, TAIL))


@gluon.constexpr_function
def output_layout(width):
    """Layout of the output [ROWS, width] of a head."""
    return row_layout(min(width, CHUNK.value))


@gluon.constexpr_function
def rows_of(part, NC, TAIL):
    """Layout of a number for each row, beside the scores of a part."""
    return gl.SliceLayout(1, layout_of(part, NC, TAIL))


@gluon.jit
def masked(
    s, added_buf, part: gl.constexpr, rows, N, scale_log2,
    NC: gl.constexpr, TAIL: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """The scores of a part, [ROWS, keys], with -inf where a key is hidden. With MASK they are times scale_log2."""
    width: gl.constexpr = width_of(part, NC, TAIL)
    layout: gl.constexpr = row_layout(width)
    by_key: gl.constexpr = gl.SliceLayout(0, layout)
    keys = part * CHUNK + gl.arange(0, width, layout=by_key)
    if MASK != NO_BIAS:
        added = gl.expand_dims(added_buf.index(part).slice(0, width).load(by_key), 0)
        s = gl.where(added == float("-inf"), float("-inf"), s * scale_log2 + added)
    elif part == NC + (TAIL > 0) - 1:
        s = gl.where(gl.expand_dims(keys < N, 0), s, float("-inf"))
    if CAUSAL:
        rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
        s = gl.where(gl.expand_dims(rows, 1) >= gl.expand_dims(keys, 0), s, float("-inf"))
    return s


@gluon.jit
def no_products(part: gl.constexpr, NC: gl.constexpr, TAIL: gl.constexpr):
    """[ROWS, keys] registers for the scores of a part."""
    return gl.full([ROWS, width_of(part, NC, TAIL)], 0.0, gl.float32, layout_of(part, NC, TAIL))


@gluon.jit
def scores(q, k_buf, first, part: gl.constexpr, s, NC: gl.constexpr, TAIL: gl.constexpr):
    """Start the products of queries [ROWS, D] and a part of the keys."""
    k = box(k_buf, first + part).slice(0, width_of(part, NC, TAIL))
    return multiply_keys(q, k, q, k, s, 0)


@gluon.jit
def as_operand(p, v_buf):
    """Weights [ROWS, keys] as the first operand of a product with values."""
    return gl.convert_layout(p.to(v_buf.dtype), gl.DotOperandLayout(0, output_layout(v_buf.shape[4]), 2))


@gluon.jit
def add_values(p, v_buf, first, part: gl.constexpr, o, NC: gl.constexpr, TAIL: gl.constexpr):
    """Start o += p v for the weights of a part of the keys; o = p v for the first part."""
    v = box(v_buf, first + part).slice(0, width_of(part, NC, TAIL))
    return warpgroup_mma(p, v, o, use_acc=part > 0, is_async=True)


@gluon.jit
def output_pointers(out_ptr, first_row, M, stride_om, WIDTH: gl.constexpr, DV: gl.constexpr):
    """Pointers to ROWS rows of head 0 of the output, [ROWS, WIDTH], and their mask."""
    layout: gl.constexpr = output_layout(WIDTH)
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    ptrs = out_ptr + gl.expand_dims(rows, 1) * stride_om + gl.expand_dims(columns, 0)
    return ptrs, gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < DV, 0)
