"""A batch job beside its model and its decoders, by several engines, and with ten million rows.

    python -m benchmarks.suites.jobs                            2,000 generated JPEGs of 640 x 480
    python -m benchmarks.suites.jobs --photos DIR               copies of the JPEGs in DIR
    python -m benchmarks.suites.jobs --device cuda              on a GPU
    python -m benchmarks.suites.jobs --engines 2                one process, then two: local, ranks, Ray
    python -m benchmarks.suites.jobs --many 10000000            without a model and decoders, see `many`
    python -m benchmarks.suites.jobs --quick                    a tiny model, 64 pictures

`decode` is the decoding processes alone, `model` the extractor alone on decoded pixels. Each runs before and after
`pipeline`, the job of `attnx extract`, and the mean of the two rates counts. The job can't be faster than the slower of
decoders and model. The median of seven rounds is stored.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnx.cli.options import rollout_options
from attnx.jobs.decoding import Decode, Decoders, start_server
from attnx.jobs.memory import usable_cores
from attnx.jobs.options import RunOptions
from attnx.jobs.plan import open_job
from attnx.jobs.recipe import ExtractRecipe
from attnx.jobs.run import run_job
from attnx.jobs.runtime import Runtime
from attnx.jobs.sources import Entry
from attnx.limits import PICTURE_PIXELS
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.suites.many import many

MODEL = "timm:vit_small_patch16_224"


def draw(folder: Path, count: int, photos: Path | None) -> float:
    """Write `count` JPEGs, copies of those in `photos` or generated, and return their mean size in bytes."""
    folder.mkdir()
    own = [] if photos is None else [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    rng = np.random.default_rng(0)
    for i in range(count):
        if own:
            (folder / f"{i:05d}.jpg").write_bytes(own[i % len(own)])
            continue
        # Large shapes and noise: about 100 KB, like a photo of this size.
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((640, 480))
        grain = rng.normal(0, 12, (480, 640, 1))
        image = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:05d}.jpg", quality=88)
    return sum(path.stat().st_size for path in folder.iterdir()) / count


def decode_alone(runtime: Runtime) -> float:
    """Images per second of the decoders alone."""
    source = runtime.recipe.open_source()
    entries = list(source.entries())
    with Decoders(Decode(source.reader(), runtime.pixels), None) as decoders:
        for future in [decoders.submit(entry) for entry in entries[: 4 * max(1, decoders.workers)]]:
            future.result()
        start = time.perf_counter()
        for future in [decoders.submit(entry) for entry in entries]:
            assert future.result().error is None
        return len(entries) / (time.perf_counter() - start)


def model_alone(runtime: Runtime, batch: int, count: int) -> float:
    """Images per second of the model alone, from pixels on the device to maps on the CPU."""
    pixels = torch.randint(0, 256, (batch, 3, *runtime.pixels.size), dtype=torch.uint8, device=runtime.device)
    groups = [[Entry("", "")]] * batch
    start = time.perf_counter()
    waits = [runtime.task.start(runtime.pixels.normalise(pixels), groups) for _ in range(max(1, count // batch))]
    for wait in waits:
        wait()
    return len(waits) * batch / (time.perf_counter() - start)


def pipeline(runtime: Runtime, out: Path, running: RunOptions) -> dict[str, Any]:
    """Images per second of a whole job, and the seconds of its stages."""
    recipe = runtime.recipe
    with open_job(out, recipe.open_source(), recipe.describe_source(), runtime.settings, recipe.to_json()) as job:
        report = run_job(runtime, job, running)
    assert report.maps == report.rows == job.rows
    return {"images_per_s": report.made / report.seconds, "seconds": report.seconds, "stages": vars(report.stages)}


def _recipe(options: argparse.Namespace, folder: Path) -> ExtractRecipe:
    """The recipe of `attnx extract`."""
    return ExtractRecipe(
        source=str(folder / "images"), kind="folder", root=None, split=None,
        model="demo" if options.quick else options.model, pretrained=options.quick, checkpoint=None, image_size=None,
        seed=0, method="rollout", heads="mean", dtype=options.dtype, map_dtype="float16", max_pixels=PICTURE_PIXELS,
        pixels=None, layers=None, keep="auto", compile=False, store="map", rolling=rollout_options(0.5, 0.0, 0, None),
    )  # fmt: skip


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of decoders, model and pipeline on a folder of images."""
    count = 64 if options.quick else options.images
    size = draw(folder / "images", count, options.photos)
    start_server()
    runtime = _recipe(options, folder).load(torch.device(options.device))
    running = RunOptions(options.batch, None)
    model_alone(runtime, options.batch, 2 * options.batch)
    rounds = []
    for number in range(options.rounds):
        before = decode_alone(runtime), model_alone(runtime, options.batch, count // 2)
        found = pipeline(runtime, folder / f"out-{number}", running)
        after = decode_alone(runtime), model_alone(runtime, options.batch, count // 2)
        decode, model = ((a + b) / 2 for a, b in zip(before, after, strict=True))
        rounds.append((found["images_per_s"] / min(decode, model), decode, model, found))
        print(f"round {number}: {rounds[-1][0]:.3f} of the slower", flush=True)
    # All values of one round, because they belong together.
    of_slower, decode, model, found = sorted(rounds, key=lambda one: one[0])[len(rounds) // 2]
    return {
        "images": count, "bytes_per_image": size, "model": runtime.recipe.model, "batch": options.batch,
        "dtype": options.dtype, "decode_per_s": decode, "model_per_s": model, "pipeline": found,
        "of_slower": of_slower, "rounds_of_slower": [one[0] for one in rounds],
    }  # fmt: skip


def engines(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of the same `attnx extract` on CPUs by one process and by every engine with N processes.

    They include the start of the processes. `same_as_local` is True if the shards equal those of the local engine.
    """
    world = options.engines
    count = 64 if options.quick else options.images
    draw(folder / "images", count, options.photos)
    model = ["demo"] if options.quick else [options.model, "--no-pretrained"]
    shared = ["--max-pixels", str(PICTURE_PIXELS), "--shard-size", "16" if options.quick else "64"]
    command = [sys.executable, "-m", "attnx", "extract", str(folder / "images"), "--model", *model, *shared]
    own_cores = max(1, usable_cores() // world)
    rank = ["--device", "cpu", "--engine", "ranks", "--world", str(world), "--workers", str(own_cores)]
    runs = {
        "here": [["--device", "cpu"]],
        "local": [["--device", ",".join(["cpu"] * world)]],
        "ranks": [[*rank, "--rank", str(i)] for i in range(world)],
        "ray": [["--device", "cpu", "--engine", "ray", "--actors", str(world)]],
    }
    found: dict[str, Any] = {}
    wrote: dict[str, list[bytes]] = {}
    for name, processes in runs.items():
        out = folder / name
        env = {**os.environ, **({"OMP_NUM_THREADS": str(own_cores)} if name == "ranks" else {})}
        start = time.perf_counter()
        started = [subprocess.Popen([*command, "--out", str(out), *args], env=env) for args in processes]
        assert [process.wait() for process in started] == [0] * len(started), f"{name}: attnx extract failed"
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "images_per_s": count / seconds}
        wrote[name] = [path.read_bytes() for path in sorted(out.glob("part-*.parquet"))]
    same = {name: shards == wrote["local"] for name, shards in wrote.items()}
    return {"images": count, "model": model[0], "processes": world, "engines": found, "same_as_local": same}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.jobs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs to copy; default: generated ones")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--engines", type=int, metavar="N", help="one process, then N: local, ranks, Ray; on the CPU")
    parser.add_argument("--many", type=int, metavar="ROWS", help="only a job of this many rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    about = {**environment(options.device), "quick": options.quick, "cores": usable_cores()}
    with tempfile.TemporaryDirectory() as folder:
        if options.many is not None:
            found, name = many(options.many, Path(folder) / "out"), "jobs-many"
        elif options.engines is not None:
            found, name = engines(options, Path(folder)), "jobs-engines"
        else:
            found, name = measure(options, Path(folder)), "jobs"
    file = ResultFile(options.out, f"{name}-{file_stem(options.device)}", options.quick)
    file.save({**about, **found})
    print(json.dumps(found, indent=1))
    print(file.finish().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
