"""The demo ALBEF: a small ALBEF that classifies whether a caption matches a drawn scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from attnx.demo.captioned import RELATIONS
from attnx.demo.scenes import COLORS, SHAPES
from attnx.demo.vit import IMAGE_SIZE, MEAN, PATCH_SIZE, STD

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from attnx.models.albef import Albef, AlbefConfig
    from attnx.models.loaded import Loaded

__all__ = [
    "IMAGE_SIZE",
    "LAYER",
    "MEAN",
    "STD",
    "VOCAB",
    "WEIGHTS",
    "demo_albef",
    "demo_albef_config",
    "load_demo_albef",
    "prepare",
]

WEIGHTS = Path(__file__).with_name("pair.safetensors")
VOCAB: tuple[str, ...] = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "of"),
    *COLORS,
    *SHAPES,
    *(relation.split(" ")[0] for relation in RELATIONS),
)
MAX_TOKENS = 32
LAYER = 2
"""The default text layer of maps: the first with cross-attention. Layers above it pass its result to [CLS]."""


def demo_albef_config() -> AlbefConfig:
    """Sizes of the demo ALBEF: the image encoder is the first half of ``demo_model``.

    Training starts with the weights of that model.

    In higher layers the token of a patch describes the whole image, so word maps would not be local.
    """
    from attnx.models.albef import AlbefConfig

    return AlbefConfig(
        image_size=(IMAGE_SIZE, IMAGE_SIZE),
        patch_size=PATCH_SIZE,
        vision_width=96,
        vision_depth=2,
        vision_heads=6,
        width=128,
        depth=4,
        heads=4,
        mlp_ratio=3,
        fusion_layer=LAYER,
        vocab_size=len(VOCAB),
        max_tokens=MAX_TOKENS,
        embed_dim=64,
    )


def demo_albef(pretrained: bool = True) -> Albef:
    """The demo ALBEF in eval mode, with its tokenizer. Images are float32 [I, 3, 96, 96], see ``prepare``.

    pretrained: load the bundled weights; otherwise the weights are random (torch's global generator).
    """
    return cast("Albef", load_demo_albef(pretrained=pretrained).model)


def load_demo_albef(
    checkpoint: str | Path | None = None, image_size: int | tuple[int, int] | None = None, pretrained: bool = True
) -> Loaded:
    """The demo ALBEF with the preprocessing of its images.

    checkpoint: a file of weights for its sizes; None: the bundled weights.
    image_size: (height, width) in pixels, or one number for a square; multiples of the patch size.
    """
    from attnx.models.albef_checkpoint import load_albef

    weights = (WEIGHTS if pretrained else None) if checkpoint is None else checkpoint
    loaded = load_albef(weights, VOCAB, image_size, demo_albef_config())
    return replace(loaded, name="demo", mean=MEAN, std=STD)


def prepare(pictures: Sequence[np.ndarray]) -> Tensor:
    """Normalised input [I, 3, H, W] float32 of the demo ALBEF, from pictures uint8 [H, W, 3]."""
    import torch

    images = torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2) / 255.0
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std
