"""Weights that are sharded over processes (FSDP): hooks gather them before a module runs and free them after it."""

import sys

from torch import nn

from attnx.trace.structure import Structure

_WRAPPERS = ("FSDPModule", "FullyShardedDataParallel")


def is_sharded(structure: Structure) -> bool:
    """True if a model is sharded: its modules must run to their end, so that hooks free the gathered weights."""
    return "torch.distributed.fsdp" in sys.modules and bool(structure.where(_is_wrapper))


def _is_wrapper(module: nn.Module) -> bool:
    return any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__)
