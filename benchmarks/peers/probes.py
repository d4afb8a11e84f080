"""Contestants of the probes: the mean attention distance and the row entropy of every head and layer.

A function takes a model, which it may change, and returns ``call(images) -> [B, 2, layers, heads]``: distances in
pixels, entropies in nats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnx.jobs.probes import HeadProbes

Probe = Callable[[Tensor], Tensor]
ALL = ("distance", "entropy", "max", "mass")


def stats(model: nn.Module) -> Probe:
    """attnx: all four statistics, as `attnx probe` computes them. Distances and entropies are returned."""
    probes = HeadProbes(model, ALL)

    def call(images: Tensor) -> Tensor:
        return probes(images)[:, :2].unflatten(-1, (len(probes.layers_of), -1))

    return call


def hooks(model: nn.Module) -> Probe:
    """A timm model with fused attention off, and hooks that keep every layer's weights, then `of_weights`."""
    kept: list[Tensor] = []
    network: Any = model
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for block in blocks:
        block.fused_attn = False
        block.attn_drop.register_forward_hook(lambda module, args, output: kept.append(output))
    patch: int = network.patch_embed.patch_size[0]

    def call(images: Tensor) -> Tensor:
        kept.clear()
        try:
            model(images)
            return of_weights(kept, patch)
        finally:
            kept.clear()

    return call


def output_attentions(model: nn.Module) -> Probe:
    """A Hugging Face model with eager attention and ``output_attentions=True``, then `of_weights`."""
    network: Any = model
    network.set_attn_implementation("eager")
    patch: int = network.config.patch_size

    def call(images: Tensor) -> Tensor:
        return of_weights(network(images, output_attentions=True).attentions, patch)

    return call


PROBES: dict[str, Callable[[nn.Module], Probe]] = {
    "stats": stats, "hooks": hooks, "output_attentions": output_attentions,
}  # fmt: skip


def of_weights(attentions: Sequence[Tensor], patch: int) -> Tensor:
    """The tutorial's mean attention distance, in torch, and the entropy of the rows, of weights [B, H, N, N].

    Reference:
        https://github.com/sayakpaul/probing-vits/blob/main/notebooks/mean-attention-distance-1k.ipynb
    """
    side = int((attentions[0].shape[-1] - 1) ** 0.5)
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(attentions[0])
    far = patch * torch.cdist(at, at)
    found = []
    for weights in attentions:
        distance = (weights[..., 1:, 1:] * far).sum(-1).mean(-1)
        found.append(torch.stack([distance, torch.special.entr(weights).sum(-1).mean(-1)], 1))
    return torch.stack(found, 2)
