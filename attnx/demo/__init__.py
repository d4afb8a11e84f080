"""The bundled demo: a small vision transformer and a small ALBEF, trained on drawn scenes.

`register` makes both available as the model "demo". They are built when they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnx.models.registry import IMAGE_MODELS, WORD_MODELS, Size, WordModel

if TYPE_CHECKING:
    from attnx.models.loaded import Loaded

__all__ = ["register"]


def register() -> None:
    """Register the bundled models under the name "demo"."""
    IMAGE_MODELS["demo"] = _vit
    WORD_MODELS["demo"] = WordModel(_albef, layer=2)


def _vit(pretrained: bool, image_size: Size) -> Loaded:
    from attnx.demo.vit import load_demo_vit

    return load_demo_vit(pretrained, image_size)


def _albef(pretrained: bool, checkpoint: str | Path | None, vocab: str | Path | None, image_size: Size) -> Loaded:
    from attnx.demo.albef import load_demo_albef

    return load_demo_albef(checkpoint, image_size, pretrained)
