"""Adapter for DINO's own attention: forwards that call SDPA instead of computing the softmax themselves.

The attention returns (output, probabilities), and the block discards the probabilities unless return_attention=True. So
the bound block calls the bound attention without probabilities. See `known` for how blocks are recognised.

Reference:
    https://github.com/facebookresearch/dino, vision_transformer.py
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.rewriting import (
    VIT_MAY_USE,
    VIT_NEEDS,
    drops,
    makes_graph,
    output,
    probabilities_of,
    project,
    returns_pair,
)

_BLOCK = {"norm1", "attn", "drop_path", "norm2", "mlp"}


def _attention(self: Any, x: Tensor, probabilities: bool = True) -> tuple[Tensor, Tensor | None]:
    """Output and probabilities of DINO's attention; with probabilities=False, (output, None)."""
    if drops(self.attn_drop) or (probabilities and makes_graph(self, x)):
        result: tuple[Tensor, Tensor | None] = type(self).forward(self, x)
        return result
    q, k, v = project(self, x)
    out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return output(self, out), probabilities_of(self, q, k) if probabilities else None


def _block(self: Any, x: Tensor, return_attention: bool = False) -> Tensor:
    """Output of DINO's block, computed without probabilities unless they are returned or a hook sees them."""
    is_bound = getattr(vars(self.attn).get("forward"), "__func__", None) is _attention
    if return_attention or not is_bound or _has_foreign_hooks(self.attn):
        result: Tensor = type(self).forward(self, x, return_attention)
        return result
    attended, _ = self.attn(self.norm1(x), probabilities=False)
    x = x + self.drop_path(attended)
    x = x + self.drop_path(self.mlp(self.norm2(x)))
    return x


def _has_foreign_hooks(module: nn.Module) -> bool:
    """True if hooks of other packages see the module's output; hooks of this package do not read it."""
    hooks = (*module._forward_hooks.values(), *registry._global_forward_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("attnx.") for hook in hooks)


BLOCKS = (
    Known("Attention", (("x",),), VIT_NEEDS, VIT_MAY_USE, _attention, test=returns_pair),
    Known("Block", (("x", "return_attention"),), _BLOCK, frozenset(), _block),
)
