"""Pointing game of the demo ALBEF's word maps on captioned scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnx.demo.captioned import CaptionedScene, draw_pair
from attnx.extract.captions import WordMaps
from attnx.extract.word_maps import gradcam, word_maps
from attnx.methods import pointing_game

if TYPE_CHECKING:
    from attnx.models.albef import Albef

BATCH = 50
HEADS = ("mean", "max", "min")


@dataclass(frozen=True)
class Pointing:
    """Captioned scenes, maps of their noun phrases by method, and the shares of maps that peak inside the object's box.

    maps: [scenes, 2, h, w] each, in the order of the scenes' phrases.
    shares: of all phrases, by method; "random" are maps of noise, "area" is the boxes' mean share of the picture.
    layer: the text layer of the demo's maps.
    """

    scenes: tuple[CaptionedScene, ...]
    maps: dict[str, Tensor]
    shares: dict[str, float]
    layer: int

    def __str__(self) -> str:
        cam, attention = (self.shares[f"{name} {self.layer}"] for name in ("gradcam", "attention mean"))
        return (
            f"the words' Grad-CAM points at what they name in {cam:.1%} of {2 * len(self.scenes)} phrases "
            f"(attention {attention:.1%}, random {self.shares['random']:.1%})"
        )


def point_at_phrases(scenes: int, seed: int, model: Albef | None = None) -> Pointing:
    """Play the pointing game on scenes `seed` and following: in every layer, by Grad-CAM and by attention itself.

    A phrase's map is the mean over its words'. Methods are called "gradcam LAYER" and "attention HEADS LAYER".
    `model`: the demo pair, with its bundled weights unless given.
    """
    from attnx.demo.albef import LAYER, demo_albef, prepare

    model = demo_albef() if model is None else model
    drawn = tuple(draw_pair(seed + i) for i in range(scenes))
    maps: dict[str, list[Tensor]] = {}
    for start in range(0, scenes, BATCH):
        some = drawn[start : start + BATCH]
        images, captions = prepare([scene.image for scene in some]), [scene.caption for scene in some]
        for layer in model.cross_layers:
            found = {f"gradcam {layer}": gradcam(model, images, captions, layer)}
            found |= {f"attention {heads} {layer}": word_maps(model, images, captions, layer, heads) for heads in HEADS}
            for name, words in found.items():
                maps.setdefault(name, []).append(_phrases(some, words))
    whole = {name: torch.cat(parts) for name, parts in maps.items()}
    noise = np.random.default_rng(seed).random(tuple(whole[f"gradcam {LAYER}"].shape), np.float32)
    whole["random"] = torch.from_numpy(noise)
    return Pointing(drawn, whole, _shares(drawn, whole), LAYER)


def words_sheet(pointing: Pointing, scenes: int) -> Image.Image:
    """One scene per row: the captioned picture, and Grad-CAM and attention overlays of each noun phrase."""
    from attnx.figures.picture import overlay
    from attnx.figures.sheets import captioned, contact_sheet

    methods = {"Grad-CAM": f"gradcam {pointing.layer}", "attention": f"attention mean {pointing.layer}"}
    pictures, titles = [], []
    for i, scene in enumerate(pointing.scenes[:scenes]):
        image = Image.fromarray(scene.image).resize((224, 224), Image.Resampling.LANCZOS)
        pictures.append(captioned(image, scene.caption))
        titles.append("")
        for k, (phrase, _) in enumerate(scene.phrases):
            pictures += [overlay(image, pointing.maps[name][i, k]) for name in methods.values()]
            titles += [f"{phrase}: {title}" for title in methods]
    return contact_sheet(pictures, titles, columns=1 + 2 * len(methods))


def _phrases(scenes: Sequence[CaptionedScene], words: WordMaps) -> Tensor:
    """[scenes, 2, h, w]: the maps of their noun phrases."""
    found = [[own.phrase(phrase) for phrase, _ in scene.phrases] for own, scene in zip(words, scenes, strict=True)]
    return torch.stack([torch.stack(both) for both in found])


def _shares(drawn: Sequence[CaptionedScene], maps: dict[str, Tensor]) -> dict[str, float]:
    boxes = torch.tensor([box for scene in drawn for _, box in scene.phrases])
    size = drawn[0].image.shape[:2]
    shares = {name: pointing_game(m.flatten(0, 1), boxes, size).double().mean().item() for name, m in maps.items()}
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return shares | {"area": areas.double().mean().item() / (size[0] * size[1])}
