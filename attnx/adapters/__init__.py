"""Makes blocks that hide their attention call SDPA. An adapter knows nothing of maps, kernels or devices.

Each gives a list of functions that undo what it did; `open_ears` applies all of them. The outermost capture restores
the blocks. No adapter changes what a model computes: where SDPA is not the same arithmetic the block is left, and
`left_alone` says why.
"""

from collections.abc import Callable

from torch import nn

from attnx.adapters import albef, huggingface, timm

Undo = Callable[[], None]


def open_ears(model: nn.Module) -> list[Undo]:
    """Makes the model's deaf blocks call SDPA; call the functions given, in any order, to undo it."""
    return [*timm.use_sdpa(model), *huggingface.use_sdpa(model), *albef.use_sdpa(model)]


def left_alone(model: nn.Module) -> dict[str, str]:
    """{module name: reason}, of the parts of a model that were not made to call SDPA."""
    return huggingface.not_switched(model)
