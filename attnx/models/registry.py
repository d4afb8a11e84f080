"""Registry of models with a bare name, such as "demo". Packages add their own, see `attnx.demo.register`.

`load_model` and `load_word_model` (`attnx.models.loading`) look names up here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from attnx.models.loaded import Loaded

Size = tuple[int, int] | None
"""(height, width) in pixels; None: the model's own."""


class WordModel(NamedTuple):
    """A model of images and captions.

    load: (pretrained, checkpoint, vocab, image size) -> the model, an `Albef`, in eval mode.
    layer: the default text layer of maps.
    """

    load: Callable[[bool, str | Path | None, str | Path | None, Size], Loaded]
    layer: int


IMAGE_MODELS: dict[str, Callable[[bool, Size], Loaded]] = {}
"""name -> (pretrained, image size) -> the model. With pretrained it has its bundled weights."""

WORD_MODELS: dict[str, WordModel] = {}
