"""Launches of the Hopper kernels for the compiler, in the default configurations. Tensors are on the meta device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attnx.kernels.configs import Launch, Target
from attnx.kernels.hopper.arguments import Attention
from attnx.kernels.hopper.configs import map_tile, short_row, vecmat_tile
from attnx.kernels.hopper.launches import map_launch, short_rows_launch, vecmat_launch

SHORT = (50, 197, 257)  # keys; those that a head dim does not take are left out


def hopper_launches(head_dim: int, dtype: torch.dtype, target: Target) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every Hopper kernel for a packed ViT qkv. They exist for sm_90 and half precision.

    "hopper_197" is the kernel for short rows with 197 keys. "_bias" has an additive mask of keys, "_mask" a boolean
    one, and "_causal" is causal.
    """
    if target.arch != 90 or dtype == torch.float32 or map_tile(head_dim, 197, False) is None:
        return
    for kind, mask_dtype in (("", None), ("_bias", dtype), ("_mask", torch.bool)):
        mask = None if mask_dtype is None else torch.empty(2, 1370, dtype=mask_dtype, device="meta")
        for keys in SHORT if mask is None else SHORT[1:2]:
            if short_row(head_dim, max(keys, 65), keys) is not None:
                yield f"hopper_{keys}{kind}", _short(head_dim, dtype, keys, mask)
        yield f"hopper_map{kind}", _map(head_dim, dtype, mask, False, target)
    yield "hopper_map_causal", _map(head_dim, dtype, None, True, target)
    q, _, _, _ = _packed(head_dim, dtype, 1370)
    tile = vecmat_tile(head_dim, 1370)
    assert tile is not None
    r, lse, out = (torch.empty(shape, device="meta") for shape in ((2, 1370), (2, 12, 1370), (2, 12, 2, 1370)))
    yield "hopper_vecmat", vecmat_launch(Attention(q, q, None, False, head_dim**-0.5), r, lse, out, tile)


def _packed(head_dim: int, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output."""
    q, k, v = torch.empty(2, n, 3, 12, head_dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.empty(2, n, 12, head_dim, dtype=dtype, device="meta").transpose(1, 2)


def _short(head_dim: int, dtype: torch.dtype, n: int, mask: Tensor | None) -> Launch:
    q, k, v, out = _packed(head_dim, dtype, n)
    row = short_row(head_dim, max(n, 65), n)
    assert row is not None
    attention = Attention(q, k, None if mask is None else mask[:, :n], False, head_dim**-0.5)
    return short_rows_launch(attention, v, out, torch.empty(2, n, n, device="meta"), 0, 1, row)


def _map(head_dim: int, dtype: torch.dtype, mask: Tensor | None, is_causal: bool, target: Target) -> Launch:
    q, k, _, _ = _packed(head_dim, dtype, 1370)
    tile = map_tile(head_dim, 1370, mask is not None and mask.dtype != torch.bool)
    assert tile is not None
    lse, maps = torch.empty(2, 12, 1370, device="meta"), torch.empty(2, 1370, 1370, device="meta")
    return map_launch(Attention(q, k, mask, is_causal, head_dim**-0.5), lse, maps, 0, 1, tile, target)
