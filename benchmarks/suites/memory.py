"""The memory that one contestant needs above its loaded model, in a process of its own.

    python -m benchmarks.suites.memory attnx --model vit_small_patch8_480
    python -m benchmarks.suites.memory attnx --model vit_base_patch16_224 --batch 8 --needed
    python -m benchmarks.suites.memory --claim

On a CPU it is the resident set: the kernel's own high-water mark of the process, set back to the present when the model
is loaded (Linux: 5 into /proc/self/clear_refs, then VmHWM), so that neither a peak between two samples is missed nor
one of loading is counted. Where the kernel has no such file, a thread reads the resident set every 2 ms. Before, the
contestant has run on a tiny model, so that libraries, threads and caches are there, and malloc has given back what it
held. malloc is left as users have it: freed memory that it keeps during the run counts, as it does for them. How much
that is depends on where it happens to lay things, and may be half as much again in the next process. What is needed,
the same in every process, is measured where malloc gives back at once what is freed: blocks from 128 KB on, and
only with glibc.
On CUDA it is torch's allocator: the largest amount allocated during the run, less what was before.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.peers import networks as models
from benchmarks.peers import rollouts

CLAIM_MODEL = "vit_small_patch8_480"
# glibc raises this threshold to the size of whatever is freed; one that is set stays.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)} if platform.libc_ver()[0] == "glibc" else {}


def measure(contestant: str, model: str, batch: int, device: str, runs: int) -> dict[str, Any]:
    """peak_mb (10^6 bytes) of the first run on the loaded model, and the median seconds of `runs` more."""
    _run(contestant, "hf_tiny" if contestant == "output_attentions" else "tiny", 2, device)
    call, images = _prepare(contestant, model, batch, device)
    watch, how = (allocator, "allocator") if device == "cuda" else resident_watch()
    with torch.inference_mode(), watch() as peak:
        rollout = call(images)
    tokens = 0 if rollout is None else rollout.shape[1] + 1
    del rollout
    seconds = [_seconds(call, images) for _ in range(runs)]
    return dict(
        contestant=contestant,
        model=model,
        batch=len(images),
        tokens=tokens,
        device=device,
        peak_mb=round(peak[0] / 1e6, 1),
        how=how,
        seconds=median(seconds) if seconds else None,
    )


def in_own_process(
    contestant: str, model: str, batch: int, device: str, runs: int = 0, needed: bool = False
) -> dict[str, Any]:
    """`measure` by a fresh Python; `needed`: malloc gives back at once what is freed, see above.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.suites.memory", contestant, "--model", model]
    command += ["--batch", str(batch), "--device", device, "--runs", str(runs)]
    root, env = Path(__file__).resolve().parents[2], {**os.environ, **(GIVES_BACK if needed else {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def claim(device: str, runs: int = 3) -> bool:
    """Whether the rollout of all twelve layers of a ViT-S/8 at 480 pixels needs, above the loaded model, at most the
    plain forward's memory and its twelve fp32 maps and 5 %, and no more than the forward's time."""
    results = {name: in_own_process(name, CLAIM_MODEL, 1, device, runs) for name in ("plain", "extractor", "hooks")}
    plain, ours, eager = results.values()
    maps = 12 * ours["tokens"] ** 2 * 4 / 1e6
    limit = 1.05 * (plain["peak_mb"] + maps)
    slower = {name: result["seconds"] / plain["seconds"] for name, result in results.items()}
    print(f"plain forward      {plain['peak_mb']:8.0f} MB  {plain['seconds']:6.2f} s")
    print(f"extractor          {ours['peak_mb']:8.0f} MB  {slower['extractor']:6.2f} x   (maps alone {maps:.0f} MB)")
    print(f"hooks on eager     {eager['peak_mb']:8.0f} MB  {slower['hooks']:6.2f} x")
    print(f"at most            {limit:8.0f} MB  {1.0:6.2f} x")
    return ours["peak_mb"] <= limit and slower["extractor"] <= 1.0


def _prepare(contestant: str, model: str, batch: int, device: str) -> tuple[rollouts.Rollout, torch.Tensor]:
    images = models.images(model, device, batch)
    return rollouts.CONTESTANTS[contestant](models.build(model).to(device)), images


def _run(contestant: str, model: str, batch: int, device: str) -> None:
    call, images = _prepare(contestant, model, batch, device)
    with torch.inference_mode():
        call(images)


def _seconds(call: rollouts.Rollout, images: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        call(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


Watch = Callable[[], Any]


@contextmanager
def allocator() -> Iterator[list[float]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, peak = torch.cuda.memory_allocated(), [0.0]
    yield peak
    torch.cuda.synchronize()
    peak[0] = torch.cuda.max_memory_allocated() - before


def resident_watch() -> tuple[Watch, str]:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return (_high_water, "high-water mark") if _set_back() else (_sampled, "sampled")


def _set_back() -> bool:
    """Sets the high-water mark back to the present resident set, if the kernel does that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") <= _status("VmRSS") + (8 << 20)
    return False


@contextmanager
def _high_water() -> Iterator[list[float]]:
    peak = [0.0]
    _set_back()
    before = _status("VmRSS")
    yield peak
    peak[0] = _status("VmHWM") - before


@contextmanager
def _sampled() -> Iterator[list[float]]:
    before, peak, done = _resident(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident() - before)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str] | None = None) -> int:
    """Prints one line of JSON; with --claim a table, and exits with 1 if the claim doesn't hold."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("contestant", nargs="?", choices=list(rollouts.CONTESTANTS))
    parser.add_argument("--model", choices=list(models.SPECS), default=CLAIM_MODEL)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=0, help="more runs, to time; 0: memory only")
    parser.add_argument("--needed", action="store_true", help="malloc gives back at once what is freed")
    parser.add_argument("--claim", action="store_true", help="hold attnx to what it promises at 3601 tokens")
    options = parser.parse_args(argv)
    if options.needed and (options.claim or options.device != "cpu" or not GIVES_BACK):
        parser.error("--needed: expected one contestant, on a CPU, with glibc")
    if options.claim:
        return 0 if claim(options.device, options.runs or 3) else 1
    if options.contestant is None:
        parser.error("a contestant or --claim")
    if options.contestant not in models.SPECS[options.model].contestants:
        known = ", ".join(models.SPECS[options.model].contestants)
        parser.error(f"{options.model} is run by {known}; not by {options.contestant}")
    call = (options.contestant, options.model, options.batch, options.device, options.runs)
    print(json.dumps(in_own_process(*call, needed=True) if options.needed else measure(*call)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
