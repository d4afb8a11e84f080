"""Captions of images as tensors: a list of captions with the image of each, and padded word pieces."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnx.models.tokenizer import Caption, Tokenizer


def flat(captions: Sequence[str] | Sequence[Sequence[str]], images: int) -> tuple[list[str], list[int]]:
    """All captions in one list, and the index of each caption's image.

    Raises:
        ValueError: an image without a caption, or another number of captions than of images.
    """
    if isinstance(captions, str) or not isinstance(captions, Sequence) or not len(captions):
        raise ValueError(f"captions: expected a list of texts, at least one for every image; got {captions!r}")
    if images == 1 and all(isinstance(caption, str) for caption in captions):
        captions = [[str(caption) for caption in captions]]
    if len(captions) != images:
        raise ValueError(f"captions: expected one, or a list, for each of {images} images; got {len(captions)}")
    texts: list[str] = []
    owner: list[int] = []
    for i, own in enumerate(captions):
        several = [own] if isinstance(own, str) else own
        if not isinstance(several, Sequence) or not len(several):
            raise ValueError(f"captions: expected a text or a list of them for image {i}; got {own!r}")
        texts += several
        owner += [i] * len(several)
    return texts, owner


def padded(
    tokenizer: "Tokenizer | None", texts: Sequence[str], device: torch.device | None, length: int | None = None
) -> "tuple[list[Caption], Tensor, Tensor]":
    """The tokenised captions, their ids [B, T], and the mask [B, T]: False for padding.

    Args:
        tokenizer: the model's tokenizer.
        texts: B captions.
        device: device of the tensors.
        length: T; None: that of the longest caption.

    Raises:
        ValueError: no tokenizer, or an invalid caption (the message has its number).

    Warns:
        UserWarning: as `Tokenizer`.
    """
    if tokenizer is None:
        raise ValueError("model: expected one with a tokenizer; got none; set model.tokenizer")
    captions = []
    for i, text in enumerate(texts):
        try:
            captions.append(tokenizer(text))
        except ValueError as error:
            raise ValueError(f"captions: number {i}: {error}") from error
    length = length or max(len(caption.ids) for caption in captions)
    pad = tokenizer.id_of("[PAD]")
    ids = torch.tensor([[*c.ids, *[pad] * (length - len(c.ids))] for c in captions], device=device)
    lengths = torch.tensor([len(c.ids) for c in captions], device=device)
    return captions, ids, torch.arange(length, device=device) < lengths[:, None]
