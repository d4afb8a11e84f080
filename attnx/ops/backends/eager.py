"""The op in plain torch, on any device: blocked over rows and heads, so that no [B, H, M, N] exists.

For a block of query rows and one head after another: scores, softmax, into the map's block, times V. A block of
weights is small enough to stay in cache. Half precision is computed in fp32, so the maps are as exact as fp32's.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.backends.vendor import output_and_lse
from attnx.ops.reducers import MASK_THRESHOLD, Reduction, fuse_into

_BLOCK_BYTES = 4 << 20  # of weights at a time


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype (rows before heads in memory, as blocks want it) and map, see `ops.attention`."""
    if rows is not None:
        amap = attention_map(q, k, bias, is_causal, scale, heads, rows, None, softcap)
        if softcap:
            return attention_lse(q, k, v, bias, is_causal, scale, softcap)[0], amap
        return _output(q, k, v, bias, is_causal, scale), amap
    B, H, M, _ = q.shape
    out = q.new_empty(B, M, H, v.shape[3])
    v = v.to(_compute_dtype(q))
    amap = _map(q, k, v, bias, is_causal, scale, heads, None, None, out, softcap)
    return out.transpose(1, 2), amap


def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """The map alone, see `ops.attention_map`. Rows are gathered first, so R rows cost R rows."""
    if rows is not None:
        q, bias, lse = _take_rows(q, bias, lse, rows)
    return _map(q, k, None, bias, is_causal, scale, heads, rows, lse, None, softcap)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] and lse [B,H,M], see `ops.attention_lse`: the vendor's, or else by blocks.

    The lse is float32, of float64 inputs float64. The vendor knows no softcap.
    """
    served = None if softcap else output_and_lse(q, k, v, bias, is_causal, scale)
    if served is not None:
        return served
    (B, H, M, _), group, compute = q.shape, q.shape[1] // k.shape[1], _compute_dtype(q)
    out = q.new_empty(B, M, H, v.shape[3])
    lse = torch.empty(B, H, M, dtype=compute, device=q.device)
    v = v.to(compute)
    for block, h, s in _scores(q, k.to(compute), bias, is_causal, scale, None, softcap):
        top = s.amax(-1, keepdim=True)
        # A row without keys has no maximum to subtract: its weights are then exp(-inf) = 0, its lse log(0).
        p = s.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
        total = p.sum(-1, keepdim=True)
        lse[:, h, block] = (top + total.log())[..., 0]
        out[:, block, h] = torch.bmm(p, v[:, h // group]) / total.masked_fill(total == 0, 1.0)
    return out.transpose(1, 2), lse


def vecmat(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    lse: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """[B,N]: r times the mean map, see `ops.vecmat`. On CPUs rows whose r is zero in every item cost nothing."""
    rows = None
    if r.device.type == "cpu":
        used = (r != 0).any(0)
        if not used.all():
            rows = used.nonzero()[:, 0]
            r = r.index_select(1, rows)
            q, bias, lse = _take_rows(q, bias, lse, rows)
    compute = _compute_dtype(q)
    r = r.to(compute)
    skip = r == 0
    some = r.device.type != "cpu" or bool(skip.any())
    passed = k.new_zeros(r.shape[0], 1, k.shape[2], dtype=compute)
    for block, _, p in _weights(q, k.to(compute), bias, is_causal, scale, rows, lse, softcap):
        if some:
            p.masked_fill_(skip[:, block, None], 0.0)  # zero times NaN is NaN
        passed.baddbmm_(r[:, None, block], p)
    return passed[:, 0].div_(q.shape[1]).float()


def gradient_map(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
    softcap: float = 0.0,
) -> Tensor:
    """The gradient-weighted map, see `ops.gradient_map`. Rows are gathered first, so R rows cost R rows."""
    if rows is not None:
        q, bias, lse = _take_rows(q, bias, lse, rows)
        grad = grad.index_select(2, rows)
    compute, group = _compute_dtype(q), q.shape[1] // k.shape[1]
    amap = _empty_map(q, k, heads)
    v = v.to(compute)
    for block, h, p in _weights(q, k.to(compute), bias, is_causal, scale, rows, lse, softcap):
        da = torch.bmm(grad[:, h, block].to(compute), v[:, h // group].transpose(1, 2))
        p.mul_(da.clamp_(min=0) if clamp else da)
        _fuse_block(amap, p, block, h, q.shape[1], heads)
    return amap.float()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    is_causal: bool,
    scale: float,
    softcap: float = 0.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of an additive bias (None for a boolean one), the weights recomputed block by block.

    ``dS = P (dP - sum_j dP_j P_j + dlse)``, times ``1 - tanh^2`` before it reaches q and k of capped scores.

    Args:
        grad: [B, H, M, Dv], the gradient of the output.
        dlse: [B, H, M] float, the gradient of the log-sum-exp; None: zero.
    """
    compute = _compute_dtype(q)
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (q, k, v))
    additive = bias is not None and bias.dtype != torch.bool
    dbias = torch.zeros(bias.shape, dtype=compute, device=q.device) if bias is not None and additive else None
    k_, v_, grad, out = (t.to(compute) for t in (k, v, grad, out))
    for block, h, p in _weights(q, k_, bias, is_causal, scale, None, None, softcap):
        hk = h // group
        q_block = q[:, h, block].to(compute)
        grad_block = grad[:, h, block]
        ds = torch.bmm(grad_block, v_[:, hk].transpose(1, 2))
        delta = (grad_block * out[:, h, block]).sum(-1, keepdim=True)
        ds -= delta if dlse is None else delta - dlse[:, h, block, None]
        ds *= p
        dv[:, hk].baddbmm_(p.transpose(1, 2), grad_block)
        if dbias is not None:
            target = _bias_block(dbias, h, block)
            target += ds.sum_to_size(target.shape)
        if softcap:
            # The weights are no longer needed: their scratch takes the capped scores.
            tanh = torch.bmm(q_block, k_[:, hk].transpose(1, 2), out=p).mul_(scale / softcap).tanh_()
            ds *= tanh.square_().neg_().add_(1)
        dq[:, h, block] = torch.bmm(ds, k_[:, hk]).mul_(scale)
        dk[:, hk].baddbmm_(ds.transpose(1, 2), q_block, alpha=scale)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _output(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Output [B,H,M,Dv] alone: the vendor's SDPA."""
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype).masked_fill(bias.float() < MASK_THRESHOLD, -torch.inf)
    # SDPA on CPUs hides before it scales: a scale of 0 or less would make NaN of minus infinity.
    if is_causal and (bias is not None or scale <= 0):
        hidden = _causal_mask(slice(0, q.shape[2]), None, k.shape[2], q.device)
        if bias is None:
            bias = ~hidden
        else:
            bias = bias & ~hidden if bias.dtype == torch.bool else bias.masked_fill(hidden, -torch.inf)
        is_causal = False
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if bias is not None and q.is_cuda:  # some of its kernels there give rows without keys the mean of all values
        empty = ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else (bias == -torch.inf).all(-1, keepdim=True)
        out = out.masked_fill(empty, 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _map(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
    out: Tensor | None,
    softcap: float,
) -> Tensor:
    """The map [B,M,N] (each: [B,H,M,N]); with v, writes the output into out [B,M,H,Dv] on the way."""
    H, group = q.shape[1], q.shape[1] // k.shape[1]
    amap = _empty_map(q, k, heads)
    for block, h, p in _weights(q, k.to(_compute_dtype(q)), bias, is_causal, scale, rows, lse, softcap):
        _fuse_block(amap, p, block, h, H, heads)
        if v is not None and out is not None:
            out[:, block, h] = torch.bmm(p, v[:, h // group])
    return amap.float()


def _empty_map(q: Tensor, k: Tensor, heads: Reduction) -> Tensor:
    (B, H, M, _), N = q.shape, k.shape[2]
    return q.new_empty((B, H, M, N) if heads is Reduction.EACH else (B, M, N), dtype=_compute_dtype(q))


def _fuse_block(amap: Tensor, p: Tensor, block: slice, h: int, H: int, heads: Reduction) -> None:
    """One more head's block of weights into the map; a mean is divided when the last head is in."""
    if heads is Reduction.EACH:
        amap[:, h, block] = p
    elif h == 0:
        amap[:, block] = p
    else:
        fuse_into(amap[:, block], p, heads)
    if heads is Reduction.MEAN and h == H - 1:
        amap[:, block].div_(H)


def _weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    rows: Tensor | None,
    lse: Tensor | None,
    softcap: float,
) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, P [B, rows, N]) for every block and head. The P given is overwritten by the next."""
    scratch = k.new_empty(k.shape[0] * _rows_in_a_block(q, k) * k.shape[2] if lse is None else 0)
    for block, h, s in _scores(q, k, bias, is_causal, scale, rows, softcap):
        # A row without keys: softmax gives NaN, and the answer is zero.
        empty = (s == -torch.inf).all(-1, keepdim=True) if bias is not None else None
        if lse is None:
            p = torch.softmax(s, -1, out=scratch[: s.numel()].view(s.shape))
        else:
            p = s.sub_(lse[:, h, block, None]).exp_()
        if empty is not None:
            p.masked_fill_(empty, 0.0)
        yield block, h, p


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float, rows: Tensor | None, softcap: float
) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, scores [B, rows, N]) for every block and head. Overwritten by the next."""
    (B, H, M, _), N = q.shape, k.shape[2]
    group, step = H // k.shape[1], _rows_in_a_block(q, k)
    scratch = k.new_empty(B * step * N)
    alpha = scale / softcap if softcap else scale
    for start in range(0, M, step):
        block = slice(start, min(M, start + step))
        s = scratch[: B * (block.stop - start) * N].view(B, block.stop - start, N)
        hidden = _causal_mask(block, rows, N, q.device) if is_causal else None
        for h in range(H):
            q_block = q[:, h, block].to(k.dtype)
            torch.baddbmm(s, q_block, k[:, h // group].transpose(1, 2), beta=0, alpha=alpha, out=s)
            if softcap:
                s.tanh_().mul_(softcap)
            if bias is not None:
                tile = _bias_block(bias, h, block)
                if bias.dtype != torch.bool:
                    s.add_(tile)
                s.masked_fill_(~tile if bias.dtype == torch.bool else tile < MASK_THRESHOLD, -torch.inf)
            if hidden is not None:
                s.masked_fill_(hidden, -torch.inf)
            yield block, h, s


def _rows_in_a_block(q: Tensor, k: Tensor) -> int:
    return max(16, min(q.shape[2], _BLOCK_BYTES // max(1, k.shape[0] * k.shape[2] * k.element_size())))


def _take_rows(
    q: Tensor, bias: Tensor | None, lse: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    bias = bias.index_select(2, rows) if bias is not None and bias.shape[2] > 1 else bias
    return q.index_select(2, rows), bias, lse.index_select(2, rows) if lse is not None else None


def _bias_block(bias: Tensor, h: int, block: slice) -> Tensor:
    """The [1|B, 1|rows, 1|N] part of a [1|B, 1|H, 1|M, 1|N] bias."""
    return bias[:, h if bias.shape[1] > 1 else 0, block if bias.shape[2] > 1 else slice(None)]


def _causal_mask(block: slice, rows: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """[rows, N] bool: True where row i may not see key j (j > i)."""
    i = torch.arange(block.start, block.stop, device=device) if rows is None else rows[block]
    return torch.arange(keys, device=device) > i[:, None]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
