"""The usable cores and memory of this machine, and the memory limit of decoders."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from attnx.limits import PICTURE_PIXELS

__all__ = [
    "BYTES_PER_PIXEL",
    "decoder_bytes",
    "default_max_pixels",
    "default_workers",
    "limit_memory",
    "usable_cores",
    "usable_memory",
]

# Most formats take 8 during decoding, WebP 16, JPEG 2000 20. JPEG 2000 with alpha takes 25, may fail near max_pixels.
BYTES_PER_PIXEL = 20

_SLACK = 2**29  # bytes for libraries that are imported with the first picture, rows of a table, and malloc
_SLACK_OF_PROCESSORS = 2**32  # bytes; transformers and torch are imported as well
_STACKS = 2**24  # bytes per core; AVIF decoders start threads
_FEWEST_PIXELS = 2**24  # lower bound of the default
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def limit_memory(max_pixels: int, processor: bool) -> None:
    """Limit the memory of this process to what one more picture needs; beyond it, MemoryError is raised. Linux only.

    processor: True if an image processor of Hugging Face is used.
    """
    if sys.platform != "linux":
        return
    import resource

    slack = _SLACK_OF_PROCESSORS if processor else _SLACK
    more = decoder_bytes(max_pixels) + slack + _STACKS * usable_cores()
    # Relative to the current size for each picture, so that leaks of libraries don't add up.
    has = int((_PROC / "self" / "statm").read_text().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = has + more if hard == resource.RLIM_INFINITY else min(has + more, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def decoder_bytes(max_pixels: int) -> int:
    """The largest number of bytes that a decoder needs for one picture."""
    return BYTES_PER_PIXEL * max_pixels


def default_max_pixels(decoders: int) -> int:
    """The default `max_pixels`: so many decoders take at most half of the memory. At least 2**24."""
    share = usable_memory() // 2 // max(1, decoders) // BYTES_PER_PIXEL
    return max(_FEWEST_PIXELS, min(PICTURE_PIXELS, share // 10**6 * 10**6))


def usable_memory() -> int:
    """The bytes that this process may use. Containers and job schedulers may set limits below the machine's memory."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [2**33]
    with contextlib.suppress(OSError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            folder, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
            # The limits of parent groups apply as well; a container may see its own group as the root.
            inner = Path(group.strip("/"))
            for path in (inner, *inner.parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / path / name).read_text()))
    return min(limits)


def default_workers() -> int:
    """The default number of decoder processes: the usable cores, at most 16."""
    return min(16, usable_cores())


def usable_cores() -> int:
    """The number of cores that this process may use. Containers and job schedulers may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
