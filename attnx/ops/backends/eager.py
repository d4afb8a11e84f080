"""The op in plain torch, on any device: blocked over rows and heads, so that no [B, H, M, N] exists.

For a block of query rows and one head after another: scores, softmax, into the map's block, times V. A block of
weights is small enough to stay in cache. Half precision is computed in fp32, so the maps are as exact as fp32's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnx.ops.backends.blocks import bias_block, by_item, causal_mask, compute_dtype, scores_by_block, weights
from attnx.ops.backends.vendor import output_and_lse
from attnx.ops.reducers import MASK_THRESHOLD, Reduction, fuse_into
from attnx.ops.scores import Scores
from attnx.ops.statistics import Statistic, Statistics

_MOST_SCORE = 100.0  # up to which an entropy is a difference of scores


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
    q, compute = scores.q, compute_dtype(scores.q)
    out, lse, v = scores.new_output(v), torch.empty(q.shape[:3], dtype=compute, device=q.device), v.to(compute)
    for block, h, s in scores_by_block(scores, None):
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
    r = r.to(compute_dtype(scores.q))
    skip = r == 0
    some = r.device.type != "cpu" or bool(skip.any())
    passed = r.new_zeros(r.shape[0], 1, scores.k.shape[2])
    for block, _, p in weights(scores, rows, lse):
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
    compute = compute_dtype(scores.q)
    amap, v = _empty_map(scores, reduction), v.to(compute)
    for block, h, p in weights(scores, rows, lse):
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
    v = None if v is None else v.to(compute_dtype(q))
    stats, far = statistics.new_result(q), None
    for block, h, p in weights(scores, None, lse):
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
    compute = compute_dtype(scores.q)
    q, k = scores.q.to(compute), scores.k.to(compute)
    # The difference of large numbers would have few digits. Not true for NaN either.
    if not abs(scores.scale) * q.norm(dim=-1).max() * k.norm(dim=-1).max() < _MOST_SCORE:
        return None
    served = output_and_lse(scores._replace(q=q, k=k), k)
    if served is None:
        return None
    out, lse = served
    return (lse - scores.scale * (q * out).sum(-1)).clamp_(min=0).float()


def row_importance(scores: Scores, grad: Tensor, v: Tensor, lse: Tensor | None) -> Tensor:
    """[B,H,M]: the importance of each row, see `ops.row_importance`."""
    compute = compute_dtype(scores.q)
    importance, v = scores.q.new_empty(scores.q.shape[:3], dtype=torch.float32), v.to(compute)
    for block, h, p in weights(scores, None, lse):
        dp = torch.bmm(grad[:, h, block].to(compute), v[:, h // scores.group].transpose(1, 2))
        importance[:, h, block] = p.mul_(dp).abs_().sum(-1).float()
    return importance


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
    compute = compute_dtype(q)
    dq, dk, dv = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (q, k, v))
    additive = bias is not None and bias.dtype != torch.bool
    dbias = torch.zeros(bias.shape, dtype=compute, device=q.device) if bias is not None and additive else None
    k_, v_, grad, out = (t.to(compute) for t in (k, v, grad, out))
    for block, h, p in weights(scores._replace(k=k_), None, None):
        hk = h // scores.group
        q_block, grad_block = q[:, h, block].to(compute), grad[:, h, block]
        ds = torch.bmm(grad_block, v_[:, hk].transpose(1, 2))
        delta = (grad_block * out[:, h, block]).sum(-1, keepdim=True)
        ds -= delta if dlse is None else delta - dlse[:, h, block, None]
        ds *= p
        dv[:, hk].baddbmm_(p.transpose(1, 2), grad_block)
        if dbias is not None:
            target = bias_block(dbias, h, block)
            target += by_item(ds, dbias).sum_to_size(target.shape)
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
        hidden = causal_mask(slice(0, q.shape[2]), None, k.shape[2], q.device)
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
    v = None if v is None else v.to(compute_dtype(scores.q))
    for block, h, p in weights(scores, rows, lse):
        _fuse_block(amap, p, block, h, H, reduction)
        if v is not None and out is not None:
            out[:, h, block] = torch.bmm(p, v[:, h // scores.group])
    return amap.float()


def _empty_map(scores: Scores, reduction: Reduction) -> Tensor:
    (B, H, M, _), N = scores.q.shape, scores.k.shape[2]
    shape = (B, H, M, N) if reduction is Reduction.EACH else (B, M, N)
    return scores.q.new_empty(shape, dtype=compute_dtype(scores.q))


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
