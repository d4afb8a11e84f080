"""The page of an image and its caption: the patches of each word, and the words of each patch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attnx.models.loaded import as_picture
from attnx.page.explore import page_of
from attnx.page.page import Page
from attnx.page.stops import Side, Stop

if TYPE_CHECKING:
    from attnx.models.loaded import Picture
    from attnx.models.tokenizer import Caption


class CaptionMaps(Protocol):
    """The maps of one caption, such as `attnx.CaptionMaps`."""

    @property
    def caption(self) -> Caption:
        """The tokenised caption."""

    @property
    def maps(self) -> Tensor:
        """[T, h, w], one for each token."""

    @property
    def word_maps(self) -> Tensor:
        """[W, h, w], one for each word."""

    @property
    def score(self) -> float | None:
        """The logit of a match; None if there is none."""


def words_page(
    found: Mapping[str, CaptionMaps], image: Picture | None = None, title: str | None = None, start: str | None = None
) -> Page:
    """The page of the maps of one caption.

    In the page, pointing at a word shows its patches, and pointing at a patch shades the words by their values there.
    The map of several words is the mean of theirs.

    Args:
        found: {name: maps} of one caption: its layers or methods.
        image: the picture, or the path of one; None: the page has no picture.
        title: of the page; None: the caption.
        start: the name that is shown first; None: the first one.

    Raises:
        ValueError: no maps, maps of different captions, or maps with negative values or NaN.
        ImageError: the picture can't be read.
    """
    captions = {each.caption.text: each.caption for each in found.values()}
    if len(captions) != 1:
        raise ValueError(f"found: expected maps of one caption; got {len(captions)}")
    caption = next(iter(captions.values()))
    scores = [each.score for each in found.values() if each.score is not None]
    data = {
        "text": caption.text, "score": scores[0] if scores else None, "pieces": len(caption.tokens),
        "unknown": caption.unknown,
    }  # fmt: skip
    queries = Side((*caption.tokens, *caption.words))
    stops = []
    for name, each in found.items():
        rows, columns = each.maps.shape[-2:]
        stops.append(Stop(name, queries, Side(grid=(rows, columns)), ("fused",), partial(_rows, each)))
    picture = None if image is None else as_picture(image)
    first = 0 if start is None else list(found).index(start)
    return page_of(stops, first, caption.text if title is None else title, picture, caption=data)


def _rows(found: CaptionMaps) -> Tensor:
    """The maps of the word pieces, then those of the words: [1, T + W, h * w]."""
    return torch.cat([found.maps, found.word_maps]).float().flatten(1)[None]
