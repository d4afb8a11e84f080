"""Weights that are sharded over processes (FSDP): hooks gather them before a module runs and free them after it."""

import sys

from torch import nn

_WRAPPERS = ("FSDPModule", "FullyShardedDataParallel")


def is_sharded(model: nn.Module) -> bool:
    """True if the model is sharded: its modules must run to their end, so that hooks free the gathered weights."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(kind.__name__ in _WRAPPERS for module in model.modules() for kind in type(module).__mro__)
