"""The maps of a caption in every layer with cross-attention (ALBEF), or in every stage (LAVT), by every method."""

import torch
from torch import Tensor, nn

from attnx.extract.captions import CaptionMaps
from attnx.extract.class_maps import frozen
from attnx.extract.lavt_maps import LAVT_METHODS, expression_maps
from attnx.extract.word_maps import CaptionPairs
from attnx.models.albef import Albef
from attnx.models.lavt import Lavt
from attnx.trace.capture import capture


def caption_layers(
    model: nn.Module, images: Tensor, caption: str, heads: str = "mean", preset: str | None = None
) -> dict[str, CaptionMaps]:
    """The maps of a caption in every layer or stage, by every method, under their names of `layer_name`.

    Args:
        model: an `attnx.models.albef.Albef` or an `attnx.models.lavt.Lavt` with a tokenizer, in eval mode.
        images: [1, 3, height, width], normalised.
        caption: of the image.
        heads, preset: as in `attnx.word_maps`, for ALBEF.
    """
    if isinstance(model, Lavt):
        return {layer_name(*key, "stage"): maps for key, maps in maps_of_stages(model, images, caption).items()}
    assert isinstance(model, Albef)
    found = maps_of_layers(model, images, caption, heads, preset)
    return {layer_name(*key): maps for key, maps in found.items()}


def layer_name(method: str, place: int | None, word: str = "layer") -> str:
    """The name of maps: "attention, layer 8" or "rollout, mean of the stages"."""
    where = "mean of the stages" if place is None else f"{word} {place}"
    return f"{'Grad-CAM' if method == 'gradcam' else method}, {where}"


def maps_of_layers(
    albef: Albef, images: Tensor, caption: str, heads: str = "mean", preset: str | None = None
) -> dict[tuple[str, int | None], CaptionMaps]:
    """The maps of a caption in every layer with cross-attention, and their Grad-CAM, in two forward passes.

    Without a matching head, or with a preset or other heads than the mean, there is no Grad-CAM.

    Args:
        albef: the model, with a tokenizer, in eval mode.
        images: [1, 3, height, width], normalised.
        caption: of the image.
        heads, preset: as in `word_maps`.

    Returns:
        {("attention", 8): maps, ("gradcam", 8): maps, ...}: the maps of `word_maps` and `gradcam`.
    """
    pairs = CaptionPairs(albef, images, [caption])
    names = {layer: albef.cross_attention(layer) for layer in albef.cross_layers}
    with torch.inference_mode(), capture(albef, list(names.values()), heads) as trace:
        albef(images, pairs.ids, pairs.mask, pairs.owner, albef.cross_layers if preset else None)
        found: dict[tuple[str, int | None], CaptionMaps] = {
            ("attention", layer): pairs.cut(trace[name])[0] for layer, name in names.items()
        }
    if albef.itm_head is not None and preset is None and heads == "mean":
        with torch.inference_mode(False), torch.enable_grad(), frozen(albef):
            with capture(albef, list(names.values()), grad=True) as trace:
                logits = albef(images, pairs.ids, pairs.mask, pairs.owner)[:, 1]
                trace.backward(logits.sum())
            found |= {("gradcam", n): pairs.cut(trace[name], logits.tolist())[0] for n, name in names.items()}
    return found


def maps_of_stages(lavt: Lavt, images: Tensor, caption: str) -> dict[tuple[str, int | None], CaptionMaps]:
    """The maps of an expression in every stage, and their mean: {(method, stage): maps}, with stage None for the mean.

    Args:
        lavt: the model, with a tokenizer, in eval mode.
        images: [1, 3, height, width], normalised.
        caption: of the image.
    """
    stages = (*range(len(lavt.config.depths)), None)
    return {
        (method, stage): expression_maps(lavt, images, [caption], stage, method=method)[0]
        for method in LAVT_METHODS
        for stage in stages
    }
