"""The weights of attention in plain torch, for a block of query rows and one head at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnx.ops.reducers import MASK_THRESHOLD
from attnx.ops.scores import Scores

BLOCK_BYTES = 4 << 20  # of weights at a time


def weights(scores: Scores, rows: Tensor | None, lse: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, P [B, rows, N]) for every block and head. The next step overwrites P."""
    q, k = scores.q, scores.k
    size = k.shape[0] * rows_in_a_block(q, k) * k.shape[2] if lse is None else 0
    scratch = torch.empty(size, dtype=compute_dtype(q), device=q.device)
    for block, h, s in scores_by_block(scores, rows):
        # A row without keys: softmax gives NaN, and the answer is zero.
        empty = (s == -torch.inf).all(-1, keepdim=True) if scores.bias is not None else None
        if lse is None:
            p = torch.softmax(s, -1, out=scratch[: s.numel()].view(s.shape))
        else:
            p = s.sub_(lse[:, h, block, None]).exp_()
        if empty is not None:
            p.masked_fill_(empty, 0.0)
        yield block, h, p


def scores_by_block(scores: Scores, rows: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows of the block, head, scores [B, rows, N]) for every block and head. The next step overwrites them."""
    q, k, bias, is_causal, scale, softcap = scores
    (B, H, M, _), N = q.shape, k.shape[2]
    step, k = rows_in_a_block(q, k), k.to(compute_dtype(q))
    scratch = k.new_empty(B * step * N)
    alpha = scale / softcap if softcap else scale
    for start in range(0, M, step):
        block = slice(start, min(M, start + step))
        s = scratch[: B * (block.stop - start) * N].view(B, block.stop - start, N)
        hidden = causal_mask(block, rows, N, q.device) if is_causal else None
        for h in range(H):
            q_block = q[:, h, block].to(k.dtype)
            torch.baddbmm(s, q_block, k[:, h // scores.group].transpose(1, 2), beta=0, alpha=alpha, out=s)
            if softcap:
                s.tanh_().mul_(softcap)
            if bias is not None:
                tile, repeated = bias_block(bias, h, block), by_item(s, bias)
                if bias.dtype != torch.bool:
                    repeated.add_(tile)
                repeated.masked_fill_(~tile if bias.dtype == torch.bool else tile < MASK_THRESHOLD, -torch.inf)
            if hidden is not None:
                s.masked_fill_(hidden, -torch.inf)
            yield block, h, s


def rows_in_a_block(q: Tensor, k: Tensor) -> int:
    """Number of query rows of a block: at least 16, and at most as many as take BLOCK_BYTES."""
    return max(16, min(q.shape[2], BLOCK_BYTES // max(1, k.shape[0] * k.shape[2] * compute_dtype(q).itemsize)))


def bias_block(bias: Tensor, h: int, block: slice) -> Tensor:
    """The [P, 1|rows, 1|N] part of a [P, 1|H, 1|M, 1|N] bias."""
    return bias[:, h if bias.shape[1] > 1 else 0, block if bias.shape[2] > 1 else slice(None)]


def by_item(s: Tensor, bias: Tensor) -> Tensor:
    """[B / P, P, rows, N]: scores [B, rows, N] in the form that a `bias_block` of P items broadcasts to."""
    return s.view(-1, len(bias), *s.shape[1:])


def causal_mask(block: slice, rows: Tensor | None, keys: int, device: torch.device) -> Tensor:
    """[rows, N] bool: True where row i may not see key j (j > i)."""
    i = torch.arange(block.start, block.stop, device=device) if rows is None else rows[block]
    return torch.arange(keys, device=device) > i[:, None]


def compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the weights: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
