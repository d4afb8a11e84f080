"""Helpers for forwards that stand in for a known block's: what a forward does, and projections."""

import dis
from collections import Counter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# Names that the forward of a vision transformer's attention uses.
VIT_NEEDS = {"qkv", "num_heads", "scale", "softmax", "attn_drop", "proj", "proj_drop"}
VIT_MAY_USE = {"permute", "reshape", "shape", "transpose"}


def returns_pair(function: FunctionType) -> bool:
    """True if every return statement returns a pair: the output and the probabilities."""
    steps = list(dis.get_instructions(function))
    returned = [steps[i - 1] for i, step in enumerate(steps) if step.opname == "RETURN_VALUE"]
    return bool(returned) and all((step.opname, step.arg) == ("BUILD_TUPLE", 2) for step in returned)


def returns_one(function: FunctionType) -> bool:
    """True if the function does not always return a pair."""
    return not returns_pair(function)


def arithmetic(function: FunctionType) -> Counter[str]:
    """Number of uses of each binary operator in a function: {"@": 2, "*": 1}. Sizes and indices are left out."""
    used = [step.argrepr for step in dis.get_instructions(function) if step.opname == "BINARY_OP"]
    return Counter(name for name in used if name not in ("//", "[]"))


def project(self: Any, x: Tensor) -> Any:
    """q, k, v [B, H, N, D] of a block with a packed qkv projection."""
    return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


def output(self: Any, out: Tensor) -> Tensor:
    """The block's output projection of the attention output [B, H, N, D]."""
    projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
    return projected


@torch.no_grad()
def probabilities_of(self: Any, q: Tensor, k: Tensor) -> Tensor:
    """The attention probabilities [B, H, N, N], without a graph."""
    probabilities: Tensor = (q @ k.transpose(-1, -2) * self.scale).softmax(-1)
    return probabilities


def drops(dropout: Any) -> bool:
    """True if a dropout module changes its input."""
    return not isinstance(dropout, nn.Identity) and not (
        isinstance(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)
    )


def makes_graph(module: nn.Module, *inputs: Tensor | None) -> bool:
    """True if autograd records the module's output for these inputs."""
    tensors = (*module.parameters(), *(t for t in inputs if t is not None))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
