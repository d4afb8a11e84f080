"""Pictures and numbers of a job's summary, for `attnx summary`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from attnx.figures.picture import heat, overlay, save
from attnx.figures.sheets import contact_sheet
from attnx.files import replacing
from attnx.jobs.photos import Photos
from attnx.jobs.reader import Maps
from attnx.jobs.summary import LEVELS, Summary, spatial

if TYPE_CHECKING:
    from attnx.figures.style import Style
    from attnx.jobs.columns import MapRow
    from attnx.jobs.masks import Score

__all__ = ["draw_summary", "numbers", "table"]

_TILE = 192


def draw_summary(maps: Maps, found: Summary, out: Path, style: Style, examples: int) -> dict[Path, str]:
    """Write levels.png, focus.png and mean.png to `out`; {path: description} of the written files.

    Nothing is written if the job has no maps over patches.
    """
    if found.mean is None or not len(found.places):
        return {}
    out.mkdir(parents=True, exist_ok=True)
    rows = [(f"level {level}", found.of_level(level, examples)) for level in range(LEVELS)]
    ends = [("most", found.focused(examples)), ("least", found.focused(examples, least=True))]
    pictures = _Pictures(maps, style)
    written = {
        out / "levels.png": f"examples of the {LEVELS} levels of entropy, the most focused first",
        out / "focus.png": "the most and the least focused images",
        out / "mean.png": "the mean of all maps, each divided by its sum",
    }
    save(_sheet(rows, pictures, found), out / "levels.png")
    save(_sheet(ends, pictures, found), out / "focus.png")
    grey = Image.new("RGB", (4 * _TILE, 4 * _TILE * found.mean.shape[0] // found.mean.shape[1] or 1), "white")
    save(overlay(grey, found.mean, cmap=style.cmap, alpha=1, interpolation="nearest"), out / "mean.png")
    return written


def _sheet(rows: list[tuple[str, np.ndarray]], pictures: _Pictures, found: Summary) -> Image.Image:
    """A sheet with a row of pictures for each (name, places) of `rows`, titled with their entropies."""
    columns = max(len(places) for _, places in rows)
    tiles, titles = [], []
    for name, places in rows:
        for i in range(columns):
            if i < len(places):
                tiles.append(pictures(int(places[i])))
                titles.append(f"{name}: {found.entropy_at(int(places[i])):.2f}")
            else:
                tiles.append(Image.new("RGB", (_TILE, _TILE), "white"))
                titles.append("")
    return contact_sheet(tiles, titles, columns=columns, tile=_TILE)


class _Pictures:
    """Pictures of a job's rows: the map over its crop of the image, or the map alone if the image can't be read."""

    def __init__(self, maps: Maps, style: Style) -> None:
        self._maps, self._style = maps, style
        self._photos: Photos | None = Photos(maps)
        try:
            self._photos.check()
        except ValueError:
            self._photos = None

    def __call__(self, place: int) -> Image.Image:
        """The picture of the row at index `place`."""
        row = self._maps[place]
        amap = spatial(row)
        assert amap is not None
        picture = self._picture(row, place)
        style = self._style
        if picture is None:
            grey = (heat(amap, (_TILE, _TILE), interpolation="nearest") * 255).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
        return overlay(picture, amap, cmap=style.cmap, alpha=style.alpha, interpolation=style.interpolation)

    def _picture(self, row: MapRow, place: int) -> Image.Image | None:
        try:
            return None if self._photos is None else self._photos(place, row)
        except ValueError:
            return None


def numbers(maps: Maps, found: Summary, scored: Score | None) -> dict[str, Any]:
    """The summary, for JSON."""
    keys = [maps[int(place)].key for place in found.focused(5)]
    least = [maps[int(place)].key for place in found.focused(5, least=True)]
    levels = [
        {"level": level, "images": len(values), "entropy": [float(values.min()), float(values.max())]}
        for level in range(LEVELS)
        if len(values := found.entropies[found.levels == level])
    ]
    score = (
        {}
        if scored is None
        else {
            "masks": {
                "images": scored.images, "objects": scored.objects, "jaccard": scored.jaccard, "heads": scored.heads,
                "pointing": scored.pointing, "left": dict(scored.left),
            }
        }
    )  # fmt: skip
    return {
        "rows": found.rows, "planned": found.planned, "maps": found.rows - found.errors.total(),
        "errors": dict(found.errors.most_common()), "images_per_second": found.per_second, "levels": levels,
        "most_focused": keys, "least_focused": least, "settings": maps.settings, **score,
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The result of `numbers` as text."""
    planned = "" if report["planned"] in (None, report["rows"]) else f" of {report['planned']} planned"
    rate = "" if report["images_per_second"] is None else f", {report['images_per_second']:.1f} a second"
    lines = [f"{report['rows']} rows{planned}: {report['maps']} maps, {sum(report['errors'].values())} errors{rate}"]
    lines += [f"  {count} x {kind}" for kind, count in report["errors"].items()]
    lines += [
        f"level {each['level']}: {each['images']} images, entropy {each['entropy'][0]:.2f} to {each['entropy'][1]:.2f}"
        for each in report["levels"]
    ]
    for name in ("most", "least"):
        if report[f"{name}_focused"]:
            lines.append(f"{name} focused: {', '.join(key[:60] for key in report[f'{name}_focused'])}")
    if "masks" in report:
        masks = report["masks"]
        head, best = masks["heads"][0]
        lines.append(
            f"{masks['images']} masks with {masks['objects']} objects: "
            f"Jaccard {masks['jaccard']:.3f} (best head of each), "
            f"{best:.3f} (head {head}, the best alone); pointing game {masks['pointing']:.1%}"
        )
        lines += [f"  {count} x {why}" for why, count in masks["left"].items()]
    return "\n".join(lines)


def write_numbers(report: dict[str, Any], path: Path) -> None:
    """Write the numbers as JSON, atomically."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
