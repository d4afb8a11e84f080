"""Hugging Face transformers: each configuration names the attention implementation that its modules look up."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def use_sdpa(model: nn.Module) -> list[Callable[[], None]]:
    """Switches configurations from other attention implementations to SDPA; gives functions that switch them back."""
    if "transformers" not in sys.modules:
        return []
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        # Not by getattr: nn.Module's takes microseconds to find that there is none.
        config: Any = vars(module).get("config", getattr(type(module), "config", None))
        before = getattr(config, "_attn_implementation_internal", None)
        if before not in (None, "sdpa"):
            # The public setter would also set every configuration below this one.
            config._attn_implementation_internal = "sdpa"
            undo.append(partial(setattr, config, "_attn_implementation_internal", before))
    return undo
