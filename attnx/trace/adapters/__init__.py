"""Adapters that make unfused blocks call SDPA, independent of maps, kernels and devices.

Each adapter returns a list of functions that undo its changes; `route_to_sdpa` applies all adapters. The outermost
capture restores the blocks. No adapter changes what a model computes: a block whose arithmetic differs from SDPA's is
left as it is, and `unfused_blocks` returns the reason.
"""

from collections.abc import Callable

from torch import nn

from attnx.trace.adapters import albef, dino, huggingface, timm

Undo = Callable[[], None]


def route_to_sdpa(model: nn.Module) -> list[Undo]:
    """Make the model's unfused blocks call SDPA; returns functions that undo it, to be called in any order."""
    return [*timm.use_sdpa(model), *huggingface.use_sdpa(model), *albef.use_sdpa(model), *dino.use_sdpa(model)]


def unfused_blocks(model: nn.Module) -> dict[str, str]:
    """{module name: reason} of the parts of a model that do not call SDPA."""
    return huggingface.not_switched(model)
