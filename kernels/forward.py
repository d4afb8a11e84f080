"""Attention output and log-sum-exp of any length; and output, and head-reduced map, of short rows in one launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnx.kernels.configs import Config, Launch, Target, block_d, forward_config
from attnx.kernels.primitives import (
    EACH,
    LN2,
    MEAN,
    dot,
    finite_max,
    fuse_heads,
    fused_start,
    load_tile,
    row_positions,
    scores,
    store_tile,
    wide,
)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, rows_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ob, stride_oh, stride_om, stride_od,
    H, GROUP, M, N, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_V: tl.constexpr, HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head's BLOCK_M rows: online softmax over the keys. Without values only lse [B, H, M] is written."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    block_m = pid % blocks_m
    h = ((pid // blocks_m) % H).to(tl.int64)
    b = (pid // blocks_m // H).to(tl.int64)
    hk = h // GROUP

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pos_m = row_positions(rows_ptr, offs_m, mask_m, HAS_ROWS)
    q = load_tile(q_ptr + b * stride_qb + h * stride_qh, pos_m, mask_m, stride_qm, stride_qd, D, BLOCK_D)
    k_head = k_ptr + b * stride_kb + hk * stride_kh
    bias_head = bias_ptr + b * stride_bb + h * stride_bh

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = N
    if CAUSAL and not HAS_ROWS:
        end = tl.minimum(N, (block_m + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < N
        k = load_tile(k_head, offs_n, mask_n, stride_kn, stride_kd, D, BLOCK_D)
        s = scores(
            q, k, bias_head, pos_m, offs_n, mask_m, mask_n, stride_bm, stride_bn, scale_log2, BIAS, CAUSAL, PRECISION
        )
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = finite_max(m_new)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(m - shift)
        l = l * fade + tl.sum(p, 1)
        if HAS_V:
            v = load_tile(v_ptr + b * stride_vb + hk * stride_vh, offs_n, mask_n, stride_vn, stride_vd, DV, BLOCK_DV)
            acc = acc * fade[:, None] + dot(p.to(v.dtype), v, PRECISION)
        m = m_new

    # A row without keys: l is 0, the output 0, the lse minus infinity.
    lse = (finite_max(m) + tl.log2(l)) * LN2
    tl.store(lse_ptr + (b * H + h) * M + offs_m, lse, mask=mask_m)
    if HAS_V:
        out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        offs_d = tl.arange(0, BLOCK_DV)
        out_head = out_ptr + b * stride_ob + h * stride_oh
        store_tile(out_head, out, offs_m, offs_d, mask_m, offs_d < DV, stride_om, stride_od)


@triton.jit
def one_pass_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, rows_ptr, out_ptr, lse_ptr, map_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bm, stride_bn,
    stride_ob, stride_oh, stride_om, stride_od,
    H, GROUP, M, N, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HEADS: tl.constexpr,
    HAS_V: tl.constexpr, HAS_ROWS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of every head, one head after another; the whole row of keys is on chip (N <= BLOCK_N)."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    b = (pid // blocks_m).to(tl.int64)
    offs_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    pos_m = row_positions(rows_ptr, offs_m, mask_m, HAS_ROWS)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N

    fused = fused_start(BLOCK_M, BLOCK_N, HEADS)
    for head in range(H):
        h = wide(head)
        hk = h // GROUP
        q = load_tile(q_ptr + b * stride_qb + h * stride_qh, pos_m, mask_m, stride_qm, stride_qd, D, BLOCK_D)
        k = load_tile(k_ptr + b * stride_kb + hk * stride_kh, offs_n, mask_n, stride_kn, stride_kd, D, BLOCK_D)
        bias_head = bias_ptr + b * stride_bb + h * stride_bh
        s = scores(
            q, k, bias_head, pos_m, offs_n, mask_m, mask_n, stride_bm, stride_bn, scale_log2, BIAS, CAUSAL, PRECISION
        )
        m = finite_max(tl.max(s, 1))
        p = tl.exp2(s - m[:, None])
        l = tl.sum(p, 1)
        p = p / tl.where(l == 0.0, 1.0, l)[:, None]
        tl.store(lse_ptr + (b * H + h) * M + offs_m, (m + tl.log2(l)) * LN2, mask=mask_m)
        if HEADS == EACH:
            store_tile(map_ptr + (b * H + h) * M * N, p, offs_m, offs_n, mask_m, mask_n, N, 1)
        else:
            fused = fuse_heads(fused, p, HEADS)
        if HAS_V:
            v = load_tile(v_ptr + b * stride_vb + hk * stride_vh, offs_n, mask_n, stride_vn, stride_vd, DV, BLOCK_DV)
            out = dot(p.to(v.dtype), v, PRECISION)
            offs_d = tl.arange(0, BLOCK_DV)
            out_head = out_ptr + b * stride_ob + h * stride_oh
            store_tile(out_head, out, offs_m, offs_d, mask_m, offs_d < DV, stride_om, stride_od)
    if HEADS != EACH:
        if HEADS == MEAN:
            fused = fused / H
        store_tile(map_ptr + b * M * N, fused, offs_m, offs_n, mask_m, mask_n, N, 1)


def named_strides(tensor: Tensor, letters: str) -> dict[str, int]:
    """{"stride_qb": ..., ...} for letters "qb qh qm qd"."""
    return {f"stride_{name}": stride for name, stride in zip(letters.split(), tensor.stride(), strict=True)}


def precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless the user allowed tf32 for torch's own, by either of its two settings."""
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer != "none":
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def shared_args(
    q: Tensor, k: Tensor, bias: Tensor | None, rows: Tensor | None, scale: float, is_causal: bool
) -> dict[str, Any]:
    """What every kernel is given about q [B,H,M,D], k [B,Hk,N,D], bias (expanded to [B,H,M,N]) and rows [R]."""
    return dict(
        q_ptr=q,
        k_ptr=k,
        bias_ptr=q if bias is None else bias.view(torch.uint8) if bias.dtype == torch.bool else bias,
        rows_ptr=q if rows is None else rows,
        **named_strides(q, "qb qh qm qd"),
        **named_strides(k, "kb kh kn kd"),
        **({f"stride_b{x}": 0 for x in "bhmn"} if bias is None else named_strides(bias, "bb bh bm bn")),
        H=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        M=q.shape[2] if rows is None else len(rows),
        N=k.shape[2],
        scale_log2=scale * 1.4426950408889634,
        D=q.shape[3],
        BLOCK_D=block_d(q.shape[3]),
        HAS_ROWS=rows is not None,
        BIAS=0 if bias is None else 2 if bias.dtype == torch.bool else 1,
        CAUSAL=is_causal,
        PRECISION=precision(q.dtype),
    )


def value_args(q: Tensor, v: Tensor | None, out: Tensor | None) -> dict[str, Any]:
    """The values and the output, or q in their place where neither is asked for."""
    have = v is not None and out is not None
    v, out = (v, out) if v is not None and out is not None else (q, q)
    return dict(
        v_ptr=v,
        out_ptr=out,
        **named_strides(v, "vb vh vn vd"),
        **named_strides(out, "ob oh om od"),
        DV=v.shape[3],
        BLOCK_DV=block_d(v.shape[3]) if have else 16,
        HAS_V=have,
    )


def forward_launch(shared: dict[str, Any], values: dict[str, Any], lse: Tensor, target: Target) -> Launch:
    """Writes out [B,H,M,Dv] (if values are given) and lse [B,H,M] fp32, natural logarithm."""
    q = shared["q_ptr"]
    widest = max(shared["D"], values["DV"]) if values["HAS_V"] else shared["D"]
    config = forward_config(widest, q.element_size(), shared["M"], target, shared["BIAS"] != 0)
    grid = (triton.cdiv(shared["M"], config.block_m) * q.shape[0] * q.shape[1],)
    return Launch(forward_kernel, grid, {**shared, **values, "lse_ptr": lse}, config)


def one_pass_launch(
    shared: dict[str, Any], values: dict[str, Any], lse: Tensor, amap: Tensor, heads: int, config: Config
) -> Launch:
    """Writes out (if values are given), lse [B,H,M] and the map ([B,M,N], or [B,H,M,N] for each) fp32."""
    grid = (triton.cdiv(shared["M"], config.block_m) * shared["q_ptr"].shape[0],)
    args = {**shared, **values, "lse_ptr": lse, "map_ptr": amap, "HEADS": heads}
    return Launch(one_pass_kernel, grid, args, config)
