"""A job that takes seconds: the bundled model on small pictures."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnx.jobs.job import Job, Rank
from attnx.jobs.options import RunOptions
from attnx.jobs.plan import open_job
from attnx.jobs.recipe import ExtractRecipe
from attnx.jobs.run import run_job
from attnx.jobs.runtime import Runtime

RECIPE = ExtractRecipe(
    source="", kind="folder", root=None, split=None, model="demo", pretrained=True, checkpoint=None, image_size=None,
    seed=0, pixels=None, method="cls", layers=None, heads="mean", keep="auto", dtype="float32", compile=False,
    rolling={}, map_dtype="float16", store="map", max_pixels=178_956_970,
)  # fmt: skip


def draw(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Write noise images 000.jpg, 001.jpg, ...; those in `broken` are truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(rng.integers(0, 255, (40, 50 + i % 7, 3), dtype=np.uint8)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:300])
    return folder


def recipe(source: Path, **changes: Any) -> ExtractRecipe:
    """The recipe of a job on a folder of pictures."""
    return dataclasses.replace(RECIPE, source=str(source), **changes)


def tools(source: Path, **changes: Any) -> Runtime:
    """The runtime of a job on a folder of pictures, on the CPU."""
    return recipe(source, **changes).load(torch.device("cpu"))


@contextmanager
def opened(made_with: Runtime, out: Path, shard_size: int | None = None, rank: Rank | None = None) -> Iterator[Job]:
    """Open the job of a folder as `attnx extract` does."""
    how = made_with.recipe
    with open_job(
        out, how.open_source(), how.describe_source(), made_with.settings, how.to_json(), shard_size,
        made_with.row_bytes, rank, batch_size=4,
    ) as job:  # fmt: skip
        yield job


def files(out: Path) -> dict[str, bytes]:
    """The content of every file of a finished job, including hidden files but not locks."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".lock")}


def shards(out: Path) -> dict[str, bytes]:
    """The content of every shard of a job."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.parquet"))}


def made_job(folder: Path, out: Path, shard_size: int, **changes: Any) -> Path:
    """Run the job of a folder of pictures in this process."""
    torch.set_num_threads(1)
    made_with = tools(folder, **changes)
    with opened(made_with, out, shard_size) as planned:
        run_job(made_with, planned, RunOptions(batch_size=4, workers=0))
    return out
