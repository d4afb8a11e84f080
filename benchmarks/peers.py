"""What attnx is compared with. Every function does its whole job; none is slower than its users know it.

Attention: (q, k, v), each [B, H, N, D] -> (tokens [B, N, H * D] as the next layer wants them, map or None).
Models: a function that takes a model for itself and gives ``call(images) -> rollout [B, patches]``, or None.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnx

Answer = tuple[Tensor, Tensor | None]
Attention = Callable[[Tensor, Tensor, Tensor], Answer]
Rollout = Callable[[Tensor], Tensor | None]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Answer:
    """Attention without a map: the floor."""
    return _tokens(F.scaled_dot_product_attention(q, k, v)), None


def attnx_map(q: Tensor, k: Tensor, v: Tensor) -> Answer:
    """attnx with the whole mean map."""
    out, amap = attnx.attention(q, k, v)
    return _tokens(out), amap


def attnx_row(q: Tensor, k: Tensor, v: Tensor) -> Answer:
    """attnx with the class token's row of the mean map."""
    out, amap = attnx.attention(q, k, v, rows=_first_row(q.device))
    return _tokens(out), amap


def hf_eager(q: Tensor, k: Tensor, v: Tensor) -> Answer:
    """As Hugging Face's eager attention: scaled scores, softmax in fp32, cast; then the mean over heads."""
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return _tokens(torch.matmul(weights, v)), weights.mean(1, dtype=torch.float32)


def timm_eager(q: Tensor, k: Tensor, v: Tensor) -> Answer:
    """As timm's unfused attention: q is scaled first, softmax in the input dtype; then the mean over heads."""
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return _tokens(weights @ v), weights.mean(1, dtype=torch.float32)


def compiled_eager() -> Attention:
    """`hf_eager` by `torch.compile`, for one shape; forgets earlier ones, so that no recompilation limit is met."""
    torch.compiler.reset()
    return torch.compile(hf_eager, dynamic=False)


ATTENTION: dict[str, Callable[[], Attention]] = {
    "sdpa": lambda: sdpa,
    "attnx": lambda: attnx_map,
    "attnx_row": lambda: attnx_row,
    "hf_eager": lambda: hf_eager,
    "timm_eager": lambda: timm_eager,
    "compiled_eager": compiled_eager,
}


def plain(model: nn.Module) -> Rollout:
    """The model's own forward pass: the floor."""

    def call(images: Tensor) -> None:
        model(images)

    return call


def capture(model: nn.Module) -> Rollout:
    """attnx: every layer's map by `attnx.capture`, then `attnx.rollout`."""

    def call(images: Tensor) -> Tensor:
        with attnx.capture(model) as trace:
            model(images)
        return attnx.rollout(trace).flatten(1)

    return call


def extractor(model: nn.Module) -> Rollout:
    """attnx: `attnx.Extractor`, which may leave out what the rollout does not need."""
    extract = attnx.Extractor(model, "rollout")
    return lambda images: extract(images).flatten(1)


def hooks(model: nn.Module) -> Rollout:
    """A timm model with fused attention off, hooks that keep every layer's weights, then `explain_rollout`."""
    kept: list[Tensor] = []
    blocks = [module for module in model.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]
    if not blocks:
        raise ValueError(f"hooks: expected timm attention modules; found none in {type(model).__name__}")
    for block in blocks:
        block.fused_attn = False
        block.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output))

    def call(images: Tensor) -> Tensor:
        kept.clear()
        model(images)
        result = explain_rollout(kept)
        kept.clear()
        return result

    return call


def output_attentions(model: nn.Module) -> Rollout:
    """A Hugging Face model with eager attention and ``output_attentions=True``, then `explain_rollout`."""
    model.set_attn_implementation("eager")  # type: ignore[operator]

    def call(images: Tensor) -> Tensor:
        attentions = model(images, output_attentions=True).attentions
        if not attentions:
            raise RuntimeError("output_attentions: the model gave no attentions")
        return explain_rollout(attentions)

    return call


MODELS: dict[str, Callable[[nn.Module], Rollout]] = {
    "plain": plain,
    "attnx": capture,
    "extractor": extractor,
    "hooks": hooks,
    "output_attentions": output_attentions,
}


def explain_rollout(attentions: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Rollout as vit-explain computes it, with mean fusion and nothing discarded: the product of whole matrices.

    ``M = (F + I) / 2``, divided by its row sums, ``R = M_L ... M_1``; the class token's row over the patches,
    [B, patches]. Rows are divided by their own sums, which lets it take batches; at B = 1 the result is vit-explain's,
    since the rows of M sum to 1. The weights stay on their device: vit-explain copies each layer's to the CPU.

    Reference:
        https://github.com/jacobgil/vit-explain
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    result = identity.expand(len(attentions[0]), -1, -1)
    for weights in attentions:
        mixed = (weights.mean(1, dtype=torch.float32) + identity) / 2
        result = torch.matmul(mixed / mixed.sum(-1, keepdim=True), result)
    return result[:, 0, 1:]


def _tokens(out: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]: a view where the kernel left rows before heads, else a copy, as in a model."""
    return out.transpose(1, 2).flatten(2)


@cache
def _first_row(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)
