"""The peak memory of one contestant above its loaded model, measured in a process of its own.

    python -m benchmarks.suites.memory attnx --model vit_small_patch8_480

On a CPU this is the high-water mark of the resident set. It is reset after the model is loaded (on Linux, by writing 5
to /proc/self/clear_refs), so loading does not count. Before that, the contestant runs on a tiny model, so that
libraries, threads and caches are loaded, and malloc returns its free memory. Freed memory that malloc keeps during the
run counts, as it does for users; its amount differs between processes. `run_module` with `needed` sets malloc to return
freed blocks from 128 KB on at once (glibc only). Then the result is the same in every process.
On CUDA it is the peak of torch's allocator above the amount allocated before.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import ROOT
from benchmarks.peers import networks as models
from benchmarks.peers import rollouts
from benchmarks.timing import wall_timer

MEASURABLE = Path("/proc/self/clear_refs").exists()
# glibc raises this threshold to the size of freed blocks, unless it is set.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)} if platform.libc_ver()[0] == "glibc" else {}


def measure(contestant: str, model: str, batch: int, device: str, runs: int) -> dict[str, Any]:
    """peak_mb (10^6 bytes) of the first run on the loaded model, and the median seconds of `runs` more."""
    call, images = _prepare(contestant, "hf_tiny" if contestant == "output_attentions" else "tiny", 2, device)
    with torch.inference_mode():
        call(images)
    call, images = _prepare(contestant, model, batch, device)
    with torch.inference_mode(), peak_of(device) as peak:
        rollout = call(images)
    tokens = 0 if rollout is None else rollout.shape[1] + 1
    del rollout
    once = wall_timer(call, [(images,)])
    seconds = [once() for _ in range(runs)]
    return dict(
        contestant=contestant, model=model, batch=len(images), tokens=tokens, device=device,
        peak_mb=round(peak[0] / 1e6, 1), seconds=median(seconds) if seconds else None,
    )  # fmt: skip


def in_own_process(
    contestant: str, model: str, batch: int, device: str, runs: int = 0, needed: bool = False
) -> dict[str, Any]:
    """`measure` in a process of its own, see `run_module`."""
    options = ["--model", model, "--batch", str(batch), "--device", device, "--runs", str(runs)]
    return run_module("benchmarks.suites.memory", [contestant, *options], needed)


def run_module(module: str, args: list[str], needed: bool = False) -> dict[str, Any]:
    """The JSON that a module prints in its last line; if `needed`, its malloc returns freed memory at once.

    Raises:
        subprocess.CalledProcessError: it failed; its output is on stderr.
    """
    env = {**os.environ, **(GIVES_BACK if needed else {})}
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=env)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def peak_of(device: str) -> Iterator[list[float]]:
    """A list with one number, which after the block is its peak memory in bytes above the start."""
    peak = [0.0]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = _status("VmRSS")
    yield peak
    peak[0] = _status("VmHWM") - start


def cuda_peak_mb(call: Callable[..., Any], args: tuple[torch.Tensor, ...]) -> float | None:
    """Peak megabytes (10^6 bytes) of one call above what was allocated before; None on a CPU."""
    if not args[0].is_cuda:
        return None
    with torch.inference_mode(), peak_of("cuda") as peak:
        result = call(*args)  # noqa: F841  keep until the peak is read
    return peak[0] / 1e6


def _prepare(contestant: str, model: str, batch: int, device: str) -> tuple[rollouts.Rollout, torch.Tensor]:
    images = models.images(model, device, batch)
    return rollouts.CONTESTANTS[contestant](models.build(model).to(device)), images


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def main(argv: list[str] | None = None) -> int:
    """Print the result as one line of JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("contestant", choices=list(rollouts.CONTESTANTS))
    parser.add_argument("--model", choices=list(models.SPECS), default="vit_small_patch8_480")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=0, help="number of further runs to time; 0: memory only")
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.contestant, options.model, options.batch, options.device, options.runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
