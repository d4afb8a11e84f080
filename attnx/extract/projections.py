"""Queries of chosen rows and all keys, from an attention block's own projections: neither values nor other queries."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.trace.adapters.switches import own_forward_only

# Blocks whose queries and keys are linear maps of their input, normalised at most: no rotation, no scale of their own.
_TIMM = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
_TRANSFORMERS = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "ViTMSN", "ViTMAE", "CLIP", "IJepa", "AST", "Yolos")
_SEPARATE = (("q_proj", "k_proj"), ("query", "key"))


class HeadDims(NamedTuple):
    """Numbers of heads of queries and keys, and their dimension."""

    H: int
    Hk: int
    D: int


def projects(module: nn.Module) -> bool:
    """Whether it is a block whose projections are known."""
    kind = type(module)
    name = kind.__name__.removesuffix("SelfAttention").removesuffix("Attention")
    is_transformers = kind.__module__.startswith("transformers.models.") and name in _TRANSFORMERS
    return is_transformers or f"{kind.__module__}.{kind.__name__}" in _TIMM


def queries_and_keys(module: nn.Module, x: Tensor, row: int, heads: HeadDims) -> tuple[Tensor, Tensor] | None:
    """q [B, H, 1, D] of one row, and k [B, Hk, N, D], as the block would project them; None where it is not known to.

    Args:
        module: with one packed linear `qkv`, or linears for queries and keys by a known name.
        x: [B, N, C], what the block is called with.
        row: the query's.
        heads: of the attention.
    """
    weights = _weights(module, heads) if projects(module) and x.dim() == 3 else None
    if weights is None:
        return None
    (wq, bq), (wk, bk) = weights
    q = F.linear(x[:, row : row + 1], wq, bq).unflatten(-1, (heads.H, heads.D)).transpose(1, 2)
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
    """A linear map and nothing more: no adapter, no hook, no forward of its own, no weight of a tensor subclass."""
    if type(linear) is not nn.Linear or not own_forward_only(linear):
        return False
    # Quantised and sharded weights (torchao's, DTensor) can't all be sliced.
    if any(type(t) not in (Tensor, nn.Parameter) for t in (linear.weight, linear.bias) if t is not None):
        return False
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)
    return not any((*hooks, registry._global_forward_hooks, registry._global_forward_pre_hooks))
