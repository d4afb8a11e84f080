"""Reductions of the attention weights P over the heads: their names, and their definition in torch."""

from enum import IntEnum

import torch
from torch import Tensor

MASK_THRESHOLD = -5e4
"""A bias below this masks its key: minus infinity, finfo.min of any dtype, -1e9. Scores beside it have no digits."""


class Reduction(IntEnum):
    """A reduction of the heads' maps to one. The values are those of the kernels' constants of the same names."""

    MEAN = 0
    MAX = 1
    MIN = 2
    EACH = 3

    @classmethod
    def parse(cls, name: str) -> "Reduction":
        """The member called `name` ("mean", "max", "min", "each").

        Raises:
            ValueError: no such member.
        """
        if isinstance(name, str) and name in _BY_NAME:
            return _BY_NAME[name]
        raise ValueError(f"heads: expected one of {', '.join(_BY_NAME)}; got {name!r}")


# A plain dict, since torch.compile does not trace the members of an enum class.
_BY_NAME = {member.name.lower(): member for member in Reduction}


def fuse_heads(p: Tensor, heads: Reduction) -> Tensor:
    """[B, H, M, N] weights fused over their heads to [B, M, N]; unchanged for EACH. This is the definition."""
    if heads is Reduction.MEAN:
        return p.mean(1)
    if heads is Reduction.MAX:
        return p.amax(1)
    if heads is Reduction.MIN:
        return p.amin(1)
    return p


def fuse_into(fused: Tensor, p: Tensor, heads: Reduction) -> None:
    """Fuse another head's weights into `fused`, in place. It starts as head 0's; the caller divides a MEAN by H."""
    if heads is Reduction.MEAN:
        fused.add_(p)
    elif heads is Reduction.MAX:
        torch.maximum(fused, p, out=fused)
    elif heads is Reduction.MIN:
        torch.minimum(fused, p, out=fused)
    else:
        raise ValueError("heads: EACH is not fused")
