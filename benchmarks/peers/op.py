"""Contestants of the op, each as its users run it.

A contestant takes q, k, v, each [B, H, N, D], and r [B, N] float32, and returns an `Answer`.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnx


class NotRun(Exception):  # noqa: N818  not an error
    """The contestant can't run; the message is recorded as the reason."""


class Answer(NamedTuple):
    """out [B, N, H * D], the input of the next layer, and results of the mean map over heads.

    map: [B, N, N], or [B, 1, N] for the first row only; vector: [B, N], r @ map.
    """

    out: Tensor
    map: Tensor | None = None
    vector: Tensor | None = None


Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Answer]


def sdpa(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """Attention without a map: the floor."""
    return Answer(_tokens(F.scaled_dot_product_attention(q, k, v)))


def attnx_map(q: Tensor, k: Tensor, v: Tensor, r: Tensor, **options: Any) -> Answer:
    """attnx with the mean map; `options` are passed to `attnx.attention`."""
    out, amap = attnx.attention(q, k, v, **options)
    return Answer(_tokens(out), amap)


def attnx_row(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """attnx with the class token's row of the mean map."""
    return attnx_map(q, k, v, r, rows=_first_row(q.device))


def vecmat(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """attnx without the map: output and log-sum-exp, then r @ map. r is dense, so no part can be skipped."""
    out, lse = attnx.attention_lse(q, k, v)
    return Answer(_tokens(out), vector=attnx.vecmat(r, q, k, lse=lse))


def hf_eager(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """As Hugging Face's eager attention: scaled scores, softmax in fp32, cast; then the mean over heads."""
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return Answer(_tokens(torch.matmul(weights, v)), weights.mean(1, dtype=torch.float32))


def timm_eager(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """As timm's unfused attention: q is scaled first, softmax in the input dtype; then the mean over heads."""
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return Answer(_tokens(weights @ v), weights.mean(1, dtype=torch.float32))


def compiled_eager(quick: bool) -> Attention:
    """`hf_eager` with `torch.compile` for one shape; if quick, it is traced without code generation.

    The compiler is reset first, to stay below its recompilation limit.
    """
    if not quick and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise NotRun("torch.compile needs a C++ compiler for the CPU")
    torch.compiler.reset()
    return torch.compile(hf_eager, dynamic=False, backend="eager" if quick else "inductor")


# compiled_eager is made for each shape, by `contestant`.
ATTENTION: dict[str, Attention] = {
    "sdpa": sdpa,
    "attnx": attnx_map,
    "attnx_eager": partial(attnx_map, backend="eager"),  # plain torch, by blocks: the fallback without kernels
    "attnx_row": attnx_row,
    "vecmat": vecmat,
    "hf_eager": hf_eager,
    "timm_eager": timm_eager,
}
NAMES = (*ATTENTION, "compiled_eager")
ATTNX = ("attnx", "attnx_eager", "attnx_row", "vecmat")


def contestant(name: str, quick: bool) -> Attention:
    """The contestant of this name; raises `NotRun` if it is not available on this device."""
    return compiled_eager(quick) if name == "compiled_eager" else ATTENTION[name]


def _tokens(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]: a view if the kernel stores rows before heads, else a copy, as in a model."""
    return out.transpose(1, 2).flatten(2)


@cache
def _first_row(device: torch.device) -> Tensor:
    # A tensor on the device, because a CUDA graph can't record a copy from the host.
    return torch.zeros(1, dtype=torch.int64, device=device)
