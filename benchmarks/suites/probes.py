"""Statistics of every head and layer: time and memory, beside those of the weights of all heads; and of the op alone.

    python -m benchmarks.suites.probes                  on the CPU
    python -m benchmarks.suites.probes --device cuda
    python -m benchmarks.suites.probes --quick          tiny models

The floor of a model is its forward pass, that of the op is SDPA; contestant and floor run alternately in one process.
Distances and entropies that differ from those of the weights by more than 1e-3 are not timed. Peak memory is measured
in processes of their own.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import attnx
from benchmarks import mkl
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.peers import networks
from benchmarks.peers.probes import PROBES
from benchmarks.suites import memory
from benchmarks.timing import graph_timer, race, wall_timer

AGREEMENT = 1e-3
RUNS = {
    "quick": (("tiny", 2), ("hf_tiny", 2)),
    "cpu": (("vit_base_patch16_224", 8), ("vit_small_patch8_480", 1), ("hf_vit_base_224", 4)),
    "cuda": (("vit_base_patch16_224", 64), ("vit_small_patch8_480", 4), ("hf_vit_base_224", 64)),
}
# B, H, side of the grid, D
OPS = {
    "quick": ((2, 3, 4, 32),),
    "cpu": ((8, 12, 14, 64), (1, 6, 60, 64)),
    "cuda": ((64, 12, 14, 64), (16, 12, 37, 64), (4, 6, 60, 64)),
}


def eager_of(name: str) -> str:
    """The contestant that holds the weights of all heads, for a model."""
    return "output_attentions" if name.startswith("hf") else "hooks"


def timed(contestant: str, name: str, batch: int, quick: bool, device: str, seconds: float) -> dict[str, Any]:
    """Times of a contestant and of the forward pass, and the largest difference from the weights' own statistics."""
    images = networks.images(name, device, batch)
    with torch.inference_mode():
        exact, ours = (
            PROBES[each](networks.build(name).to(device))(images[:1]) for each in (eager_of(name), contestant)
        )
    error = float((ours - exact).abs().max())
    if error > AGREEMENT:
        raise AssertionError(f"{contestant}, {name}: off by {error:.1e}")
    plain = networks.build(name).to(device)
    call = PROBES[contestant](networks.build(name).to(device))
    times = race(wall_timer(call, [(images,)]), wall_timer(plain, [(images,)]), seconds=seconds, quick=quick)
    return {**times, "error": error}


def peak(contestant: str, name: str, batch: int, device: str) -> dict[str, Any]:
    """Peak memory of one call, after a call on a tiny model."""
    for each, count in (("hf_tiny" if name.startswith("hf") else "tiny", 2), (name, batch)):
        model, images = networks.build(each).to(device), networks.images(each, device, count)
        call = model if contestant == "forward" else PROBES[contestant](model)
        with torch.inference_mode(), memory.peak_of(device) as most:
            result = call(images)
        del result
    return dict(peak_mb=round(most[0] / 1e6, 1))


def of_models(quick: bool, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each model and contestant."""
    for name, batch in RUNS["quick" if quick else device]:
        for contestant in ("forward", "stats", eager_of(name)):
            row: dict[str, Any] = dict(contestant=contestant, model=name, batch=batch)
            args = ["--one", contestant, name, str(batch), "--device", device]
            if contestant != "forward":
                row |= timed(contestant, name, batch, quick, device, seconds)
            yield row | memory.run_module("benchmarks.suites.probes", args, needed=True)


def of_op(quick: bool, device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each shape: `attnx.attention_stats` beside SDPA."""
    for B, H, side, D in OPS["quick" if quick else device]:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        q, k, v = torch.randn(B, side * side + 1, 3, H, D, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
        timer = graph_timer if device == "cuda" else wall_timer
        stats = partial(attnx.attention_stats, grid=(side, side), prefix=1)
        ours = timer(stats, [(q, k)])
        floor = timer(F.scaled_dot_product_attention, [(q, k, v)])
        yield dict(contestant="op", model=f"{B}x{H}x{q.shape[2]}x{D}", batch=B, **race(ours, floor, seconds, quick))


def main(argv: list[str] | None = None) -> int:
    """Write probes-HARDWARE.json and print its rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.probes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each race")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mkl-as-on-intel", action="store_true", help="see benchmarks/mkl.py")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        contestant, name, batch = options.one
        print(json.dumps(peak(contestant, name, int(batch), options.device)))
        return 0
    with mkl.as_on_intel() if options.mkl_as_on_intel else nullcontext():
        about = {**environment(options.device), "quick": options.quick}
        file, rows = ResultFile(options.out, f"probes-{file_stem(options.device)}", options.quick), []
        for measure in (of_models, of_op):
            for row in measure(options.quick, options.device, options.seconds):
                rows.append(row)
                times = f"{row['median_ms']:9.1f} ms {row['ratio_to_floor']:6.3f} x" if "median_ms" in row else ""
                print(
                    f"{row['model']:24} b{row['batch']} {row['contestant']:18}{times} {row.get('peak_mb', '')}",
                    flush=True,
                )
                file.save({**about, "rows": rows})
    print(file.finish().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
