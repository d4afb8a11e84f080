"""The demo: draw scenes, extract their maps with the code of `attnx extract`, and play the pointing game."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnx.demo.pointing import Pointing, point_at_phrases, words_sheet
from attnx.demo.scenes import CLASSES, Scene, draw_scene
from attnx.files import replacing
from attnx.jobs.options import RunOptions
from attnx.jobs.photos import Photos
from attnx.jobs.plan import forget_job, open_job
from attnx.jobs.reader import Maps
from attnx.jobs.recipe import ExtractRecipe
from attnx.jobs.run import run_job
from attnx.methods import pointing_game

FIRST_SEED = 20_000_000  # training draws its scenes below 10 million
METHODS = ("rollout", "cls")
_PAGE = 384  # pixels of the picture in explore.html
Progress = Callable[[int], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Verdict:
    """Pointing game: the share of scenes whose map peaks inside the target's box, by method and for random maps.

    words: the same of captioned scenes and their noun phrases.
    """

    scenes: int
    shares: dict[str, float]
    words: Pointing

    def __str__(self) -> str:
        best = max(METHODS, key=lambda m: self.shares[m])
        others = ", ".join(f"{name} {share:.1%}" for name, share in self.shares.items() if name != best)
        found = f"{best} points at the target in {self.shares[best]:.1%} of {self.scenes} unseen scenes ({others})"
        return f"{found}\n{self.words}"


def run_demo(out: str | Path, scenes: int = 48, seed: int = FIRST_SEED, progress: Progress | None = None) -> Verdict:
    """Draw scenes, extract their maps, and run the pointing game, also for words on as many captioned scenes.

    Writes into `out` scenes/*.png, the shards rollout/ and cls/, results.json, contact_sheet.png and words.png; the
    captioned scenes, captioned/*.png with their pairs.jsonl; and the interactive pages explore.html, of the first scene
    and all heads, and browse/index.html, of all rollouts.

    Args:
        out: a folder; an earlier demo's results in it are replaced.
        scenes: number of scenes, at least 1.
        seed: seed of the first scene; scene i has seed + i.
        progress: gives a context manager of a progress function for a number of images.
    """
    if scenes < 1:
        raise ValueError(f"scenes: expected at least 1; got {scenes}")
    from attnx.figures.picture import save
    from attnx.page.browse import Browse, write_pages
    from attnx.page.explore import explore

    out = Path(out)
    drawn = [draw_scene(seed + i) for i in range(scenes)]
    folder = out / "scenes"
    _write_pictures(folder, [scene.image for scene in drawn])
    maps = {method: _extract(folder, out / method, method, progress) for method in METHODS}
    maps["random"] = torch.from_numpy(np.random.default_rng(seed).random(tuple(maps["cls"].shape), np.float32))
    boxes = torch.tensor([scene.box for scene in drawn])
    size = drawn[0].image.shape[:2]
    hits = {name: pointing_game(m, boxes, size) for name, m in maps.items()}
    shares = {name: hit.double().mean().item() for name, hit in hits.items()}
    verdict = Verdict(scenes, shares, point_at_phrases(scenes, seed))
    _write_results(out, verdict, drawn, hits)
    save(_sheet(drawn[:12], maps), out / "contact_sheet.png")
    captioned = verdict.words.scenes
    names = _write_pictures(out / "captioned", [scene.image for scene in captioned])
    pairs = [{"image": name, "caption": scene.caption} for name, scene in zip(names, captioned, strict=True)]
    _write(out / "captioned" / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    save(words_sheet(verdict.words, 6), out / "words.png")
    first = Image.fromarray(drawn[0].image).resize((_PAGE, _PAGE), Image.Resampling.LANCZOS)
    explore("demo", first, heads="each", title="A drawn scene, seen by the bundled model").save(out / "explore.html")
    rollouts = Maps(out / "rollout")
    write_pages(Browse(rollouts, out / "browse", Photos(rollouts)), workers=0)
    return verdict


def _write_pictures(folder: Path, images: list[np.ndarray]) -> list[str]:
    """Write the pictures to the folder and return their names. Pictures of an earlier run are removed."""
    from attnx.figures.picture import save

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    names = [f"{i:05d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        save(Image.fromarray(image), folder / name)
    return names


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def _extract(folder: Path, out: Path, method: str, progress: Progress | None) -> Tensor:
    """Maps [scenes, h, w] of a job that writes its shards to `out`."""
    recipe = ExtractRecipe(
        source=str(folder.absolute()), kind="folder", root=None, split=None, model="demo", pretrained=True,
        checkpoint=None, image_size=None, seed=0, method=method, heads="mean", dtype="float32", map_dtype="float16",
        max_pixels=2**20, pixels=None, layers=None, keep="auto", compile=False, store="map", rolling={},
    )  # fmt: skip
    runtime, source = recipe.load(torch.device("cpu")), recipe.open_source()
    described = recipe.describe_source()
    forget_job(out, described)
    with (
        open_job(out, source, described, runtime.settings, recipe.to_json(), row_bytes=runtime.row_bytes) as job,
        progress(job.rows) if progress else nullcontext(None) as report,
    ):
        run_job(runtime, job, RunOptions(workers=0), progress=report)
    return torch.from_numpy(np.stack([row.map for row in Maps(out) if row.map is not None])).float()


def _write_results(out: Path, verdict: Verdict, drawn: list[Scene], hits: dict[str, Tensor]) -> None:
    rows = [
        {"key": f"{i:05d}.png", "target": CLASSES[scene.label], "box": list(scene.box)}
        | {name: bool(hit[i]) for name, hit in hits.items()}
        for i, scene in enumerate(drawn)
    ]
    results = {"scenes": verdict.scenes, "pointing_game": verdict.shares, "words": verdict.words.shares, "rows": rows}
    _write(out / "results.json", json.dumps(results, indent=1) + "\n")


def _sheet(drawn: list[Scene], maps: dict[str, Tensor]) -> Image.Image:
    """A sheet of scenes with their rollout and CLS map, two scenes per row."""
    from attnx.figures.picture import overlay
    from attnx.figures.sheets import contact_sheet

    pictures, titles = [], []
    for i, scene in enumerate(drawn):
        image = Image.fromarray(scene.image).resize((192, 192), Image.Resampling.LANCZOS)
        pictures += [image, *(overlay(image, maps[method][i]) for method in METHODS)]
        titles += [CLASSES[scene.label], *METHODS]
    return contact_sheet(pictures, titles, columns=6)
