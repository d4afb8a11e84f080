"""The maps of all layers and heads, for jobs with `--store rows` or `--store full`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnx.methods import cls_map
from attnx.trace.capture import capture
from attnx.trace.layers import Layers

__all__ = ["AllHeads"]


class AllHeads:
    """The maps of all layers and heads: `AllHeads(model)(images)`.

    Args:
        whole: False: the class token's maps, [B, L, H, h, w]. True: the whole maps, [B, L, H, N, N].
        layers, model_kwargs, dtype: see `attnx.Extractor`.

    Raises:
        ValueError: on a call, if the model has no class token, or if the layers' maps differ in shape.
    """

    def __init__(
        self,
        model: nn.Module,
        whole: bool,
        layers: Layers = None,
        dtype: torch.dtype | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.whole = whole
        self.layers = layers
        self.dtype = dtype
        self.model_kwargs = model_kwargs or {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] on the model's device -> float32 maps, see the class."""
        with (
            torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None),
            capture(self.model, self.layers, "each", None if self.whole else [0]) as trace,
        ):
            self.model(images, **self.model_kwargs)
        maps = [trace[name] if self.whole else cls_map(trace, name) for name in trace]
        shapes = {name: list(amap.shape[1:]) for name, amap in zip(trace, maps, strict=True)}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            got = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
            raise ValueError(f"store: expected layers with maps of one shape; got {got}; choose some with layers=")
        return torch.stack(maps, 1)
