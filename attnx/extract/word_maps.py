"""Maps of images for each word of a caption: cross-attention, or cross-attention weighted by its gradient."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnx.extract.captions import CaptionMaps, WordMaps
from attnx.extract.class_maps import frozen
from attnx.trace.capture import capture, uncompiled
from attnx.trace.interceptor import Interceptor, is_intercepted
from attnx.trace.recorder import Recorder, StopForward

if TYPE_CHECKING:
    from attnx.models.albef import Albef

WORD_METHODS = ("attention", "gradcam")
PRESETS = (None, "vl-dino")


def word_maps(
    model: nn.Module,
    images: Tensor,
    captions: Sequence[str] | Sequence[Sequence[str]],
    layer: int = 8,
    heads: str = "mean",
    *,
    preset: str | None = None,
    backend: str = "auto",
) -> WordMaps:
    """Cross-attention from each word of a caption to the patches of its image, in one text layer, heads fused.

    The weight of the class token is dropped and the weights of the patches are not renormalised. The forward pass stops
    in that layer, before its values are used. An image with several captions is encoded once.

    Args:
        model: an `attnx.models.albef.Albef` with a tokenizer, in eval mode.
        images: [I, 3, height, width] float, normalised; height and width are multiples of the patch size.
        captions: one caption per image; or any number of captions for a single image; or a list of captions per image.
        layer: index among all text layers. ALBEF has cross-attention in layers 6 to 11, and its authors use 8.
        heads: "mean", "max" or "min".
        preset: "vl-dino" passes the word embeddings to the fusion layers without the text layers, like that script.
        backend: as in `attnx.attention`.

    Returns:
        a `WordMaps` with one `CaptionMaps` per caption; its maps are [T, h, w] float32.

    Raises:
        ValueError: a layer without cross-attention (the message lists those with it), an empty caption, an image
            without a caption, or invalid images or models.

    Warns:
        UserWarning: a caption has more tokens than the model has positions, and was cut at a word.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.albef import demo_albef
        >>> maps = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)
        >>> maps[0].word_maps.shape
        torch.Size([3, 12, 12])

    Reference:
        Li et al., "Align before Fuse", https://arxiv.org/abs/2107.07651; https://github.com/salesforce/ALBEF;
        https://github.com/tabtoyou/VL-DINO
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected None or 'vl-dino'; got {preset!r}")
    if heads == "each":
        raise ValueError(
            "heads: expected 'mean', 'max' or 'min'; for maps of each head capture model.cross_attention(layer)"
        )
    albef, block = _cross_attention(model, layer)
    pairs = _Pairs(albef, images, captions)
    recorder = Recorder(block, heads, None, "map", None, backend, internal=True)
    # Other captures of the model must see the whole pass.
    recorder.stop_after = None if is_intercepted([block]) else "self"
    interceptor = Interceptor(block, None, recorder, get_ident())
    layers = albef.cross_layers if preset else None
    with torch.inference_mode(), uncompiled():
        interceptor.install()
        try:
            with suppress(StopForward):
                albef(images, pairs.ids, pairs.mask, pairs.owner, layers)
        finally:
            interceptor.uninstall()
        return pairs.cut(recorder.trace[0])


def gradcam(
    model: nn.Module,
    images: Tensor,
    captions: Sequence[str] | Sequence[Sequence[str]],
    layer: int = 8,
    *,
    backend: str = "auto",
) -> WordMaps:
    """ALBEF's Grad-CAM: the patches that each word uses to match the image with the caption.

    ``mean_h max(dP, 0) P``, where P is the layer's cross-attention and dP the gradient of the logit of a match. Only
    the layers between P and the logit are differentiated, and no [P, H, T, N] map is computed.

    LAVIS uses layer 6 and another order of the maps, see `CaptionMaps.lavis`.

    Args:
        model, images, captions, layer, backend: as in `word_maps`.

    Returns:
        a `WordMaps`; the `score` of each `CaptionMaps` is the logit of a match.

    Raises:
        ValueError: the model has no matching head; and as in `word_maps`.

    Warns:
        UserWarning: as in `word_maps`.

    Reference:
        https://github.com/salesforce/ALBEF/blob/main/visualization.ipynb; LAVIS's blip_image_text_matching.py

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.albef import demo_albef
        >>> found = attnx.gradcam(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)[0]
        >>> found.maps.shape, type(found.score)
        (torch.Size([5, 12, 12]), <class 'float'>)
    """
    albef, block = _cross_attention(model, layer)
    if albef.itm_head is None:
        raise ValueError("model: expected one with an image-text matching head (itm_head); its checkpoint had none")
    pairs = _Pairs(albef, images, captions)
    with torch.inference_mode(False), torch.enable_grad(), frozen(albef):
        with capture(block, grad=True, backend=backend) as trace:
            logits = albef(images, pairs.ids, pairs.mask, pairs.owner)[:, 1]
            trace.backward(logits.sum())
        return pairs.cut(trace[0], logits.tolist())


def find_words(
    albef: "Albef", method: str, layer: int, heads: str, preset: str | None, autocast: torch.dtype | None
) -> "Callable[[Tensor, Sequence[Sequence[str]]], WordMaps]":
    """A function of images [I, 3, height, width] and the captions of each image that returns their `WordMaps`.

    Args:
        method: "attention" or "gradcam".
        albef: the model.
        layer: index of a text layer with cross-attention.
        heads, preset: as in `attnx.word_maps`.
        autocast: dtype of autocast; None: no autocast.

    Raises:
        ValueError: an unknown method or preset, options that cannot be combined, or a layer without cross-attention.
    """
    if method not in WORD_METHODS:
        raise ValueError(f"method: expected attention or gradcam; got {method!r}")
    if heads not in ("mean", "max", "min"):
        raise ValueError(f"heads: expected mean, max or min; got {heads!r}")
    if preset not in (None, "vl-dino"):
        raise ValueError(f"preset: expected vl-dino; got {preset!r}")
    if method == "gradcam" and (heads != "mean" or preset):
        raise ValueError(f"method gradcam: expected heads mean and no preset; got {heads!r}, {preset!r}")
    albef.cross_attention(layer)  # raises ValueError if the layer has none

    def find(images: Tensor, captions: Sequence[Sequence[str]]) -> "WordMaps":
        with torch.autocast(images.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            if method == "gradcam":
                return gradcam(albef, images, captions, layer)
            return word_maps(albef, images, captions, layer, heads, preset=preset)

    return find


class _Pairs:
    """Tokenised captions as tensors: ids and mask [P, T], and owner [P], the index of each caption's image."""

    def __init__(self, model: "Albef", images: Tensor, captions: Sequence[str] | Sequence[Sequence[str]]) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(f"images: expected a tensor [I, 3, height, width]; got {type(images).__name__}")
        self.grid = model.grid(images)
        if model.tokenizer is None:
            raise ValueError("model: expected one with a tokenizer; got none; set model.tokenizer")
        texts, owner = _flat(captions, len(images))
        self.captions = []
        for i, text in enumerate(texts):
            try:
                self.captions.append(model.tokenizer(text))
            except ValueError as error:
                raise ValueError(f"captions: number {i}: {error}") from error
        length = max(len(caption.ids) for caption in self.captions)
        pad = model.tokenizer.id_of("[PAD]")
        rows = [list(caption.ids) + [pad] * (length - len(caption.ids)) for caption in self.captions]
        self.ids = torch.tensor(rows, device=images.device)
        lengths = torch.tensor([len(caption.ids) for caption in self.captions], device=images.device)
        self.mask = torch.arange(length, device=images.device) < lengths[:, None]
        one_each = owner == list(range(len(images)))
        self.owner = None if one_each else torch.tensor(owner, device=images.device)

    def cut(self, amap: Tensor, scores: Sequence[float] | None = None) -> WordMaps:
        """The maps of each caption's own tokens, from padded maps [P, T, 1 + patches]."""
        patches = amap[:, :, 1:].unflatten(-1, self.grid)
        return WordMaps(
            [
                CaptionMaps(caption, patches[i, : len(caption.ids)], None if scores is None else scores[i])
                for i, caption in enumerate(self.captions)
            ]
        )


def _cross_attention(model: nn.Module, layer: int) -> "tuple[Albef, nn.Module]":
    """The model and the module around the layer's cross-attention."""
    from attnx.models.albef import Albef

    if not isinstance(model, Albef):
        raise ValueError(f"model: expected an attnx.models.albef.Albef; got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    return model, model.get_submodule(model.cross_attention(layer).rpartition(".")[0])


def _flat(captions: Sequence[str] | Sequence[Sequence[str]], images: int) -> tuple[list[str], list[int]]:
    """All captions in one list, and the index of each caption's image."""
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
