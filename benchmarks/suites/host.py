"""Time that Python takes: launches with a driver that does nothing, and a tiny model.

    python -m benchmarks.suites.host             minutes
    python -m benchmarks.suites.host --quick     seconds

Launches are timed on CPU tensors, with their compiled kernels replaced by a function that does nothing. So neither a
GPU nor a driver takes part. The contestants of the tiny model run in turn in one process.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import timm
import torch

import attnx
from attnx.kernels.configs import Launch
from attnx.ops.backends import plans
from attnx.ops.backends import triton as backend
from attnx.ops.reducers import Reduction
from attnx.ops.scores import Scores
from benchmarks.machine import ROOT, ResultFile, environment, file_stem

MODEL = "vit_tiny_patch16_224"
SHAPES = ((64, 197), (16, 577))  # batch, tokens; 12 heads of 64


class NoDriver:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args: None


def launches(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each call of a backend: microseconds with a plan and without, and the number of launches."""
    for batch, tokens in SHAPES:
        qkv = torch.zeros(batch, tokens, 3, 12, 64, dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores, lse = Scores(q, k, None, False, 0.125), torch.zeros(batch, 12, tokens)
        of_map = partial(backend.attention_map, scores, Reduction.MEAN, None, lse)
        for name, call in (
            ("map from log-sum-exps", of_map),
            ("output and map", partial(backend.attention, scores, v, Reduction.MEAN, None)),
        ):
            yield dict(call=name, batch=batch, tokens=tokens, **launch_times(call, quick))


def launch_times(call: Callable[[], Any], quick: bool) -> dict[str, Any]:
    """Number of launches of a call, and its microseconds with a plan and without."""
    launched = []

    def run(launch: Launch) -> NoDriver:
        launched.append(launch)
        return NoDriver()

    with mock.patch.object(Launch, "run", run), mock.patch.object(plans, "_KEPT", {}):
        with mock.patch.object(plans, "is_planned", return_value=False):
            call()
            count = len(launched)
        not_planned = _timed_with(False, call, quick)
        return dict(launches=count, planned_us=_timed_with(True, call, quick), not_planned_us=not_planned)


def _timed_with(planned: bool, call: Callable[[], Any], quick: bool) -> float:
    # A mock would take longer than what it stands for.
    def is_planned(t: torch.Tensor) -> bool:
        return planned

    with mock.patch.object(plans, "is_planned", is_planned):
        return microseconds(call, quick)


def microseconds(call: Callable[[], Any], quick: bool) -> float:
    """Median time of a call."""
    times = []
    for i in range(100 if quick else 5000):
        started = time.perf_counter()
        call()
        if i >= 50:
            times.append(time.perf_counter() - started)
    return round(1e6 * median(times), 2)


def models(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each contestant: milliseconds for one image, and the ratio to the forward pass in the same run."""
    torch.manual_seed(0)
    options: dict[str, Any] = dict(depth=2) if quick else {}
    model, images = timm.create_model(MODEL, **options).eval(), torch.randn(1, 3, 224, 224)
    extractor = attnx.Extractor(model)

    def capture_and_rollout() -> None:
        with attnx.capture(model) as trace:
            model(images)
        attnx.rollout(trace)

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(images),
        "capture + rollout": capture_and_rollout,
        "Extractor": lambda: extractor(images),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for i in range(6 if quick else 203):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if i >= 3:
                    times[name].append(time.perf_counter() - started)
    floor = median(times["forward"])
    for name, measured in times.items():
        ratio = median(t / f for t, f in zip(measured, times["forward"], strict=True))
        yield dict(
            contestant=name, median_ms=1e3 * median(measured), floor_ms=1e3 * floor, ratio_to_floor=round(ratio, 3)
        )


def main(argv: list[str] | None = None) -> int:
    """Write host-HARDWARE.json and print its rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.host", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="a smaller model, few rounds")
    options = parser.parse_args(argv)
    file = ResultFile(options.out, f"host-{file_stem('cpu')}", options.quick)
    content: dict[str, Any] = {**environment("cpu"), "quick": options.quick, "model": MODEL}
    content |= {"launches": list(launches(options.quick)), "models": list(models(options.quick))}
    for row in content["launches"]:
        size = f"b{row['batch']} n{row['tokens']}"
        print(f"{row['call']:22} {size:9} {row['planned_us']:6.1f} us, {row['not_planned_us']:6.1f} without a plan")
    for row in content["models"]:
        print(f"{row['contestant']:22} {row['median_ms']:8.2f} ms {row['ratio_to_floor']:6.3f} x")
    file.save(content)
    print(file.finish().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
