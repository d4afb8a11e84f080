"""The kernels for Hopper, where they take a call. Not a backend: `triton` tries them first for backend="hopper".

They have not run on a GPU yet. Until they have passed the CUDA tests on one, they are off by default: a mistake in the
order of their loads and products would stop the GPU.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from triton import cdiv

from attnx.kernels.hopper.arguments import Attention, can_be_loaded
from attnx.kernels.hopper.configs import ROWS, map_tile, short_row, vecmat_tile
from attnx.ops.backends.launches import fused_map, run, target
from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores

SMALLEST_SCALE = 2.0**-126  # a scale that underflows would turn infinite scores into NaN


@cache
def missing(device: torch.device) -> str:
    """The reason that these kernels can't run on the device, or with this Triton; "" if there is none."""
    if find_spec("triton.experimental") is None or find_spec("triton.experimental.gluon.nvidia.hopper") is None:
        return "it needs Triton 3.6 or newer, which has Gluon"
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU of compute capability 9.0; tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    return ""


def is_on(device: torch.device) -> bool:
    """True if the environment variable ATTNX_HOPPER=1 turns these kernels on, and the device has what they need."""
    return os.environ.get("ATTNX_HOPPER") == "1" and not missing(device)


def takes_short_rows(scores: Scores, v: Tensor | None) -> bool:
    """True if the kernel for short rows takes the call."""
    q = scores.q
    return short_row(q.shape[3], q.shape[2], scores.k.shape[2]) is not None and _attention(scores, v) is not None


def short_rows(scores: Scores, v: Tensor | None, out: Tensor | None, reduction: Reduction) -> Tensor:
    """The map of short rows; writes the output, too, unless v and out are None. See `takes_short_rows`."""
    from attnx.kernels.hopper.launches import short_rows_launch

    attention, q, keys = _attention(scores, v), scores.q, scores.k.shape[2]
    row = short_row(q.shape[3], q.shape[2], keys)
    assert attention is not None
    assert row is not None
    return fused_map(
        q, q.shape[2], keys, reduction, cdiv(q.shape[2], ROWS),
        lambda maps, splits: short_rows_launch(attention, v, out, maps, int(reduction), splits, row),
    )  # fmt: skip


def long_map(scores: Scores, reduction: Reduction, lse: Tensor, inf_is_nan: bool) -> Tensor | None:
    """The map from log-sum-exps [B, H, M], contiguous; None if the kernel doesn't take the call."""
    attention = _attention(scores, None)
    if attention is None:
        return None
    q, keys, mask = scores.q, scores.k.shape[2], attention.mask
    tile = map_tile(q.shape[3], q.shape[2], mask is not None and mask.dtype != torch.bool)
    if tile is None:
        return None
    from attnx.kernels.hopper.launches import map_launch

    return fused_map(
        q, q.shape[2], keys, reduction, cdiv(q.shape[2], ROWS) * cdiv(keys, tile.keys),
        lambda maps, splits: map_launch(
            attention, lse, maps, int(reduction), splits, tile, target(q.device), inf_is_nan
        ),
    )  # fmt: skip


def vecmat(scores: Scores, r: Tensor, lse: Tensor) -> Tensor | None:
    """r @ P of each half of a head's rows, [B, 2 H, N], for r [B, M] and lse [B, H, M], contiguous.

    None if the kernel doesn't take the call.
    """
    attention, q = _attention(scores, None), scores.q
    if attention is None or attention.mask is not None or scores.is_causal:
        return None
    tile = vecmat_tile(q.shape[3], q.shape[2])
    if tile is None:
        return None
    from attnx.kernels.hopper.launches import vecmat_launch

    parts = q.new_empty((q.shape[0], q.shape[1], 2, scores.k.shape[2]), dtype=torch.float32)
    run(vecmat_launch(attention, r, lse, parts, tile), q)
    return parts.flatten(1, 2)


def _attention(scores: Scores, v: Tensor | None) -> Attention | None:
    """The kernels' inputs; None if they can't load or compute them, whatever the sizes."""
    q, k, bias = scores.q, scores.k, scores.bias
    tensors = (q, k) if v is None else (q, k, v)
    if scores.softcap or scores.scale < SMALLEST_SCALE or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if (v is not None and v.shape[3] != q.shape[3]) or not all(can_be_loaded(t) for t in tensors):
        return None
    mask = None
    if bias is not None:
        mask = _mask_of_keys(bias, k.shape[2])
        if mask is None:
            return None
    return Attention(q, k, mask, scores.is_causal, scores.scale)


def _mask_of_keys(bias: Tensor, keys: int) -> Tensor | None:
    """[P, N]: the bias if it is the same for all heads and queries; None if it is not, or of a dtype without kernel."""
    same = all(bias.shape[dim] == 1 or bias.stride(dim) == 0 for dim in (1, 2))
    known = bias.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32)
    return bias[:, 0, 0].expand(-1, keys) if same and known else None
