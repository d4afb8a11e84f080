"""From images to maps: a model, a method, and how to run the one to answer the other."""

from typing import Any

import torch
from torch import Tensor, nn

from attnx.capture import capture
from attnx.kept import check_keep
from attnx.layers import Layers
from attnx.layout import TokenLayout
from attnx.methods import cls_map, layer_maps, rollout

METHODS = ("rollout", "cls", "layers")


class Extractor:
    """Images in, maps out: `Extractor(model, method="rollout")(images)`. The model is left as it was.

    Only what the method reads is kept: whole maps of every layer for rollout, or where they are larger, q and k (the
    memory is then linear in the tokens); the class token's row for the others.

    Args:
        model: in eval mode.
        method: "rollout" gives [B, h, w]; "cls" the class token's map of one layer, [B, h, w] ([B, H, h, w] with
            heads="each"); "layers" that of every layer, [B, L, h, w].
        layers: as in `attnx.capture`; for "cls" the last layer unless given.
        heads: "mean", "max", "min"; "each" for "cls" only.
        keep: as in `attnx.capture`.
        layout: as in `attnx.capture`.
        dtype: run the model under autocast to this dtype; None: as it is.
        backend: as in `attnx.attention`.
        model_kwargs: further arguments of every call of the model, such as interpolate_pos_encoding=True.
        options: further arguments of `attnx.rollout` (residual, discard, start, preset, rows).

    Raises:
        ValueError: an unknown method, options that the method doesn't have, a model in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "rollout",
        *,
        layers: Layers = None,
        heads: str = "mean",
        keep: str = "auto",
        layout: TokenLayout | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        if options and method != "rollout":
            raise ValueError(f"method {method!r} takes no options; got {', '.join(options)}")
        if heads == "each" and method != "cls":
            raise ValueError(f"heads='each' is for method 'cls'; got method {method!r}")
        if model.training:
            raise ValueError("model: expected eval mode; got training mode; call model.eval()")
        self.model = model
        self.method = method
        self.dtype = dtype
        self.model_kwargs = model_kwargs or {}
        self.options = options
        self.listening = dict(
            layers=-1 if method == "cls" and layers is None else layers,
            heads=heads,
            rows=None if method == "rollout" else [0],
            keep=check_keep(keep),
            layout=layout,
            backend=backend,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] on the model's device -> float32 maps, see the class.

        Raises:
            ValueError, RuntimeError: as `attnx.capture` and the method do.
        """
        autocast = torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None)
        with torch.inference_mode(), capture(self.model, **self.listening) as trace, autocast:  # type: ignore[arg-type]
            self.model(images, **self.model_kwargs)
        with torch.inference_mode():
            if self.method == "rollout":
                return rollout(trace, **self.options)
            if self.method == "cls":
                return cls_map(trace)
            return layer_maps(trace).maps
