"""One query and all keys of an attention block, computed from its projections without the other queries and values."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.ops.checks import in_range
from attnx.trace.adapters.switches import own_forward_only

# Blocks whose queries and keys are linear maps of their input, at most normalised: no rotation and no own scale.
_TIMM = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
_TRANSFORMERS = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "ViTMSN", "ViTMAE", "CLIP", "IJepa", "AST", "Yolos")
_SEPARATE = (("q_proj", "k_proj"), ("query", "key"))


class HeadDims(NamedTuple):
    """H query heads and Hk key heads of dimension D."""

    H: int
    Hk: int
    D: int


def projects(module: nn.Module) -> bool:
    """True if the projections of the block are known."""
    kind = type(module)
    name = kind.__name__.removesuffix("SelfAttention").removesuffix("Attention")
    is_transformers = kind.__module__.startswith("transformers.models.") and name in _TRANSFORMERS
    return is_transformers or f"{kind.__module__}.{kind.__name__}" in _TIMM


def queries_and_keys(module: nn.Module, x: Tensor, row: int, heads: HeadDims) -> tuple[Tensor, Tensor] | None:
    """q [B, H, 1, D] of one row and k [B, Hk, N, D], as the block projects them; None for an unknown block.

    Args:
        module: a block with a packed linear `qkv`, or with linears for queries and keys of known names.
        x: [B, N, C], the block's input.
        row: index of the query; -1 is the last.
        heads: numbers of heads and their dimension.
    """
    weights = _weights(module, heads) if projects(module) and x.dim() == 3 else None
    if weights is None:
        return None
    (wq, bq), (wk, bk) = weights
    (at,) = in_range([row], x.shape[1])
    q = F.linear(x[:, at : at + 1], wq, bq).unflatten(-1, (heads.H, heads.D)).transpose(1, 2)
    k = F.linear(x, wk, bk).unflatten(-1, (heads.Hk, heads.D)).transpose(1, 2)
    norms: list[Any] = [getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    return norms[0](q), norms[1](k)


def _weights(module: nn.Module, heads: HeadDims) -> list[tuple[Tensor, Tensor | None]] | None:
    queries, keys = heads.H * heads.D, heads.Hk * heads.D
    packed: Any = getattr(module, "qkv", None)
    if _plain(packed) and packed.out_features == queries + 2 * keys:
        parts = (slice(0, queries), slice(queries, queries + keys))
        return [(packed.weight[part], None if packed.bias is None else packed.bias[part]) for part in parts]
    for names in _SEPARATE:
        pair: list[Any] = [getattr(module, name, None) for name in names]
        if all(_plain(linear) for linear in pair) and [linear.out_features for linear in pair] == [queries, keys]:
            return [(linear.weight, linear.bias) for linear in pair]
    return None


def _plain(linear: Any) -> bool:
    """True for an nn.Linear without adapter, hook, replaced forward, or weights of a tensor subclass."""
    if type(linear) is not nn.Linear or not own_forward_only(linear):
        return False
    # Some quantised and sharded weights (torchao, DTensor) cannot be sliced.
    if any(type(t) not in (Tensor, nn.Parameter) for t in (linear.weight, linear.bias) if t is not None):
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)
    return not any((*hooks, registry._global_forward_hooks, registry._global_forward_pre_hooks))
