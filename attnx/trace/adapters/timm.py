"""timm: every attention module reads its own `fused_attn` flag, set when the block was built."""

from collections.abc import Callable
from functools import partial

from torch import nn

from attnx.trace.adapters.switches import On


def use_sdpa(model: nn.Module) -> list[Callable[[], None]]:
    """Sets `fused_attn` where it is off; gives the functions that set it back."""
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        # Not by getattr: nn.Module's takes microseconds to find that there is none.
        if vars(module).get("fused_attn", getattr(type(module), "fused_attn", True)) is False:
            setattr(module, "fused_attn", On(True))  # noqa: B010  (a plain flag, which nn.Module is not typed to have)
            undo.append(partial(setattr, module, "fused_attn", False))
    return undo
