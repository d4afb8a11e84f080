"""Queries of chosen rows and all keys, from an attention block's own projections: neither values nor other queries."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_SEPARATE = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"))


def projects(module: nn.Module) -> bool:
    """Whether it has linears for queries and keys by a known name."""
    return any(all(hasattr(module, name) for name in names) for names in (("qkv",), *_SEPARATE))


def queries_and_keys(
    module: nn.Module, x: Tensor, row: int, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor] | None:
    """q [B, H, 1, D] of one row, and k [B, Hk, N, D], as the block would project them; None where it can't be told.

    What a block does beside projecting and normalising (rotary embeddings, say) is not done here: whoever calls this
    compares it with what the block itself gives, once.

    Args:
        module: with one packed linear `qkv`, or linears for queries and keys by a known name.
        x: [B, N, C], what the block is called with.
        row: the query's.
        heads: H, Hk, D.
    """
    H, Hk, D = heads
    weights = _weights(module, H * D, Hk * D)
    if weights is None or x.dim() != 3:
        return None
    (wq, bq), (wk, bk) = weights
    q = F.linear(x[:, row : row + 1], wq, bq).unflatten(-1, (H, D)).transpose(1, 2)
    k = F.linear(x, wk, bk).unflatten(-1, (Hk, D)).transpose(1, 2)
    norms: list[Any] = [getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm")]
    return norms[0](q), norms[1](k)


def _weights(module: nn.Module, queries: int, keys: int) -> list[tuple[Tensor, Tensor | None]] | None:
    packed: Any = getattr(module, "qkv", None)
    if _plain(packed) and packed.out_features >= queries + keys:
        parts = (slice(0, queries), slice(queries, queries + keys))
        return [(packed.weight[part], None if packed.bias is None else packed.bias[part]) for part in parts]
    for names in _SEPARATE:
        pair: list[Any] = [getattr(module, name, None) for name in names]
        if all(_plain(linear) for linear in pair) and [linear.out_features for linear in pair] == [queries, keys]:
            return [(linear.weight, linear.bias) for linear in pair]
    return None


def _plain(linear: Any) -> bool:
    """A linear map and nothing more: no adapter, no hook, no parametrization."""
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks
