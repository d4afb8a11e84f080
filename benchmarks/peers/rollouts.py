"""Contestants of the whole-model benchmarks.

A function takes a model, which it may change, and returns ``call(images) -> rollout [B, patches]`` or None. `cls`
returns the class token's map instead of a rollout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attnx

Rollout = Callable[[Tensor], Tensor | None]


def plain(model: nn.Module) -> Rollout:
    """The floor: the model's own forward pass, without a rollout."""

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


def extractor(method: str, **options: Any) -> Callable[[nn.Module], Rollout]:
    """A contestant: `attnx.Extractor` with these options."""

    def prepare(model: nn.Module) -> Rollout:
        extract = attnx.Extractor(model, method, **options)
        return lambda images: extract(images).flatten(1)

    return prepare


def hooks(model: nn.Module) -> Rollout:
    """A timm model with fused attention off, hooks that keep every layer's weights, then `explain_rollout`."""
    kept: list[Tensor] = []
    blocks = [module for module in model.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]
    block: Any
    for block in blocks:
        block.fused_attn = False
        block.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output))

    def call(images: Tensor) -> Tensor:
        kept.clear()
        try:
            model(images)
            return explain_rollout(kept)
        finally:
            kept.clear()

    return call


def output_attentions(model: nn.Module) -> Rollout:
    """A Hugging Face model with eager attention and ``output_attentions=True``, then `explain_rollout`."""
    model.set_attn_implementation("eager")

    def call(images: Tensor) -> Tensor:
        return explain_rollout(model(images, output_attentions=True).attentions)

    return call


CONTESTANTS: dict[str, Callable[[nn.Module], Rollout]] = {
    "plain": plain,
    "attnx": capture,
    "extractor": extractor("rollout", keep="auto"),  # keeps maps or q and k, whichever is smaller
    "extractor_qk": extractor("rollout", keep="qk"),  # memory linear in the tokens
    "extractor_graph": extractor("rollout", compile=True),  # a CUDA graph, for single images
    "cls": extractor("cls"),  # the class token's map of the last layer
    "hooks": hooks,
    "output_attentions": output_attentions,
}
EAGER = ("hooks", "output_attentions")  # these keep the weights of all heads and layers


def explain_rollout(attentions: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Rollout as vit-explain computes it, with mean fusion and nothing discarded: the product of whole matrices.

    ``M = (F + I) / 2``, divided by its row sums, ``R = M_L ... M_1``; the class token's row over the patches,
    [B, patches]. Rows are divided by their own sums, so batches work; at B = 1 the result is vit-explain's, since
    the rows of M sum to 1. The weights stay on their device, whereas vit-explain copies them to the CPU.

    Reference:
        https://github.com/jacobgil/vit-explain
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    result = identity.expand(len(attentions[0]), -1, -1)
    for weights in attentions:
        mixed = (weights.mean(1, dtype=torch.float32) + identity) / 2
        result = torch.matmul(mixed / mixed.sum(-1, keepdim=True), result)
    return result[:, 0, 1:]
