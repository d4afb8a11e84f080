"""The op on GPUs by the Triton kernels; on CPU tensors they run in Triton's interpreter."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from attnx.kernels.arguments import shared_args, value_args
from attnx.kernels.configs import (
    Config,
    Launch,
    ShortRows,
    Target,
    gradient_config,
    head_splits,
    map_config,
    one_pass_config,
)
from attnx.kernels.forward import forward_launch
from attnx.kernels.gradient import gradient_launch
from attnx.kernels.map import fuse_launch, map_launch
from attnx.kernels.one_pass import one_pass_launch
from attnx.kernels.vecmat import vecmat_launch
from attnx.ops.backends import vendor
from attnx.ops.reducers import Reduction

MAX_HEAD_DIM = 256
ONE_PASS = 128
"""Up to so many keys output and map are made in one launch; with more, on Hopper, the vendor's output and a launch for
the map are faster where the vendor can serve: the parts take 0.84 of the time at 197 keys, 0.58 at 257 (H200)."""


def limits(q: Tensor, v: Tensor | None) -> list[str]:
    """Why this backend can't take these inputs; empty if it can."""
    widest = max(q.shape[-1], 0 if v is None else v.shape[-1])
    reasons = []
    if widest > MAX_HEAD_DIM:
        reasons.append(f"head dim {widest} is above {MAX_HEAD_DIM}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype} is not float16, bfloat16 or float32")
    if q.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(q.device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(q.device)))
        reasons.append(f"compute capability {capability} is below 8.0: Triton has no matrix units there")
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"tensors are on {q.device.type}; set TRITON_INTERPRET=1 before triton is imported to interpret")
    return reasons


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B,H,M,Dv] in q's dtype (rows before heads in memory, as blocks want it) and map, see `ops.attention`."""
    short = _short_rows(q, k, v, bias) if rows is None else None
    if short is None or (k.shape[2] > ONE_PASS and target(q.device).arch == 90):
        served = vendor.output_and_lse(q, k, v, bias, is_causal, scale) if q.is_cuda else None
        if served is not None:
            return served[0], attention_map(q, k, bias, is_causal, scale, heads, rows, served[1])
    if short is None:
        out, lse = _forward(q, k, v, bias, is_causal, scale)
        return out, attention_map(q, k, bias, is_causal, scale, heads, rows, lse)
    out = _output(q, v)
    shared = shared_args(q, k, _expand(bias, q, k), None, scale, is_causal)
    return out, _one_pass(shared, value_args(q, v, out), heads, short)


def attention_map(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Reduction,
    rows: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """The map alone, see `ops.attention_map`. Only the chosen rows are loaded."""
    shared = shared_args(q, k, _expand(bias, q, k), rows, scale, is_causal)
    short = _short_rows(q, k, None, bias) if lse is None else None
    if short is not None:
        return _one_pass(shared, value_args(q, None, None), heads, short)
    lse = _lse_of_rows(shared, rows, lse)
    config = map_config(shared["D"], q.element_size(), shared["M"], target(q.device), bias is not None)
    tiles = _tiles(shared, config)
    return _fused(shared, heads, tiles, lambda maps, splits: map_launch(shared, lse, maps, int(heads), splits, config))


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output, as in `attention`, and log-sum-exps [B,H,M] fp32: the vendor's, or where it can't serve, our kernel's."""
    served = vendor.output_and_lse(q, k, v, bias, is_causal, scale) if q.is_cuda else None
    return _forward(q, k, v, bias, is_causal, scale) if served is None else served


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exps by our own kernel."""
    out = _output(q, v)
    shared = shared_args(q, k, _expand(bias, q, k), None, scale, is_causal)
    lse = _lse(shared)
    _launch(forward_launch(shared, value_args(q, v, out), lse, target(q.device)), q)
    return out, lse


def vecmat(
    r: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float, lse: Tensor | None
) -> Tensor:
    """r @ mean_h P, [B,N] fp32, see `ops.vecmat`."""
    shared = shared_args(q, k, _expand(bias, q, k), None, scale, is_causal)
    lse = _lse_of_rows(shared, None, lse)
    each = q.new_empty((q.shape[0], q.shape[1], k.shape[2]), dtype=torch.float32)
    _launch(vecmat_launch(shared, r.contiguous(), lse, each, target(q.device)), q)
    return each.mean(1)


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
) -> Tensor:
    """The gradient-weighted map, see `ops.gradient_map`. Only the chosen rows are loaded."""
    shared = shared_args(q, k, _expand(bias, q, k), rows, scale, is_causal)
    lse = _lse_of_rows(shared, rows, lse)
    widest = max(q.shape[3], v.shape[3])
    config = gradient_config(widest, q.element_size(), shared["M"], target(q.device), bias is not None)
    return _fused(
        shared,
        heads,
        _tiles(shared, config),
        lambda maps, splits: gradient_launch(shared, grad, v, lse, maps, int(heads), clamp, splits, config),
    )


def _one_pass(shared: dict[str, Any], values: dict[str, Any], heads: Reduction, short: ShortRows) -> Tensor:
    tiles = cdiv(shared["M"], short.config.block_m)
    return _fused(
        shared, heads, tiles, lambda maps, splits: one_pass_launch(shared, values, maps, int(heads), splits, short)
    )


def _fused(shared: dict[str, Any], heads: Reduction, tiles: int, launch: Callable[[Tensor, int], Launch]) -> Tensor:
    """The map of a launch that splits the heads over programs where the tiles are too few for the device."""
    q, count = shared["q_ptr"], shared["H"]
    B, M, N = q.shape[0], shared["M"], shared["N"]
    each = heads is Reduction.EACH
    splits = count if each else head_splits(tiles * B, count, target(q.device))
    maps = q.new_empty((B * splits, M, N), dtype=torch.float32)
    _launch(launch(maps, splits), q)
    if each:
        return maps.view(B, count, M, N)
    if splits == 1:
        return maps
    amap = q.new_empty((B, M, N), dtype=torch.float32)
    _launch(fuse_launch(maps, amap, count, splits, int(heads)), q)
    return amap


def _short_rows(q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None) -> ShortRows | None:
    widest = max(q.shape[3], 0 if v is None else v.shape[3])
    return one_pass_config(widest, q.element_size(), k.shape[2], target(q.device), bias is not None)


def _output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _launch(launch: Launch, q: Tensor) -> None:
    """Runs it on q's device, which need not be the current one."""
    if q.device.type == "cuda" and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            launch.run()
    else:
        launch.run()


def _lse(shared: dict) -> Tensor:
    q = shared["q_ptr"]
    return q.new_empty((q.shape[0], q.shape[1], shared["M"]), dtype=torch.float32)


def _lse_of_rows(shared: dict[str, Any], rows: Tensor | None, lse: Tensor | None) -> Tensor:
    """[B,H,M] fp32, contiguous, of the rows that are asked for: chosen from a given one, or else computed."""
    if lse is not None:
        return (lse if rows is None else lse.index_select(2, rows)).contiguous()
    q, lse = shared["q_ptr"], _lse(shared)
    if rows is not None and rows.is_cuda:  # nothing is gathered: the kernels go where the rows say
        torch._assert_async(((rows >= 0) & (rows < q.shape[2])).all())
    _launch(forward_launch(shared, value_args(q, None, None), lse, target(q.device)), q)
    return lse


def _tiles(shared: dict[str, Any], config: Config) -> int:
    return cdiv(shared["M"], config.block_m) * cdiv(shared["N"], config.block_n * config.parts)


def _expand(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


@cache
def target(device: torch.device) -> Target:
    """What the kernels are compiled for; the interpreter takes Hopper's block sizes."""
    if device.type != "cuda":
        return Target("cuda", 90)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor, properties.multi_processor_count)
