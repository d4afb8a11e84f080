"""Makes blocks that hide their attention call SDPA. An adapter knows nothing of maps, kernels or devices.

Each returns a list of functions that undo what it did; `route_to_sdpa` applies all of them. The outermost capture
restores the blocks. No adapter changes what a model computes: a block whose arithmetic differs from SDPA's is left as
it is, and `unfused_blocks` returns the reason.
"""

from collections.abc import Callable

from torch import nn

from attnx.trace.adapters import albef, huggingface, timm

Undo = Callable[[], None]


def route_to_sdpa(model: nn.Module) -> list[Undo]:
    """Makes the model's deaf blocks call SDPA; call the functions given, in any order, to undo it."""
    return [*timm.use_sdpa(model), *huggingface.use_sdpa(model), *albef.use_sdpa(model)]


def unfused_blocks(model: nn.Module) -> dict[str, str]:
    """{module name: reason}, of the parts of a model that were not made to call SDPA."""
    return huggingface.not_switched(model)
