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
from attnx.ops.scores import Scores
from attnx.ops.statistics import Statistic, Statistics

_BLOCK_BYTES = 4 << 20  # of weights at a time


def attention(scores: Scores, v: Tensor, reduction: Reduction, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype and map, see `ops.functional.attention`."""
    if rows is not None:
        amap = attention_map(scores, reduction, rows, None)
        by_blocks = scores.softcap or scores.bias_repeats
        return attention_lse(scores, v)[0] if by_blocks else _output(scores, v), amap
    out = scores.new_output(v)
    return out, _map(scores, reduction, None, None, v, out)


def attention_map(scores: Scores, reduction: Reduction, rows: Tensor | None, lse: Tensor | None) -> Tensor:
    """The map alone, see `ops.functional.attention_map`. Rows are gathered first, so R rows cost R rows."""
    if rows is not None:
        scores, lse = scores.at_rows(rows), None if lse is None else lse.index_select(2, rows)
    return _map(scores, reduction, rows, lse, None, None)


def attention_lse(scores: Scores, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] and lse [B,H,M], see `ops.functional.attention_lse`: the vendor's, or else by blocks.

    The lse is float32, for float64 inputs float64.
    """
    served = output_and_lse(scores, v)
    if served is not None:
        return served
    q, compute = scores.q, _compute_dtype(scores.q)
    out, lse, v = scores.new_output(v), torch.empty(q.shape[:3], dtype=compute, device=q.device), v.to(compute)
    for block, h, s in _scores(scores, None):
        top = s.amax(-1, keepdim=True)
        # A row without keys has no maximum to subtract: its weights are then exp(-inf) = 0, its lse log(0).
        p = s.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
        total = p.sum(-1, keepdim=True)
        lse[:, h, block] = (top + total.log())[..., 0]
        out[:, h, block] = torch.bmm(p, v[:, h // scores.group]) / total.masked_fill(total == 0, 1.0)
    return out, lse


def vecmat(scores: Scores, r: Tensor, lse: Tensor | None) -> Tensor:
    """[B,N]: r times the mean map, see `ops.functional.vecmat`. On CPUs rows with r = 0 in every item cost nothing."""
    rows = None
    if r.device.type == "cpu":
        used = (r != 0).any(0)
        if not used.all():
            rows = used.nonzero()[:, 0]
            r = r.index_select(1, rows)
            scores, lse = scores.at_rows(rows), None if lse is None else lse.index_select(2, rows)
    r = r.to(_compute_dtype(scores.q))
    skip = r == 0
    some = r.device.type != "cpu" or bool(skip.any())
    passed = r.new_zeros(r.shape[0], 1, scores.k.shape[2])
    for block, _, p in _weights(scores, rows, lse):
        if some:
            p.masked_fill_(skip[:, block, None], 0.0)  # zero times NaN is NaN
        passed.baddbmm_(r[:, None, block], p)
    return passed[:, 0].div_(scores.q.shape[1]).float()


def gradient_map(
    scores: Scores,
    grad: Tensor,
    v: Tensor,
    reduction: Reduction,
    clamp: bool,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The gradient-weighted map, see `ops.functional.gradient_map`. Rows are gathered first, so R rows cost R rows."""
    if rows is not None:
        scores, lse = scores.at_rows(rows), None if lse is None else lse.index_select(2, rows)
        grad = grad.index_select(2, rows)
    compute = _compute_dtype(scores.q)
    amap, v = _empty_map(scores, reduction), v.to(compute)
    for block, h, p in _weights(scores, rows, lse):
        da = torch.bmm(grad[:, h, block].to(compute), v[:, h // scores.group].transpose(1, 2))
        p.mul_(da.clamp_(min=0) if clamp else da)
        _fuse_block(amap, p, block, h, scores.q.shape[1], reduction)
    return amap.float()


def attention_stats(
    scores: Scores, v: Tensor | None, reduction: Reduction | None, statistics: Statistics, lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Output, map and statistics, see `ops.attention_stats`."""
    q = scores.q
    if v is None and reduction is None and lse is None and statistics.which == Statistic.ENTROPY:
        entropy = _entropy_by_output(scores)
        if entropy is not None:
            return None, None, entropy[None]
    out = None if v is None else scores.new_output(v)
    amap = None if reduction is None else _empty_map(scores, reduction)
    v = None if v is None else v.to(_compute_dtype(q))
    stats, far = statistics.new_result(q), None
    for block, h, p in _weights(scores, None, lse):
        if h == 0:
            far = statistics.distances(block)
        stats[:, :, h, block] = statistics.of_rows(p, far).float()
        if out is not None and v is not None:
            out[:, h, block] = torch.bmm(p, v[:, h // scores.group])
        if amap is not None and reduction is not None:
            _fuse_block(amap, p, block, h, q.shape[1], reduction)
    return out, None if amap is None else amap.float(), stats


def _entropy_by_output(scores: Scores) -> Tensor | None:
    """Entropy [B,H,M] float32 of the rows by the vendor's kernel; None with a bias, or where that can't serve.

    ``-sum_j P_j log P_j = lse - scale * q . sum_j P_j k_j``, whose sum is the output of attention with v = k.
    """
    if scores.bias is not None or scores.q.device.type != "cpu":
        return None
    compute = _compute_dtype(scores.q)
    q, k = scores.q.to(compute), scores.k.to(compute)
    served = output_and_lse(scores._replace(q=q, k=k), k)
    if served is None:
        return None
    out, lse = served
    return (lse - scores.scale * (q * out).sum(-1)).clamp_(min=0).float()


def attention_backward(
    scores: Scores, grad: Tensor, v: Tensor, out: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of an additive bias (None for a boolean one), the weights recomputed block by block.

    ``dS = P (dP - sum_j dP_j P_j + dlse)``, times ``1 - tanh^2`` before it reaches q and k of capped scores.

    Args:
        grad: [B, H, M, Dv], the gradient of the output.
        out: [B, H, M, Dv], the output.
        dlse: [B, H, M] float, the gradient of the log-sum-exp; None: zero.
    """
    q, k, bias, _, scale, softcap = scores
    compute = _compute_dtype(q)
    dq, dk, dv = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (q, k, v))
    additive = bias is not None and bias.dtype != torch.bool
    dbias = torch.zeros(bias.shape, dtype=compute, device=q.device) if bias is not None and additive else None
    k_, v_, grad, out = (t.to(compute) for t in (k, v, grad, out))
    for block, h, p in _weights(scores._replace(k=k_), None, None):
        hk = h // scores.group
        q_block, grad_block = q[:, h, block].to(compute), grad[:, h, block]
        ds = torch.bmm(grad_block, v_[:, hk].transpose(1, 2))
        delta = (grad_block * out[:, h, block]).sum(-1, keepdim=True)
        ds -= delta if dlse is None else delta - dlse[:, h, block, None]
        ds *= p
        dv[:, hk].baddbmm_(p.transpose(1, 2), grad_block)
        if dbias is not None:
            target = _bias_block(dbias, h, block)
            target += _by_item(ds, dbias).sum_to_size(target.shape)
        if softcap:
            # The weights are no longer needed: the capped scores take their place.
            tanh = torch.bmm(q_block, k_[:, hk].transpose(1, 2), out=p).mul_(scale / softcap).tanh_()
            ds *= tanh.square_().neg_().add_(1)
        dq[:, h, block] = torch.bmm(ds, k_[:, hk]).mul_(scale)
        dk[:, hk].baddbmm_(ds.transpose(1, 2), q_block, alpha=scale)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _output(scores: Scores, v: Tensor) -> Tensor:
    """Output [B,H,M,Dv] alone: torch's SDPA."""
    q, k, bias, is_causal, scale, _ = scores
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype).masked_fill(bias.float() < MASK_THRESHOLD, -torch.inf)
    # SDPA on CPUs masks before it scales: a scale of 0 or less would turn minus infinity into NaN.
    if is_causal and (bias is not None or scale <= 0):
        hidden = _causal_mask(slice(0, q.shape[2]), None, k.shape[2], q.device)
        if bias is None:
            bias = ~hidden
        else:
            bias = bias & ~hidden if bias.dtype == torch.bool else bias.masked_fill(hidden, -torch.inf)
        is_causal = False
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if bias is not None and q.is_cuda:  # some CUDA kernels give rows without keys the mean of all values
        empty = ~bias.any(-1, keepdim=True) if bias.dtype == torch.bool else (bias == -torch.inf).all(-1, keepdim=True)
        out = out.masked_fill(empty, 0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _map(
    scores: Scores,
    reduction: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The map [B,M,N] (EACH: [B,H,M,N]); with v, also writes the output into out [B,H,M,Dv]."""
    H, amap = scores.q.shape[1], _empty_map(scores, reduction)
    v = None if v is None else v.to(_compute_dtype(scores.q))
    for block, h, p in _weights(scores, rows, lse):
        _fuse_block(amap, p, block, h, H, reduction)
        if v is not None and out is not None:
            out[:, h, block] = torch.bmm(p, v[:, h // scores.group])
    return amap.float()


def _empty_map(scores: Scores, reduction: Reduction) -> Tensor:
    (B, H, M, _), N = scores.q.shape, scores.k.shape[2]
    shape = (B, H, M, N) if reduction is Reduction.EACH else (B, M, N)
    return scores.q.new_empty(shape, dtype=_compute_dtype(scores.q))


def _fuse_block(amap: Tensor, p: Tensor, block: slice, h: int, H: int, reduction: Reduction) -> None:
    """Fuses the block of weights of head h into the map; a mean is divided after the last head."""
    if reduction is Reduction.EACH:
        amap[:, h, block] = p
    elif h == 0:
        amap[:, block] = p
    else:
        fuse_into(amap[:, block], p, reduction)
    if reduction is Reduction.MEAN and h == H - 1:
        amap[:, block].div_(H)


def _weights(scores: Scores, rows: Tensor | None, lse: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, P [B, rows, N]) for every block and head. The next step overwrites P."""
    q, k = scores.q, scores.k
    size = k.shape[0] * _rows_in_a_block(q, k) * k.shape[2] if lse is None else 0
    scratch = torch.empty(size, dtype=_compute_dtype(q), device=q.device)
    for block, h, s in _scores(scores, rows):
        # A row without keys: softmax gives NaN, and the answer is zero.
        empty = (s == -torch.inf).all(-1, keepdim=True) if scores.bias is not None else None
        if lse is None:
            p = torch.softmax(s, -1, out=scratch[: s.numel()].view(s.shape))
        else:
            p = s.sub_(lse[:, h, block, None]).exp_()
        if empty is not None:
            p.masked_fill_(empty, 0.0)
        yield block, h, p


def _scores(scores: Scores, rows: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, scores [B, rows, N]) for every block and head. The next step overwrites them."""
    q, k, bias, is_causal, scale, softcap = scores
    (B, H, M, _), N = q.shape, k.shape[2]
    step, k = _rows_in_a_block(q, k), k.to(_compute_dtype(q))
    scratch = k.new_empty(B * step * N)
    alpha = scale / softcap if softcap else scale
    for start in range(0, M, step):
        block = slice(start, min(M, start + step))
        s = scratch[: B * (block.stop - start) * N].view(B, block.stop - start, N)
        hidden = _causal_mask(block, rows, N, q.device) if is_causal else None
        for h in range(H):
            q_block = q[:, h, block].to(k.dtype)
            torch.baddbmm(s, q_block, k[:, h // scores.group].transpose(1, 2), beta=0, alpha=alpha, out=s)
            if softcap:
                s.tanh_().mul_(softcap)
            if bias is not None:
                tile, repeated = _bias_block(bias, h, block), _by_item(s, bias)
                if bias.dtype != torch.bool:
                    repeated.add_(tile)
                repeated.masked_fill_(~tile if bias.dtype == torch.bool else tile < MASK_THRESHOLD, -torch.inf)
            if hidden is not None:
                s.masked_fill_(hidden, -torch.inf)
            yield block, h, s


def _rows_in_a_block(q: Tensor, k: Tensor) -> int:
    return max(16, min(q.shape[2], _BLOCK_BYTES // max(1, k.shape[0] * k.shape[2] * _compute_dtype(q).itemsize)))


def _bias_block(bias: Tensor, h: int, block: slice) -> Tensor:
    """The [P, 1|rows, 1|N] part of a [P, 1|H, 1|M, 1|N] bias."""
    return bias[:, h if bias.shape[1] > 1 else 0, block if bias.shape[2] > 1 else slice(None)]


def _by_item(s: Tensor, bias: Tensor) -> Tensor:
    """[B / P, P, rows, N]: scores [B, rows, N] in the form that a `_bias_block` of P items broadcasts to."""
    return s.view(-1, len(bias), *s.shape[1:])


def _causal_mask(block: slice, rows: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """[rows, N] bool: True where row i may not see key j (j > i)."""
    i = torch.arange(block.start, block.stop, device=device) if rows is None else rows[block]
    return torch.arange(keys, device=device) > i[:, None]


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
