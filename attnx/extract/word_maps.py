"""Maps of images for each word of a caption: cross-attention, or cross-attention weighted by its gradient."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from attnx.extract.captions import CaptionMaps, WordMaps
from attnx.extract.class_maps import frozen
from attnx.extract.pairs import flat, padded
from attnx.trace.capture import capture, uncompiled
from attnx.trace.interceptor import Interceptor
from attnx.trace.live import is_intercepted
from attnx.trace.recorder import Recorder, StopForward

if TYPE_CHECKING:
    from PIL.Image import Image

    from attnx.models.albef import Albef

WORD_METHODS = ("attention", "gradcam")
PRESETS = (None, "vl-dino")
_ALBEF_LAYER = 8  # the layer that ALBEF's authors use


@overload
def word_maps(  # type: ignore[overload-overlap]  # a str is also a sequence of str
    model: nn.Module,
    images: "Tensor | Image",
    captions: str,
    layer: int | None = None,
    heads: str = "mean",
    *,
    stage: int | None = None,
    method: str = "attention",
    preset: str | None = None,
    backend: str = "auto",
) -> CaptionMaps: ...
@overload
def word_maps(
    model: nn.Module,
    images: "Tensor | Image",
    captions: Sequence[str] | Sequence[Sequence[str]],
    layer: int | None = None,
    heads: str = "mean",
    *,
    stage: int | None = None,
    method: str = "attention",
    preset: str | None = None,
    backend: str = "auto",
) -> WordMaps: ...
def word_maps(
    model: nn.Module,
    images: "Tensor | Image",
    captions: str | Sequence[str] | Sequence[Sequence[str]],
    layer: int | None = None,
    heads: str = "mean",
    *,
    stage: int | None = None,
    method: str = "attention",
    preset: str | None = None,
    backend: str = "auto",
) -> WordMaps | CaptionMaps:
    """The maps of the words of captions, from the attention between words and image, heads fused.

    ALBEF: the cross-attention from each word to the patches, in one text layer. The weight of the class token is
    dropped and the weights of the patches are not renormalised. The forward pass stops in that layer, before its
    values are used. An image with several captions is encoded once. A word's map is the mean over its pieces.

    LAVT: the attention from each pixel of a stage's grid to the words. The words are keys, so a word's map is the sum
    over its pieces. The image is encoded once for each caption. See `attnx.extract.lavt_maps`.

    Args:
        model: an `attnx.models.albef.Albef` or an `attnx.models.lavt.Lavt` with a tokenizer, in eval mode.
        images: [I, 3, height, width] float, normalised; for ALBEF, height and width are multiples of the patch size.
            Or one PIL image, which is prepared as the model's loader prepares it.
        captions: one caption per image; or any number of captions for a single image; or a list of captions per image;
            or, for a single image, one str.
        layer: ALBEF: index among all text layers. It has cross-attention in layers 6 to 11, and its authors use 8, the
            default.
        heads: "mean", "max" or "min"; for LAVT "mean".
        stage: LAVT: 0 to 3. None: the mean of all stages, interpolated to the grid of stage 0.
        method: "attention"; for LAVT also "rollout": carried on through the Swin blocks to stage 0, mass 1 a word.
        preset: ALBEF: "vl-dino" passes the word embeddings to the fusion layers without the text layers, like that
            script.
        backend: as in `attnx.attention`.

    Returns:
        a `WordMaps` with one `CaptionMaps` per caption; its maps are [T, h, w] float32. For a str, its `CaptionMaps`.

    Raises:
        ValueError: a layer without cross-attention (the message lists those with it), an option of the other model, an
            empty caption, an image without a caption, or invalid images or models.

    Warns:
        UserWarning: a caption has more tokens than the model takes, and was cut.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.albef import demo_albef
        >>> maps = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)
        >>> maps[0].word_maps.shape
        torch.Size([3, 12, 12])

    Reference:
        Li et al., "Align before Fuse", https://arxiv.org/abs/2107.07651; https://github.com/salesforce/ALBEF;
        https://github.com/tabtoyou/VL-DINO; Yang et al., "LAVT", https://arxiv.org/abs/2112.02244;
        https://github.com/yz93/LAVT-RIS
    """
    from attnx.models.lavt import Lavt

    if not isinstance(images, Tensor):
        images = _prepared(model, images, preset)
    if isinstance(captions, str) and len(images) == 1:
        return word_maps(
            model, images, [captions], layer, heads, stage=stage, method=method, preset=preset, backend=backend
        )[0]
    if not isinstance(model, Lavt):
        if stage is not None:
            raise ValueError(f"stage: expected None, since only LAVT has stages; got {stage!r}")
        if method != "attention":
            raise ValueError(f"method: expected 'attention', since only LAVT has rollout; got {method!r}")
        return _albef_maps(model, images, captions, _ALBEF_LAYER if layer is None else layer, heads, preset, backend)
    from attnx.extract.lavt_maps import expression_maps

    if layer is not None or preset is not None or heads != "mean":
        raise ValueError(f"LAVT has no layer, heads or preset, only stage; got {layer!r}, {heads!r}, {preset!r}")
    return expression_maps(model, images, captions, stage, method=method, backend=backend)


def _albef_maps(
    model: nn.Module,
    images: Tensor,
    captions: Sequence[str] | Sequence[Sequence[str]],
    layer: int,
    heads: str,
    preset: str | None,
    backend: str,
) -> WordMaps:
    """ALBEF's word maps, see `word_maps`."""
    if preset not in PRESETS:
        raise ValueError(f"preset: expected None or 'vl-dino'; got {preset!r}")
    if heads == "each":
        raise ValueError(
            "heads: expected 'mean', 'max' or 'min'; for maps of each head capture model.cross_attention(layer)"
        )
    albef, block = _cross_attention(model, layer)
    pairs = CaptionPairs(albef, images, captions)
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
    pairs = CaptionPairs(albef, images, captions)
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


class CaptionPairs:
    """Tokenised captions as tensors: ids and mask [P, T], and owner [P], the index of each caption's image."""

    def __init__(self, model: "Albef", images: Tensor, captions: Sequence[str] | Sequence[Sequence[str]]) -> None:
        if not isinstance(images, Tensor):
            raise ValueError(f"images: expected a tensor [I, 3, height, width]; got {type(images).__name__}")
        self.grid = model.grid(images)
        texts, owner = flat(captions, len(images))
        self.captions, self.ids, self.mask = padded(model.tokenizer, texts, images.device)
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


def _prepared(model: nn.Module, image: object, preset: str | None) -> Tensor:
    """[1, 3, height, width]: a PIL image, prepared as the model's loader does it, on the model's device."""
    from PIL.Image import Image

    from attnx.images import to_tensor
    from attnx.models.albef import CLIP_MEAN, CLIP_STD, Albef
    from attnx.models.lavt import INTERPOLATION, Lavt
    from attnx.models.loaded import IMAGENET

    if not isinstance(image, Image):
        raise ValueError(f"images: expected a tensor [I, 3, height, width], or a PIL image; got {type(image).__name__}")
    if isinstance(model, Lavt):
        pixels = to_tensor(image, model.config.image_size, *IMAGENET, INTERPOLATION)
    elif isinstance(model, Albef):
        pixels = to_tensor(image, model.config.image_size, *(IMAGENET if preset else (CLIP_MEAN, CLIP_STD)))
    else:
        raise ValueError(f"model: expected an Albef or a Lavt of attnx.models; got {type(model).__name__}")
    return pixels[None].to(next(model.parameters()).device)


def _cross_attention(model: nn.Module, layer: int) -> "tuple[Albef, nn.Module]":
    """The model and the module around the layer's cross-attention."""
    from attnx.models.albef import Albef

    if not isinstance(model, Albef):
        raise ValueError(f"model: expected an Albef of attnx.models; got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    return model, model.get_submodule(model.cross_attention(layer).rpartition(".")[0])
