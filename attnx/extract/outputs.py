"""Outputs of models: their tensors, differences between them, and scores."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors(output: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in an output, at any level of nesting."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (dict, tuple, list)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def difference(got: Any, want: Any) -> float:
    """The largest difference of two outputs, each tensor relative to its largest number; infinite if they do not match.

    Entries that are infinite or NaN must be so in both.
    """
    largest = 0.0
    pairs = list(tensors(got)), list(tensors(want))
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return float("inf")
    for a, b in zip(*pairs, strict=True):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        if finite.any():
            scale = b[finite].abs().max().clamp(min=1e-6)
            largest = max(largest, float((a - b)[finite].abs().max() / scale))
    return largest


def score_of(output: Any) -> Tensor:
    """One number that depends on every floating-point number of an output, each with its own weight."""
    parts = [t for t in tensors(output) if t.requires_grad]
    if not parts:
        raise RuntimeError("no tensor of the output depends on a captured layer with a gradient")
    weighted = [torch.where(t.isfinite(), t, 0) * torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in parts]
    return torch.stack([t.sum() for t in weighted]).sum()


def is_logits(output: Any, count: int) -> bool:
    """True if an output, or its attribute `logits`, is [count, classes]."""
    logits = getattr(output, "logits", output)
    return isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == count
