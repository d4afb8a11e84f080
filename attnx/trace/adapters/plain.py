"""Adapter for attention that returns only its output: forwards that call SDPA instead of computing the softmax.

This is the attention of timm 0.4, which the code of DeiT, MAE, T2T-ViT and CrossViT copies. `dino` supports the form
that returns the probabilities, too. See `known` for how blocks are recognised.

Reference:
    https://github.com/huggingface/pytorch-image-models/blob/v0.4.12/timm/models/vision_transformer.py
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnx.trace.adapters.known import Known
from attnx.trace.adapters.rewriting import (
    VIT_MAY_USE,
    VIT_NEEDS,
    drops,
    output,
    project,
    returns_one,
)


def _attention(self: Any, x: Tensor) -> Tensor:
    """Output of the attention [B, N, C]."""
    if drops(self.attn_drop) or not isinstance(self.scale, int | float):
        result: Tensor = type(self).forward(self, x)
        return result
    q, k, v = project(self, x)
    return output(self, F.scaled_dot_product_attention(q, k, v, scale=self.scale))


BLOCKS = (
    Known(
        "Attention", (("x",),), VIT_NEEDS, VIT_MAY_USE | {"unbind"}, _attention, operators={"@": 2, "*": 1},
        test=returns_one,
    ),
)  # fmt: skip
