"""Compares maps with labelled masks: DINO's Jaccard index, and the pointing game."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from attnx.files import open_regular
from attnx.jobs.columns import MapRow
from attnx.jobs.photos import path_of_key
from attnx.jobs.reader import Maps
from attnx.limits import PICTURE_PIXELS
from attnx.methods import mass_mask

__all__ = ["Score", "jaccard", "mask_of", "points_at", "read_labels", "score"]

VOID = 255


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Attributes:
        images, objects: number of scored images and objects.
        jaccard: the best head's Jaccard index, averaged over the objects of an image, then over the images.
        heads: (head, Jaccard index) of each head alone, best first.
        pointing: share of images whose map has its maximum in an object.
        left: number of images that were not scored, by reason.
    """

    images: int
    objects: int
    jaccard: float
    heads: list[tuple[int, float]]
    pointing: float
    left: Counter[str]


def score(maps: Maps, folder: str | Path, keep: float = 0.6) -> Score:
    """The scores of a job's maps against labelled masks. The mask of a/b.jpg is folder/a/b.png.

    A mask is a palette or grey image of the picture's size: 0 is the background, 255 is void and ignored, and other
    values are objects. Only the part of the picture that the model saw counts. If a map has several layers, the last
    one is used.

    Args:
        maps: the maps of the job.
        folder: folder of the masks.
        keep: share of a head's mass in its mask.

    Raises:
        ValueError: no image has a usable mask; the maps are whole maps or maps of words.

    Reference:
        DINO's Jaccard index over ground-truth objects: https://github.com/facebookresearch/dino/issues/54
        Pointing game: Zhang et al., https://arxiv.org/abs/1608.00507 (with a margin of 15 pixels; here without)
    """
    if maps.settings.get("store") == "full" or "vocab" in maps.settings:
        raise ValueError("masks: expected maps of images over patches; this job has whole maps or maps of words")
    left: Counter[str] = Counter()
    best: list[float] = []
    per_head: list[np.ndarray] = []
    hits: list[bool] = []
    objects = 0
    for row in maps:
        path = mask_of(row.key, folder)
        if row.map is None or row.crop is None:
            left["no map"] += 1
        elif path is None:
            left["no mask"] += 1
        else:
            heads = _heads(row.map, maps.settings.get("method") == "layers")
            try:
                labels = read_labels(path, row)
            except ValueError as error:
                left[str(error)] += 1
                continue
            values = jaccard(heads, labels, row.crop, keep)
            if not len(values):
                left["no object in the part that the model saw"] += 1
                continue
            objects += len(values)
            best.append(float(values.max(1).mean()))
            per_head.append(values.mean(0))
            hits.append(points_at(heads.mean(0), labels, row.crop))
    if not best:
        reasons = ", ".join(f"{count} images: {why}" for why, count in left.most_common(3))
        raise ValueError(f"masks: no image of this job has a usable mask in {folder} ({reasons})")
    mean = np.mean(per_head, 0)
    order = np.argsort(-mean, kind="stable")
    ranked = [(int(head), float(mean[head])) for head in order]
    return Score(len(best), objects, float(np.mean(best)), ranked, float(np.mean(hits)), left)


def mask_of(key: str, folder: str | Path) -> Path | None:
    """The path of a key's mask below the folder; None if there is none."""
    path = path_of_key(key)
    if path is None:
        return None
    try:
        return mask if (mask := Path(folder) / path.with_suffix(".png")).is_file() else None
    # The key is too long for a path.
    except (OSError, ValueError):
        return None


def read_labels(path: Path, row: MapRow) -> np.ndarray:
    """The labels of a mask, [height, width] int64.

    Raises:
        ValueError: the file is not a mask, or its size differs from the picture's.
    """
    try:
        with open_regular(path) as file, Image.open(file) as image:
            mode, size = image.mode, image.size
            fits = size == (row.width, row.height) and size[0] * size[1] <= PICTURE_PIXELS
            labels = np.asarray(image).astype(np.int64) if fits else None
    # Decoders raise nearly any exception for broken data.
    except Exception as error:
        raise ValueError("the mask can't be read as an image") from error
    if mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(f"expected a palette or grey mask; got mode {mode}")
    if size[0] * size[1] > PICTURE_PIXELS:
        raise ValueError(f"the mask has more than {PICTURE_PIXELS:,} pixels")
    if labels is None or labels.shape != (row.height, row.width):
        raise ValueError("the mask has another size than its image")
    return labels


def jaccard(heads: np.ndarray, labels: np.ndarray, crop: tuple[float, ...], keep: float = 0.6) -> np.ndarray:
    """[objects, H]: intersection over union of each object and each head's mask, in the part that the model saw.

    Args:
        heads: [H, h, w] maps over the crop.
        labels: [height, width]; 0 background, 255 void.
        crop: (left, top, right, bottom) in the labels' pixels.
        keep: see `attnx.mass_mask`. Its masks are upsampled by nearest neighbour.
    """
    masks = mass_mask(torch.from_numpy(np.ascontiguousarray(heads, np.float32)), keep).numpy()
    left, top, right, bottom = crop
    rows, row_of = _cells(labels.shape[0], top, bottom, heads.shape[1])
    columns, column_of = _cells(labels.shape[1], left, right, heads.shape[2])
    seen = labels[np.ix_(rows, columns)]
    valid = seen != VOID
    # [H, pixels]
    chosen = masks[:, row_of[:, None], column_of[None]][:, valid]
    numbers = [number for number in np.unique(seen[valid]) if number != 0]
    values = np.zeros((len(numbers), len(heads)))
    for i, number in enumerate(numbers):
        inside = seen[valid] == number
        values[i] = (chosen & inside).sum(1) / (chosen | inside).sum(1)
    return values


def points_at(amap: np.ndarray, labels: np.ndarray, crop: tuple[float, ...]) -> bool:
    """True if a map [h, w], upsampled bilinearly to its part of the picture, has its maximum in an object."""
    left, top, right, bottom = crop
    size = max(1, round(bottom - top)), max(1, round(right - left))
    tensor = torch.from_numpy(np.ascontiguousarray(amap, np.float32))[None, None]
    full = F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0]
    y, x = divmod(int(full.argmax()), size[1])
    y, x = math.floor(y + 0.5 + top), math.floor(x + 0.5 + left)
    inside = 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]
    return inside and int(labels[y, x]) not in (0, VOID)


def _heads(amap: np.ndarray, layers: bool) -> np.ndarray:
    """The heads [H, h, w] of a map of any method; of several layers, the last one."""
    if amap.ndim == 4 or layers:
        amap = amap[-1]
    return amap if amap.ndim == 3 else amap[None]


def _cells(length: int, start: float, stop: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one side of a picture: the pixels with their centre in the crop, and the map cell of each."""
    middles = np.arange(length) + 0.5
    inside = np.flatnonzero((middles >= start) & (middles < stop))
    cell = np.floor((middles[inside] - start) / (stop - start) * cells).astype(np.int64)
    return inside, cell.clip(0, cells - 1)
