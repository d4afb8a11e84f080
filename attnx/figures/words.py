"""Pictures and arrays of one image and its caption, for `attnx words`."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnx.figures.picture import overlay, save
from attnx.figures.sheets import captioned, contact_sheet
from attnx.figures.style import Style
from attnx.files import replacing
from attnx.jobs.tasks import WordTask

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from attnx.extract.captions import CaptionMaps
    from attnx.jobs.runtime import Runtime

_TILE = 256


def draw_words(picture: "Image", found: "CaptionMaps", out: Path, style: Style) -> dict[Path, str]:
    """Write a picture of each word, words.png and words.npz to `out`; {path: description} of the written files."""
    out.mkdir(parents=True, exist_ok=True)
    written: dict[Path, str] = {}
    digits = max(2, len(str(len(found.words) - 1)))
    for number, (word, amap) in enumerate(zip(found.words, found.word_maps, strict=True)):
        path = out / f"{number:0{digits}d}-{_safe(word)}.png"
        save(_over(picture, amap, style), path)
        written[path] = word
    save(words_sheet(picture, found, style), out / "words.png")
    written[out / "words.png"] = "all of them, and the caption"
    _save_arrays(found, out / "words.npz")
    written[out / "words.npz"] = f"maps of {len(found.words)} words and of {len(found.tokens)} word pieces"
    return written


def draw_pairs(out: Path, runtime: "Runtime", style: Style) -> None:
    """Write the sheet of each pair of a finished job to `out`/pictures. That of row 7 is 000007-a-red-circle.png.

    Existing pictures are kept, because several runs may share the job; so are those of the former name 000007.png.
    """
    import torch

    from attnx.jobs.photos import Photos
    from attnx.jobs.reader import Maps

    maps = Maps(out)
    photos = Photos(maps)
    assert isinstance(runtime.task, WordTask)
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    for place, row in enumerate(maps):
        number = maps.manifest_row(place)
        if row.map is None or row.text is None or (folder / f"{number:06d}.png").exists():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            caption = runtime.task.tokenizer(row.text)
        path = folder / _pair_name(number, caption.words)
        if path.exists():
            continue
        found = runtime.task.result(caption, torch.from_numpy(row.map), row.score)
        # The crop of a job of captions is the whole photo.
        save(words_sheet(photos(place, row), found, style), path)


def words_sheet(picture: "Image", found: "CaptionMaps", style: Style) -> "Image":
    """The picture, an overlay of each word's map with its own colour scale, and the caption below them."""
    from PIL import Image, ImageOps

    small = ImageOps.contain(picture, (_TILE, _TILE), Image.Resampling.LANCZOS)
    tiles = [small, *(_over(small, amap, style) for amap in found.word_maps)]
    columns = min(6, len(tiles))
    text = found.caption.text if found.score is None else f"{found.caption.text} (match {found.score:+.2f})"
    return captioned(contact_sheet(tiles, ["", *found.words], columns=columns), text)


def _over(picture: "Image", amap: "Tensor", style: Style) -> "Image":
    return overlay(picture, amap, interpolation=style.interpolation, cmap=style.cmap, alpha=style.alpha)


def _pair_name(number: int, words: tuple[str, ...], most: int = 60) -> str:
    """The file name of a pair: its number and its first words in ASCII, of at most `most` characters."""
    text = ""
    for word in filter(None, map(_ascii, words)):
        longer = f"{text}-{word}"
        if len(longer) - 1 > most:
            break
        text = longer
    return f"{number:06d}{text}.png"


def _safe(word: str) -> str:
    """The word as part of a file name that is valid on all systems."""
    return _ascii(word) or "word"


def _ascii(word: str) -> str:
    """At most 40 letters, digits and underscores of a word; "" if it has none."""
    return re.sub(r"[^\w]+", "_", word, flags=re.ASCII).strip("_")[:40]


def _save_arrays(found: "CaptionMaps", path: Path) -> None:
    """words [W], maps [W, h, w]; tokens, word_of (-1: none) [T], token_maps [T, h, w]; caption; score (NaN: none)."""
    with replacing(path, sync=False) as temporary, temporary.open("xb") as file:
        np.savez_compressed(
            file,
            words=np.array(found.words),
            maps=found.word_maps.float().cpu().numpy(),
            tokens=np.array(found.tokens),
            token_maps=found.maps.float().cpu().numpy(),
            word_of=np.array([-1 if word is None else word for word in found.caption.word_of]),
            caption=np.array(found.caption.text),
            score=np.array(np.nan if found.score is None else found.score, np.float32),
        )
