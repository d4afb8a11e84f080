"""The figures of docs/guides/probes.md, from the bundled model and drawn scenes: python docs/make_probes.py."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from attnx.demo.run import run_demo
from attnx.figures.probes import draw_comparison, draw_probes
from attnx.jobs.options import RunOptions
from attnx.jobs.plan import open_job
from attnx.jobs.probe_summary import HeadTable, compared
from attnx.jobs.reader import Maps
from attnx.jobs.recipe import ProbeRecipe
from attnx.jobs.run import run_job

OUT = Path(__file__).with_name("probes")
SCENES = 48
NAMES = {"trained": True, "random weights": False}  # in the figures: pretrained


def probed(scenes: Path, out: Path, pretrained: bool) -> Maps:
    """A finished job with the bundled model, or with random weights."""
    recipe = ProbeRecipe(
        source=str(scenes), kind="folder", root=None, split=None, model="demo", pretrained=pretrained, checkpoint=None,
        image_size=None, seed=0, method="probe", heads="each", dtype="float32", map_dtype="float32",
        max_pixels=10**8, pixels=None, layers=None, stats=None, targets=None,
        patch_size=None,
    )  # fmt: skip
    runtime = recipe.load(torch.device("cpu"))
    with open_job(
        out, recipe.open_source(), recipe.describe_source(), runtime.settings, recipe.to_json(), batch_size=16
    ) as job:
        run_job(runtime, job, RunOptions(batch_size=16, workers=0))
    return Maps(out)


def tables(folder: Path) -> list[HeadTable]:
    """The tables of the trained model and of random weights, for the same drawn scenes."""
    run_demo(folder, SCENES)
    jobs = [probed(folder / "scenes", folder / name, pretrained) for name, pretrained in NAMES.items()]
    found, _ = compared(jobs)
    return [replace(table, model=name) for table, name in zip(found, NAMES, strict=True)]


def main() -> None:
    """Writes every figure of the page."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trained, random = tables(Path(folder))
    draw_comparison([trained, random], OUT / "compare.png")
    draw_probes(trained, OUT)
    for path in OUT.glob("*.png"):
        if path.stem not in ("compare", "heads"):
            path.unlink()


if __name__ == "__main__":
    main()
