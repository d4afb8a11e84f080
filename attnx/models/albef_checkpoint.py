"""Loading of ALBEF's published checkpoints, without the weights that maps do not need."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnx.messages import printable
from attnx.models.albef import CLIP_MEAN, CLIP_STD, Albef, AlbefConfig, interpolate_positions
from attnx.models.checkpoint import check_values, misfit, read_weights, weights_file
from attnx.models.loaded import Loaded, height_and_width
from attnx.models.tokenizer import Tokenizer

# Momentum copies, queues, the masked-language and answering heads, and buffers that old versions of BERT stored.
_IGNORED = (
    "visual_encoder_m.",
    "text_encoder_m.",
    "vision_proj_m.",
    "text_proj_m.",
    "text_decoder",
    "text_encoder.cls.",
)
_QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr")
_OPTIONAL = ("itm_head", "vision_proj", "text_proj", "temp")
_POSITIONS = "visual_encoder.pos_embed"


def load_albef(
    checkpoint: str | Path | None,
    vocab: str | Path | Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    config: AlbefConfig | None = None,
) -> Loaded:
    """An ALBEF in eval mode, on the CPU, with its tokenizer and the preparation of its images.

    Args:
        checkpoint: a published checkpoint (pretraining, retrieval, RefCOCO, VQA or visual entailment), or a state dict
            of `Albef`, which may be a .safetensors file. Torch files are read with weights_only=True. None: random
            weights.
        vocab: bert-base-uncased's vocab.txt, or its pieces; None: from the Hugging Face hub.
        image_size: (height, width) in pixels, or one number for a square; multiples of the patch size. None: the
            checkpoint's own size. Position embeddings are interpolated once, at loading.
        config: sizes of the model; None: those of the published checkpoints.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the checkpoint doesn't fit the model (the message lists the keys), or the image size is invalid.
        ConnectionError: the vocabulary could not be downloaded.
    """
    config = config or AlbefConfig()
    path = None if checkpoint is None else weights_file(checkpoint)
    size = height_and_width(image_size)
    tokenizer = Tokenizer(vocab, config.max_tokens)
    weights = None if path is None else _own_names(read_weights(path))
    positions = None if weights is None else weights.get(_POSITIONS)
    if size is None and positions is not None and positions.shape[2:] == (config.vision_width,):
        side = round(max(1, positions.shape[1] - 1) ** 0.5) * config.patch_size
        size = side, side
    config = replace(config, image_size=size or config.image_size)
    if any(pixels % config.patch_size for pixels in config.image_size):
        height, width = config.image_size
        raise ValueError(f"image size: expected multiples of the patch of {config.patch_size}; got {height}x{width}")
    model = Albef(config, tokenizer)
    if weights is not None and path is not None:
        _load(model, weights, path)
    model.eval().requires_grad_(False)
    name = "albef" if path is None else f"albef:{path}"
    return Loaded(name, model, config.image_size, CLIP_MEAN, CLIP_STD)


def _own_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, named as in `Albef`, without ignored ones. Pretraining wraps BERT in a language model."""
    renamed = {key.replace("text_encoder.bert.", "text_encoder.", 1): value for key, value in weights.items()}
    return {
        key: value
        for key, value in renamed.items()
        if not key.startswith(_IGNORED) and key not in _QUEUES and not key.endswith("embeddings.position_ids")
    }


def _load(model: Albef, weights: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    absent = [name for name in _OPTIONAL if not any(key.split(".")[0] == name for key in weights)]
    positions = weights.get(_POSITIONS)
    if positions is not None and positions.shape != own[_POSITIONS].shape and positions.dim() == 3:
        weights[_POSITIONS] = _fitted(positions, own[_POSITIONS], model)
    expected = {key: value for key, value in own.items() if key.split(".")[0] not in absent}
    message = misfit(weights, expected)
    if message:
        raise ValueError(f"checkpoint {printable(path, None)} doesn't fit ALBEF: {message}")
    check_values(weights, own, path)
    with torch.no_grad():
        model.load_state_dict(weights, strict=False)
    for name in absent:
        setattr(model, name, None)


def _fitted(positions: Tensor, own: Tensor, model: Albef) -> Tensor:
    """Position embeddings resized to the model's grid; unchanged if not square, which `misfit` reports."""
    side = round(max(0, positions.shape[1] - 1) ** 0.5)
    if 1 + side * side != positions.shape[1] or positions.shape[2] != own.shape[2]:
        return positions
    grid: Any = model.visual_encoder.patch_embed.grid_size
    return interpolate_positions(positions, (side, side), grid)
