"""The page of an image and its caption: the patches of each word, and the words of each patch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from attnx.extract.lavt_maps import maps_of_stages
from attnx.extract.word_maps import maps_of_layers
from attnx.models.lavt import Lavt
from attnx.models.loaded import as_picture
from attnx.page.explore import page_of
from attnx.page.page import Page
from attnx.page.stops import Side, Stop

if TYPE_CHECKING:
    from attnx.extract.captions import CaptionMaps
    from attnx.models.albef import Albef
    from attnx.models.loaded import Picture


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


def every_layer_page(
    model: nn.Module, images: Tensor, caption: str, picture: Picture, method: str, place: int | None,
    heads: str = "mean", preset: str | None = None,
) -> Page:  # fmt: skip
    """The page of a caption in every layer with cross-attention (ALBEF) or in every stage (LAVT), by every method.

    Args:
        model: an `attnx.models.albef.Albef` or an `attnx.models.lavt.Lavt` with a tokenizer, in eval mode.
        images: [1, 3, height, width], normalised: the prepared picture.
        caption, picture: to show.
        method, place: the method and the layer or stage that the page shows first.
        heads, preset: as in `attnx.word_maps`.
    """
    if isinstance(model, Lavt):
        found, word = maps_of_stages(model, images, caption), "stage"
    else:
        found, word = maps_of_layers(cast("Albef", model), images, caption, heads, preset), "layer"

    def name(kind: str, at: int | None) -> str:
        return f"{'Grad-CAM' if kind == 'gradcam' else kind}, {'mean of the stages' if at is None else f'{word} {at}'}"

    return words_page({name(*key): maps for key, maps in found.items()}, picture, start=name(method, place))


def _rows(found: CaptionMaps) -> Tensor:
    """The maps of the word pieces, then those of the words: [1, T + W, h * w]."""
    return torch.cat([found.maps, found.word_maps]).float().flatten(1)[None]
