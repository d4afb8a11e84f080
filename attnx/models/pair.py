"""Models of images and captions by name: "albef", "demo"; and what finds their words' maps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnx.models.albef import Albef
from attnx.models.loading import IMAGENET, Loaded

if TYPE_CHECKING:
    from attnx.pairs import WordMaps

__all__ = ["METHODS", "default_layer", "find_words", "load_pair"]

METHODS = ("attention", "gradcam")
VL_DINO_SIZE = (480, 480)


def load_pair(
    model: str,
    pretrained: bool,
    checkpoint: str | Path | None,
    vocab: str | Path | None,
    image_size: int | tuple[int, int] | None,
    preset: str | None,
) -> Loaded:
    """The model, an `Albef`, on the CPU, in eval mode.

    Args:
        model: "albef" in the published sizes, or "demo".
        pretrained: its own weights; False: random ones.
        checkpoint: a file of weights; ALBEF's own can't be downloaded by us.
        vocab: bert-base-uncased's vocab.txt; the hub's unless given.
        image_size: (height, width) in pixels, or one number for a square; the model's own unless given, 480 of VL-DINO.
        preset: "vl-dino": ImageNet's colours.

    Raises:
        ValueError: an unknown name, no weights, a checkpoint that doesn't fit.
        FileNotFoundError: no such file.
    """
    from attnx.demo import pair
    from attnx.models.albef_checkpoint import load_albef

    if model == "demo":
        loaded = pair.load_demo_pair(checkpoint, image_size, pretrained)
    elif model == "albef":
        if checkpoint is None and pretrained:
            raise ValueError(
                "checkpoint: expected ALBEF's weights (https://github.com/salesforce/ALBEF has them to download), "
                "--no-pretrained for random ones, or --model demo; got none"
            )
        loaded = load_albef(checkpoint, vocab, VL_DINO_SIZE if preset and image_size is None else image_size)
    else:
        raise ValueError(f"model: expected albef or demo; got {model!r}")
    return replace(loaded, mean=IMAGENET[0], std=IMAGENET[1]) if preset else loaded


def default_layer(model: str) -> int:
    """The text layer that is looked at unless another is asked for."""
    from attnx.demo import pair

    return pair.LAYER if model == "demo" else 8


def find_words(
    albef: Albef, method: str, layer: int, heads: str, preset: str | None, autocast: torch.dtype | None
) -> "Callable[[Tensor, Sequence[Sequence[str]]], WordMaps]":
    """What finds maps: images [I, 3, h, w] and captions of each -> theirs, in order.

    Args:
        method: "attention" or "gradcam".
        layer: of the text, with cross-attention.
        heads, preset: as of `attnx.word_maps`.
        autocast: a dtype to run in; None: the model's own.

    Raises:
        ValueError: an unknown method or preset, what goes not together, a layer without cross-attention.
    """
    from attnx.pairs import gradcam, word_maps

    if method not in METHODS:
        raise ValueError(f"method: expected attention or gradcam; got {method!r}")
    if heads not in ("mean", "max", "min"):
        raise ValueError(f"heads: expected mean, max or min; got {heads!r}")
    if preset not in (None, "vl-dino"):
        raise ValueError(f"preset: expected vl-dino; got {preset!r}")
    if method == "gradcam" and (heads != "mean" or preset):
        raise ValueError(f"method gradcam: expected heads mean and no preset; got {heads!r}, {preset!r}")
    albef.cross_attention(layer)  # raises where the layer has none

    def find(images: Tensor, captions: Sequence[Sequence[str]]) -> "WordMaps":
        with torch.autocast(images.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            if method == "gradcam":
                return gradcam(albef, images, captions, layer)
            return word_maps(albef, images, captions, layer, heads, preset=preset)

    return find
