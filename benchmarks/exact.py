"""References in float64: r @ map and rollout, computed in blocks of rows. They share no code with attnx."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK = 1 << 27  # weights per block, 1 GB in float64


class Layer(NamedTuple):
    """q, k [B, H, N, D] of one layer, and the scale of its scores."""

    q: Tensor
    k: Tensor
    scale: float


def vecmat(r: Tensor, q: Tensor, k: Tensor, scale: float | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B, N]: r @ mean_h softmax(q k^T * scale), computed in `dtype`; r [B, M], q [B, H, M, D], k [B, H, N, D]."""
    B, H, M, D = q.shape
    block = max(1, BLOCK // (B * H * k.shape[2]))
    keys = k.to(dtype).transpose(-1, -2)
    result = torch.zeros(B, k.shape[2], dtype=dtype, device=q.device)
    for start in range(0, M, block):
        rows = slice(start, start + block)
        scores = q[:, :, rows].to(dtype) @ keys * (D**-0.5 if scale is None else scale)
        fused = scores.softmax(-1).mean(1)
        result += (r[:, None, rows].to(dtype) @ fused)[:, 0]
    return result


def rollout(layers: Sequence[Layer]) -> Tensor:
    """[B, N - 1] float64: the class token's row of the product of (mean_h P + I) / 2 over all layers, over the patches.

    The rows of P sum to 1, so no normalisation is needed. The product is a chain of vectors from the last layer.
    """
    r = _class_token(layers[-1].q)
    for layer in reversed(layers):
        r = (vecmat(r, *layer) + r) / 2
    return r[:, 1:]


def cls_row(layer: Layer) -> Tensor:
    """[B, N - 1] float64: the class token's row of mean_h P in one layer, over the patches."""
    return vecmat(_class_token(layer.q), *layer)[:, 1:]


def _class_token(q: Tensor) -> Tensor:
    """[B, M] float64: 1 at the first query, else 0."""
    first = torch.zeros(q.shape[0], q.shape[2], dtype=torch.float64, device=q.device)
    first[:, 0] = 1
    return first


def layers_of(model: nn.Module, images: Tensor) -> list[Layer]:
    """q, k and scale of every call of `F.scaled_dot_product_attention` in one forward pass."""
    layers: list[Layer] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                named = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
                q, scale = named["query"], kwargs.get("scale")
                layers.append(Layer(q, named["key"], q.shape[-1] ** -0.5 if scale is None else scale))
            return func(*args, **kwargs)

    with torch.inference_mode(), Mode():
        model(images)
    if not layers:
        raise ValueError(f"{type(model).__name__} never called F.scaled_dot_product_attention")
    return layers
