"""Adapter for timm's MViT v2: a forward that calls SDPA, with the relative positions as its bias.

MultiScaleAttention pools queries, keys and values, adds to the scores a bias that depends on the query, and adds the
pooled query to the output ("residual pooling").

Reference:
    https://github.com/huggingface/pytorch-image-models, timm/models/mvitv2.py; https://arxiv.org/abs/2112.01526
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.masks import as_bias


def _attention(self: Any, x: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
    """Output [B, M, C] of MViT's attention, and the height and width of its pooled queries."""
    q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, q_size = _pool(self, q, feat_size, self.pool_q, self.norm_q)
    k, k_size = _pool(self, k, feat_size, self.pool_k, self.norm_k)
    v, _ = _pool(self, v, feat_size, self.pool_v, self.norm_v)
    bias = as_bias(_positions(self, q, k, q_size, k_size), q) if self.rel_pos_type == "spatial" else None
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
    if self.residual_pooling:
        out = out + q
    return self.proj(out.transpose(1, 2).flatten(2)), q_size


def _pool(
    self: Any, x: Tensor, size: list[int], pool: nn.Module | None, norm: nn.Module | None
) -> tuple[Tensor, list[int]]:
    """Pooled and normalised tokens [B, H, N, D] with the height and width of their grid; a class token is kept."""
    if pool is not None:
        first = int(self.has_cls_token)
        grid = pool(x[:, :, first:].transpose(2, 3).flatten(0, 1).unflatten(2, tuple(size)).contiguous())
        pooled = grid.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        x, size = torch.cat((x[:, :, :first], pooled), 2), list(grid.shape[2:])
    return (x if norm is None else norm(x)), size


def _positions(self: Any, q: Tensor, k: Tensor, q_size: list[int], k_size: list[int]) -> Tensor:
    """The bias [B, H, M, N] of the relative positions; 0 for a class token."""
    # timm's function adds the bias to scores, in place.
    add = inspect.unwrap(type(self).forward).__globals__["cal_rel_pos_type"]
    scores = q.new_zeros(*q.shape[:3], k.shape[2])
    bias: Tensor = add(scores, q, self.has_cls_token, q_size, k_size, self.rel_pos_h, self.rel_pos_w)
    return bias


BLOCKS = (
    Known(
        "MultiScaleAttention",
        (("x", "feat_size"),),
        {
            "qkv", "num_heads", "scale", "softmax", "proj", "has_cls_token", "cal_rel_pos_type", "rel_pos_type",
            "rel_pos_h", "rel_pos_w", "residual_pooling", "reshape_pre_pool", "reshape_post_pool", "pool_q", "pool_k",
            "pool_v", "norm_q", "norm_k", "norm_v",
        },
        {"dim_out", "permute", "reshape", "shape", "transpose", "unbind"},
        _attention,
        "timm.models.mvitv2",
    ),
)  # fmt: skip
