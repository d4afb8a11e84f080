"""Rollout of Swin: time above the forward pass, memory above it, and bytes of the stored maps.

    python -m benchmarks.suites.windows                  on the CPU
    python -m benchmarks.suites.windows --device cuda
    python -m benchmarks.suites.windows --quick          a tiny model

The floor is the forward pass. Both run alternately in one process. Peak memory is measured in processes of their own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import attnx
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.suites import memory
from benchmarks.timing import race, wall_timer

MODELS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
BATCHES = (1, 8)


def build(name: str, batch: int, quick: bool, device: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and images of its size."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dim": 24} if quick else {}
    model = timm.create_model(name, pretrained=False, **options).eval().to(device)
    size = model.patch_embed.img_size
    return model, torch.randn(batch, 3, *size, device=device)


def contestants(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """The forward pass, and the rollout."""
    return {"forward": model, "rollout": attnx.Extractor(model)}


def timed(name: str, batch: int, quick: bool, device: str, seconds: float) -> dict[str, Any]:
    """Times of the rollout and the forward pass, and bytes of the stored maps of an image."""
    model, images = build(name, batch, quick, device)
    calls = contestants(model)
    with torch.inference_mode():
        error = float((calls["rollout"](images).sum((1, 2)) - 1).abs().max())  # the mass of a rollout is 1
    floor, ours = (wall_timer(call, [(images,)]) for call in (calls["forward"], calls["rollout"]))
    extractor: Any = calls["rollout"]
    return {**race(ours, floor, seconds=seconds, quick=quick), "map_bytes": extractor.plan.nbytes, "max_error": error}


def peak(contestant: str, name: str, batch: int, quick: bool, device: str) -> dict[str, Any]:
    """Peak memory of one call, after a call for one image."""
    model, images = build(name, batch, quick, device)
    call = contestants(model)[contestant]
    with torch.inference_mode():
        call(images[:1])
        with memory.peak_of(device) as most:
            result = call(images)  # noqa: F841  keep until the peak is read
    return dict(peak_mb=round(most[0] / 1e6, 1))


def measure(name: str, batch: int, quick: bool, device: str, seconds: float) -> dict[str, Any]:
    """A row: one model and batch size."""
    row = dict(model=name, batch=batch, **timed(name, batch, quick, device, seconds))
    for contestant in ("forward", "rollout"):
        options = ["--device", device, *(["--quick"] if quick else [])]
        args = ["--one", contestant, name, str(batch), *options]
        row[f"{contestant}_peak_mb"] = memory.run_module("benchmarks.suites.windows", args, needed=True)["peak_mb"]
    return row


def main(argv: list[str] | None = None) -> int:
    """Write windows-HARDWARE.json and print its rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.windows", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each race")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        contestant, name, batch = options.one
        print(json.dumps(peak(contestant, name, int(batch), options.quick, options.device)))
        return 0
    about = {**environment(options.device), "quick": options.quick}
    file, rows = ResultFile(options.out, f"windows-{file_stem(options.device)}", options.quick), []
    for name in MODELS:
        for batch in BATCHES:
            rows.append(measure(name, batch, options.quick, options.device, options.seconds))
            row = rows[-1]
            times = f"{row['median_ms']:9.1f} ms {row['ratio_to_floor']:6.3f} x"
            print(f"{name:30} b{batch} {times} {row['map_bytes'] / 1e6:6.2f} MB an image", flush=True)
            file.save({**about, "rows": rows})
    print(file.finish().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
