"""Gradient checkpointing, which runs blocks a second time in the backward pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from attnx.trace.adapters.switches import Off

_FLAGS = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint")  # timm's, transformers', Microsoft's


def switch_off(model: nn.Module) -> list[Callable[[], None]]:
    """Switch gradient checkpointing off; returns functions that switch it back on."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        for flag in _FLAGS:
            if vars(module).get(flag) is True:
                setattr(module, flag, Off(False))
                undo.append(partial(setattr, module, flag, True))
    return undo


def recomputes() -> bool:
    """True in a backward pass, in which a module only runs to recompute its forward pass."""
    return torch._C._current_graph_task_id() != -1


def is_checkpointed() -> bool:
    """True inside `torch.utils.checkpoint`, which runs the same code again in the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
