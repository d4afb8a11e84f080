"""The demo: scenes drawn, their maps made by the same code as `attnx extract`, and how often a map finds its target."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnx.demo.scenes import CLASSES, Scene, draw_scene
from attnx.extractor import Extractor
from attnx.images import find_images
from attnx.jobs.extract import extract_images
from attnx.jobs.shards import read_settings, read_shards
from attnx.methods import pointing_game
from attnx.models.loading import load_model

FIRST_SEED = 20_000_000  # training draws its scenes below 10 million
METHODS = ("rollout", "cls")
Progress = Callable[[int], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Verdict:
    """Pointing game: the share of scenes whose map peaks inside the target's box, by method and for random maps."""

    scenes: int
    shares: dict[str, float]

    def __str__(self) -> str:
        best = max(METHODS, key=lambda m: self.shares[m])
        others = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items() if name != best)
        return f"{best} points at the target in {self.shares[best]:.1%} of {self.scenes} unseen scenes ({others})"


def run_demo(out: Path, scenes: int = 48, seed: int = FIRST_SEED, progress: Progress | None = None) -> Verdict:
    """Draws scenes, extracts their maps, plays the pointing game; writes everything into `out`.

    Writes scenes/*.png, the shards rollout/ and cls/, results.json and contact_sheet.png.

    Args:
        out: a folder; an earlier demo's results in it are replaced.
        scenes: how many, at least 1.
        seed: of the first scene; scene i has seed + i.
        progress: gives a context manager of a progress function for a number of images.
    """
    if scenes < 1:
        raise ValueError(f"scenes: expected at least 1; got {scenes}")
    from attnx.picture import save

    drawn = [draw_scene(seed + i) for i in range(scenes)]
    folder = out / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    for i, scene in enumerate(drawn):
        save(Image.fromarray(scene.image), folder / f"{i:05d}.png")
    maps = {method: _extract(folder, out / method, method, progress) for method in METHODS}
    maps["random"] = torch.from_numpy(np.random.default_rng(seed).random(tuple(maps["cls"].shape), np.float32))
    boxes = torch.tensor([scene.box for scene in drawn])
    size = drawn[0].image.shape[:2]
    hits = {name: pointing_game(m, boxes, size) for name, m in maps.items()}
    verdict = Verdict(scenes, {name: hit.double().mean().item() for name, hit in hits.items()})
    _write_results(out, verdict, drawn, hits)
    save(_sheet(drawn[:12], maps), out / "contact_sheet.png")
    return verdict


def _extract(folder: Path, out: Path, method: str, progress: Progress | None) -> Tensor:
    """[scenes, h, w] maps, by way of the shards that are written to `out`."""
    loaded = load_model("demo")
    paths = find_images(folder)
    settings = {"demo": True, "method": method}
    _forget(out)
    with progress(len(paths)) if progress else nullcontext(None) as report:
        extract_images(paths, folder, loaded.prepare, Extractor(loaded.model, method), out, settings, progress=report)
    return torch.from_numpy(np.stack([row.map for row in read_shards(out) if row.map is not None])).float()


def _forget(out: Path) -> None:
    """Removes an earlier demo's shards; those of anything else stay, and the writer refuses their folder."""
    shards = sorted(out.glob("part-*.parquet"))
    if shards and read_settings(out).get("demo"):
        for shard in shards:
            shard.unlink()


def _write_results(out: Path, verdict: Verdict, drawn: list[Scene], hits: dict[str, Tensor]) -> None:
    rows = [
        {"key": f"{i:05d}.png", "target": CLASSES[scene.label], "box": list(scene.box)}
        | {name: bool(hit[i]) for name, hit in hits.items()}
        for i, scene in enumerate(drawn)
    ]
    results = {"scenes": verdict.scenes, "pointing_game": verdict.shares, "rows": rows}
    partial = out / ".results.json.tmp"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out / "results.json")


def _sheet(drawn: list[Scene], maps: dict[str, Tensor]) -> Image.Image:
    """Scene, rollout and CLS map side by side, two scenes a row."""
    from attnx.picture import contact_sheet, overlay

    pictures, titles = [], []
    for i, scene in enumerate(drawn):
        image = Image.fromarray(scene.image).resize((192, 192), Image.Resampling.LANCZOS)
        pictures += [image, *(overlay(image, maps[method][i]) for method in METHODS)]
        titles += [CLASSES[scene.label], *METHODS]
    return contact_sheet(pictures, titles, columns=6)
