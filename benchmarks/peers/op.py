"""Contestants of the op, each as its users run it.

A contestant takes q, k, v, each [B, H, N, D], and r [B, N] float32, and returns an `Answer`. A factory raises `NotRun`
if the contestant is not available on this device.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

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


def attnx_map(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """attnx with the whole mean map."""
    out, amap = attnx.attention(q, k, v)
    return Answer(_tokens(out), amap)


def attnx_eager(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """attnx with the whole mean map in plain torch, by blocks: the fallback without kernels."""
    out, amap = attnx.attention(q, k, v, backend="eager")
    return Answer(_tokens(out), amap)


def attnx_row(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """attnx with the class token's row of the mean map."""
    out, amap = attnx.attention(q, k, v, rows=_first_row(q.device))
    return Answer(_tokens(out), amap)


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


def flex_map(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """For torch.compile: output and log-sum-exp by flex_attention, then the map from whole scores."""
    from torch.nn.attention.flex_attention import flex_attention

    out, lse = flex_attention(q, k, v, return_lse=True)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return Answer(_tokens(out), torch.exp(scores.float() - lse[..., None]).mean(1))


def flex_vecmat(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Answer:
    """For torch.compile: r @ map by two calls of torch's flex_attention, in linear memory.

    The second one attends from keys to queries with scores ``s - lse + log r``: its log-sum-exp over the queries is
    log(r @ P). Its values are not used, so they are as narrow as possible.
    """
    from torch.nn.attention.flex_attention import flex_attention

    out, lse = flex_attention(q, k, v, return_lse=True)

    def weighted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - lse[b, h, j] + torch.log(r[b, j])

    narrow = q[..., :16].contiguous()
    _, log = flex_attention(k, q, narrow, score_mod=weighted, scale=q.shape[-1] ** -0.5, return_lse=True)
    return Answer(_tokens(out), vector=log.exp().mean(1))


def compiled(call: Attention) -> Callable[[bool], Attention]:
    """A factory of `call` with `torch.compile` for one shape; if quick, it is traced without code generation.

    It resets the compiler first, to stay below its recompilation limit.
    """

    def make(quick: bool) -> Attention:
        if not quick and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise NotRun("torch.compile needs a C++ compiler for the CPU")
        torch.compiler.reset()
        return torch.compile(call, dynamic=False, backend="eager" if quick else "inductor")

    return make


ATTENTION: dict[str, Callable[[bool], Attention]] = {
    "sdpa": lambda quick: sdpa,
    "attnx": lambda quick: attnx_map,
    "attnx_eager": lambda quick: attnx_eager,
    "attnx_row": lambda quick: attnx_row,
    "vecmat": lambda quick: vecmat,
    "hf_eager": lambda quick: hf_eager,
    "timm_eager": lambda quick: timm_eager,
    "compiled_eager": compiled(hf_eager),
    "flex_map": compiled(flex_map),
    "flex_vecmat": compiled(flex_vecmat),
}
ATTNX = ("attnx", "attnx_eager", "attnx_row", "vecmat")


def _tokens(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]: a view if the kernel stores rows before heads, else a copy, as in a model."""
    return out.transpose(1, 2).flatten(2)


@cache
def _first_row(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)
